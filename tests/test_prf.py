"""Vector PRF: the two formulas, and queries that found too little."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from raydr.errors import ConfigError
from raydr.prf import Average, Rocchio, refined
from raydr.protocols import QueryRefiner
from raydr.types import Found, Hit, Query

QUERIES = [Query("a", "a"), Query("b", "b")]
EMBEDDINGS = np.array([[1, 0], [0, 2]], dtype=np.float32)
VECTORS = np.array([[4, 2], [0, 4]], dtype=np.float32)
HITS = [Hit("x", 2.0), Hit("y", 1.0)]


@pytest.mark.parametrize(
    ("refiner", "expected"),
    [
        (Average(2), [[5 / 3, 2], [4 / 3, 8 / 3]]),  # (q + x + y) / 3
        (Rocchio(2), [[0.4 + 0.6 * 2, 0.6 * 3], [0.6 * 2, 0.4 * 2 + 0.6 * 3]]),
        (Rocchio(2, alpha=1.0, beta=0.0), EMBEDDINGS),
    ],
)
def test_the_formulas(refiner, expected):
    assert isinstance(refiner, QueryRefiner)
    before = EMBEDDINGS.copy()
    found = refined(refiner, QUERIES, EMBEDDINGS, [Found(HITS, embeddings=VECTORS)] * 2)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(EMBEDDINGS, before)


def test_the_defaults_are_pyserinis():
    assert (Average().num_feedback, Rocchio().num_feedback, Rocchio().alpha, Rocchio().beta) == (3, 5, 0.4, 0.6)


def test_a_query_that_found_too_little_keeps_its_embedding():
    found = [Found(HITS[:1], embeddings=VECTORS[:1]), Found(HITS, embeddings=VECTORS)]
    moved = refined(Average(2), QUERIES, EMBEDDINGS, found)
    np.testing.assert_array_equal(moved[0], EMBEDDINGS[0])
    np.testing.assert_allclose(moved[1], [4 / 3, 8 / 3])
    np.testing.assert_array_equal(refined(Average(2), QUERIES, EMBEDDINGS, [Found([])] * 2), EMBEDDINGS)


def test_sparse_embeddings_are_refused():
    with pytest.raises(ConfigError, match="these are sparse"):
        refined(Average(2), QUERIES, csr_array(EMBEDDINGS), [Found(HITS, embeddings=VECTORS)] * 2)
