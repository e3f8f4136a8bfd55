"""The pool of Ray actors behind a stage that works block by block: as many as fit, without starving what feeds them.

for table in over_pool(blocks, functools.partial(Scorer, ranker), ScoreConfig(), name="score pairs"): ...
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa

from raydr.errors import ConfigError
from raydr.runtime import smallest_node_cpus
from raydr.stages.config import PoolConfig

if TYPE_CHECKING:
    import ray.data

Work: TypeAlias = Callable[[pa.Table], pa.Table]
"""What an actor does with a block."""

RESTARTS: dict[str, Any] = {"max_restarts": 20, "max_task_retries": 20}
"""Of each actor. Ray Data's own is without end, and a block that takes too much memory would be tried for ever."""
_CPUS_LEFT_FREE = 2
_MOST_WORKER_CPUS = 4
"""More threads than this help one worker less than a second worker does."""


@dataclass(frozen=True)
class WorkerPool:
    """How many actors there may be, their threads, and the CPUs that each of them reserves with Ray's scheduler."""

    fewest: int
    most: int
    num_threads: int
    reserved_cpus: int | float


def worker_pool(config: PoolConfig, nodes: Sequence[Mapping[str, float]]) -> WorkerPool:
    """The pool for nodes with these resources.

    Reading, writing and the filter of a resumed run each need a whole CPU from Ray's scheduler: actors that reserved
    all of them would wait for ever for rows. So two CPUs always stay free, by reserving less than is used. Raises
    `ConfigError` on a cluster that has not even two.
    """
    cpus = sum(node["CPU"] for node in nodes)
    if cpus < _CPUS_LEFT_FREE:
        raise ConfigError(
            f"this stage needs {_CPUS_LEFT_FREE} CPUs on Ray, the cluster has {cpus:g}; use runtime: local"
        )
    worker_cpus = config.worker_cpus or min(_MOST_WORKER_CPUS, smallest_node_cpus(nodes))
    gpus = sum(node.get("GPU", 0) for node in nodes)
    fitting = gpus // config.worker_gpus if config.worker_gpus else cpus // worker_cpus
    fewest, most = config.num_workers or (1, max(1, int(fitting)))
    spare = min(worker_cpus, (cpus - _CPUS_LEFT_FREE) / most)
    # Ray takes whole CPUs above one, and fractions below.
    reserved_cpus = math.floor(spare) if spare >= 1 else math.floor(spare * 100) / 100
    return WorkerPool(fewest, most, max(1, int(worker_cpus)), reserved_cpus)


def mapped(
    dataset: ray.data.Dataset,
    worker: type,
    arguments: tuple[Any, ...],
    config: PoolConfig,
    pool: WorkerPool,
    *,
    batch_size: int | None = None,
) -> ray.data.Dataset:
    """`dataset` after the workers of `pool`, made of `arguments`, by tables of `batch_size` rows or block by block."""
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    with warnings.catch_warnings():
        # Restarts are among what Ray 2.64 will take no more in this way, and Ray 2.60 has no other for them.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return dataset.map_batches(
            worker,
            fn_constructor_args=arguments,
            batch_format="pyarrow",
            batch_size=batch_size,
            zero_copy_batch=True,
            # A corpus may be embedded before the autoscaler has seen that one actor is not enough.
            compute=ray.data.ActorPoolStrategy(min_size=pool.fewest, max_size=pool.most, initial_size=pool.most),
            num_cpus=pool.reserved_cpus,
            num_gpus=config.worker_gpus,
            **RESTARTS,
            **config.options(),
        )


class _Worker:
    """What a stage builds, in a Ray actor."""

    def __init__(self, build: Callable[[], Work], num_threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(num_threads)  # Ray would derive it from the CPUs reserved for scheduling
        self._work = build()

    def __call__(self, block: pa.Table) -> pa.Table:
        return self._work(block)


def over_pool(
    blocks: Sequence[pa.Table], build: Callable[[], Work], config: PoolConfig, *, name: str
) -> Iterator[pa.Table]:
    """What the work that `build` makes, once in each actor of a pool, gives for each block; in any order.

    Ray's dashboard shows it under `name`.
    """
    import ray.data

    pool = worker_pool(config, config.nodes())
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    with ray.data.DataContext.current(context):
        # Not `from_arrow`, which sends a task of one CPU to look at the tables.
        dataset = ray.data.from_blocks(list(blocks))
        dataset.set_name(name)
        done = mapped(dataset, _Worker, (build, pool.num_threads), config, pool)
        yield from done.iter_batches(batch_size=None, batch_format="pyarrow")
