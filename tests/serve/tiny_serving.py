"""Two tiny corpora, real indexes over them, a reranker; shared by the tests of this folder."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydr.artifacts import Artifact, open_artifact, write_artifact
from raydr.config import Component
from raydr.data.config import DataConfig
from raydr.data.corpus import Corpus
from raydr.errors import ConfigError
from raydr.index.config import IndexConfig
from raydr.llm.engine import EngineError
from raydr.methods.zero_shot import ZeroShot
from raydr.protocols import Encoder
from raydr.types import Hit, Passage

ANIMALS = {
    "cat": ("Cat", "A small furry animal that purrs and hunts mice at night.", "pet", 2001),
    "dog": ("Dog", "A loyal animal that barks, guards the house and follows people.", "pet", 2003),
    "cow": ("Cow", "A large animal that gives milk and eats grass.", "farm", 1999),
    "owl": ("Owl", "A bird with large eyes that hunts mice at night.", "wild", 2010),
    "bee": ("", "An insect that makes honey and lives in a hive.", "farm", 2020),
    "whale": ("Whale", "The largest animal of the sea, it breathes air.", "wild", 2015),
}
INSTRUMENTS = {
    "piano": ("Piano", "A keyboard instrument whose hammers strike strings.", "keys", 2001),
    "violin": ("Violin", "A wooden instrument with four strings, played with a bow.", "strings", 2002),
    "drum": ("Drum", "A hollow instrument that is struck to keep the beat.", "percussion", 2003),
    "flute": ("Flute", "A pipe with holes; the player's breath makes the tone.", "wind", 2004),
    "harp": ("Harp", "A tall instrument whose strings are plucked.", "strings", 2005),
    "mouse_organ": ("Cat piano", "A joke instrument said to be played with cats and mice.", "keys", 2006),
    "horn": ("Horn", "A coiled tube of brass.", "wind", 2007),
}


def build_run(folder: Path, passages: dict[str, tuple[str, str, str, int]], *, num_shards: int, **encoder: Any) -> Path:
    """Ingests, embeds and indexes `passages` with the packaged MiniLM; the path of the index."""
    from raydr.data.ingest import ingest
    from raydr.encoders.factory import EncoderFactory
    from raydr.index.build import build_index

    folder.mkdir(parents=True)
    rows = [
        {"_id": id_, "title": title, "text": text, "kind": kind, "year": year}
        for id_, (title, text, kind, year) in passages.items()
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "an animal"}\n', encoding="utf-8")
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\nq1\t{next(iter(passages))}\t1\n")
    method = Component(
        import_path="raydr.methods.zero_shot:ZeroShot",
        args={"backend": "torch", "precision": "float32", "num_threads": 1, **encoder},
    )
    corpus = ingest(DataConfig(path=str(folder)), folder / "out" / "corpus")
    embeddings = embedded(corpus, EncoderFactory(method)(), method, folder / "out" / "embed")
    build_index(corpus, embeddings, IndexConfig(num_shards=num_shards), folder / "out" / "index", use_ray=False)
    return folder / "out" / "index"


def embedded(corpus: Corpus, encoder: Encoder, method: Component, out: Path) -> Artifact:
    """The embeddings artifact of a corpus small enough for one call of the encoder."""
    table = pa.concat_tables(corpus.passages())
    names = [name for name in ("passage_id", "text", "title", "image") if name in table.column_names]
    columns = (table[name].to_pylist() for name in names)
    embeddings = encoder.encode_passages([Passage(*row) for row in zip(*columns, strict=True)])
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), encoder.dim)
    with write_artifact(out, kind="embeddings", config={}, inputs={"corpus": corpus.artifact}) as writer:
        rows = {"passage_id": table["passage_id"], "position": table["position"], "embedding": column}
        pq.write_table(pa.table(rows), writer.path / "part-00000.parquet")
        writer.details.update(encoder_version=encoder.version, dim=encoder.dim, method=method.model_dump(mode="json"))
    return open_artifact(out)


class LexicalReranker:
    """A small deterministic reranker: the share of the query's words that a passage holds."""

    def rerank(self, query: Any, hits: Any, passages: Any) -> list[Hit]:
        words = query.text.lower().split()

        def score(hit: Hit) -> float:
            return sum(word in passages[hit.passage_id].text.lower().split() for word in words) / max(len(words), 1)

        return sorted((Hit(hit.passage_id, score(hit)) for hit in hits), key=lambda hit: -hit.score)


class FailingReranker:
    """Asynchronous; its language model is gone, or takes a minute, as the query says."""

    cancelled: ClassVar[list[str]] = []

    def rerank(self, query: Any, hits: Any, passages: Any) -> list[Hit]:
        raise NotImplementedError

    async def rerank_async(self, query: Any, hits: Any, passages: Any) -> list[Hit]:
        if "slow" in query.text:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled.append(query.text)
                raise
        if "fits" in query.text:
            raise ConfigError("the prompt does not fit")
        raise EngineError("its engine has stopped")


class SlowReranker(FailingReranker):
    """Keeps the order, after half a second, or after half a minute for the query `mark FILE`: makes the file where it
    is cancelled meanwhile.
    """

    async def rerank_async(self, query: Any, hits: Any, passages: Any) -> list[Hit]:
        word, _, file = query.text.partition(" ")
        try:
            await asyncio.sleep(30 if word == "mark" else 0.5)
        except asyncio.CancelledError:
            if word == "mark":
                Path(file).touch()
            raise
        return list(hits)


class WithFeedback(ZeroShot):
    """ZeroShot with pseudo-relevance feedback: the query's embedding averaged with those of its first two hits."""

    def build_refiner(self, encoder: Encoder) -> Any:
        return _Average(encoder)


class _Average:
    num_feedback = 2
    reads = "passages"

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def refine(self, queries: Any, embeddings: Any, found: Any) -> np.ndarray:
        passages = [self._encoder.encode_passages(own.passages).sum(axis=0) for own in found]
        return ((embeddings + np.stack(passages)) / 3).astype(np.float32)


def with_details(index: Path, copy: Path, **details: Any) -> Path:
    """A copy of an index whose manifest says something else."""
    shutil.copytree(index, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest |= {"details": manifest["details"] | details, "checksum": ""}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def check_error(response: Any, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """The `error` of a response, after checking that it has the one shape of errors."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    if param is not None:
        assert error["param"] == param
    assert "Traceback" not in response.text
    return error
