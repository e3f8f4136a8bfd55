"""Fixtures every test may use: one small Ray cluster per session, the shared collections, a tiny corpus.

Notable: tests that start Ray carry `@pytest.mark.ray` and take `ray_cluster`; the cluster is always a new local one,
so a developer's own cluster is never touched. Real collections lie outside the repository (`RAYDR_DATA`, by default
`../shared/data` beside the checkout); a test that needs one is skipped where it is absent.

    pytest -m "not ray and not slow"        the quick part
    make test                               all of it, by two processes: see `pytest_collection_modifyitems`
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).resolve().parent.parent

# Tests never join a cluster that happens to run here, and never reach out for models or telemetry.
os.environ["RAY_ADDRESS"] = "local"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # how long Ray Train takes to see that workers are done
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process more per training; nobody preempts this machine
# With Ray's own 15, workers starve beside the tests of the other process.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112, which is how Ray spells it
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes with a thread for each core would wait for each other

settings.register_profile("raydr", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("raydr")  # a slow machine is no failure

TINY_PASSAGES = {
    "bm25": ("Term weighting", "A ranking function that weighs rare terms more than frequent ones."),
    "cat": ("Cat", "A small furry animal that purrs and hunts mice at night."),
    "compass": ("Compass", "An instrument whose magnetic needle points north and guides sailors."),
    "dog": ("Dog", "A loyal animal that barks, guards the house and follows people."),
    "faiss": ("", "A library for nearest neighbour search among dense vectors."),
    "moon": ("Moon", "The natural satellite of the Earth; its pull causes the tides."),
    "piano": ("Piano", "A keyboard instrument whose hammers strike strings."),
    "ray": ("Cluster computing", "A system that runs Python functions on many machines."),
    "sun": ("Sun", "The star at the centre of the planets, source of light and heat."),
    "wheat": ("Wheat", "A cereal grain that is ground into flour and baked into bread."),
}
TINY_QUERIES = {
    "q1": ("which pet catches mice", {"cat": 2, "dog": 1}),
    "q2": ("why does the sea rise and fall", {"moon": 1}),
    "q3": ("find similar embeddings quickly", {"faiss": 1}),
}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Says which tests must run in one process where `make test` has two: `-n 2 --dist loadgroup`.

    All that start Ray are one group, because of two clusters on a machine Ray may take the wrong one; its first tests
    are the first of all, because it takes longest. Every other file is a group of its own, which makes its fixtures
    once.
    """
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else item.nodeid.split("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Stops where pytest-xdist did not see the groups, as under pytest 9.2.0: Ray's tests would fail for no reason."""
    items = session.items
    if session.config.getoption("loadgroup", False) and not all("@" in item.nodeid for item in items):
        raise pytest.UsageError("pytest-xdist has put no test into a group; see the pin of pytest in pyproject.toml")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A local Ray cluster of two CPUs, shared by the session; gives the address that jobs are submitted to."""
    import ray

    context = ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=True,
        dashboard_port=0,
        object_store_memory=300_000_000,
        _system_config={"metrics_report_interval_ms": 5000},  # what tests that read them wait for
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    yield f"http://{context.dashboard_url}"
    ray.shutdown()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real collections; skips where there is none."""
    path = Path(os.environ.get("RAYDR_DATA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no collections at {path} (set RAYDR_DATA)")
    return path


@pytest.fixture(scope="session")
def collection(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """`collection("scifact")` is that collection's folder; skips where it is absent."""

    def find(name: str) -> Path:
        path = request.getfixturevalue("data_dir") / name
        if not path.is_dir():
            pytest.skip(f"no collection {name!r} at {path}")
        return path

    return find


@pytest.fixture
def tiny_beir(tmp_path: Path) -> Path:
    """A BEIR folder of ten passages (one without a title) and three judged queries (one graded)."""
    return write_beir(tmp_path / "tiny")


def write_beir(folder: Path) -> Path:
    """Writes the tiny corpus as a BEIR folder with a `test` split."""
    (folder / "qrels").mkdir(parents=True)
    passages = [{"_id": id_, "title": title, "text": text} for id_, (title, text) in TINY_PASSAGES.items()]
    queries = [{"_id": id_, "text": text} for id_, (text, _) in TINY_QUERIES.items()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages), encoding="utf-8")
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries), encoding="utf-8")
    judgements = [f"{q}\t{p}\t{grade}\n" for q, (_, grades) in TINY_QUERIES.items() for p, grade in grades.items()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judgements), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def causal_lm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`causal_lm("Llama")` is the folder of a small random network of that kind."""
    from tests.causal_lms import write_causal_lm

    made: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_causal_lm(kind, tmp_path_factory.mktemp("causal_lm") / kind)
        return made[kind]

    return build


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For a network so small, threads that wait for each other take longer than the work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
