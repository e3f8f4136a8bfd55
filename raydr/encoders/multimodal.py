"""An encoder of texts, pictures, and both together: a multimodal language model, or a CLIP-style dual encoder.

Notable: which of the two a folder holds is in its config.json; both read queries as "Instruct: ...", "Query: ..." and
passages plainly, and leave the instruction's tokens out of the pooling. A picture takes a fixed number of placeholder
tokens, whatever its shape: it is brought to the checkpoint's square. Placeholders that stand in a text are dropped, so
that no text passes for a picture. What a folder cannot say in transformers' own files stands in `raydr.json`.

    encoder = MultimodalEncoder(MultimodalEncoderConfig(model="llava-hf/llava-v1.6-mistral-7b-hf", pooling="mean"))
    encoder.encode_queries([Query("q", "the same with dark skin", image=png, instruction="Find a picture.")])
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32
from pydantic import Field

from raydr.config import Config
from raydr.data.images import decode_rgb
from raydr.encoders.checkpoint import fingerprint, locate
from raydr.encoders.device import OneStream, choose_device
from raydr.encoders.precision import Precision, choose_precision
from raydr.encoders.text import available_cpus
from raydr.encoders.texts import Texts
from raydr.encoders.token_batches import EncoderStats, RowBatcher
from raydr.encoders.tokenization import BoundedTokenizer, load_tokenizer
from raydr.errors import ConfigError
from raydr.types import Modality, Passage, Query

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from raydr.models.multimodal import MultimodalPooling, Preprocessing

SETTINGS = "raydr.json"
LATENT = "latent_attention.safetensors"
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
_LLAVA, _QWEN = {"llava_next"}, {"qwen2_vl", "qwen2_5_vl"}
_DUAL = {"clip", "siglip", "vision-text-dual-encoder"}


class MultimodalEncoderConfig(Config):
    """Which checkpoint, how it reads, and how it runs here. Null takes what the folder says."""

    model: str
    """Folder or hub name of a LLaVA-NeXT, Qwen2-VL, Qwen2.5-VL, CLIP or SigLIP checkpoint, or of a pair of a text and a
    vision tower (`VisionTextDualEncoderModel`), in safetensors."""
    pooling: Literal["mean", "last", "latent", "own"] | None = None
    """Language models: `mean` (all tokens but the instruction's; the default), `last` (EOS), `latent` (NV-Embed's).
    Dual encoders: `own` (as the model does; the default), `mean`. Pictures are the vision tower's affair."""
    bidirectional: bool | None = None
    """Language models: whether tokens see those behind them; by default they do not."""
    image_size: int | None = Field(default=None, ge=8)
    """Side in pixels of the square that pictures are brought to, a multiple of the patches' side."""
    instruction: str = ""
    """For queries that bring none of their own."""
    query_template: str = "Instruct: {instruction}\nQuery: "
    """What stands before a query that has an instruction."""
    max_query_tokens: int = Field(default=128, ge=8)
    """Longest query in words' tokens, the instruction and special ones included; the picture's come beside them."""
    max_passage_tokens: int = Field(default=512, ge=8)
    """Longest passage likewise."""
    title_separator: str = " "
    """Stands between title and text of a passage that has a title."""
    latents: int = Field(default=512, ge=1)
    """`latent`, for a checkpoint that has no such head yet: rows of the table; its heads are as wide as the tokens."""
    latent_heads: int = Field(default=8, ge=1)
    """Likewise: heads."""
    precision: Literal["auto"] | Precision = "auto"
    """`auto`: bfloat16 where it is measured to be faster, float16 on older GPUs, float32 elsewhere."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; `auto`: a GPU if there is one."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per batch, visual ones and padding included; null: 2048 on a CPU, 32768 on a GPU. Halved when memory runs
    out."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads; null: OMP_NUM_THREADS, else all cores this process may use."""


class Read(NamedTuple):
    """A query or passage as the network reads it."""

    ids: list[int]
    first_pooled: int
    """Tokens at the start that make no part of the embedding."""
    pixels: bytes | None
    """Rows of RGB of the square."""


class MultimodalCheckpoint:
    """What a folder and a config together say of a model; reads no weights."""

    def __init__(self, config: MultimodalEncoderConfig) -> None:
        self.config = config
        self.path = locate(config.model)
        self.settings = _json(self.path / "config.json")
        own = _json(self.path / SETTINGS)
        self.kind = str(self.settings.get("model_type"))
        if self.kind not in _LLAVA | _QWEN | _DUAL:
            raise ConfigError(
                f"model {config.model!r}: a {self.kind} model; raydr reads pictures with "
                f"{', '.join(sorted(_LLAVA | _QWEN | _DUAL))}"
            )
        self.is_dual = self.kind in _DUAL
        allowed = ("own", "mean") if self.is_dual else ("mean", "last", "latent")
        self.pooling: MultimodalPooling | Literal["own"] = config.pooling or own.get("pooling") or allowed[0]
        if self.pooling not in allowed:
            raise ConfigError(f"pooling: {self.pooling!r} is not one of a {self.kind} model's: {', '.join(allowed)}")
        bidirectional = own.get("bidirectional", False) if config.bidirectional is None else config.bidirectional
        self.bidirectional = bool(bidirectional) and not self.is_dual
        self.latents = int(own.get("latents", config.latents))
        self.latent_heads = int(own.get("latent_heads", config.latent_heads))
        self.preprocessing = self._preprocessing(config.image_size or own.get("image_size"))

    def _preprocessing(self, size: int | None) -> Preprocessing:
        from raydr.models.multimodal import Preprocessing

        vision = self.settings.get("vision_config") or {}
        own = _json(self.path / "preprocessor_config.json")
        side = int(size or vision.get("image_size") or 448)
        block = int(vision.get("patch_size", 1)) * int(vision.get("spatial_merge_size", 1))
        if side % block:
            raise ConfigError(f"image_size: {side} is no multiple of {block}, the side of a patch of {self.path}")
        return Preprocessing(side, _three(own.get("image_mean", _CLIP_MEAN)), _three(own.get("image_std", _CLIP_STD)))

    @property
    def dim(self) -> int:
        if self.is_dual:
            return int(
                self.settings["projection_dim"]
                if "projection_dim" in self.settings
                else self.settings["text_config"]["hidden_size"]
            )
        text = self.settings.get("text_config") or self.settings
        return int(text["hidden_size"])

    @property
    def image_token_id(self) -> int | None:
        """The placeholder of a visual token; None for dual encoders, which need none."""
        found = self.settings.get("image_token_id", self.settings.get("image_token_index"))
        return None if self.is_dual or found is None else int(found)

    @property
    def visual_tokens(self) -> int:
        """Tokens that a picture takes: placeholders, or what the dual encoder's vision tower reads."""
        vision = self.settings.get("vision_config") or {}
        side = self.preprocessing.size // int(vision.get("patch_size", 14)) // int(vision.get("spatial_merge_size", 1))
        keeps_cls = self.kind in _LLAVA and self.settings.get("vision_feature_select_strategy", "default") != "default"
        return side**2 + keeps_cls

    @property
    def around(self) -> tuple[list[int], list[int]]:
        """What stands before and behind the placeholders."""
        if self.kind in _QWEN:
            return [int(self.settings["vision_start_token_id"])], [int(self.settings["vision_end_token_id"])]
        return [], []

    def load(self, precision: Precision) -> Any:
        """The network, with the checkpoint's weights, from safetensors and without code of its own."""
        from raydr.encoders.multimodal_weights import load

        return load(self, precision)

    def described(self) -> dict[str, Any]:
        """What `raydr.json` says."""
        own: dict[str, Any] = {"pooling": self.pooling, "bidirectional": self.bidirectional}
        if self.pooling == "latent":
            own |= {"latents": self.latents, "latent_heads": self.latent_heads}
        return {**own, "image_size": self.preprocessing.size}


class MultimodalReader:
    """Queries and passages to token ids and pixels; safe to call from several threads."""

    def __init__(self, checkpoint: MultimodalCheckpoint) -> None:
        self._of, config = checkpoint, checkpoint.config
        self.tokenizer, self.pad_id = load_tokenizer(checkpoint.path)
        plain = _without_special(self.tokenizer)
        special = self.tokenizer.encode("").ids
        ends = _end_of_text(checkpoint.path)
        self._first = special[:1] if special and special[0] not in ends else []
        last = next(iter(ends), None)
        self._last = [last] if last is not None and not checkpoint.is_dual else [i for i in special if i in ends][:1]
        room = len(self._first) + len(self._last)
        self._by_side = {
            "query": BoundedTokenizer(plain, config.max_query_tokens - room),
            "passage": BoundedTokenizer(plain, config.max_passage_tokens - room),
        }
        self._dropped = {checkpoint.image_token_id, *(checkpoint.around[0]), *(checkpoint.around[1])}

    def queries(self, queries: Sequence[Query], *, looks: bool = True) -> list[Read]:
        """`looks`: whether pictures are decoded; without, there are no pixels."""
        config = self._of.config
        instructions = [query.instruction or config.instruction for query in queries]
        prefixes = [config.query_template.format(instruction=text) if text else "" for text in instructions]
        return self._read("query", prefixes, [q.text for q in queries], [q.image for q in queries], looks)

    def passages(self, passages: Sequence[Passage], *, looks: bool = True) -> list[Read]:
        """`looks`: as of queries."""
        texts = [passage.joined(self._of.config.title_separator) for passage in passages]
        return self._read("passage", [""] * len(texts), texts, [p.image for p in passages], looks)

    def count(self, contents: Sequence[Any], side: Literal["query", "passage"]) -> int:
        """Tokens that the network reads of queries or passages, visual ones included."""
        read = (self.queries if side == "query" else self.passages)(contents, looks=False)
        seen = self._of.visual_tokens if self._of.is_dual else 0
        return sum(len(one.ids) for one in read) + seen * sum(one.image is not None for one in contents)

    def texts(self, read: Sequence[Read]) -> Texts:
        """As training reads them."""
        return Texts([r.ids for r in read], [r.first_pooled for r in read], [r.pixels for r in read])

    def _read(
        self, side: str, prefixes: Sequence[str], texts: Sequence[str], images: Sequence[bytes | None], looks: bool
    ) -> list[Read]:
        images_in = [None] * len(images) if self._of.is_dual else list(images)
        before = self._encode(side, prefixes)
        # Without a picture between them, prefix and text are one string, as a tokenizer expects it.
        joined = [
            f"{prefix}{text}" if image is None else (f"\n{text}" if text else "")
            for prefix, text, image in zip(prefixes, texts, images_in, strict=True)
        ]
        behind = self._encode(side, joined)
        limit = self._by_side[side].max_tokens
        found = []
        for start, rest, text, image, shown in zip(before, behind, texts, images, images_in, strict=True):
            ids = rest if shown is None else [*start, *self._placeholders, *rest[: max(0, limit - len(start))]]
            ids = [*self._first, *ids, *self._last]
            pixels = None if image is None or not looks else square(image, self._of.preprocessing.size)
            found.append(Read(ids, self._first_pooled(ids, start, text, image), pixels))
        return found

    def _first_pooled(self, ids: list[int], start: list[int], text: str, image: bytes | None) -> int:
        if self._of.is_dual:  # the instruction is part of the text; of a picture alone, no token says anything
            return len(ids) if image is not None and not text and not start else 0
        # The token that begins every text counts with the instruction, if there is one. One that is left always counts.
        return min(len(self._first) + len(start), len(ids) - 1) if start else 0

    @cached_property
    def _placeholders(self) -> list[int]:
        before, behind = self._of.around
        image = self._of.image_token_id
        return [*before, *([image] * self._of.visual_tokens if image is not None else []), *behind]

    def _encode(self, side: str, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._by_side[side].encode(texts)
        return [[token for token in ids if token not in self._dropped] for ids in encoded]


class MultimodalEncoder:
    """An `Encoder` of one checkpoint; safe to call from several threads once built."""

    Config: ClassVar[type[MultimodalEncoderConfig]] = MultimodalEncoderConfig
    modalities: ClassVar[frozenset[Modality]] = frozenset({"text", "image", "image,text"})
    """What it reads."""
    reads_instructions: ClassVar[bool] = True

    def __init__(self, config: MultimodalEncoderConfig) -> None:
        self.config = config
        self.checkpoint = MultimodalCheckpoint(config)

    @property
    def dim(self) -> int:
        return self.checkpoint.dim

    @cached_property
    def version(self) -> str:
        """SHA-256 (hex) over weights, tokenizer and every setting that changes the vectors, whatever the device."""
        config, checkpoint = self.config, self.checkpoint
        settings = {
            "checkpoint": fingerprint(checkpoint.path, ("preprocessor_config.json",)),
            **checkpoint.described(),
            "instruction": [config.instruction, config.query_template],
            "max_tokens": [config.max_query_tokens, config.max_passage_tokens],
            "title_separator": config.title_separator,
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @property
    def stats(self) -> EncoderStats:
        """Texts, tokens (visual ones included) and padding since the encoder was built."""
        return self._batcher.stats

    @cached_property
    def reader(self) -> MultimodalReader:
        return MultimodalReader(self.checkpoint)

    def encode_queries(self, queries: Sequence[Query]) -> Float32[np.ndarray, "row dim"]:
        return self._encode(self.reader.queries(queries))

    def encode_passages(self, passages: Sequence[Passage]) -> Float32[np.ndarray, "row dim"]:
        return self._encode(self.reader.passages(passages))

    def _encode(self, read: list[Read]) -> Float32[np.ndarray, "row dim"]:
        if not read:
            return np.zeros((0, self.dim), dtype=np.float32)
        seen = self.checkpoint.visual_tokens if self.checkpoint.is_dual else 0
        lengths = np.array([len(r.ids) + (seen if r.pixels is not None else 0) for r in read], dtype=np.int64)
        return self._batcher.run_rows(lengths, lambda rows: self._backend.embed([read[row] for row in rows]))

    @cached_property
    def _batcher(self) -> RowBatcher:
        backend = self._backend
        budget = self.config.batch_tokens or _BATCH_TOKENS["cuda" if backend.device.startswith("cuda") else "cpu"]
        return RowBatcher(backend, dim=self.dim, batch_tokens=budget)

    @cached_property
    def _backend(self) -> _Torch:
        device = choose_device(self.config.device)
        network = self.checkpoint.load(choose_precision(self.config.precision, device))
        return _Torch(network, self.reader, device=device, num_threads=self.config.num_threads or available_cpus())


class _Torch(OneStream):
    """Runs batches of what was read, pictures and all."""

    def __init__(self, network: Any, reader: MultimodalReader, *, device: str, num_threads: int) -> None:
        super().__init__(network, device, num_threads)
        self._reader = reader

    def embed(self, read: Sequence[Read]) -> Float32[np.ndarray, "text dim"]:
        import torch

        with torch.inference_mode():
            tokens = self._reader.texts(read).padded(self._reader.pad_id).to(torch.device(self.device))
            return self.network(*tokens.inputs).float().cpu().numpy()


def square(image: bytes, size: int) -> bytes:
    """A picture's pixels, brought to a square of `size`: rows of RGB."""
    from PIL import Image

    picture = Image.fromarray(decode_rgb(image))
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return picture.tobytes()


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)


def _without_special(tokenizer: Tokenizer) -> Tokenizer:
    from tokenizers import Tokenizer as Fast

    return Fast.from_str(json.dumps({**json.loads(tokenizer.to_str()), "post_processor": None}))


def _end_of_text(path: Path) -> list[int]:
    """The ids that end a text: EOS, or SEP of encoders."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return [i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None]


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: not a JSON object")
    return found
