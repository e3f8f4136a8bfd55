"""What only a GPU can show: the same embeddings and the same hits as on the CPU. Skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raydr.encoders.text import TextEncoder
from raydr.index.vectors import Vectors, create, uses_gpu
from raydr.types import Passage

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TEXTS = ["short", "a sentence of a few more words", "word " * 400, ""]


@pytest.mark.parametrize(("precision", "least"), [("float32", 0.9999), ("bfloat16", 0.999)])
def test_embeddings_equal_the_cpu(precision: str, least: float) -> None:
    passages = [Passage(str(number), text) for number, text in enumerate(TEXTS)]
    expected = TextEncoder(TextEncoder.Config(device="cpu", precision="float32")).encode_passages(passages)
    found = TextEncoder(TextEncoder.Config(device="cuda", precision=precision)).encode_passages(passages)
    assert (found * expected).sum(1).min() > least


@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat"])
def test_hits_equal_the_cpu(factory: str) -> None:
    if not uses_gpu("auto"):
        pytest.skip("this FAISS has no GPU support")
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((2000, 32), dtype=np.float32)
    index = create(factory, 32)
    if not index.is_trained:
        index.train(embeddings)
    index.add(embeddings)
    ids = np.array([f"p{row:05}" for row in range(len(embeddings))], dtype=object)
    on_cpu, on_gpu = (
        Vectors(index, device=device).search(embeddings[:50], 10, ids_of=ids.__getitem__) for device in ("cpu", "gpu")
    )
    assert (on_cpu.rows == on_gpu.rows).mean() > 0.999
    np.testing.assert_allclose(on_cpu.scores, on_gpu.scores, rtol=1e-4)
