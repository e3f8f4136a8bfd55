"""One shard, on disk and in memory: exactness, masks, passages, every family of FAISS index."""

from __future__ import annotations

import faiss
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydr.errors import ArtifactError, ConfigError
from raydr.index.config import SearchParameters
from raydr.index.shard import PASSAGES, VECTORS, Shard, VectorIndex, write_passages
from raydr.index.vectors import Vectors, create, train
from tests.contracts import check_index
from tests.corpora import as_pairs, brute_force, integers


@pytest.mark.parametrize("factory", ["Flat", "SQfp16"])
def test_an_index_in_memory_keeps_the_contract(factory):
    check_index(lambda: VectorIndex(factory))


@settings(max_examples=60)
@given(
    num_rows=st.integers(1, 60),
    dim=st.integers(1, 5),
    num_queries=st.integers(1, 30),
    k=st.integers(1, 70),
    spread=st.integers(0, 2),
    share=st.sampled_from([None, 0.0, 0.3, 0.9]),
    seed=st.integers(0, 10_000),
)
def test_flat_is_brute_force_ties_included(num_rows, dim, num_queries, k, spread, share, seed):
    rng = np.random.default_rng(seed)
    ids = [f"p{number}" for number in rng.permutation(num_rows)]
    embeddings = integers(num_rows, dim, seed=seed, spread=spread)
    queries = integers(num_queries, dim, seed=seed + 1, spread=spread)
    allowed = None if share is None else rng.random(num_rows) < share
    index = VectorIndex()
    index.add(ids, embeddings)
    top = index.search(queries, k, allowed=allowed)
    assert as_pairs(top, ids) == brute_force(ids, embeddings, queries, k, allowed)


@pytest.mark.parametrize("masked", [False, True])
def test_ties_far_beyond_k_are_found(masked):
    """All 30 000 rows tie: the best by id stands at the very end, where no heap would keep it."""
    num_rows = 30_000
    ids = [f"p{number:05d}" for number in reversed(range(num_rows))]
    index = VectorIndex()
    index.add(ids, np.ones((num_rows, 4), dtype=np.float32))
    allowed = np.arange(num_rows) % 2 == 0 if masked else None
    top = index.search(np.ones((2, 4), dtype=np.float32), 3, allowed=allowed)
    expected = ["p00001", "p00003", "p00005"] if masked else ["p00000", "p00001", "p00002"]
    assert [[ids[row] for row in rows] for rows in top.rows] == [expected, expected]


FACTORIES = [
    "Flat",
    "SQfp16",
    "SQ8",
    "SQ8,RFlat",
    "HNSW16",
    "HNSW16,SQ8",
    "IVF8,Flat",
    "IVF8,PQ8x4",
    "IVF8,SQ8",
    "PCA8,IVF4,Flat",
]


@pytest.fixture(scope="module")
def cloud():
    rng = np.random.default_rng(3)
    return rng.standard_normal((2000, 16)).astype(np.float32), rng.standard_normal((30, 16)).astype(np.float32)


def shard_of(path, factory, embeddings, **options):
    path.mkdir()
    index = create(factory, embeddings.shape[1])
    train(index, embeddings)
    vectors = Vectors(index)
    vectors.add(embeddings)
    vectors.write(path / VECTORS)
    ids = [f"p{row}" for row in range(len(embeddings))]
    table = pa.table({"passage_id": ids, "title": [""] * len(ids), "text": [f"text {id_}" for id_ in ids]})
    write_passages(path / PASSAGES, [table.slice(0, 900), table.slice(900)])
    return Shard(path, **options)


@pytest.mark.parametrize("factory", FACTORIES)
def test_every_family_is_filtered_deleted_from_and_good(factory, cloud, tmp_path):
    embeddings, queries = cloud
    thorough = SearchParameters(nprobe=8, ef_search=200, rescore_factor=4)
    dead = np.arange(0, 2000, 3)
    shard = shard_of(tmp_path / "s", factory, embeddings, deleted=dead, parameters=thorough)
    allowed = np.arange(2000) < 1500
    top = shard.search(queries, 10, allowed)
    assert ((top.rows >= 0) & (top.rows < 1500) & (top.rows % 3 != 0)).all()
    assert (np.diff(top.scores, axis=1) <= 0).all()
    scores = queries @ embeddings.T
    scores[:, dead] = scores[:, 1500:] = -np.inf
    truth = np.argsort(-scores, axis=1)[:, :10]
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(top.rows, truth, strict=True)])
    assert recall >= {"IVF8,PQ8x4": 0.3, "PCA8,IVF4,Flat": 0.3}.get(factory, 0.9)


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_mask_that_leaves_few_rows_still_finds_them(factory, cloud, tmp_path):
    embeddings, queries = cloud
    shard = shard_of(tmp_path / "s", factory, embeddings)  # nprobe 1 and ef_search 16, as FAISS has them
    allowed = np.zeros(2000, dtype=bool)
    allowed[[5, 700, 1999]] = True
    top = shard.search(queries, 5, allowed)
    assert (np.sort(top.rows[:, :3], axis=1) == [5, 700, 1999]).all()
    assert (top.rows[:, 3:] == -1).all()


def test_hnsw_filters_while_it_walks(cloud, tmp_path, monkeypatch):
    """The same mask through the graph instead of the exact path for few rows."""
    monkeypatch.setattr("raydr.index.vectors._FEW_ROWS", 0)
    embeddings, queries = cloud
    shard = shard_of(tmp_path / "s", "HNSW16", embeddings)
    allowed = np.arange(2000) % 4 == 0
    top = shard.search(queries, 10, allowed)
    assert (top.rows % 4 == 0).all()
    scores = np.where(allowed, queries @ embeddings.T, -np.inf)
    truth = np.argsort(-scores, axis=1)[:, :10]
    assert np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(top.rows, truth, strict=True)]) > 0.85


def test_search_parameters_override_the_shards_own(cloud, tmp_path):
    embeddings, queries = cloud
    shard = shard_of(tmp_path / "s", "IVF32,Flat", embeddings, parameters=SearchParameters(nprobe=1))
    exact = np.sort(queries @ embeddings.T, axis=1)[:, ::-1][:, :10]
    assert not np.allclose(shard.search(queries, 10).scores, exact)
    thorough = shard.search(queries, 10, parameters=SearchParameters(nprobe=32))
    np.testing.assert_allclose(thorough.scores, exact, rtol=1e-5)


def test_scores_are_those_of_plain_faiss(cloud, tmp_path):
    embeddings, queries = cloud
    plain = faiss.IndexFlatIP(16)
    plain.add(embeddings)
    scores, rows = plain.search(queries, 25)
    top = shard_of(tmp_path / "s", "Flat", embeddings).search(queries, 25)
    np.testing.assert_array_equal(top.rows, rows)
    np.testing.assert_array_equal(top.scores, scores)


def test_passages_are_taken_in_any_order_from_any_batch(cloud, tmp_path):
    shard = shard_of(tmp_path / "s", "Flat", cloud[0])
    rows = [1999, 0, 899, 900, 0]
    assert [p["passage_id"] for p in shard.passages(rows)] == [f"p{row}" for row in rows]
    assert shard.passages([900])[0] == {"passage_id": "p900", "title": "", "text": "text p900"}
    assert shard.passages([]) == []
    assert shard.passage_ids[1999] == "p1999"
    assert shard.passage_ids[1:3] == ["p1", "p2"]


def test_a_damaged_shard_is_named(cloud, tmp_path):
    shard_of(tmp_path / "s", "Flat", cloud[0])
    (tmp_path / "s" / VECTORS).write_bytes(b"no index")
    with pytest.raises(ArtifactError, match="vectors.faiss: not a readable FAISS index"):
        _ = Shard(tmp_path / "s").vectors
    (tmp_path / "s" / PASSAGES).write_bytes(b"no table")
    with pytest.raises(ArtifactError, match="passages.arrow: cannot be read"):
        Shard(tmp_path / "s")


@pytest.mark.parametrize(
    ("factory", "message"),
    [("IVFmany,Flat", "could not parse"), ("PQ4", "cannot filter"), ("IVF4,PQ7", "multiple")],
)
def test_factories_that_cannot_serve_are_refused(factory, message):
    with pytest.raises(ConfigError, match=message):
        create(factory, 16)


def test_too_few_embeddings_to_train_on(cloud):
    with pytest.raises(ConfigError, match="IVF5000|5000 IVF lists cannot be trained on 2000"):
        train(create("IVF5000,Flat", 16), cloud[0])


def test_an_index_in_memory_names_its_misuse():
    index = VectorIndex()
    index.add(["a"], np.ones((1, 3), dtype=np.float32))
    with pytest.raises(ConfigError, match="added twice"):
        index.add(["a"], np.ones((1, 3), dtype=np.float32))
    with pytest.raises(ConfigError, match="dimension 4"):
        index.add(["b"], np.ones((1, 4), dtype=np.float32))
    with pytest.raises(ConfigError, match="dimension 2"):
        index.search(np.ones((1, 2), dtype=np.float32), 1)
    with pytest.raises(ConfigError, match="NaN"):
        index.search(np.full((1, 3), np.nan, dtype=np.float32), 1)
    with pytest.raises(ConfigError, match="must be trained"):
        VectorIndex("IVF4,Flat").add(["a"], np.ones((1, 4), dtype=np.float32))


def test_a_gpu_is_refused_where_there_is_none():
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        pytest.skip("this machine has one")
    vectors = Vectors(faiss.IndexFlatIP(2), device="gpu")
    vectors.add(np.ones((1, 2), dtype=np.float32))
    with pytest.raises(ConfigError, match="gpu was asked for"):
        vectors.search(np.ones((1, 2), dtype=np.float32), 1, ids_of=lambda rows: rows)
