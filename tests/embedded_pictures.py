"""A corpus of texts, pictures and both, with embeddings a test chooses, judged queries, and its index; no model needed.

built = pictured(tmp_path, passages, embeddings, {"q1": ("alpha beta", {"p1": 1})})
built.index, built.queries
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raydr.artifacts import open_artifact, write_artifact
from raydr.data.corpus import PASSAGES, QRELS, QUERIES, Corpus, QuerySet
from raydr.index.build import build_index
from raydr.index.config import IndexConfig
from raydr.types import IMAGE, INSTRUCTIONS, PASSAGE_ID, POSITION, QUERY_ID, RELEVANCE, TASK, TEXT, TITLE, Passage
from tests.corpora import METHOD, STAMP


class Pictured(NamedTuple):
    corpus: Corpus
    index: Path
    queries: QuerySet


def picture(number: int) -> bytes:
    """A PNG of 2 x 2 pixels, another for each number."""
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (number % 256, number // 256 % 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def pictured(
    folder: Path,
    passages: Sequence[Passage],
    embeddings: np.ndarray,
    queries: Mapping[str, tuple[str, Mapping[str, int]]],
    *,
    tasks: Mapping[str, str] | None = None,
    metadata: Mapping[str, Sequence[str]] | None = None,
) -> Pictured:
    """`queries`: text and judgements by id; `metadata`: further columns of the passages."""
    position = pa.array(range(len(passages)), pa.int64())
    columns = {
        PASSAGE_ID: pa.array([p.passage_id for p in passages], pa.string()),
        POSITION: position,
        TITLE: pa.array([p.title for p in passages], pa.string()),
        TEXT: pa.array([p.text for p in passages], pa.string()),
        IMAGE: pa.array([p.image for p in passages], pa.binary()),
        **{name: pa.array(values, pa.string()) for name, values in (metadata or {}).items()},
    }
    judged = [(query_id, *pair) for query_id, (_, grades) in queries.items() for pair in grades.items()]
    asked = pa.table(
        {
            QUERY_ID: pa.array([*queries], pa.string()),
            TEXT: [text for text, _ in queries.values()],
            INSTRUCTIONS: pa.array([["Find it."]] * len(queries), pa.list_(pa.string())),
            TASK: pa.array([(tasks or {}).get(query_id) for query_id in queries], pa.string()),
        }
    )
    grades = pa.table(dict(zip((QUERY_ID, PASSAGE_ID, RELEVANCE), zip(*judged, strict=True), strict=True)))

    def write_queries(to: Path) -> None:
        pq.write_table(asked, to / QUERIES)
        pq.write_table(grades, to / QRELS)

    with write_artifact(folder / "corpus", kind="corpus", config={}) as writer:
        write_queries(writer.path)
        (writer.path / PASSAGES).mkdir()
        pq.write_table(pa.table(columns), writer.path / PASSAGES / "part-00000.parquet")
        writer.counts["passages"] = len(passages)
        writer.details.update(is_split=False, metadata=[*(metadata or {})])
    corpus = Corpus.open(folder / "corpus")
    with write_artifact(folder / "queries", kind="queries", config={}, inputs={"corpus": corpus.artifact}) as writer:
        write_queries(writer.path)
    with write_artifact(folder / "embed", kind="embeddings", config={}, inputs={"corpus": corpus.artifact}) as writer:
        flat = pa.array(embeddings.astype(np.float32).ravel())
        column = pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1])
        table = pa.table({PASSAGE_ID: columns[PASSAGE_ID], POSITION: position, "embedding": column})
        pq.write_table(table, writer.path / "part-0.parquet")
        writer.details.update({"encoder_version": STAMP, "dim": embeddings.shape[1], "method": METHOD})
    build_index(corpus, open_artifact(folder / "embed"), IndexConfig(num_shards=3), folder / "index", use_ray=False)
    return Pictured(corpus, folder / "index", QuerySet.open(folder / "queries"))
