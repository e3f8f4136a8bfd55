"""Every batch verb loses a worker, its driver or a whole node to SIGKILL in the middle of its work, and goes on.

A local Ray cluster: a head without CPUs, where the drivers are, and two nodes of two CPUs each. A verb runs undisturbed
once; then, for each kind of death, it runs again in a copy of the folder, the victim gets SIGKILL when half of the work
is there, and what comes out is compared with the undisturbed artifact. A driver's command is given again at once; a
node is replaced by a new one five seconds after its death, as Kubernetes does it. Only processes that this script's own
cluster and drivers have started are killed.

    python benchmarks/kills.py --data DIR --work /tmp/kills --out benchmarks/kills
    python benchmarks/kills.py --data DIR --work /tmp/kills --out benchmarks/kills --only embed/node train
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from interleaved import markdown, write
from kill_checks import compared
from ray.cluster_utils import Cluster

from raydr.artifacts import open_artifact
from raydr.errors import ArtifactError
from raydr.train.metrics import METRICS, read_metrics

REPOSITORY = Path(__file__).resolve().parent.parent
REPLACED_AFTER_S = 5.0
_TIMEOUT_S = 400.0
_POLL_S = 0.02


# ---- what is run, what of it is killed, how far it is -------------------------------------------------------------


def num_bytes(folder: Path) -> int:
    """Of the files that belong to the artifact."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() and not file.name.startswith(".") else 0
        except FileNotFoundError:  # renamed since
            continue
    return total


def num_files(pattern: str) -> Callable[[Path], int]:
    return lambda folder: len(list(folder.glob(pattern)))


def num_steps(folder: Path) -> int:
    return max((int(record["step"]) for record in read_metrics(folder / METRICS)), default=0)


@dataclass(frozen=True)
class Verb:
    """A verb of the command line, and where its work can be seen."""

    name: str
    folder: str
    """Of its artifact."""
    victims: dict[str, str] = field(default_factory=dict)
    """What the table calls a worker -> what its process is called."""
    progress: Callable[[Path], float] | None = None
    """How far its artifact is; None where nothing can be seen before the end, and half of the time is waited for."""
    config: str = "jobs/configs/zero_shot.yaml"
    settings: tuple[str, ...] = ()
    also_removed: tuple[str, ...] = ()
    """Folders beside the artifact that the verb makes as well."""


def verbs(work: Path) -> list[Verb]:
    on_ray = {"task": r"ray::build_shard"}
    return [
        Verb(
            "ingest",
            "split/corpus",  # cut into small passages, to have enough to do; the others take the documents whole
            progress=num_bytes,
            settings=("out={out}/split", "data.split_documents={max_tokens: 24, overlap_tokens: 8}"),
            also_removed=("split",),
        ),
        Verb(
            "embed",
            "embed",
            {
                "encoder actor": r"ray::.*_EmbedPassages",
                "data worker": r"ray::(?!.*Act|.*Tally|.*Agent|.*Split|IDLE|_).+",
            },
            num_files("embeddings/*.parquet"),
            settings=("embed.passages_per_block=32", "embed.num_workers=[2, 2]", "embed.worker_cpus=1"),
        ),
        Verb(
            "index",
            "index",
            on_ray,
            num_files("shards/[0-9]*/shard.json"),
            settings=("index.factory=HNSW64", "index.ef_construction=1000", "index.num_shards=16", "index.bm25={}"),
        ),
        Verb(
            "search",
            "search",
            {"encoder actor": r"ray::_Worker", "shard actor": r"ray::_ShardActor"},
            num_bytes,
            settings=("search.query_batch=2", "search.k=100", "search.mode=hybrid", "search.shard_cpus=0.2"),
        ),
        Verb(
            "mine",
            "examples",
            {"encoder actor": r"ray::_Worker", "shard actor": r"ray::_ShardActor"},
            num_bytes,
            settings=(
                "mine.split=train",
                "mine.fraction=0.95",
                "mine.sources=[model, bm25]",
                "search.query_batch=16",
                "search.shard_cpus=0.2",
            ),
            also_removed=("queries_train",),
        ),
        Verb(
            "rerank",
            "rerank",
            {"reranker actor": r"ray::MapWorker.*_Worker"},
            settings=(
                "rerank.depth=5",
                "rerank.queries_per_block=4",
                "rerank.num_workers=[2, 2]",
                "rerank.worker_cpus=1",
                "rerank.reranker.import_path=raydr.encoders.cross_encoder:CrossEncoderReranker",
                f"rerank.reranker.args={{model: '{work / 'ranker'}', max_pair_tokens: 96, precision: float32}}",
            ),
        ),
        Verb("evaluate", "evaluate", settings=("evaluate.measures=[nDCG@10, AP, R@100]",)),
        Verb(
            "train",
            "train",
            {"training worker": r"ray::RayTrainWorker"},
            num_steps,
            config="jobs/configs/contrastive.yaml",
            settings=(
                "mine.base_index={out}/index",
                "mine.split=train",
                "method.args.num_negatives=1",
                "train.evaluate_every=0",
                "train.patience=0",
                "train.num_workers=2",
                "train.worker_cpus=1",
                "train.batch_size=8",
                "train.max_steps=40",
                "train.checkpoint_every=6",
                "train.log_every=1",
                "train.precision=float32",
            ),
            also_removed=("method",),
        ),
    ]


# ---- the cluster ----------------------------------------------------------------------------------------------------


class Nodes:
    """A head without CPUs and two nodes of two."""

    def __init__(self) -> None:
        # A folder of its own: what Ray calls the machine's current cluster stays as it was.
        self.folder = tempfile.mkdtemp(prefix="rk")
        head = {"num_cpus": 0, "object_store_memory": 150_000_000, "temp_dir": self.folder}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []
        self.drivers: list[subprocess.Popen[bytes]] = []
        self.fill()
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")

    def fill(self) -> None:
        while len(self.nodes) < 2:
            self.nodes.append(self.cluster.add_node(num_cpus=2, object_store_memory=300_000_000))

    def settle(self) -> None:
        """Waits until Ray has forgotten dead nodes, so that the next run starts on a whole cluster."""
        self.fill()
        deadline = time.monotonic() + 90
        while sum(node["Alive"] for node in ray.nodes()) != 3 and time.monotonic() < deadline:
            time.sleep(0.5)

    def close(self) -> None:
        for driver in self.drivers:
            driver.kill()
        ray.shutdown()
        self.cluster.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "RAY_ADDRESS": self.cluster.address,
            "PYTHONPATH": str(REPOSITORY),
            "HF_HUB_OFFLINE": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def processes(self, node: Any) -> list[psutil.Process]:
        """The node's raylet, then all that it started."""
        raylets = [psutil.Process(info.process.pid) for info in node.all_processes["raylet"]]
        return [*raylets, *(child for raylet in raylets for child in raylet.children(recursive=True))]

    def find(self, title: str) -> tuple[Any, psutil.Process, str] | None:
        """A worker of that name, its node, and its whole name."""
        for node in self.nodes:
            for process in self.processes(node):
                try:
                    name = " ".join(process.cmdline()).strip()
                except psutil.Error:
                    continue
                if re.match(title, name):
                    return node, process, name
        return None

    def kill_node(self, node: Any) -> None:
        self.nodes.remove(node)
        for process in self.processes(node):
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self.cluster.remove_node(node, allow_graceful=False)


# ---- one run --------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a run came to."""

    verb: str
    killed: str
    at: float = 0.0
    """Share of the work (or of the time) that was done."""
    total_s: float = 0.0
    next_progress_s: float | None = None
    extra_s: float = 0.0
    same: str = ""
    note: str = ""


class Run:
    """A verb in a folder, watched. Its time begins when it is started."""

    def __init__(self, verb: Verb, nodes: Nodes, data: str, out: Path) -> None:
        self.verb, self.nodes, self.out = verb, nodes, out
        self.artifact, self.log = out / verb.folder, out / f"{verb.name}.log"
        settings = [setting.replace("{out}", str(out)) for setting in verb.settings]
        common = [f"data.path={data}", "data.split=test", f"out={out}", "runtime=ray"]
        method = ["method.args.max_passage_tokens=48", "method.args.precision=float32", "method.args.num_threads=1"]
        self.command = [sys.executable, "-m", "raydr.cli", verb.name, verb.config, *common, *method, *settings]
        self.started = 0.0

    def start(self) -> subprocess.Popen[bytes]:
        self.started = self.started or time.monotonic()
        with self.log.open("ab") as stream:
            driver = subprocess.Popen(
                self.command,
                cwd=REPOSITORY,
                env=self.nodes.environment,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self.nodes.drivers.append(driver)
        return driver

    def progress(self) -> float:
        return float(self.verb.progress(self.artifact)) if self.verb.progress is not None else 0.0

    def is_begun(self) -> bool:
        return (self.artifact / ".in_progress").exists()

    def wait(self, driver: subprocess.Popen[bytes]) -> None:
        try:
            code = driver.wait(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            driver.kill()
            raise SystemExit(f"{self.verb.name}: not done in {_TIMEOUT_S:.0f} s\n{self.tail()}") from None
        if code:
            raise RuntimeError(self.tail())

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-1500:]


def undisturbed(run: Run) -> dict[str, float]:
    """Seconds in all and before the artifact is begun, and its progress at the end."""
    driver = run.start()
    begun = 0.0
    while driver.poll() is None:
        if not begun and run.is_begun():
            begun = time.monotonic() - run.started
        time.sleep(_POLL_S)
    run.wait(driver)
    return {"total_s": time.monotonic() - run.started, "begun_s": begun, "progress": run.progress()}


def disturbed(run: Run, base: dict[str, float], killed: str) -> Outcome:
    outcome = Outcome(run.verb.name, killed)
    driver = run.start()
    _await_the_middle(run, driver, base, outcome)
    where = next(iter(run.verb.victims.values()), "")  # the node that has a worker of the first kind
    if killed == "driver":
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    else:
        title = where if killed == "node" else run.verb.victims[killed]
        node, process, outcome.note = _victim(run, driver, title)
        if killed == "node":
            run.nodes.kill_node(node)
        else:
            process.send_signal(signal.SIGKILL)
    at_kill = time.monotonic()
    if killed == "driver":
        _expect_unfinished(run)
        driver = run.start()
    replaced = killed != "node"
    lowest, last = run.progress(), time.monotonic()
    while driver.poll() is None:
        if not replaced and time.monotonic() - at_kill >= REPLACED_AFTER_S:
            run.nodes.fill()
            replaced = True
        now = run.progress()
        if run.verb.progress is not None and outcome.next_progress_s is None and now > lowest:
            outcome.next_progress_s = time.monotonic() - at_kill
        lowest, last = min(lowest, now), time.monotonic()
        if last - at_kill > _TIMEOUT_S:
            break
        time.sleep(_POLL_S)
    run.wait(driver)
    outcome.total_s = time.monotonic() - run.started
    outcome.extra_s = outcome.total_s - base["total_s"]
    return outcome


def _await_the_middle(run: Run, driver: subprocess.Popen[bytes], base: dict[str, float], outcome: Outcome) -> None:
    half = (base["total_s"] - base["begun_s"]) / 2
    begun = None
    while True:
        if driver.poll() is not None:
            raise SystemExit(f"{run.verb.name}: ended before it could be disturbed\n{run.tail()}")
        if begun is None and run.is_begun():
            begun = time.monotonic()
        if run.verb.progress is not None:
            outcome.at = run.progress() / base["progress"]
            if outcome.at >= 0.5:
                return
        elif begun is not None and time.monotonic() - begun >= half:
            outcome.at = 0.5
            return
        time.sleep(_POLL_S / 4)


def _victim(run: Run, driver: subprocess.Popen[bytes], title: str) -> tuple[Any, psutil.Process, str]:
    while driver.poll() is None:
        if (found := run.nodes.find(title)) is not None:
            return found
    raise SystemExit(f"{run.verb.name}: no process like {title!r} was seen before the end\n{run.tail()}")


def _expect_unfinished(run: Run) -> None:
    try:
        open_artifact(run.artifact)
    except ArtifactError as error:
        if "did not finish" in str(error):
            return
        raise
    raise SystemExit(f"{run.artifact}: opens although its step was killed")


# ---- all of it ------------------------------------------------------------------------------------------------------


def prepare(work: Path) -> None:
    """A cross-encoder whose head is new, the same for every process."""
    import torch

    from raydr.encoders.cross_encoder import PairConfig, load_cross_encoder, save_cross_encoder

    if (work / "ranker").exists():
        return
    torch.manual_seed(0)
    config = PairConfig(model="minilm")
    save_cross_encoder(load_cross_encoder(config), config.model, work / "ranker")


def cut(source: Path, target: Path, num_passages: int) -> Path:
    """The collection with its judged passages and as many others as there is room for."""
    if target.exists():
        return target
    shutil.copytree(source / "qrels", target / "qrels")
    shutil.copy(source / "queries.jsonl", target)
    judged = {line.split("\t")[1] for file in (source / "qrels").glob("*.tsv") for line in file.open()}
    plain = source / "corpus.jsonl"
    with plain.open() if plain.exists() else gzip.open(f"{plain}.gz", "rt") as stream:
        lines = list(stream)
    lines.sort(key=lambda line: str(json.loads(line)["_id"]) not in judged)  # stable
    (target / "corpus.jsonl").write_text("".join(lines[: max(num_passages, len(judged) - 1)]))
    return target


def copied(base: Path, target: Path, verb: Verb) -> Path:
    """The folder as it was before the verb."""
    shutil.rmtree(target, ignore_errors=True)
    left_out = {verb.folder, *verb.also_removed}
    shutil.copytree(base, target, ignore=lambda folder, _: left_out if Path(folder) == base else set())
    return target


def tried(run: Run, base: Path, bases: dict[str, dict[str, float]], killed: str) -> Outcome:
    try:
        outcome = disturbed(run, bases[run.verb.name], killed)
        outcome.same = compared(run.verb.name, run.artifact, base / run.verb.folder)
        return outcome
    except (RuntimeError, SystemExit) as error:
        kept = run.out.with_name(f"failed-{run.verb.name}-{killed}".replace(" ", "-"))
        shutil.copytree(run.out, kept, dirs_exist_ok=True)
        return Outcome(run.verb.name, killed, same="FAILED", note=str(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a BEIR folder with the splits train and test")
    parser.add_argument("--passages", type=int, default=1500, help="so many of its passages, those judged among them")
    parser.add_argument("--work", type=Path, required=True, help="a new folder for the runs")
    parser.add_argument("--out", type=Path, required=True, help="OUT.md and OUT.json are written")
    parser.add_argument("--only", nargs="*", default=[], help="VERB or VERB/WHAT (driver, node, a worker), to run less")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    if (work / "base").exists():  # of which `train` has replaced the examples that `mine` made
        raise SystemExit(f"{work}: holds an earlier run; give a new folder")
    work.mkdir(parents=True, exist_ok=True)
    prepare(work)
    data = str(cut(arguments.data.resolve(), work / f"data-{arguments.passages}", arguments.passages))
    base_folder = work / "base"
    base_folder.mkdir()
    bases: dict[str, dict[str, float]] = {}
    outcomes: list[Outcome] = []
    nodes = Nodes()
    try:
        for verb in verbs(work):
            wanted = [*verb.victims, "driver", *(["node"] if verb.victims else [])]
            if arguments.only:
                wanted = [w for w in wanted if {verb.name, f"{verb.name}/{w}"} & set(arguments.only)]
            bases[verb.name] = undisturbed(Run(verb, nodes, data, base_folder))
            print(f"{verb.name}, undisturbed: {bases[verb.name]['total_s']:.1f} s", file=sys.stderr, flush=True)
            for killed in wanted:
                nodes.settle()
                run = Run(verb, nodes, data, copied(base_folder, work / "case", verb))
                outcome = tried(run, base_folder, bases, killed)
                outcomes.append(outcome)
                print(asdict(outcome), file=sys.stderr, flush=True)
    finally:
        nodes.close()
    write(
        arguments.out, "Kills", table(outcomes, bases), {"undisturbed": bases, "kills": [asdict(o) for o in outcomes]}
    )


def table(outcomes: list[Outcome], times: dict[str, dict[str, float]]) -> str:
    columns = ["verb", "undisturbed s", "killed", "work done", "next progress s", "extra s", "artifact"]
    rows = [
        [
            outcome.verb,
            f"{times[outcome.verb]['total_s']:.0f}",
            outcome.killed,
            f"{outcome.at:.0%}",
            "" if outcome.next_progress_s is None else f"{outcome.next_progress_s:.1f}",
            f"{outcome.extra_s:.0f}",
            outcome.same,
        ]
        for outcome in outcomes
    ]
    median = statistics.median([outcome.extra_s for outcome in outcomes] or [0.0])
    return markdown(columns, rows) + f"\nMedian of the extra seconds: {median:.0f}.\n"


if __name__ == "__main__":
    main()
