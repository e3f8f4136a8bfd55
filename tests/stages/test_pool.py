"""How many actors a stage has on Ray, and what they leave to those that feed them."""

import pytest

from raydr.errors import ConfigError
from raydr.stages.config import EmbedConfig, PoolConfig, ScoreConfig
from raydr.stages.pool import worker_pool


@pytest.mark.parametrize("schema", [EmbedConfig, ScoreConfig])
def test_num_workers_must_be_a_range(schema):
    with pytest.raises(ValueError, match="fewest, most"):
        schema(num_workers=(3, 2))


@pytest.mark.parametrize(
    ("settings", "nodes", "pool"),
    [
        ({}, [{"CPU": 2.0}], (1, 1, 2, 0.0)),
        ({}, [{"CPU": 64.0}], (1, 16, 4, 3)),
        ({}, 32 * [{"CPU": 2.0}], (1, 32, 2, 1)),
        ({"worker_cpus": 1}, [{"CPU": 64.0}], (1, 64, 1, 0.96)),
        ({"worker_cpus": 4}, [{"CPU": 16.0}], (1, 4, 4, 3)),
        ({"worker_cpus": 4, "num_workers": (1, 2)}, [{"CPU": 16.0}], (1, 2, 4, 4)),
        ({"worker_gpus": 1}, [{"CPU": 24.0, "GPU": 8.0}, {"CPU": 8.0}], (1, 8, 4, 3)),
    ],
)
def test_workers_leave_two_cpus_free(settings, nodes, pool):
    found = worker_pool(PoolConfig(**settings), nodes)
    assert (found.fewest, found.most, found.num_threads, found.reserved_cpus) == pool
    assert sum(node["CPU"] for node in nodes) - found.most * found.reserved_cpus >= 2


def test_one_cpu_is_not_enough_for_ray():
    with pytest.raises(ConfigError, match="runtime: local"):
        worker_pool(PoolConfig(), [{"CPU": 1.0}])
