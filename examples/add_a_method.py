"""A new method in forty lines: pseudo-relevance feedback by averaging vectors, run by the verbs like any other.

The method's invention is one formula, `refine`; embedding, indexing, searching twice, evaluating and serving exist
already. Notable: nothing in raydr was edited; the config names the class by import path, and its own knob (`weight`)
is a field like every other.

    python examples/add_a_method.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from raydr.config import validate
from raydr.encoders.text import TextEncoder
from raydr.methods.base import Method
from raydr.protocols import Encoder
from raydr.types import Embeddings, Found, Query
from raydr.verbs.config import RunConfig
from raydr.verbs.reproduce import reproduce


class AverageFeedback(Method):
    """Mixes a query's embedding with those of the passages its first search found (Rocchio without negatives)."""

    class Config(TextEncoder.Config):
        num_feedback: int = 2
        """Passages of the first search that are trusted."""
        weight: float = 0.3
        """Share of the feedback in the new query embedding."""

    config: Config

    def build_encoder(self) -> TextEncoder:
        own_fields = {"num_feedback", "weight"}
        return TextEncoder(TextEncoder.Config(**self.config.model_dump(exclude=own_fields)))

    def build_refiner(self, encoder: Encoder) -> Averaging:
        return Averaging(self.config.num_feedback, self.config.weight)


@dataclass
class Averaging:
    """The invention: a `QueryRefiner`."""

    num_feedback: int
    weight: float
    reads: Literal["embeddings"] = "embeddings"

    def refine(self, queries: Sequence[Query], embeddings: Embeddings, found: Sequence[Found]) -> Embeddings:
        means = [own.embeddings.mean(axis=0) for own in found]
        return ((1 - self.weight) * embeddings + self.weight * np.stack(means)).astype(np.float32)


def write_a_tiny_collection(folder: Path) -> None:
    """A BEIR folder of four passages and two queries."""
    passages = {
        "d1": "A red giant is a star that has used up the hydrogen in its core.",
        "d2": "Sourdough bread rises with wild yeast and lactic acid bacteria.",
        "d3": "White dwarfs are what remains of stars like the Sun.",
        "d4": "Knead the dough until it is smooth, then let it rest.",
    }
    queries = {"q1": "how do stars die", "q2": "baking a loaf"}
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"_id": i, "text": t}) + "\n" for i, t in passages.items()))
    (folder / "queries.jsonl").write_text("".join(json.dumps({"_id": i, "text": t}) + "\n" for i, t in queries.items()))
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td3\t1\nq2\td2\t1\nq2\td4\t1\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_a_tiny_collection(Path(folder) / "data")
        config = {
            "out": f"{folder}/out",
            "runtime": "local",
            "data": {"path": f"{folder}/data", "split": "test"},
            "method": {"import_path": f"{__name__}:AverageFeedback", "args": {"weight": 0.4}},
            "search": {"k": 4},
        }
        artifact = reproduce(validate(RunConfig, config, where=sys.argv[0]))
        print((artifact.path / "metrics.json").read_text())
