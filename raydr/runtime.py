"""Where a step runs: in this process, or on a Ray cluster. The same step functions serve both.

Notable: a small job on one machine pays no cluster start. `auto` uses Ray when this process already belongs to a
cluster (`ray job submit`, `RAY_ADDRESS`, an earlier `ray.init`) or when the corpus is large, and runs in-process
otherwise. Ray is imported only where it is used.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, Literal, TypeAlias

Runtime: TypeAlias = Literal["auto", "local", "ray"]

AUTO_RAY_PASSAGES = 50_000
"""`auto` goes to Ray from this many passages on: below it, starting a cluster costs more than it gains."""

_started_here = False
"""Whether `connect` started the cluster rather than joining one."""


def uses_ray(runtime: Runtime, *, num_passages: int) -> bool:
    """Whether a step over `num_passages` runs on Ray."""
    if runtime != "auto":
        return runtime == "ray"
    return in_cluster() or num_passages >= AUTO_RAY_PASSAGES


def in_cluster() -> bool:
    """Whether this process was started by, or already talks to, a Ray cluster."""
    # RAY_ADDRESS=local asks for a new cluster of one's own: it names none to belong to.
    if os.environ.get("RAY_ADDRESS", "local") != "local" or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return True
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def connect(*, dashboard: bool = False) -> str:
    """Joins the cluster of `RAY_ADDRESS` or a running local one, or starts one; does nothing when connected.

    Returns the address of Ray's dashboard, empty where there is none. A cluster started here for one job spares
    itself the dashboard's start-up unless `dashboard` asks for it.
    """
    import ray

    global _started_here
    was_connected = ray.is_initialized()
    context = ray.init(
        include_dashboard=dashboard, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.WARNING
    )
    if not was_connected:
        # Ray says it nowhere in public; this is where its own `ray.shutdown` looks for what to stop.
        node: Any = ray._private.worker._global_node
        _started_here = node.head
    return f"http://{context.dashboard_url}" if context.dashboard_url else ""


def node_cpus() -> list[float]:
    """CPUs of each node that is alive and has any."""
    import ray

    return [cpus for node in ray.nodes() if node["Alive"] and (cpus := node["Resources"].get("CPU", 0))]


def smallest_node_cpus() -> float:
    """CPUs of the cluster's smallest node that has any: a task or actor that wants more might find no place."""
    return min(node_cpus(), default=1)


def owns_cluster() -> bool:
    """Whether `connect` started the cluster of this process, so that the cluster may be stopped with it."""
    ray = sys.modules.get("ray")
    return _started_here and ray is not None and ray.is_initialized()


def disconnect() -> None:
    """Leaves the cluster; stops it if it was started here."""
    import ray

    global _started_here
    ray.shutdown()
    _started_here = False
