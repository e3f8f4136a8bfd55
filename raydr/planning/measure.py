"""`raydr plan --measure`: the unit figures of this machine, in a minute or two, in the form that `raydr plan` reads.

Notable: what is timed is what raydr runs: its encoder with MiniLM, its `build_shard`, FAISS's searches; on all cores
unless a figure is one core's. Texts and vectors are drawn, because neither the words nor the directions decide the
time; the vectors lie near a surface of 32 dimensions, as HNSW's work depends on neighbourhoods being there. What needs
a served index, a GPU or a training is left to the benchmarks.

    raydr plan --measure > here.yaml
    raydr plan here.yaml corpus.passages=1e7
"""

from __future__ import annotations

import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from raydr.config import validate
from raydr.planning.config import EncoderShape
from raydr.version import __version__

DIM = 384
ROWS = 50_000
SCANNED_ROWS = 100_000
LISTS, NPROBE = 256, 48
_TRAINED_ROWS = 39 * LISTS
"""As few as FAISS takes without complaint."""


class _Times(NamedTuple):
    median_s: float
    p99_s: float


def measure(*, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Name -> value and source of every figure measured here; `say` is told what is being measured."""
    from raydr.encoders.text import available_cpus

    cores = available_cpus()
    found: dict[str, float] = {}
    say("embedding")
    found |= _embedding(cores)
    say("the word side")
    found |= _words()
    points = draw(SCANNED_ROWS, seed=1)
    queries = draw(1000, seed=2)
    say("building a shard")
    found |= _building(points[:ROWS])
    say("exact and scalar-quantised scans")
    found |= _scans(points, queries, cores)
    say("inverted lists")
    found |= _inverted(points, queries[:256], cores)
    say("HNSW")
    found |= _graph(points[:ROWS], queries[:256], cores)
    source = f"raydr plan --measure, raydr {__version__}, {cores} cores of {_processor()}"
    return {name: {"value": float(f"{value:.3g}"), "source": source} for name, value in found.items()}


def draw(num: int, *, seed: int, dim: int = DIM) -> Float32[np.ndarray, "row dim"]:
    """Normalised embeddings near a surface of 32 dimensions that is the same for every seed."""
    surface = np.random.default_rng(7).standard_normal((32, dim)).astype(np.float32)
    rng = np.random.default_rng(seed)
    points = np.tanh(rng.standard_normal((num, 32), dtype=np.float32)) @ surface
    points += 0.5 * rng.standard_normal(points.shape, dtype=np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def _embedding(cores: int) -> dict[str, float]:
    from raydr.encoders.text import TextEncoder, TextEncoderConfig
    from raydr.types import Passage, Query

    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(5000)]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(10, 60))) for _ in range(400)]
    passages = [Passage(str(place), text) for place, text in enumerate(texts)]
    encoder = TextEncoder(validate(TextEncoderConfig, {"device": "cpu", "num_threads": cores}, where="measure"))
    lengths = [len(tokens) for tokens in encoder.tokenize_passages(passages)]
    shape = EncoderShape()
    work = sum(2 * shape.weights * n + 4 * shape.layers * shape.hidden * n * n for n in lengths)
    whole = _timed(lambda: encoder.encode_passages(passages), repeats=3)
    read = _timed(lambda: encoder.tokenize_passages(passages), repeats=5)
    alone = TextEncoder(validate(TextEncoderConfig, {"device": "cpu", "num_threads": 1}, where="measure"))
    one = _timed(lambda: alone.encode_queries([Query("q", "how do i join two data frames on a column")]), repeats=50)
    return {
        "cpu_embed_flops": work / whole.median_s / cores,
        "tokenize_per_s": sum(lengths) / read.median_s / cores,
        "query_encode_ms": 1000 * one.median_s,
    }


def _words() -> dict[str, float]:
    from raydr.index.bm25 import BM25
    from raydr.index.config import BM25Config

    rng = random.Random(1)
    vocabulary = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(20_000)]
    texts = [" ".join(rng.choices(vocabulary, k=60)) for _ in range(5000)]
    seconds = _timed(lambda: BM25.build(texts, BM25Config()), repeats=2).median_s
    return {"bm25_build_bytes_per_s": sum(map(len, texts)) / seconds}


def _building(points: np.ndarray) -> dict[str, float]:
    """A shard as `raydr index` builds it, from Parquet to checksums, by one core."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from raydr.artifacts import file_sha256
    from raydr.index.build import ShardPlan, build_shard
    from raydr.index.embedded import EmbeddedCorpus
    from raydr.index.vectors import Vectors, create
    from raydr.stages.embed_on_ray import file_options

    with tempfile.TemporaryDirectory(prefix="raydr-plan-") as scratch:
        folder = Path(scratch)
        ids = [f"p{row}" for row in range(len(points))]
        common = {"passage_id": ids, "position": np.arange(len(points))}
        passages = pa.table({**common, "title": ids, "text": ids})
        column = pa.FixedSizeListArray.from_arrays(pa.array(points.ravel()), DIM)
        pq.write_table(passages, folder / "passages.parquet")
        embeddings = pa.table({**common, "embedding": column})
        pq.write_table(embeddings, folder / "embeddings.parquet", row_group_size=2048, **file_options(is_sparse=False))
        source = EmbeddedCorpus((folder / "passages.parquet",), (folder / "embeddings.parquet",), len(points), DIM)
        Vectors(create("Flat", DIM)).write(folder / "empty.faiss")
        places = iter(range(100))

        def build() -> None:
            plan = ShardPlan(source, 0, len(points), folder / "empty.faiss", folder / f"shard{next(places)}")
            build_shard(plan, 1)

        seconds = _timed(build, repeats=3).median_s
        checksum = _timed(lambda: file_sha256(folder / "shard0" / "vectors.faiss"), repeats=3).median_s
        ratio = (folder / "embeddings.parquet").stat().st_size / (points.nbytes + (8 + len(ids[-1])) * len(ids))
        written = sum(file.stat().st_size for file in (folder / "shard0").iterdir())
    return {
        "index_io_bytes_per_s": (points.nbytes + written) / seconds,
        "checksum_bytes_per_s": points.nbytes / checksum,
        "embedding_file_ratio": ratio,
    }


def _scans(points: np.ndarray, queries: np.ndarray, cores: int) -> dict[str, float]:
    flat = _built("Flat", points)
    one = _searched(flat, queries[:1], 1, repeats=100)
    block = _searched(flat, queries, cores, repeats=3)
    quantised = _built("SQ8", points)
    coded = _searched(quantised, queries[:16], cores, repeats=3)
    return {
        "flat_scan_bytes_per_s": points.nbytes / one.median_s,
        "tail_ratio": max(1.01, one.p99_s / one.median_s),
        "gemm_flops": 2 * points.size * len(queries) / block.median_s / cores,
        "sq_scan_values_per_s": points.size * 16 / coded.median_s / cores,
    }


def _inverted(points: np.ndarray, queries: np.ndarray, cores: int) -> dict[str, float]:
    rates: dict[str, float] = {}
    for name, factory, per_row in (
        ("ivf_flat_bytes_per_s", f"IVF{LISTS},Flat", 4 * DIM),
        ("ivf_sq_values_per_s", f"IVF{LISTS},SQ8", DIM),
        ("ivf_pq_codes_per_s", f"IVF{LISTS},PQ48", 48),
    ):
        start = time.perf_counter()
        index = _built(factory, points)
        if "PQ" in factory:  # the lists' own training, and adding, are small beside it
            distances = 25 * _TRAINED_ROWS * 256 * 48
            rates["pq_train_distances_per_s"] = distances / (time.perf_counter() - start) / cores
        index.nprobe = NPROBE
        # Every list that is visited, counted: lists are not equally long.
        _, visited = index.quantizer.search(queries, NPROBE)
        sizes = np.array([index.invlists.list_size(number) for number in range(LISTS)])
        seconds = _searched(index, queries, cores, repeats=5).median_s
        rates[name] = float(sizes[visited].sum()) * per_row / seconds / cores
    return rates


def _graph(points: np.ndarray, queries: np.ndarray, cores: int) -> dict[str, float]:
    import faiss

    from raydr.index.vectors import create

    faiss.omp_set_num_threads(cores)
    index = create("HNSW32", DIM)
    start = time.perf_counter()
    index.add(points)
    built = time.perf_counter() - start
    index.hnsw.efSearch = 48
    seconds = _searched(index, queries, cores, repeats=10).median_s
    return {
        "hnsw_build_per_s": len(points) / built / cores,
        "hnsw_candidates_per_s": len(queries) * 48 / seconds / cores,
    }


def _built(factory: str, points: np.ndarray) -> Any:
    from raydr.index.vectors import create

    index = create(factory, DIM)
    if not index.is_trained:
        index.train(points[:_TRAINED_ROWS])
    index.add(points)
    return index


def _searched(index: Any, queries: np.ndarray, threads: int, *, repeats: int) -> _Times:
    import faiss

    faiss.omp_set_num_threads(threads)
    return _timed(lambda: index.search(queries, 10), repeats=repeats)


def _timed(call: Callable[[], Any], *, repeats: int) -> _Times:
    """Median and 99th percentile of so many calls, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    times.sort()
    return _Times(statistics.median(times), times[round(0.99 * (len(times) - 1))])


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
