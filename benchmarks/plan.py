"""Does `raydr plan` say what happens? Predictions beside runs, on this machine.

    raydr plan --measure > here.yaml
    python benchmarks/plan.py texts   --units here.yaml --sizes 2000 10000 50000 --rounds 3 --out results/plan-texts
    python benchmarks/plan.py vectors --units here.yaml --sizes 100000 300000 1000000 --out results/plan-vectors
    python benchmarks/plan.py fanout  --deployments 1 2 4 8 16 --rounds 5 --out results/plan-fanout

texts: passages of the collections in `RAYDR_DATA`, each once, embedded with MiniLM, indexed as Flat and searched one
    query after the other
vectors: the index and its search alone, over vectors drawn as in benchmarks/search.py, for several kinds of index; no
    text is behind them, so nothing is embedded
fanout: what one more Shard deployment costs a query: an Ingress on Ray Serve that asks D deployments at once, each of
    which answers ten hits at once without searching; the slope over D is `serve_call_ms`

Without `--units` the figures of raydr/planning/units.yaml are used, which are of another day's machine. Every run is a
process of its own, start and imports not counted; times are the median of the rounds. The mean tokens and bytes of the
texts are given to the plan, as they would be by somebody who knows the corpus. raydr builds shards one after the other
here, not on Ray, so reading and writing is one core's and adding that of all. Memory is the peak of the resident set
above that of a process which has only imported the same; mapped files that were read count.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from interleaved import in_child, markdown, peak_rss_mib, spread, write

HERE = Path(__file__).parent
DATA = Path(os.environ.get("RAYDR_DATA", HERE.parent.parent / "shared" / "data"))
COLLECTIONS = ["dl20", "dl21", "dl22_unjudged", "medquad", "scifact", "cacm", "fnc1", "cranfield", "fetaqa", "mtrag"]
FACTORIES = ["Flat", "SQ8", "HNSW32", "IVF1024,SQ8", "IVF1024,PQ48"]
NPROBE = 16
QUERIES = 50
K = 10


# ---- what a child does ------------------------------------------------------------------------------------------


def child(task: dict[str, Any]) -> dict[str, Any]:
    """One step in this fresh process: its seconds, and its memory above that of the imports."""
    from raydr.artifacts import open_artifact
    from raydr.config import Component
    from raydr.data.corpus import Corpus
    from raydr.encoders.factory import EncoderFactory
    from raydr.index.build import build_index
    from raydr.index.config import IndexConfig, SearchParameters
    from raydr.index.reader import IndexReader
    from raydr.stages.config import EmbedConfig
    from raydr.stages.embed import embed_corpus

    folder, base = Path(task["folder"]), peak_rss_mib()
    found: dict[str, Any] = {}
    if task["do"] == "embed":
        method = Component(import_path="raydr.methods.zero_shot:ZeroShot")
        build = EncoderFactory(method)
        out, corpus = Path(task["out"]), Corpus.open(folder / "corpus")
        artifact = embed_corpus(corpus, build, EmbedConfig(), out, use_ray=False, method=method)
        details = artifact.manifest.details
        found |= {"seconds": details["seconds"], "tokens": details["num_tokens"], "bytes": _size(out)}
        base = 0.0  # the plan's figure is of the whole process
    elif task["do"] == "index":
        config = IndexConfig(factory=task["factory"], bm25=None, recall=None)
        out, corpus = Path(task["out"]), Corpus.open(folder / "corpus")
        start = time.perf_counter()
        build_index(corpus, open_artifact(folder / "embed"), config, out, use_ray=False)
        found |= {"seconds": time.perf_counter() - start, "bytes": _size(out / "shards")}
        found["vector_bytes"] = sum(file.stat().st_size for file in out.rglob("vectors.faiss"))
    elif task["do"] == "search":
        import numpy as np

        reader = IndexReader.open(Path(task["index"]), num_threads=1)
        queries = np.load(folder / "queries.npy")
        times = []
        effort = SearchParameters(nprobe=NPROBE)
        for place in range(len(queries)):
            start = time.perf_counter()
            reader.search(queries[place : place + 1], K, parameters=effort)
            times.append(time.perf_counter() - start)
        times = times[len(times) // 5 :]  # the first touch the files
        found["seconds"] = statistics.median(times)
    return found | {"mib": peak_rss_mib() - base}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# ---- inputs -----------------------------------------------------------------------------------------------------


def write_texts(folder: Path, num: int) -> dict[str, float]:
    """A corpus of `num` passages in `folder/corpus` with queries, and what the plan is told about it."""
    from raydr.data.config import DataConfig
    from raydr.data.ingest import ingest
    from raydr.encoders.text import TextEncoder
    from raydr.types import Passage

    rows: list[dict[str, str]] = []
    for name in COLLECTIONS:
        with gzip.open(DATA / name / "corpus.jsonl.gz", "rt", encoding="utf-8") as stream:
            rows += [json.loads(line) for line in stream]
    random.Random(0).shuffle(rows)
    if len(rows) < num:
        raise SystemExit(f"--sizes: the collections in {DATA} have {len(rows)} passages, {num} were asked for")
    rows = [
        {"_id": f"p{place:07d}", "title": row.get("title") or "", "text": row["text"]}
        for place, row in enumerate(rows[:num])
        if row["text"]
    ]
    source = folder / "source"
    source.mkdir(parents=True)
    with (source / "corpus.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    corpus = ingest(DataConfig(path=str(source)), folder / "corpus")
    encoder = TextEncoder(TextEncoder.Config())
    sample = [
        Passage(row["_id"], row["text"], row["title"]) for row in random.Random(1).sample(rows, min(1000, len(rows)))
    ]
    tokens = encoder.tokenize_passages(sample)
    text_bytes = sum(len((row["title"] + row["text"]).encode()) for row in rows) / len(rows)
    return {
        "passages": corpus.num_passages,
        "tokens_per_passage": sum(map(len, tokens)) / len(tokens),
        "text_bytes": text_bytes,
        "id_bytes": 8,
    }


def write_vectors(folder: Path, num: int) -> dict[str, float]:
    """`num` drawn vectors as an embedded corpus in `folder`, whose texts are their ids."""
    from search import build_raydr, draw

    build_raydr(folder, draw(num, 1), "Flat", 1)
    return {"passages": num, "text_bytes": 7, "id_bytes": 7}


# ---- prediction and run -----------------------------------------------------------------------------------------


def predicted(options: argparse.Namespace, corpus: dict[str, float], factory: str) -> dict[str, Any]:
    """The lines of a plan for one node of this machine's cores."""
    from raydr.config import load
    from raydr.planning.config import PlanConfig
    from raydr.planning.plan import make_plan

    given = [f"corpus.{name}={value}" for name, value in corpus.items()]
    given += [f"index.factory={factory}", f"index.search.nprobe={NPROBE}", "index.bm25=null", "working_share=1"]
    given += [f"node.cores={options.threads}", "within_hours=1000000", "search.p99_ms=1000000"]
    plan = make_plan(load(PlanConfig, options.units, given))
    return {stage.name: {line.name: line.value for line in stage.lines} for stage in plan.stages}


def index_rows(name: str, lines: dict[str, Any], runs: list[dict[str, Any]], threads: int) -> list[list[Any]]:
    planned = lines["index"]
    seconds = planned["io_s"] + (planned.get("add_s", 0) + planned.get("train_s", 0)) / threads
    seconds += 3600 * (planned.get("sample_h", 0) + planned["compare_h"] + planned["checksum_h"])
    one_shard = planned["memory_per_node"] / planned["shards_at_once"]
    return [
        [name, "build", "s", seconds, [run["seconds"] for run in runs]],
        [name, "memory of building", "MiB", one_shard / 2**20, [run["mib"] for run in runs]],
        [name, "vectors on disk", "MiB", planned["index_bytes"] / 2**20, [run["vector_bytes"] / 2**20 for run in runs]],
        [name, "index on disk", "MiB", planned["disk"] / 2**20, [run["bytes"] / 2**20 for run in runs]],
    ]


def search_rows(name: str, lines: dict[str, Any], runs: list[dict[str, Any]]) -> list[list[Any]]:
    planned = lines["search"]
    return [
        [name, "one query", "queries/s", 1000 / planned["query_ms"], [1 / run["seconds"] for run in runs]],
        [name, "memory of searching", "MiB", planned["copy_bytes"] / 2**20, [run["mib"] for run in runs]],
    ]


def texts(options: argparse.Namespace, folder: Path) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for size in options.sizes:
        here = folder / str(size)
        lines = predicted(options, write_texts(here, size), "Flat")
        runs: dict[str, list[dict[str, Any]]] = {"embed": [], "index": [], "search": []}
        for number in range(options.rounds):
            out = here / f"embed-{number}"
            runs["embed"].append(run(here, "embed", out=str(out)))
            if number == 0:
                out.rename(here / "embed")
                write_queries(here)
            index = here / f"index-{number}"
            runs["index"].append(run(here, "index", out=str(index), factory="Flat"))
            runs["search"].append(run(here, "search", index=str(index)))
        planned, name = lines["embed"], f"{size:,} texts"
        rows += [
            [name, "embed", "s", 3600 * planned["node_hours"], [own["seconds"] for own in runs["embed"]]],
            [name, "tokens", "", planned["tokens"], [own["tokens"] for own in runs["embed"]]],
            [name, "memory of embedding", "MiB", planned["memory_per_node"] / 2**20, [r["mib"] for r in runs["embed"]]],
            [name, "embeddings on disk", "MiB", planned["disk"] / 2**20, [r["bytes"] / 2**20 for r in runs["embed"]]],
        ]
        rows += index_rows(name, lines, runs["index"], options.threads) + search_rows(name, lines, runs["search"])
        shutil.rmtree(here)
    return rows


def vectors(options: argparse.Namespace, folder: Path) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for size in options.sizes:
        here = folder / str(size)
        corpus = write_vectors(here, size)
        write_queries(here)
        for factory in options.factories:
            runs: dict[str, list[dict[str, Any]]] = {"index": [], "search": []}
            for number in range(options.rounds):
                index = here / f"{factory.replace(',', '_')}-run-{number}"
                runs["index"].append(run(here, "index", out=str(index), factory=factory))
                runs["search"].append(run(here, "search", index=str(index)))
                shutil.rmtree(index)
            lines, name = predicted(options, corpus, factory), f"{size:,} vectors, {factory}"
            rows += index_rows(name, lines, runs["index"], options.threads) + search_rows(name, lines, runs["search"])
    return rows


def write_queries(folder: Path) -> None:
    import numpy as np
    from search import draw

    np.save(folder / "queries.npy", draw(QUERIES, 2))


def run(folder: Path, do: str, **more: str) -> dict[str, Any]:
    return in_child(__file__, ["child", "--task", json.dumps({"folder": str(folder), "do": do, **more})])


def compare(options: argparse.Namespace, folder: Path) -> None:
    rows = {"texts": texts, "vectors": vectors}[options.workload](options, folder)
    table = []
    for name, what, unit, planned, measured in rows:
        ratio = statistics.median(measured) / planned
        label = f"{what}, {unit}" if unit else what
        table.append([name, label, spread([planned]).split(" (")[0], spread(measured), f"{ratio:.2f}"])
    columns = ["what", "figure", "planned", "measured", "measured / planned"]
    results = [dict(zip(("what", "figure", "unit", "planned", "measured"), row, strict=True)) for row in rows]
    units = f"Figures: {options.units or 'raydr/planning/units.yaml'}. One query at a time on one core, k {K}, nprobe "
    units += f"{NPROBE}.\n\n"
    write(options.out, f"The planner: {options.workload}", units + markdown(columns, table), results)


# ---- the cost of a call -----------------------------------------------------------------------------------------


def fanout(options: argparse.Namespace) -> None:
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    import numpy as np
    import ray
    from ray import serve

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Part:
        async def search(self, embeddings: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            return np.zeros((len(embeddings), k), dtype=np.float32), np.zeros((len(embeddings), k), dtype=np.int64)

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Ingress:
        def __init__(self, *parts: Any) -> None:
            self._parts = parts

        async def fan(self, num: int, repeats: int) -> float:
            """Milliseconds of the median of so many queries to the first `num` parts, one after the other."""
            query, times = np.zeros((1, 384), dtype=np.float32), []
            for _ in range(repeats):
                start = time.perf_counter()
                await asyncio.gather(*(part.search.remote(query, K) for part in self._parts[:num]))
                times.append(time.perf_counter() - start)
            return 1000 * statistics.median(times)

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        parts = [Part.options(name=f"Part{number}").bind() for number in range(max(options.deployments))]
        handle = serve.run(Ingress.bind(*parts), route_prefix=None)
        times = asyncio.run(_asked(handle, options))
    finally:
        ray.shutdown()
    medians = [statistics.median(times[num]) for num in options.deployments]
    slope, fixed = np.polyfit(options.deployments, medians, 1) if len(medians) > 1 else (medians[0], 0.0)
    table = markdown(["deployments asked", "ms a query"], [[str(num), spread(own)] for num, own in times.items()])
    note = f"\nA straight line through the medians: {fixed:.2f} ms and {slope:.2f} ms for each deployment.\n"
    write(options.out, "The planner: asking deployments", table + note, {"ms": times, "slope": slope, "fixed": fixed})


async def _asked(handle: Any, options: argparse.Namespace) -> dict[int, list[float]]:
    """Milliseconds by number of deployments; in a loop, which Serve's handles want in this mode."""
    from ray import serve

    for num in options.deployments:
        await handle.fan.remote(num, 5)
    times: dict[int, list[float]] = {num: [] for num in options.deployments}
    for _ in range(options.rounds):
        for num in options.deployments:
            times[num].append(await handle.fan.remote(num, options.repeats))
    await serve.shutdown_async()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=["texts", "vectors", "fanout", "child"])
    parser.add_argument("--units", type=Path, help="what raydr plan --measure printed")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2000, 10_000, 50_000])
    parser.add_argument("--factories", nargs="+", default=FACTORIES)
    parser.add_argument("--deployments", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("results/plan"))
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.workload == "child":
        print(json.dumps(child(json.loads(options.task))))
    elif options.workload == "fanout":
        fanout(options)
    else:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
        with tempfile.TemporaryDirectory(prefix="raydr-plan-") as scratch:
            compare(options, Path(scratch))


if __name__ == "__main__":
    main()
