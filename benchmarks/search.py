"""W3: exact top-100 over N x 384. W4: approximate search at equal recall@10. raydr against its neighbours, in process.

    OMP_NUM_THREADS=2 python benchmarks/search.py exact --num 100000 --rounds 7
    OMP_NUM_THREADS=2 python benchmarks/search.py ann --num 100000 --rounds 5

Contenders (usearch, hnswlib and qdrant-client are no dependency of raydr): raydr reading an index from disk (one shard,
and four), plain FAISS (one index, and four behind its `IndexShards`), sentence-transformers' `semantic_search`,
usearch, hnswlib. Outputs are compared before a speed counts: exact search must agree on every score to 1e-5,
approximate search is timed at the least effort that reaches the recall on other queries. Embeddings are drawn near a
32-dimensional surface, so that neighbourhoods exist as they do in text.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from interleaved import in_child, markdown, peak_rss_mib, quantile, rounds, spread, write

DIM = 384
K = 100
ANN_K = 10
BATCHES = (1, 10, 1000)
EXACT = ["raydr 1", "raydr 4", "faiss", "faiss 4", "ST semantic_search", "usearch"]
EFFORTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def draw(num: int, seed: int) -> np.ndarray:
    """Normalised embeddings (num, DIM) near a surface that is the same for every seed."""
    surface = np.random.default_rng(7).standard_normal((32, DIM)).astype(np.float32)
    rng = np.random.default_rng(seed)
    points = np.empty((num, DIM), dtype=np.float32)
    for start in range(0, num, 50_000):
        part = points[start : start + 50_000]
        part[:] = np.tanh(rng.standard_normal((len(part), 32), dtype=np.float32)) @ surface
        part += 0.5 * rng.standard_normal(part.shape, dtype=np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def build_raydr(folder: Path, points: np.ndarray, factory: str, num_shards: int) -> tuple[Path, float]:
    """A raydr index on disk, through its own corpus and embeddings artifacts; the seconds `build_index` took."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from raydr.artifacts import open_artifact, write_artifact
    from raydr.data.config import DataConfig
    from raydr.data.ingest import ingest
    from raydr.index.build import build_index
    from raydr.index.config import IndexConfig

    folder.mkdir(parents=True, exist_ok=True)
    ids = [f"p{row}" for row in range(len(points))]
    pq.write_table(pa.table({"passage_id": ids, "text": ids}), folder / "source.parquet")
    corpus = ingest(DataConfig(path=str(folder / "source.parquet")), folder / "corpus")
    if not (folder / "embed").exists():
        with write_artifact(folder / "embed", kind="embeddings", config={}) as writer:
            column = pa.FixedSizeListArray.from_arrays(pa.array(points.ravel()), DIM)
            table = pa.table({"passage_id": ids, "position": np.arange(len(points)), "embedding": column})
            pq.write_table(table, writer.path / "part.parquet", row_group_size=10_000)
            method = {"import_path": "benchmarks:none", "args": {}}
            writer.details.update({"encoder_version": "none", "dim": DIM, "method": method})
    out = folder / f"{factory.replace(',', '_')}-{num_shards}"
    config = IndexConfig(factory=factory, num_shards=num_shards, bm25=None, recall=None)
    start = time.perf_counter()
    build_index(corpus, open_artifact(folder / "embed"), config, out, use_ray=False)
    return out, time.perf_counter() - start


Search = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Queries -> (scores, rows), best first."""


def open_exact(name: str, folder: Path) -> Search:
    """A contender for W3, loaded from disk."""
    if name.startswith("raydr"):
        from raydr.index.reader import IndexReader

        reader = IndexReader.open(folder / f"Flat-{name.split()[1]}")

        def search(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            top = reader.search(queries, K)
            return top.scores, top.rows

        return search
    if name == "faiss":
        import faiss

        index = faiss.read_index(str(folder / "plain.faiss"))
        return lambda queries: index.search(queries, K)
    if name == "faiss 4":
        import faiss

        sharded = faiss.IndexShards(DIM, False, True)  # one after the other, rows numbered through
        for part in sorted((folder / "Flat-4" / "shards").glob("*/vectors.faiss")):
            sharded.add_shard(faiss.read_index(str(part)))
        return lambda queries: sharded.search(queries, K)
    points = np.load(folder / "points.npy")
    if name == "ST semantic_search":
        import torch
        from sentence_transformers.util import dot_score, semantic_search

        corpus = torch.from_numpy(points)

        def search(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            found = semantic_search(torch.from_numpy(queries), corpus, top_k=K, score_function=dot_score)
            scores = np.array([[hit["score"] for hit in hits] for hits in found])
            return scores, np.array([[hit["corpus_id"] for hit in hits] for hits in found])

        return search
    from usearch.index import MetricKind
    from usearch.index import search as exact

    def search(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = exact(points, queries, K, MetricKind.IP, exact=True)
        return 1 - np.atleast_2d(found.distances), np.atleast_2d(found.keys)

    return search


def exact(arguments: argparse.Namespace, folder: Path) -> None:
    """W3."""
    import faiss

    points, queries = draw(arguments.num, 1), draw(max(BATCHES), 2)
    np.save(folder / "points.npy", points)
    plain = faiss.IndexFlatIP(DIM)
    plain.add(points)
    faiss.write_index(plain, str(folder / "plain.faiss"))
    for num_shards in (1, 4):
        build_raydr(folder, points, "Flat", num_shards)
    names = [name for name in arguments.only if name != "usearch" or importlib.util.find_spec("usearch")]
    del points, plain
    cold = {name: in_child(__file__, ["cold", "--folder", str(folder), "--name", name]) for name in names}
    contenders = {name: open_exact(name, folder) for name in names}
    reference = contenders["faiss"](queries)[0]
    for name, search in contenders.items():
        scores, rows = search(queries)
        np.testing.assert_allclose(scores, reference, atol=1e-5, err_msg=name)
        assert all(len(set(line)) == K for line in np.asarray(rows).tolist()), name
    results: dict[str, Any] = {name: {"cold": cold[name]} for name in names}
    rows_out = []
    for batch in BATCHES:
        repeats = 1 if batch == max(BATCHES) else arguments.repeats
        timed = rounds({n: partial(s, queries[:batch]) for n, s in contenders.items()}, arguments.rounds, repeats)
        for name, times in timed.items():
            results[name][f"seconds, {batch} queries"] = times
            per_s = [batch / t for t in times]
            faiss_share = statistics.median(timed["faiss"]) / statistics.median(times)
            p50, p99 = 1e3 * quantile(times, 0.5), 1e3 * quantile(times, 0.99)
            rows_out.append([str(batch), name, spread(per_s), f"{p50:.3g}", f"{p99:.3g}", f"{faiss_share:.3f}"])
    table = markdown(["queries at once", "contender", "queries/s", "p50 ms", "p99 ms", "speed / faiss"], rows_out)
    cold_rows = [[n, f"{c['load_s']:.2f}", f"{c['first_s']:.2f}", f"{c['peak_mib']:.0f}"] for n, c in cold.items()]
    table += "\n" + markdown(["contender", "load s", "first query s", "peak MiB"], cold_rows)
    write(arguments.out / "search_exact", f"W3: exact top-{K} over {arguments.num} x {DIM}", table, results)


def cold_start(arguments: argparse.Namespace) -> None:
    """Loads one contender in this fresh process and answers one query."""
    start = time.perf_counter()
    search = open_exact(arguments.name, arguments.folder)
    load_s = time.perf_counter() - start
    start = time.perf_counter()
    search(draw(1, 3))
    print(json.dumps({"load_s": load_s, "first_s": time.perf_counter() - start, "peak_mib": peak_rss_mib()}))


class Approximate:
    """A contender for W4: built once, searched with a chosen effort."""

    def __init__(self, name: str, points: np.ndarray, folder: Path) -> None:
        self.name, self.num = name, len(points)
        start = time.perf_counter()
        self.search, file = getattr(self, f"_{name.split()[0]}")(points, folder, name.split()[-1])
        self.build_s = getattr(self, "build_s", time.perf_counter() - start)
        self.bytes_per_vector = file.stat().st_size / self.num

    def _raydr(self, points: np.ndarray, folder: Path, factory: str) -> tuple[Any, Path]:
        from raydr.index.config import SearchParameters
        from raydr.index.reader import IndexReader

        path, self.build_s = build_raydr(folder, points, factory, 1)
        reader = IndexReader.open(path)

        def search(queries: np.ndarray, effort: int) -> np.ndarray:
            effort_of = SearchParameters(nprobe=effort, ef_search=effort, rescore_factor=max(1, effort / 4))
            return reader.search(queries, ANN_K, parameters=effort_of).rows

        return search, path / "shards" / "00000" / "vectors.faiss"

    def _faiss(self, points: np.ndarray, folder: Path, factory: str) -> tuple[Any, Path]:
        import faiss

        index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(points)
        index.add(points)
        file = folder / f"{factory}.faiss"
        faiss.write_index(index, str(file))

        def search(queries: np.ndarray, effort: int) -> np.ndarray:
            faiss.ParameterSpace().set_index_parameter(index, "efSearch" if "HNSW" in factory else "nprobe", effort)
            return index.search(queries, ANN_K)[1]

        return search, file

    def _hnswlib(self, points: np.ndarray, folder: Path, _: str) -> tuple[Any, Path]:
        import hnswlib

        index = hnswlib.Index(space="ip", dim=DIM)
        index.init_index(len(points), M=32, ef_construction=40)
        index.add_items(points)
        index.save_index(str(folder / "hnswlib.bin"))

        def search(queries: np.ndarray, effort: int) -> np.ndarray:
            index.set_ef(max(effort, ANN_K))
            return index.knn_query(queries, ANN_K)[0].astype(np.int64)

        return search, folder / "hnswlib.bin"

    def _usearch(self, points: np.ndarray, folder: Path, _: str) -> tuple[Any, Path]:
        from usearch.index import Index

        index = Index(ndim=DIM, metric="ip", dtype="f32", connectivity=32, expansion_add=40)
        index.add(np.arange(len(points)), points)
        index.save(str(folder / "usearch.bin"))

        def search(queries: np.ndarray, effort: int) -> np.ndarray:
            index.expansion_search = effort
            return np.atleast_2d(index.search(queries, ANN_K).keys).astype(np.int64)

        return search, folder / "usearch.bin"

    def _qdrant(self, points: np.ndarray, folder: Path, _: str) -> tuple[Any, Path]:
        """Its local mode, which compares with every point whatever the effort."""
        from qdrant_client import QdrantClient, models

        client = QdrantClient(path=str(folder / "qdrant"))
        client.create_collection("c", vectors_config=models.VectorParams(size=DIM, distance=models.Distance.DOT))
        client.upload_collection("c", vectors=points, ids=range(len(points)))

        def search(queries: np.ndarray, effort: int) -> np.ndarray:
            answers = [client.query_points("c", query=query, limit=ANN_K).points for query in queries]
            return np.array([[point.id for point in answer] for answer in answers])

        return search, next((folder / "qdrant").rglob("*.sqlite"))

    def least_effort(self, queries: np.ndarray, truth: np.ndarray, recall: float) -> int | None:
        """The least effort of `EFFORTS` that reaches `recall`; None when none does."""
        return next((e for e in EFFORTS if recall_at(self.search(queries, e), truth) >= recall), None)


def recall_at(rows: np.ndarray, truth: np.ndarray) -> float:
    shares = [len(np.intersect1d(a, b)) / truth.shape[1] for a, b in zip(rows, truth, strict=True)]
    return float(np.mean(shares))


def ann(arguments: argparse.Namespace, folder: Path) -> None:
    """W4."""
    import faiss

    points, tuning, queries = draw(arguments.num, 1), draw(500, 2), draw(1000, 4)
    plain = faiss.IndexFlatIP(DIM)
    plain.add(points)
    tuning_truth, truth = plain.search(tuning, ANN_K)[1], plain.search(queries, ANN_K)[1]
    lists = max(16, 2 ** round(np.log2(4 * arguments.num**0.5)))
    names = [
        *("raydr HNSW32", "faiss HNSW32", "hnswlib", "usearch"),
        *(f"raydr IVF{lists},Flat", f"faiss IVF{lists},Flat", f"raydr IVF{lists},SQ8,RFlat", "raydr SQ8,RFlat"),
        *(["qdrant local"] if importlib.util.find_spec("qdrant_client") else []),
    ]
    built = [Approximate(name, points, folder) for name in names]
    rows_out, results = [], {}
    for target in (0.95, 0.99):
        efforts = {c.name: c.least_effort(tuning, tuning_truth, target) for c in built}
        able = [c for c in built if efforts[c.name] is not None]
        timed = rounds({c.name: partial(c.search, queries, efforts[c.name]) for c in able}, arguments.rounds)
        for c in built:
            common = [f"{target}", c.name, str(efforts[c.name] or "-")]
            sizes = [f"{c.build_s:.1f}", f"{c.bytes_per_vector:.0f}"]
            if c not in able:
                rows_out.append([*common, "not reached", "-", *sizes])
                continue
            recall = recall_at(c.search(queries, efforts[c.name]), truth)
            results[f"{c.name} at {target}"] = {"effort": efforts[c.name], "recall": recall, "seconds": timed[c.name]}
            rows_out.append([*common, f"{recall:.4f}", spread([len(queries) / t for t in timed[c.name]]), *sizes])
    columns = ["recall@10 asked", "contender", "effort", "recall@10", "queries/s", "build s", "bytes/vector"]
    table = markdown(columns, rows_out)
    write(arguments.out / "search_ann", f"W4: approximate top-{ANN_K} over {arguments.num} x {DIM}", table, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=["exact", "ann", "cold"])
    parser.add_argument("--num", type=int, default=100_000, help="number of embeddings")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=20, help="calls per round for batches of 1 and 10 queries")
    parser.add_argument("--only", nargs="+", default=EXACT, choices=EXACT, help="exact: contenders (faiss is needed)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.workload == "cold":
        cold_start(arguments)
        return
    folder = Path(tempfile.mkdtemp(prefix="raydr-search-"))
    try:
        {"exact": exact, "ann": ann}[arguments.workload](arguments, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
