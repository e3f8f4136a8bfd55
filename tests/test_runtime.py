"""Where a step runs: `auto` pays for a cluster only where one is there or worth it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from raydr.errors import ConfigError
from raydr.runtime import AUTO_RAY_PASSAGES, Placement, connect, in_cluster, owns_cluster, uses_ray


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch):
    """No cluster in the environment, and none that this process has joined."""
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "ray", raising=False)


def test_local_and_ray_are_taken_at_their_word(alone):
    assert uses_ray("ray", num_passages=1)
    assert not uses_ray("local", num_passages=10**9)


def test_auto_starts_a_cluster_only_for_a_large_corpus(alone):
    assert not uses_ray("auto", num_passages=AUTO_RAY_PASSAGES - 1)
    assert uses_ray("auto", num_passages=AUTO_RAY_PASSAGES)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("RAY_ADDRESS", "10.0.0.1:6379", True),
        ("RAY_ADDRESS", "auto", True),
        ("RAY_ADDRESS", "local", False),  # asks for a new cluster of one's own
        ("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}", True),
    ],
)
def test_the_environment_of_a_job_means_a_cluster(alone, monkeypatch, name, value, expected):
    monkeypatch.setenv(name, value)
    assert in_cluster() is expected
    assert uses_ray("auto", num_passages=1) is expected
    assert not uses_ray("local", num_passages=1)


def test_asking_does_not_import_ray():
    code = (
        "import sys; from raydr.runtime import uses_ray; uses_ray('auto', num_passages=1); print('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.ray
def test_a_joined_cluster_is_used_and_kept(ray_cluster):
    import ray

    node = ray.get_runtime_context().get_node_id()
    assert uses_ray("auto", num_passages=1)
    connect()
    assert ray.get_runtime_context().get_node_id() == node
    assert not owns_cluster()  # the fixture started it


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_is_started_where_the_last_one_was_killed_and_can_be_stopped():
    """A killed head leaves its address behind, and Ray would try it for minutes and give up."""
    code = (
        "import ray; from raydr.runtime import connect, disconnect, in_cluster, owns_cluster; "
        "connect(); print(owns_cluster()); disconnect(); print(owns_cluster(), in_cluster())"
    )
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # Ray's sockets lie in it: a short name
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"RAY_TMPDIR": folder}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=own)
    assert done.stdout.split() == ["True", "False", "False"]
    assert "(127.0.0.1:1) no longer runs; starting another" in done.stderr


def node(cpus, labels=None, *, alive=True, **resources):
    return {"Alive": alive, "Resources": {"CPU": cpus, **resources} if cpus else {}, "Labels": labels or {}}


NODES = [
    node(0),
    node(2.0, {"raydr/group": "cpu"}),
    node(4.0, {"raydr/group": "embed", "zone": "a"}, fast_disk=1.0),
    node(8.0, {"raydr/group": "embed"}, alive=False),
]


@pytest.mark.parametrize(
    ("settings", "cpus"),
    [
        ({}, [2.0, 4.0]),
        ({"labels": {"raydr/group": "embed"}}, [4.0]),
        ({"labels": {"raydr/group": "embed", "zone": "a"}, "resources": {"fast_disk": 1}}, [4.0]),
        ({"labels": {"raydr/group": "llm"}}, [2.0, 4.0]),  # none yet: all, to count with
    ],
)
def test_the_nodes_that_may_take_a_step(settings, cpus, monkeypatch, capsys):
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: NODES)
    placement = Placement(**settings)
    assert [own["CPU"] for own in placement.nodes()] == cpus
    assert ("raydr/group=llm; waiting for one" in capsys.readouterr().err) == ("llm" in str(settings))


def test_a_cluster_of_ones_own_is_not_waited_for(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: NODES)
    monkeypatch.setattr("raydr.runtime.owns_cluster", lambda: True)
    with pytest.raises(ConfigError, match=r"no node .* has the label zone=b and 2 of the resource fast_disk"):
        Placement(labels={"zone": "b"}, resources={"fast_disk": 2}).nodes()


def test_what_is_not_asked_for_is_not_said_to_ray():
    assert Placement().options() == {}
    options = Placement(labels={"a": "b"}, resources={"x": 1.5}).options()
    assert options == {"label_selector": {"a": "b"}, "resources": {"x": 1.5}}
