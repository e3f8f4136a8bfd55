"""passage_embeddings: the embeddings that an index has of training examples' passages, ready beside the examples.

Needs an index and sets of examples over the same corpus; writes one Arrow file (kind "passage_embeddings") with
passage_id and embedding, each passage once. Notable: a training whose passage side is frozen takes its vectors from
here, memory-mapped, so it needs neither the passages' encoder nor the index; they are those that the trained queries
will be compared with, also where the index keeps them coarsely.

    artifact = keep_embeddings("runs/a/index", [examples, dev], out)
    PassageEmbeddings.open(artifact.path).of(["p1", "p7"])
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from raydr.artifacts import Artifact, fingerprint, is_finished, open_artifact, write_artifact
from raydr.data.arrow_rows import ArrowRows
from raydr.data.examples import ExampleSet
from raydr.errors import ArtifactError, DataError
from raydr.index.reader import IndexReader
from raydr.index.shard import dense
from raydr.storage import named
from raydr.types import EMBEDDING, PASSAGE_ID

KIND = "passage_embeddings"
FILE = "embeddings.arrow"
_BATCH_ROWS = 8192


def keep_embeddings(index_path: str | Path, sets: Sequence[ExampleSet], out: Path) -> Artifact:
    """The embeddings in `out`; finished ones of the same index and examples stay.

    Raises `ArtifactError` where the index lacks a passage of the examples.
    """
    reader = IndexReader.open(index_path)
    settings = {"index_version": reader.version}
    inputs = {"index": reader.artifact, **{f"examples {place}": own.artifact for place, own in enumerate(sets)}}
    prints = {name: artifact.fingerprint for name, artifact in inputs.items()}
    if is_finished(out, fingerprint(KIND, settings, prints)):
        print(f"passage_embeddings: {named(out)} has these already", file=sys.stderr)
        return open_artifact(out, kind=KIND)
    wanted = sorted({passage_id for own in sets for passage_id in own.passage_ids})
    rows = reader.passage_ids.where(wanted)
    rows = rows[reader.select()[rows]] if reader.details.num_deleted else rows
    ids = reader.passage_ids.take(rows)
    if missing := set(wanted) - set(ids.tolist()):
        raise ArtifactError(f"{reader.path}: lacks {min(missing)!r}, which the examples have; mine them again in it")
    schema = pa.schema({PASSAGE_ID: pa.string(), EMBEDDING: pa.list_(pa.float32(), reader.dim)})
    with write_artifact(out, kind=KIND, config=settings, inputs=inputs) as writer:
        with pa.ipc.new_file(str(out / FILE), schema) as file:
            for start in range(0, len(rows), _BATCH_ROWS):
                vectors = dense(reader.embeddings(rows[start : start + _BATCH_ROWS]))
                columns = {
                    PASSAGE_ID: pa.array(ids[start : start + _BATCH_ROWS], type=pa.string()),
                    EMBEDDING: pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), reader.dim),
                }
                file.write_table(pa.table(columns, schema=schema))
        writer.counts["passages"] = len(rows)
        writer.details.update(encoder_version=reader.encoder_version, dim=reader.dim)
    return open_artifact(out, kind=KIND)


class PassageEmbeddings:
    """The kept embeddings, by passage id."""

    def __init__(self, artifact: Artifact) -> None:
        self.encoder_version: str = artifact.manifest.details["encoder_version"]
        self._path, self._dim = artifact.path, int(artifact.manifest.details["dim"])
        self._rows = ArrowRows.open(artifact.path / FILE)
        ids = self._rows.table[PASSAGE_ID].to_pylist()
        self._places = {passage_id: place for place, passage_id in enumerate(ids)}

    @classmethod
    def open(cls, path: str | Path) -> PassageEmbeddings:
        """Raises `ArtifactError` where nothing finished is at `path`."""
        return cls(open_artifact(path, kind=KIND))

    def of(self, passage_ids: Sequence[str]) -> Float32[np.ndarray, "passage dim"]:
        """One row each, in this order. Raises `DataError` naming one that is not there."""
        try:
            places = [self._places[passage_id] for passage_id in passage_ids]
        except KeyError as error:
            raise DataError(f"{self._path}: no embedding of {error.args[0]!r}; make them of these examples") from None
        column = self._rows.take(np.array(places, dtype=np.int64), [EMBEDDING])[EMBEDDING]
        values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
        return np.concatenate([np.zeros(0, dtype=np.float32), *values]).reshape(len(places), self._dim)
