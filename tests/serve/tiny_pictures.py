"""Pictures drawn with Pillow, an encoder of words and colours, the method that names it, rerankers, and an index."""

import base64
import io
import json
import re
import threading
import zlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw
from tiny_serving import LexicalReranker

from raydr.config import Component
from raydr.data.config import DataConfig
from raydr.data.images import ImageConfig, decode_rgb, prepare_image
from raydr.data.ingest import ingest
from raydr.encoders.factory import EncoderFactory
from raydr.index.build import build_index
from raydr.index.config import IndexConfig
from raydr.methods.base import Method
from raydr.stages.config import EmbedConfig
from raydr.stages.embed import embed_corpus
from raydr.types import Hit

COLOURS = {"red": (225, 25, 25), "green": (25, 160, 60), "blue": (30, 60, 220), "yellow": (240, 220, 30)}


def picture(colour: str, size: tuple[int, int] = (48, 32), form: str = "PNG") -> bytes:
    """An ellipse of one colour on white, as the bytes of a file."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((1, 1, size[0] - 2, size[1] - 2), fill=COLOURS[colour])
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def sent(image: bytes) -> str:
    """As a request carries it."""
    return base64.b64encode(image).decode()


def stored(image: bytes) -> bytes:
    """As the index has it."""
    return prepare_image(image, PREPARED)


PREPARED = ImageConfig(size=40)
"""Smaller than the pictures."""
PASSAGES: list[tuple[str, str, str, str | None]] = [  # id, title, text, colour of the picture
    ("red", "", "", "red"),
    ("green", "Meadow", "", "green"),
    ("blue", "Sea", "An ellipse like the sea.", "blue"),
    ("rose", "Rose", "A rose is red.", None),
    ("sky", "", "The sky at noon is blue.", None),
    ("lemon", "Lemon", "A lemon.", "yellow"),
]
KINDS = ["shape", "shape", "shape", "word", "word", "shape"]


def build_pictures(folder: Path, method: Component, *, num_shards: int = 2) -> Path:
    """An index over the passages above; its path."""
    rows = [
        {
            "_id": id_,
            "title": title,
            "text": text,
            "kind": kind,
            "image": None if colour is None else sent(picture(colour)),
        }
        for (id_, title, text, colour), kind in zip(PASSAGES, KINDS, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "red"}\n')
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tred\t1\n")
    corpus = ingest(DataConfig(path=str(folder), images=PREPARED), folder / "corpus")
    embeddings = embed_corpus(
        corpus, EncoderFactory(method), EmbedConfig(), folder / "embed", use_ray=False, method=method
    )
    build_index(corpus, embeddings, IndexConfig(num_shards=num_shards), folder / "index", use_ray=False)
    return folder / "index"


class ColourEncoder:
    """An embedding's first three numbers are the colour that a picture has or that the words name; the others are
    hashed words, of which an instruction's count less.
    """

    modalities = frozenset({"text", "image", "image,text"})
    reads_instructions = True
    dim = 64
    version = "colours-1"
    batches: ClassVar[list[list[str]]] = []
    """The modalities of each batch that was encoded in this process."""
    gate = threading.Event()
    """Batches wait for it."""
    gate.set()

    def encode_queries(self, queries: Any) -> np.ndarray:
        return self._encode([(q.text, q.image, q.instruction) for q in queries], [q.modality for q in queries])

    def encode_passages(self, passages: Any) -> np.ndarray:
        return self._encode([(p.joined(" "), p.image, "") for p in passages], [p.modality for p in passages])

    def _encode(self, contents: list[tuple[str, bytes | None, str]], modalities: list[str]) -> np.ndarray:
        self.batches.append(modalities)
        assert self.gate.wait(30)
        return np.stack([embedding(*content) for content in contents]) if contents else np.zeros((0, 64), np.float32)


def embedding(text: str, image: bytes | None, instruction: str = "") -> np.ndarray:
    vector = np.zeros(64, dtype=np.float32)
    if image is not None:
        vector[:3] += mean_colour(image)
    for words, weight in ((text, 0.3), (instruction, 0.1)):
        for word in re.findall(r"\w+", words.lower()):
            if word in COLOURS and words is text:
                vector[:3] += mean_colour(picture(word))
            vector[3 + zlib.crc32(word.encode()) % 61] += weight
    return vector / max(np.linalg.norm(vector), 1e-9)


def mean_colour(image: bytes) -> np.ndarray:
    """Of what is not white, between -0.5 and 0.5."""
    pixels = decode_rgb(image).reshape(-1, 3).astype(np.float32) / 255
    drawn = pixels[(pixels < 0.9).any(axis=1)]
    return drawn.mean(axis=0) - 0.5 if len(drawn) else np.full(3, 0.5, np.float32)


class Colours(Method):
    """The method that a manifest names."""

    def build_encoder(self) -> Any:
        return ColourEncoder()


class ColourReranker:
    """Reads pictures: a passage is better the nearer its colour is to the query's. `seen`: what it was given."""

    modalities = frozenset({"text", "image", "image,text"})
    seen: ClassVar[list[tuple[Any, list[Any]]]] = []

    def rerank(self, query: Any, hits: Any, passages: Any) -> list[Hit]:
        self.seen.append((query, [passages[hit.passage_id] for hit in hits]))
        wanted = embedding(query.text, query.image)[:3]

        def score(hit: Hit) -> float:
            passage = passages[hit.passage_id]
            return float(embedding(passage.joined(" ") or "-", passage.image)[:3] @ wanted)

        return sorted((Hit(hit.passage_id, score(hit)) for hit in hits), key=lambda hit: -hit.score)


class WordReranker(LexicalReranker):
    """Reads words alone, and does not say so, as rerankers of text do."""

    seen: ClassVar[list[tuple[Any, list[Any]]]] = []

    def rerank(self, query: Any, hits: Any, passages: Any) -> list[Hit]:
        self.seen.append((query, [passages[hit.passage_id] for hit in hits]))
        return super().rerank(query, hits, passages)
