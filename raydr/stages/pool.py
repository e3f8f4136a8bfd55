"""The pool of Ray actors behind a stage that works block by block: as many as fit, without starving what feeds them.

pool = worker_pool(EmbedConfig(), ray.cluster_resources(), smallest_node_cpus())
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from raydr.errors import ConfigError
from raydr.stages.config import PoolConfig

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


def smallest_node_cpus() -> float:
    """CPUs of the cluster's smallest node that has any: an actor that wants more might find no place."""
    import ray

    return min((cpus for node in ray.nodes() if node["Alive"] and (cpus := node["Resources"].get("CPU", 0))), default=1)


def worker_pool(config: PoolConfig, resources: Mapping[str, float], node_cpus: float) -> WorkerPool:
    """The pool for a cluster with these resources (`ray.cluster_resources()`), its smallest node having `node_cpus`.

    Reading, writing and the filter of a resumed run each need a whole CPU from Ray's scheduler: actors that reserved
    all of them would wait for ever for rows. So two CPUs always stay free, by reserving less than is used. Raises
    `ConfigError` on a cluster that has not even two.
    """
    cpus = resources.get("CPU", 0)
    if cpus < _CPUS_LEFT_FREE:
        raise ConfigError(
            f"this stage needs {_CPUS_LEFT_FREE} CPUs on Ray, the cluster has {cpus:g}; use runtime: local"
        )
    worker_cpus = config.worker_cpus or min(_MOST_WORKER_CPUS, node_cpus)
    fitting = resources.get("GPU", 0) // config.worker_gpus if config.worker_gpus else cpus // worker_cpus
    fewest, most = config.num_workers or (1, max(1, int(fitting)))
    spare = min(worker_cpus, (cpus - _CPUS_LEFT_FREE) / most)
    # Ray takes whole CPUs above one, and fractions below.
    reserved_cpus = math.floor(spare) if spare >= 1 else math.floor(spare * 100) / 100
    return WorkerPool(fewest, most, max(1, int(worker_cpus)), reserved_cpus)
