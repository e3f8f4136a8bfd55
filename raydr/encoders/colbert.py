"""A ColBERT checkpoint: read in the layouts of the hub, written in ColBERT's own.

Notable: three layouts are read, all from safetensors and without code of their own: ColBERT's (`linear.weight` beside
the transformer; normalised), matchmaker's (`compressor.*` beside `bert_model.*`; not normalised), and a plain encoder,
whose linear layer is then new: the identity where it keeps the dimension, because the tokens of a sentence encoder rank
well as they are.

    network = load_colbert("runs/tas/colbert/model")
    ColBertReranker(ColBertReranker.Config(model="runs/tas/colbert/model")).score([(query, passage)])
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from raydr.encoders.checkpoint import load_transformer, open_checkpoint, weight_names, without_missing_pooler
from raydr.encoders.text import TextEncoder, TextEncoderConfig, available_cpus
from raydr.encoders.token_batches import collate, plan
from raydr.errors import ConfigError
from raydr.models.colbert import ColBert
from raydr.types import Hit, Passage, Query

_WEIGHTS = "model.safetensors"
_SETTINGS = "colbert.json"
"""Written by `save_colbert`: what the weights do not say."""
_PROJECTIONS = ("linear", "compressor")
_BATCH_TOKENS = {"cpu": 1024, "cuda": 32768}


def load_colbert(model: str, *, dimensions: int | None = None, normalize: bool | None = None) -> ColBert:
    """The ColBERT in a folder or of a hub name, in float32.

    `dimensions` is that of the linear layer where the checkpoint has none (None: the transformer's own); `normalize`
    whether token embeddings have length 1 (None: as the checkpoint has it, and no where it does not say). Raises
    `ConfigError` where the weights cannot be read, or have another dimension than the one asked for.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel

    checkpoint = open_checkpoint(model)
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
        transformer, found = load_transformer(
            AutoModel,
            checkpoint.path,
            warnings=False,  # of the linear layer's weights, which are read below
            config=config,
            key_mapping={r"^bert_model\.": ""},
            output_loading_info=True,
            **without_missing_pooler(checkpoint.path, config),
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"{checkpoint.path}: transformers cannot load this model: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(f"{checkpoint.path}: lacks {len(missing)} weights of its network, such as {missing[0]}")
    names = weight_names(checkpoint.path)
    projection = next((name for name in _PROJECTIONS if f"{name}.weight" in names), None)
    if projection is None:
        size = checkpoint.hidden_size
        network = ColBert(transformer, hidden_size=size, dimensions=dimensions or size, normalize=bool(normalize))
        if network.linear.weight.shape == (size, size):
            torch.nn.init.eye_(network.linear.weight)
        return network
    weights = load_file(checkpoint.path / names[f"{projection}.weight"])
    linear = {name.rpartition(".")[2]: w for name, w in weights.items() if name.startswith(f"{projection}.")}
    if dimensions not in (None, len(linear["weight"])):
        raise ConfigError(
            f"dimensions: {checkpoint.path} has token embeddings of {len(linear['weight'])} dimensions, not "
            f"{dimensions}; leave the setting out"
        )
    network = ColBert(
        transformer,
        hidden_size=checkpoint.hidden_size,
        dimensions=len(linear["weight"]),
        bias="bias" in linear,
        normalize=_is_normalized(checkpoint.path, projection) if normalize is None else normalize,
    )
    network.linear.load_state_dict(linear)
    return network


class ColBertReranker:
    """A `Reranker` by late interaction; equal scores keep the order they came in."""

    class Config(TextEncoderConfig):
        """Which checkpoint, its lengths and prompts, where it runs and how precisely; `pooling` means nothing here."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._texts = TextEncoder(config.model_copy(update={"dimensions": None}))

    def rerank(self, query: Query, hits: Sequence[Hit], passages: Mapping[str, Passage]) -> list[Hit]:
        scores = self.score([(query, passages[hit.passage_id]) for hit in hits])
        order = np.argsort(-scores, kind="stable")
        return [Hit(hits[place].passage_id, float(scores[place])) for place in order]

    def score(self, pairs: Sequence[tuple[Query, Passage]]) -> Float32[np.ndarray, " pair"]:
        """One score per pair, in order; a text that is in several pairs is embedded once."""
        queries = {query.text: query for query, _ in pairs}
        passages = {(passage.title, passage.text): passage for _, passage in pairs}
        of_query = self._embed(queries, self._texts.tokenize_queries(list(queries.values())))
        of_passage = self._embed(passages, self._texts.tokenize_passages(list(passages.values())))
        scores = [
            float((of_query[query.text] @ of_passage[passage.title, passage.text].T).amax(dim=1).sum())
            for query, passage in pairs
        ]
        return np.array(scores, dtype=np.float32)

    def _embed(self, names: Iterable[Any], token_ids: Sequence[Sequence[int]]) -> dict[Any, Tensor]:
        """The token embeddings of each text, without padding, on the CPU."""
        found: list[Tensor] = [torch.empty(0)] * len(token_ids)
        lengths = np.array([len(ids) for ids in token_ids], dtype=np.int64)
        kind = "cuda" if self._texts.device.startswith("cuda") else "cpu"
        with torch.inference_mode():
            for rows in plan(lengths, self.config.batch_tokens or _BATCH_TOKENS[kind]):
                batch = collate([token_ids[row] for row in rows], self._texts.pad_id)
                ids, mask = (None if part is None else torch.from_numpy(part).to(self._texts.device) for part in batch)
                for row, tokens in zip(rows, self._network(ids, mask).float().cpu(), strict=True):
                    found[row] = tokens[: lengths[row]]
        return dict(zip(names, found, strict=True))

    @cached_property
    def _network(self) -> ColBert:
        device = self._texts.device
        if device == "cpu":
            torch.set_num_threads(self.config.num_threads or available_cpus())
        network = load_colbert(self.config.model, dimensions=self.config.dimensions, normalize=self.config.normalize)
        return network.eval().to(device, dtype=getattr(torch, self._texts.precision))


def save_colbert(network: ColBert, source: str, folder: Path) -> None:
    """Weights (safetensors), configuration and tokenizer; `load_colbert` opens the folder."""
    from safetensors.torch import load_file, save_file

    from raydr.encoders.export import save_transformer

    save_transformer(network.transformer, open_checkpoint(source).path, folder)
    weights = load_file(folder / _WEIGHTS)
    prefix = getattr(network.transformer, "base_model_prefix", "")
    named = {f"{prefix}.{name}" if prefix else name: weight for name, weight in weights.items()}
    named |= {f"linear.{name}": weight.contiguous() for name, weight in network.linear.state_dict().items()}
    save_file(named, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _SETTINGS).write_text(json.dumps({"normalize": network.normalize}), encoding="utf-8")


def _is_normalized(folder: Path, projection: str) -> bool:
    file = folder / _SETTINGS
    return bool(json.loads(file.read_text(encoding="utf-8"))["normalize"]) if file.is_file() else projection == "linear"
