"""The batcher and the version cache: what arrives while one batch runs is the next one; one load per version."""

import asyncio
import threading

import pytest

from raydr.serve.batching import Batcher
from raydr.serve.versions import IndexRef, VersionCache


class Model:
    """Doubles its inputs; runs only while its gate is open, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        assert self.gate.wait(10)
        if any(item < 0 for item in items):
            raise ValueError("negative")
        return [2 * item for item in items]


async def _submit_all(batcher: Batcher, model: Model, items: list[tuple[int, int, str]]) -> list:
    """A first item keeps the model busy until all the others wait."""
    model.gate.clear()
    first = asyncio.create_task(batcher.submit(100, cost=1, group="a"))
    while not model.batches:
        await asyncio.sleep(0.001)
    tasks = [asyncio.create_task(batcher.submit(item, cost=cost, group=group)) for item, cost, group in items]
    await asyncio.sleep(0.01)
    model.gate.set()
    return await asyncio.gather(first, *tasks, return_exceptions=True)


def test_a_lone_item_runs_at_once_and_alone():
    model = Model()
    assert asyncio.run(Batcher(model, budget=10).submit(3, cost=1, group="a")) == 6
    assert model.batches == [[3]]


def test_what_waits_is_one_batch_up_to_the_budget():
    model = Model()
    results = asyncio.run(_submit_all(Batcher(model, budget=4), model, [(n, 1, "a") for n in range(6)]))
    assert results == [200, 0, 2, 4, 6, 8, 10]
    assert model.batches == [[100], [0, 1, 2, 3], [4, 5]]


def test_groups_never_share_a_batch_and_keep_their_order():
    model = Model()
    waiting = [(1, 1, "a"), (2, 1, "b"), (3, 1, "a"), (4, 1, "b")]
    asyncio.run(_submit_all(Batcher(model, budget=10), model, waiting))
    assert model.batches == [[100], [1, 3], [2, 4]]


def test_an_item_beyond_the_budget_runs_alone_and_is_not_overtaken_for_ever():
    model = Model()
    waiting = [(1, 50, "a"), (2, 1, "a"), (3, 1, "a")]
    assert asyncio.run(_submit_all(Batcher(model, budget=10), model, waiting)) == [200, 2, 4, 6]
    assert model.batches == [[100], [1], [2, 3]]


def test_an_error_reaches_its_batch_and_no_other():
    model = Model()
    results = asyncio.run(_submit_all(Batcher(model, budget=2), model, [(-1, 1, "a"), (1, 1, "a"), (2, 1, "a")]))
    assert [type(result) for result in results] == [int, ValueError, ValueError, int]


def test_a_cancelled_caller_is_not_computed_for():
    async def scenario() -> Model:
        model = Model()
        batcher = Batcher(model, budget=10)
        model.gate.clear()
        first = asyncio.create_task(batcher.submit(1, cost=1, group="a"))
        while not model.batches:
            await asyncio.sleep(0.001)
        second = asyncio.create_task(batcher.submit(2, cost=1, group="a"))
        third = asyncio.create_task(batcher.submit(3, cost=1, group="a"))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.sleep(0.01)
        model.gate.set()
        assert await first == 2
        assert await third == 6
        return model

    assert asyncio.run(scenario()).batches == [[1], [3]]


def test_the_batcher_reports_what_it_ran():
    reports = []
    model = Model()
    batcher = Batcher(
        model, budget=4, on_batch=lambda group, items, cost, waits, queue: reports.append((items, cost, queue))
    )
    asyncio.run(_submit_all(batcher, model, [(n, 2, "a") for n in range(3)]))
    assert reports == [([100], 1, 0), ([0, 1], 4, 1), ([2], 2, 0)]


def _ref(version: str) -> IndexRef:
    return IndexRef("/somewhere", version, "encoder")


def test_callers_of_a_missing_version_share_one_load():
    loads = []

    def load(ref: IndexRef) -> str:
        loads.append(ref.version)
        return ref.version.upper()

    async def scenario() -> list[str]:
        cache = VersionCache(load, keep=2)
        return await asyncio.gather(*(cache.get(_ref("a")) for _ in range(5)))

    assert asyncio.run(scenario()) == ["A"] * 5
    assert loads == ["a"]


def test_the_version_used_longest_ago_is_dropped():
    loads = []

    async def scenario() -> None:
        cache = VersionCache(lambda ref: loads.append(ref.version), keep=2)
        for version in ("a", "b", "a", "c", "a", "b"):
            await cache.get(_ref(version))

    asyncio.run(scenario())
    assert loads == ["a", "b", "c", "b"]


def test_a_load_that_failed_is_tried_again():
    attempts = []

    def load(ref: IndexRef) -> str:
        attempts.append(ref.version)
        if len(attempts) == 1:
            raise OSError("disk")
        return "loaded"

    async def scenario() -> str:
        cache = VersionCache(load, keep=2)
        with pytest.raises(OSError, match="disk"):
            await cache.get(_ref("a"))
        return await cache.get(_ref("a"))

    assert asyncio.run(scenario()) == "loaded"


def test_a_caller_that_gives_up_does_not_stop_the_load():
    started, go = threading.Event(), threading.Event()

    def load(ref: IndexRef) -> str:
        started.set()
        assert go.wait(10)
        return "loaded"

    async def scenario() -> str:
        cache = VersionCache(load, keep=2)
        impatient = asyncio.create_task(cache.get(_ref("a")))
        while not started.is_set():
            await asyncio.sleep(0.001)
        patient = asyncio.create_task(cache.get(_ref("a")))
        await asyncio.sleep(0.001)
        impatient.cancel()
        go.set()
        return await patient

    assert asyncio.run(scenario()) == "loaded"
