"""Factory strings in bytes: against the files FAISS makes; what cannot be planned is an error that says what can."""

from __future__ import annotations

import numpy as np
import pytest

from raydr.errors import ConfigError
from raydr.planning.structure import structure

ROWS, DIM = 4000, 32

FACTORIES = [
    "Flat", "SQ8", "SQfp16", "SQ4", "SQ6", "SQ8,RFlat", "HNSW32", "HNSW16,SQ8", "HNSW16_SQ8", "IVF64,Flat",
    "IVF64,SQ8", "IVF64_HNSW32,SQ8", "IVF64,PQ8x4", "PCA16,IVF64,SQ8", "IVF64,PQ8x4,RFlat", "IVF64,PQ8x4,Refine(SQ8)",
]  # fmt: skip


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, DIM), dtype=np.float32)


@pytest.mark.parametrize("factory", FACTORIES)
def test_sizes_are_those_of_faiss(factory, points):
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    planned = structure(factory, DIM)
    assert planned.needs_training or index.is_trained
    index.train(points)
    index.add(points)
    size = len(faiss.serialize_index(index))
    assert planned.row_bytes * ROWS + planned.fixed_bytes == pytest.approx(size, rel=0.02)


def test_the_parts_by_hand():
    hnsw = structure("HNSW32", 384)
    assert hnsw.code_bytes == 1536 and hnsw.links == 32
    assert hnsw.row_bytes == pytest.approx(1808, abs=1)  # what benchmarks/results.md, W4, has of a file
    assert structure("IVF1024,SQ8,RFlat", 384).row_bytes == 384 + 8 + 1536
    product = structure("OPQ48_192,IVF4096,PQ48", 384)
    assert (product.dim, product.num_lists, product.row_bytes) == (192, 4096, 56)
    assert product.fixed_bytes == 385 * 192 * 4 + 4096 * 192 * 4 + 256 * 192 * 4


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("PQ48", ["'PQ48'", "IVF4096,PQ48"]),
        ("NSG32,Flat", ["NSG32,Flat", "HNSW32"]),
        ("IVF64", ["IVF64"]),
        ("Falt", ["Falt", "Flat"]),
        ("IVF64,PQ50", ["multiple of 50", "PQ48"]),
        ("OPQ16", ["OPQ16"]),
    ],
)
def test_what_cannot_be_planned_is_named(factory, words):
    with pytest.raises(ConfigError) as error:
        structure(factory, 384)
    assert all(word in str(error.value) for word in ["index.factory", *words]), str(error.value)
