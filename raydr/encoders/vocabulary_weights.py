"""A VDR checkpoint: read, written, and made of the released ones.

| in the folder | what |
| --- | --- |
| config.json, model.safetensors, tokenizer | the passages' transformer, and the queries' where they share it |
| norm.safetensors | the layer norm behind it |
| vocabulary.json | what the weights do not say: shift, number of towers, normalisation, whether padding is pooled |
| queries/ | config.json, model.safetensors, norm.safetensors of the queries' tower, where it is another one |

Notable: a folder without vocabulary.json is a plain encoder, whose layer norm is then new; safetensors only.

    network = load_towers("runs/vdr/train/model", towers="auto")
    convert_vsearch(Path("vdr-nq"), base="bert-base-uncased", out=Path("vdr-nq-raydr"))
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import Field

from raydr.config import Config, validate
from raydr.encoders.checkpoint import fingerprint, load_transformer, locate, weight_names
from raydr.encoders.precision import Precision
from raydr.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from raydr.models.vocabulary import VocabularyTower

TowerCount: TypeAlias = Literal["auto", "one", "two"]

SETTINGS = "vocabulary.json"
_NORM = "norm.safetensors"
_QUERIES = "queries"
_BERT_WORDS, _BERT_SHIFT = 30522, 999
"""The vocabulary of BERT (uncased), and how many of its first ids are no words: padding, special and unused ones."""


class VocabularySettings(Config):
    """`vocabulary.json`."""

    shift: int = Field(ge=0)
    """Token ids below it have no dimension."""
    towers: Literal["one", "two"]
    """Whether queries and passages share the network."""
    normalize: bool = False
    """Whether embeddings have length 1."""
    pools_padding: bool = False
    """Whether padding took part in the maximum while it was trained."""


def read_settings(path: Path) -> VocabularySettings | None:
    """What the folder says; None of a plain encoder."""
    file = path / SETTINGS
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from error
    return validate(VocabularySettings, content, where=str(file))


def settings_of(path: Path, towers: TowerCount) -> VocabularySettings:
    """The same, with what a plain encoder is given: two towers unless asked otherwise, and BERT's shift for BERT's
    vocabulary. Raises `ConfigError` for one tower where the checkpoint has two.
    """
    found = read_settings(path)
    if found is None:
        shift = default_shift(vocabulary_size(path))
        return VocabularySettings(shift=shift, towers="two" if towers == "auto" else towers)
    if towers == "one" and found.towers == "two":
        raise ConfigError(f"towers: {path} has one for queries and one for passages; leave the setting out")
    return found if towers == "auto" else found.model_copy(update={"towers": towers})


def default_shift(num_words: int) -> int:
    """Ids without a dimension, for a checkpoint that does not say it."""
    return _BERT_SHIFT if num_words == _BERT_WORDS else 0


def vocabulary_size(path: Path) -> int:
    """Word embeddings of the checkpoint in a folder, by its config.json."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    size = config.get("vocab_size")
    if not isinstance(size, int):
        raise ConfigError(f"{path}: config.json gives no vocab_size; VDR's embeddings are over a vocabulary")
    return size


def weights_fingerprint(path: Path) -> str:
    """SHA-256 (hex) over all that decides the outputs of a VDR checkpoint."""
    own = fingerprint(path, [SETTINGS])
    return f"{own} {fingerprint(path / _QUERIES)}" if (path / _QUERIES).is_dir() else own


def load_towers(
    model: str,
    *,
    towers: TowerCount = "auto",
    shift: int | None = None,
    normalize: bool | None = None,
    pools_padding: bool | None = None,
    precision: Precision = "float32",
) -> nn.Module:
    """A `VocabularyTower`, or `Towers` of two; what is None is as the checkpoint has it.

    Raises `ConfigError` where the weights cannot be read.
    """
    from raydr.models.towers import Towers

    path = locate(model)
    settings = settings_of(path, towers)
    how = {
        "shift": settings.shift if shift is None else shift,
        "normalize": settings.normalize if normalize is None else normalize,
        "pools_padding": settings.pools_padding if pools_padding is None else pools_padding,
    }
    passages = _load_tower(path, precision, **how)
    if settings.towers == "one":
        return passages
    own = path / _QUERIES
    queries = _load_tower(own, precision, **how) if own.is_dir() else copy.deepcopy(passages)
    return Towers(queries=queries, passages=passages)


def _load_tower(path: Path, precision: Precision, **how: Any) -> VocabularyTower:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel

    from raydr.models.vocabulary import VocabularyTower

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        has_option = config.model_type in {"bert", "roberta", "xlm-roberta", "camembert"}
        transformer, found = load_transformer(
            AutoModel,
            path,
            warnings=False,  # of a pooler's weights, which nothing here uses
            config=config,
            dtype=getattr(torch, precision),
            output_loading_info=True,
            **({"add_pooling_layer": False} if has_option else {}),
        )
        if missing := sorted(found["missing_keys"]):
            raise ConfigError(f"{path}: lacks {len(missing)} weights of its network, such as {missing[0]}")
        tower = VocabularyTower(transformer, **how)
        if (path / _NORM).is_file():
            tower.norm.load_state_dict(load_file(path / _NORM))
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ConfigError(f"{path}: cannot load this model: {error}") from error
    return tower.eval()


def save_towers(network: nn.Module, source: str, folder: Path) -> None:
    """Writes what `load_towers` opens again, with the tokenizer of the checkpoint `source` it started from."""
    from raydr.encoders.export import save_transformer
    from raydr.models.towers import towers_of

    queries, passages = (towers := towers_of(network))[0], towers[-1]
    first: Any = passages
    save_transformer(first.transformer, locate(source), folder)
    _save_norm(first, folder)
    if len(towers) == 2:
        second: Any = queries
        second.transformer.save_pretrained(folder / _QUERIES, safe_serialization=True)
        _save_norm(second, folder / _QUERIES)
    settings = VocabularySettings(
        shift=first.shift,
        towers="two" if len(towers) == 2 else "one",
        normalize=first.normalize,
        pools_padding=first.pools_padding,
    )
    (folder / SETTINGS).write_text(settings.model_dump_json(indent=2), encoding="utf-8")


def _save_norm(tower: VocabularyTower, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: weight.contiguous() for name, weight in tower.norm.state_dict().items()}, folder / _NORM)


def convert_vsearch(source: Path, *, base: str, out: Path) -> Path:
    """Makes a folder that `load_towers` opens of a released checkpoint (`vsearch/vdr-nq`, `svdr-msmarco`, ...).

    Theirs hold both encoders in one file, by the names `encoder_q.bert_model.*`, `encoder_q.ln.*` and `encoder_p.*`,
    and have no tokenizer: `base` is the checkpoint they started from (bert-base-uncased), whose configuration and
    tokenizer are used. They were trained with padding in the maximum, which is noted. Raises `ConfigError` naming what
    is missing; cross-modal ones have a vocabulary of their own, and are refused.
    """
    from safetensors.torch import load_file, save_file

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    kinds = {side: config.get(side, {}).get("type") for side in ("encoder_q", "encoder_p")}
    if set(kinds.values()) != {"vdr"}:
        raise ConfigError(f"{source}: its encoders are {kinds}; only those of texts alone (vdr, vdr) can be converted")
    weights: dict[str, Tensor] = {}
    for file in sorted(set(weight_names(source).values())):
        weights |= load_file(source / file)
    sides = {side: {n.removeprefix(f"{side}."): w for n, w in weights.items() if n.startswith(f"{side}.")}
             for side in kinds}  # fmt: skip
    is_shared = bool(config.get("shared_encoder")) or not all(sides.values())
    passages = sides["encoder_p"] or sides["encoder_q"]
    root = locate(base)
    out.mkdir(parents=True)
    for file in root.iterdir():  # configuration and tokenizer
        if file.is_file() and file.suffix in {".json", ".txt", ".model"} and "safetensors" not in file.name:
            shutil.copy(file, out / file.name)
    for name, tower in [("", passages)] if is_shared else [("", passages), (_QUERIES, sides["encoder_q"])]:
        folder = out / name
        folder.mkdir(exist_ok=True)
        shutil.copy(root / "config.json", folder / "config.json") if name else None
        parts = {prefix: {n.removeprefix(prefix): w.contiguous() for n, w in tower.items() if n.startswith(prefix)}
                 for prefix in ("bert_model.", "ln.")}  # fmt: skip
        if missing := [prefix for prefix, own in parts.items() if not own]:
            raise ConfigError(f"{source}: has no weights called {missing[0]}*; it is no VDR checkpoint")
        save_file(parts["bert_model."], folder / "model.safetensors", metadata={"format": "pt"})
        save_file(parts["ln."], folder / _NORM)
    shift = config["encoder_p"].get("shift_vocab_num", _BERT_SHIFT)
    settings = VocabularySettings(
        shift=shift,
        towers="one" if is_shared else "two",
        normalize=bool(config["encoder_p"].get("norm", False)),
        pools_padding=True,
    )
    (out / SETTINGS).write_text(settings.model_dump_json(indent=2), encoding="utf-8")
    return out
