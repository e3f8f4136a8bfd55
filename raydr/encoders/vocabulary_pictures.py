"""Encodes texts and pictures as sparse weights over one vocabulary: the encoder of cross-modal VDR.

Notable: the folder is a dual encoder as transformers writes it (`VisionTextDualEncoderModel`, CLIP, SigLIP), read as
those are, pictures and all; what VDR adds stands beside it, in `pictures.safetensors` (both layer norms, the pictures'
table of words) and `vocabulary.json`. Without them it is a start, whose additions are new.

    encoder = PictureVocabularyEncoder(PictureVocabularyConfig(model="runs/vdr_pictures/train/model"))
    encoder.encode_passages([Passage("d1", "", image=png)])                   # scipy.sparse.csr_array, (1, dim)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Int, Int64
from pydantic import Field
from scipy.sparse import csr_array

from raydr.encoders.checkpoint import fingerprint
from raydr.encoders.device import OneStream, choose_device
from raydr.encoders.multimodal import MultimodalCheckpoint, MultimodalEncoderConfig, MultimodalReader, Read
from raydr.encoders.precision import Precision, choose_precision
from raydr.encoders.text import available_cpus
from raydr.encoders.token_batches import EncoderStats, RowBatcher
from raydr.encoders.vocabulary import SparseConfig, in_order, sparsified, special_tokens, word_pieces
from raydr.encoders.vocabulary_weights import SETTINGS, VocabularySettings, default_shift, read_settings
from raydr.errors import ConfigError
from raydr.types import Modality, Passage, Query, WeightType

if TYPE_CHECKING:
    from torch import nn

    from raydr.models.vocabulary_pictures import VocabularyFusion

ADDED = "pictures.safetensors"
_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}


class PictureVocabularyConfig(MultimodalEncoderConfig, SparseConfig):
    """Which dual encoder, what is kept of its vectors, and how it runs here. `pooling` and what belongs to language
    models is not used: VDR takes the maximum over positions and patches.
    """

    query_template: str = "{instruction} "
    """What stands before a query that has an instruction."""
    shift: int | None = Field(default=None, ge=0)
    """Token ids below it have no dimension; null: as the checkpoint has it, 999 for BERT's uncased vocabulary."""


class PictureVocabularyEncoder:
    """An `Encoder` of sparse embeddings of texts, pictures, and both; safe to call from several threads once built."""

    Config: ClassVar[type[PictureVocabularyConfig]] = PictureVocabularyConfig
    modalities: ClassVar[frozenset[Modality]] = frozenset({"text", "image", "image,text"})
    reads_instructions: ClassVar[bool] = True
    normalize: ClassVar[bool] = True

    def __init__(self, config: PictureVocabularyConfig) -> None:
        self.config = config
        self.checkpoint = MultimodalCheckpoint(config)
        if not self.checkpoint.is_dual:
            raise ConfigError(
                f"{self.checkpoint.path}: a {self.checkpoint.kind} model; VDR takes a dual encoder's towers"
            )
        words = (self.checkpoint.settings.get("text_config") or {}).get("vocab_size")
        if not isinstance(words, int):
            raise ConfigError(f"{self.checkpoint.path}: config.json gives no text_config.vocab_size")
        self.shift = shift_of(self.checkpoint.path, config.shift, words)
        self._dim: int = words - self.shift

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def weight_type(self) -> WeightType:
        """How passages' weights are stored without losing anything."""
        return self.config.weights

    @cached_property
    def version(self) -> str:
        """SHA-256 (hex) over what changes passages' embeddings and how queries' compare with them."""
        config, checkpoint = self.config, self.checkpoint
        settings = {
            "checkpoint": fingerprint(checkpoint.path, ("preprocessor_config.json", SETTINGS)),
            "image_size": checkpoint.preprocessing.size,
            "shift": self.shift,
            "instruction": [config.instruction, config.query_template],
            "max_tokens": [config.max_query_tokens, config.max_passage_tokens],
            "title_separator": config.title_separator,
            "kept": [config.passage_topk, config.own_tokens, config.weights],
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @property
    def stats(self) -> EncoderStats:
        """Texts, tokens (patches included) and padding since the encoder was built."""
        return self._batcher.stats

    @cached_property
    def reader(self) -> MultimodalReader:
        return MultimodalReader(self.checkpoint)

    def encode_queries(self, queries: Sequence[Query]) -> csr_array:
        return self._encode(self.reader.queries(queries), self.config.query_topk)

    def encode_passages(self, passages: Sequence[Passage]) -> csr_array:
        embeddings = self._encode(self.reader.passages(passages), self.config.passage_topk)
        if self.weight_type == "float16":
            embeddings.data = embeddings.data.astype(np.float16).astype(np.float32)
        return embeddings

    def tokens_of(self, dims: Sequence[int] | Int[np.ndarray, " dim"]) -> list[str]:
        """The word pieces that dimensions stand for."""
        return word_pieces(self.reader.tokenizer, dims, shift=self.shift)

    @cached_property
    def special_ids(self) -> list[int]:
        """Ids of the tokens that stand for no word."""
        return special_tokens(self.reader.tokenizer)

    def _encode(self, read: Sequence[Read], topk: int | None) -> csr_array:
        """The network's weights, sparsified batch by batch, so that they are never dense all together."""
        import torch

        own = {"own_tokens": self.config.own_tokens, "shift": self.shift, "special": self.special_ids}
        network, device = self._stream.network, torch.device(self._stream.device)
        parts: list[tuple[np.ndarray, csr_array]] = []

        def encode(rows: Int64[np.ndarray, " row"]) -> None:
            with torch.inference_mode():
                tokens = self.reader.texts([read[row] for row in rows]).padded(self.reader.pad_id).to(device)
                parts.append((rows, sparsified(network(*tokens.inputs), tokens.ids, tokens.mask, topk=topk, **own)))

        if not read:
            return csr_array((0, self.dim), dtype=np.float32)
        seen = self.checkpoint.visual_tokens
        lengths = np.array([len(r.ids) + (seen if r.pixels is not None else 0) for r in read], dtype=np.int64)
        self._batcher.run_each(lengths, encode)
        return in_order(parts)

    @cached_property
    def _batcher(self) -> RowBatcher:
        kind = "cuda" if self._stream.device.startswith("cuda") else "cpu"
        return RowBatcher(self._stream, dim=self.dim, batch_tokens=self.config.batch_tokens or _BATCH_TOKENS[kind])

    @cached_property
    def _stream(self) -> OneStream:
        device = choose_device(self.config.device)
        precision = choose_precision(self.config.precision, device)
        network = load_fusion(self.checkpoint, precision, shift=self.shift)
        return OneStream(network, device, self.config.num_threads or available_cpus())


def shift_of(path: Path, asked: int | None, words: int) -> int:
    """Ids without a dimension: as the config asks, else as the folder says, else as for the vocabulary's size."""
    if asked is not None:
        return asked
    found = read_settings(path)
    return default_shift(words) if found is None else found.shift


def load_fusion(checkpoint: MultimodalCheckpoint, precision: Precision, *, shift: int) -> VocabularyFusion:
    """The network of a dual encoder's towers. Raises `ConfigError` where the weights cannot be read, or do not fit."""
    from safetensors.torch import load_file

    from raydr.models.vocabulary import VocabularyTower
    from raydr.models.vocabulary_pictures import PictureTower, VocabularyFusion

    dual: Any = checkpoint.load(precision).transformer
    text = VocabularyTower(dual.text_model, shift=shift)
    vision = PictureTower(
        dual.vision_model, checkpoint.preprocessing, text.num_dims, num_patches=checkpoint.visual_tokens
    ).to(dual.dtype)
    network = VocabularyFusion(text, vision)
    file = checkpoint.path / ADDED
    if file.is_file():
        added = load_file(file)
        try:
            text.norm.load_state_dict(_named(added, "text_norm."))
            vision.norm.load_state_dict(_named(added, "image_norm."))
            vision.words.data.copy_(added["image_words"])
        except (KeyError, RuntimeError) as error:
            raise ConfigError(f"{file}: does not fit the model in the folder: {error}") from error
    return network.eval()


def save_fusion(network: nn.Module, checkpoint: MultimodalCheckpoint, folder: Path) -> None:
    """Writes what `load_fusion` opens again; `folder` exists and is empty."""
    from safetensors.torch import save_file

    from raydr.encoders.multimodal_weights import save
    from raydr.models.vocabulary_pictures import VocabularyFusion

    if not isinstance(network, VocabularyFusion):
        raise TypeError(f"a {type(network).__name__} has no table of words for pictures")
    dual = checkpoint.load("float32")  # with the projections, which VDR does not use
    dual.transformer.text_model.load_state_dict(network.text.transformer.state_dict())
    dual.transformer.vision_model.load_state_dict(network.vision.tower.state_dict())
    save(dual, checkpoint, folder)
    added = {f"text_norm.{name}": weight for name, weight in network.text.norm.state_dict().items()}
    added |= {f"image_norm.{name}": weight for name, weight in network.vision.norm.state_dict().items()}
    added["image_words"] = network.vision.words.data
    save_file({name: weight.float().cpu().contiguous() for name, weight in added.items()}, folder / ADDED)
    settings = VocabularySettings(shift=network.text.shift, towers="one", normalize=network.normalize)
    (folder / SETTINGS).write_text(settings.model_dump_json(indent=2), encoding="utf-8")


def _named(weights: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
