"""The inverted index against brute force: scores, ties, masks, its file in every kind of weights, damaged files."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from raydr.errors import ArtifactError, ConfigError
from raydr.index.explanation import Shares
from raydr.index.postings import Postings, SparseIndex
from raydr.protocols import Index

DIM = 30


def drawn(rows: int, *, seed: int, density: float = 0.2, integers: bool = True) -> csr_array:
    """Small whole weights, so that many scores tie and every sum is exact."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 4, (rows, DIM)) if integers else rng.random((rows, DIM)) + 0.01
    return csr_array((weights * (rng.random((rows, DIM)) < density)).astype(np.float32))


def best(scores: np.ndarray, ids: list[str], k: int, allowed: np.ndarray) -> list[int]:
    """Rows of one query by brute force: best first, ties by id, without those that share nothing with it."""
    rows = [row for row in np.flatnonzero(allowed) if scores[row] > 0]
    return sorted(rows, key=lambda row: (-scores[row], ids[row]))[:k]


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), num=st.integers(1, 50), k=st.integers(1, 60), masked=st.booleans())
def test_the_index_is_brute_force(seed, num, k, masked):
    embeddings, queries = drawn(num, seed=seed), drawn(6, seed=seed + 1)
    rng = np.random.default_rng(seed)
    ids = [f"p{number:02d}" for number in rng.permutation(num)]
    index: Index = SparseIndex()
    index.add(ids[: num // 2], embeddings[: num // 2])
    index.add(ids[num // 2 :], embeddings[num // 2 :])
    allowed = rng.random(num) < 0.5 if masked else np.ones(num, dtype=bool)
    top = index.search(queries, k, allowed=allowed if masked else None)
    assert top.rows.shape == top.scores.shape == (6, k)
    scores = (queries @ embeddings.T).toarray()
    for line, expected in enumerate(best(row, ids, k, allowed) for row in scores):
        assert top.rows[line, : len(expected)].tolist() == expected
        assert top.scores[line, : len(expected)].tolist() == scores[line, expected].tolist()
        assert (top.rows[line, len(expected) :] == -1).all()
        assert np.isneginf(top.scores[line, len(expected) :]).all()


def test_it_is_an_index():
    index = SparseIndex()
    assert isinstance(index, Index)
    assert (index.search(drawn(2, seed=0), 3).rows == -1).all()
    index.add(["a", "b"], drawn(2, seed=1))
    assert index.search(drawn(0, seed=0), 3).rows.shape == (0, 3)
    with pytest.raises(ConfigError, match="twice"):
        index.add(["a"], drawn(1, seed=2))
    with pytest.raises(ConfigError, match="dimension 7 for an index of 30"):
        index.search(csr_array((1, 7), dtype=np.float32), 1)
    with pytest.raises(ConfigError, match="needs sparse"):
        index.search(np.ones((1, DIM), dtype=np.float32), 1)


@pytest.mark.parametrize("kind", ["float32", "float16", "ones"])
def test_a_file_gives_back_what_was_written(tmp_path, kind):
    embeddings = drawn(40, seed=3, integers=kind == "float32")
    if kind == "float16":
        embeddings.data = embeddings.data.astype(np.float16).astype(np.float32)
    if kind == "ones":
        embeddings.data[:] = 1
    Postings.of(embeddings, weight_type=kind).write(tmp_path / "postings.arrow")
    read = Postings.read(tmp_path / "postings.arrow")
    assert (read.num_rows, read.dim, read.num_entries, read.weight_type) == (40, DIM, embeddings.nnz, kind)
    assert np.array_equal(read.embeddings(np.arange(40)).toarray(), embeddings.toarray())
    assert np.array_equal(read.embeddings(np.array([7, 3, 3])).toarray(), embeddings[[7, 3, 3]].toarray())
    ids = np.array([f"p{row}" for row in range(40)], dtype=object)
    queries = drawn(5, seed=4)
    found = read.search(queries, 10, ids_of=ids.__getitem__)
    expected = (queries @ embeddings.T).toarray()
    assert np.array_equal(found.scores[:, 0], expected.max(axis=1))
    sizes = {"float32": 8, "float16": 6, "ones": 4}
    size = (tmp_path / "postings.arrow").stat().st_size
    assert size < sizes[kind] * embeddings.nnz + 3000


def test_weights_in_single_precision_are_not_copied(tmp_path):
    Postings.of(drawn(40, seed=3), weight_type="float32").write(tmp_path / "postings.arrow")
    before = pa.total_allocated_bytes()
    columns = Postings.read(tmp_path / "postings.arrow")._columns
    assert pa.total_allocated_bytes() == before
    assert not columns.data.flags.owndata
    assert not columns.indices.flags.owndata


def test_empty_rows_and_no_rows(tmp_path):
    for rows in (csr_array((3, DIM), dtype=np.float32), csr_array((0, DIM), dtype=np.float32)):
        Postings.of(rows, weight_type="float32").write(tmp_path / "postings.arrow")
        read = Postings.read(tmp_path / "postings.arrow")
        assert read.num_rows == rows.shape[0]
        assert (read.search(drawn(2, seed=1), 4, ids_of=lambda rows: rows).rows == -1).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_weights_that_are_none_are_refused(value):
    embeddings = drawn(3, seed=0)
    embeddings.data[1] = value
    with pytest.raises(ConfigError, match="neither negative nor infinite"):
        Postings.of(embeddings, weight_type="float32")


def test_a_damaged_file_is_told(tmp_path):
    file = tmp_path / "postings.arrow"
    Postings.of(drawn(40, seed=3), weight_type="float32").write(file)
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="build the index again"):
            Postings.read(file)


def test_shares_add_up_to_the_score():
    query, passage = drawn(1, seed=5, density=0.9, integers=False), drawn(1, seed=6, density=0.9, integers=False)
    score = float((query @ passage.T).toarray()[0, 0])
    shares = Shares.of(query, passage, matches=3, words=4)
    assert len(shares.matches) == 3
    assert len(shares.passage) == 4
    assert shares.score == pytest.approx(score, rel=1e-6)
    assert sum(share for _, share in shares.matches) + shares.rest == pytest.approx(score, rel=1e-6)
    dense = query.toarray()[0] * passage.toarray()[0]
    assert [dim for dim, _ in shares.matches] == np.argsort(-dense, kind="stable")[:3].tolist()
    whole = Shares.of(query, passage, matches=DIM)
    assert whole.rest == 0
    assert dict(whole.matches) == pytest.approx({dim: dense[dim] for dim in np.flatnonzero(dense)})
