"""A small collection of coloured pictures, words, and both; and an encoder that sees colours and reads words.

corpus = picture_corpus(tmp_path / "corpus")
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raydr.artifacts import write_artifact
from raydr.data.corpus import Corpus
from raydr.data.images import decode_rgb
from raydr.types import Hit, Passage, Query

COLOURS = {"red": (225, 25, 25), "green": (25, 160, 60), "blue": (30, 60, 220), "yellow": (240, 220, 30)}
METHOD = {"import_path": "tests.pictures:Colours", "args": {}}
WORDS = ("rose", "meadow", "sea", "lemon", "lake", "grass")


def picture(colour: str, size: tuple[int, int] = (16, 12), form: str = "PNG") -> bytes:
    """The bytes of a picture's file."""
    out = io.BytesIO()
    Image.new("RGB", size, COLOURS[colour]).save(out, form)
    return out.getvalue()


PASSAGES = [
    Passage("p-red", "", image=picture("red")),
    Passage("p-green", "", image=picture("green")),
    Passage("p-blue", "", image=picture("blue")),
    Passage("rose", "A rose", "Flower"),
    Passage("meadow", "A meadow of grass"),
    Passage("sea", "The sea", image=picture("blue")),
    Passage("lemon", "A lemon", "Fruit", picture("yellow")),
    Passage("p-red-again", "", image=picture("red")),
]
FIND_PICTURE = ["Find the picture.", "Which picture is it?"]
QUERIES: list[tuple[Query, list[str], str | None, int | None, dict[str, int]]] = [
    (Query("words", "rose", None, FIND_PICTURE[0]), FIND_PICTURE, "text to image", 3, {"p-red": 1}),
    (Query("colour", "", picture("blue"), "Find words."), ["Find words."], "image to text", None, {"sea": 1}),
    (Query("both", "meadow", picture("green")), [], None, None, {"meadow": 2, "p-green": 1}),
    (Query("nothing", "lake"), [], None, 1, {"p-red": 0}),
]
"""With the wordings of its instruction, its task, its copies and its judgements."""


def picture_corpus(folder: Path) -> Corpus:
    """The collection as a corpus artifact, in two parts."""
    with write_artifact(folder, kind="corpus", config={"data": {"path": "pictures"}}) as writer:
        (folder / "passages").mkdir()
        for number, first in enumerate((0, 5)):
            own = PASSAGES[first : first + 5]
            columns = {
                "passage_id": pa.array([p.passage_id for p in own]),
                "position": pa.array(range(first, first + len(own)), pa.int64()),
                "title": pa.array([p.title for p in own]),
                "text": pa.array([p.text for p in own]),
                "image": pa.array([p.image for p in own], pa.large_binary()),
            }
            pq.write_table(pa.table(columns), folder / f"passages/part-{number:05d}.parquet")
        rows = [
            {
                "query_id": query.query_id,
                "text": query.text,
                "image": query.image,
                "instructions": instructions or None,
                "task": task,
                "copies": copies,
            }
            for query, instructions, task, copies, _ in QUERIES
        ]
        schema = {"query_id": pa.string(), "text": pa.string(), "image": pa.large_binary()}
        schema |= {"instructions": pa.list_(pa.string()), "task": pa.string(), "copies": pa.int64()}
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(schema)), folder / "queries.parquet")
        judged = [(query.query_id, *grade) for query, *_, grades in QUERIES for grade in grades.items()]
        names = ("query_id", "passage_id", "relevance")
        pq.write_table(pa.table(dict(zip(names, zip(*judged, strict=True), strict=True))), folder / "qrels.parquet")
        writer.counts["passages"] = len(PASSAGES)
        writer.details |= {"is_split": False, "metadata": {}}
    return Corpus.open(folder)


class Colours:
    """An encoder of a picture's colour, some words, and an instruction's length; and a method that builds it."""

    dim = 3 + len(WORDS) + 1
    version = "colours-2"

    def encode_queries(self, queries: Any) -> np.ndarray:
        return self._stacked([self._vector(q.text, q.image, q.instruction) for q in queries])

    def encode_passages(self, passages: Any) -> np.ndarray:
        return self._stacked([self._vector(p.joined(" "), p.image) for p in passages])

    def _stacked(self, vectors: list[np.ndarray]) -> np.ndarray:
        return np.stack(vectors) if vectors else np.zeros((0, self.dim), np.float32)

    def _vector(self, text: str, image: bytes | None, instruction: str = "") -> np.ndarray:
        vector = np.zeros(self.dim, np.float32)
        if image is not None:
            vector[:3] = decode_rgb(image).reshape(-1, 3).mean(axis=0) / 128 - 1
        words = text.lower().split()
        vector[3:-1] = [words.count(word) for word in WORDS]
        vector[-1] = len(instruction) / 100
        return vector

    def encoder(self) -> Colours:
        return self


class ColourScorer:
    """A reranker by the distance of colours, which also scores pairs. What it was given stands in its scores."""

    def score(self, pairs: Any) -> np.ndarray:
        return np.array([self._score(query, passage) for query, passage in pairs], np.float32)

    def rerank(self, query: Query, hits: Any, passages: Any) -> list[Hit]:
        scored = [Hit(hit.passage_id, self._score(query, passages[hit.passage_id])) for hit in hits]
        return sorted(scored, key=lambda hit: (-hit.score, hit.passage_id))

    def _score(self, query: Query, passage: Passage) -> float:
        encoder = Colours()
        return float(encoder.encode_queries([query])[0] @ encoder.encode_passages([passage])[0])
