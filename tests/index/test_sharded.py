"""Shards as Ray actors: the same hits as in this process, also after an actor has died."""

from __future__ import annotations

import time

import numpy as np
import pytest

from raydr.errors import ArtifactError
from raydr.index import store
from raydr.index.build import build_index
from raydr.index.config import IndexConfig
from raydr.index.reader import IndexReader
from raydr.index.sharded import LocalShards, RayShards
from raydr.protocols import Index
from tests.corpora import as_pairs, brute_force, embedded_corpus, integers

IDS = [f"p{number:02d}" for number in range(50)]
EMBEDDINGS = integers(50, 5, seed=1)
QUERIES = integers(30, 5, seed=2)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    embedded = embedded_corpus(
        folder / "c", {id_: {"text": id_, "year": 2000 + n} for n, id_ in enumerate(IDS)}, EMBEDDINGS
    )
    build_index(*embedded, IndexConfig(num_shards=3, bm25=None), folder / "index", use_ray=False)
    return folder / "index"


def test_an_index_on_disk_is_an_index(index):
    shards = LocalShards(IndexReader.open(index))
    assert isinstance(shards, Index)
    with pytest.raises(ArtifactError, match=r"grows by raydr.index.store.add"):
        shards.add(["x"], EMBEDDINGS[:1])


@pytest.mark.ray
def test_actors_give_the_hits_of_this_process_and_of_brute_force(index, ray_cluster):
    reader = IndexReader.open(index)
    local = LocalShards(reader)
    with RayShards(reader, cpus_per_shard=0.3) as remote:
        for allowed in (None, reader.select({"year": {"gte": 2020}})):
            for k in (1, 10, 60):
                top = remote.search(QUERIES, k, allowed=allowed)
                here = local.search(QUERIES, k, allowed=allowed)
                np.testing.assert_array_equal(top.rows, here.rows)
                np.testing.assert_array_equal(top.scores, here.scores)
                assert as_pairs(top, IDS) == brute_force(IDS, EMBEDDINGS, QUERIES, k, allowed)
        assert remote.search(QUERIES[:0], 3).rows.shape == (0, 3)


@pytest.mark.ray
def test_a_dead_actor_is_restarted_with_the_state_it_had(index, ray_cluster):
    """The index changes, then an actor dies: the restarted one still serves the state its reader opened."""
    import ray

    reader = IndexReader.open(index)
    with RayShards(reader, cpus_per_shard=0.3) as remote:
        before = as_pairs(remote.search(QUERIES, 10), IDS)
        store.delete(index, ["p00"])
        ray.kill(remote.actors[0], no_restart=False)
        started = time.monotonic()
        assert as_pairs(remote.search(QUERIES, 10), IDS) == before
        assert time.monotonic() - started < 60
    assert IndexReader.open(index).num_passages == 49
