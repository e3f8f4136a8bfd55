"""Where a step runs: in this process, or on a Ray cluster. The same step functions serve both.

Notable: a small job on one machine pays no cluster start. `auto` uses Ray when this process already belongs to a
cluster (`ray job submit`, `RAY_ADDRESS`, an earlier `ray.init`) or when the corpus is large, and runs in-process
otherwise. Ray is imported only where it is used.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from pydantic import Field

from raydr.config import Config
from raydr.errors import ConfigError

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
    told = in_cluster() or "RAY_ADDRESS" in os.environ
    gone = None if told else _address_left_behind()
    if gone is not None:
        print(f"raydr: the Ray last started on this machine ({gone}) no longer runs; starting another", file=sys.stderr)
    context = ray.init(
        address=None if gone is None else "local",
        include_dashboard=dashboard,
        ignore_reinit_error=True,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    if not was_connected:
        # Ray says it nowhere in public; this is where its own `ray.shutdown` looks for what to stop.
        node: Any = ray._private.worker._global_node
        _started_here = node.head
    return f"http://{context.dashboard_url}" if context.dashboard_url else ""


def _address_left_behind() -> str | None:
    """The address that the last `ray start` on this machine wrote down, where no node of that cluster runs here now.

    `ray stop` clears it away; a node that was killed, or a machine that went down, does not, and `ray.init` would try
    to reach it for some minutes and give up.
    """
    from ray._private import services

    address = services.find_bootstrap_address(None)
    return address if address and address not in services.find_gcs_addresses() else None


class Placement(Config):
    """Which nodes of a cluster may take the actors (or tasks) of a step."""

    labels: dict[str, str] = Field(default_factory=dict)
    """On Ray: labels that a node must have to take part, such as `{raydr/group: embed}`."""
    resources: dict[str, float] = Field(default_factory=dict)
    """On Ray: custom resources of a node that each actor takes, by name."""

    def options(self) -> dict[str, Any]:
        """Those of `ray.remote`."""
        given = {"label_selector": dict(self.labels), "resources": dict(self.resources)}
        return {name: value for name, value in given.items() if value}

    def nodes(self) -> list[dict[str, float]]:
        """Resources of the nodes that are alive, have CPUs, and may take them.

        Where there is none yet, which an autoscaler may change, it is said and all nodes are given, to count with.
        Raises `ConfigError` on a cluster that was started here, which nobody will enlarge.
        """
        import ray

        alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        wanted = self.labels.items()
        found = [node["Resources"] for node in alive if wanted <= node.get("Labels", {}).items()]
        found = [own for own in found if all(own.get(name, 0) >= need for name, need in self.resources.items())]
        if found:
            return found
        missing = f"no node of this Ray cluster has {self._as_text()}"
        if owns_cluster():
            raise ConfigError(f"{missing}; leave labels and resources out, or start Ray with them and set RAY_ADDRESS")
        print(f"raydr: {missing}; waiting for one", file=sys.stderr)
        return [node["Resources"] for node in alive]

    def _as_text(self) -> str:
        return " and ".join(
            [f"the label {name}={value}" for name, value in self.labels.items()]
            + [f"{need:g} of the resource {name}" for name, need in self.resources.items()]
        )


PLACEMENT = frozenset(Placement.model_fields)
"""Settings that say where a step works and nothing of what comes out."""


def smallest_node_cpus(nodes: Sequence[Mapping[str, float]]) -> float:
    """CPUs of the smallest of some nodes: a task or actor that wants more might find no place."""
    return min((node["CPU"] for node in nodes), default=1)


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
