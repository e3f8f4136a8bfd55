"""Gradient caching gives the gradient of the whole batch: whatever the chunk, the temperature, the dropout."""

import pytest
import torch
from torch import Tensor

from raydr.methods.contrastive import InBatchContrastive
from raydr.train import grad_cache
from tests.train.tiny import random_batch, tiny_network


class Plain:
    """The least an engine has to be: a network whose gradients add up."""

    device = torch.device("cpu")

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network
        self.forwards: list[tuple[int, bool]] = []

    def __call__(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        self.forwards.append((ids.numel(), torch.is_grad_enabled()))
        return self.network(ids, mask)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def gradients(chunk_tokens: int | None, *, dropout: float = 0.0, temperature: float = 0.05, batches: int = 1):
    """Loss and gradient of every weight, and the engine, for the same weights and batches."""
    network = tiny_network(dropout=dropout)
    engine = Plain(network.train())
    objective = InBatchContrastive(temperature=temperature, symmetric=True)
    torch.manual_seed(7)
    losses = []
    for number in range(batches):
        batch = random_batch(6, 3, seed=number)
        output = grad_cache.backward(engine, objective, batch, chunk_tokens=chunk_tokens, weight=1 / batches)
        losses.append(output.loss.item())
    return losses, {name: parameter.grad.clone() for name, parameter in network.named_parameters()}, engine


@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("chunk_tokens", [16, 40, 100, 10_000])
@pytest.mark.parametrize("batches", [1, 2])
def test_cached_is_plain(chunk_tokens, temperature, batches):
    plain_losses, plain, _ = gradients(None, temperature=temperature, batches=batches)
    losses, cached, engine = gradients(chunk_tokens, temperature=temperature, batches=batches)
    assert losses == pytest.approx(plain_losses, abs=1e-5)
    assert sum(float(gradient.abs().sum()) for gradient in plain.values()) > 0.1
    for name, gradient in plain.items():
        torch.testing.assert_close(cached[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    if chunk_tokens < 10_000:
        assert all(size <= max(chunk_tokens, 20) for size, _ in engine.forwards)


def test_the_second_pass_draws_the_dropout_of_the_first():
    """With everything in one chunk the plain and the cached pass draw the same numbers, so they must agree."""
    _, plain, _ = gradients(None, dropout=0.3)
    _, cached, engine = gradients(10_000, dropout=0.3)
    assert [grad for _, grad in engine.forwards] == [False, False, True, True]
    for name, gradient in plain.items():
        torch.testing.assert_close(cached[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    _, other, _ = gradients(None, dropout=0.0)
    assert any((plain[name] - other[name]).abs().max() > 1e-3 for name in plain)  # dropout does something


def test_the_random_state_goes_on_after_a_batch():
    """Two batches in a row must not draw the same dropout."""
    engine = Plain(tiny_network(dropout=0.3).train())
    objective, batch = InBatchContrastive(temperature=0.05), random_batch(4, 2, seed=0)
    first = grad_cache.backward(engine, objective, batch, chunk_tokens=40).loss
    second = grad_cache.backward(engine, objective, batch, chunk_tokens=40).loss
    assert first.item() != second.item()


def test_embeddings_come_back_in_the_order_of_the_batch():
    """The loss sees query i and its group at the same places, though texts are sorted by length underneath."""

    class Recording(InBatchContrastive):
        def loss(self, queries, passages, batch):
            self.seen = queries.detach().clone(), passages.detach().clone()
            return super().loss(queries, passages, batch)

    network = tiny_network().eval()
    batch = random_batch(5, 2, seed=3)
    for chunk_tokens in (None, 30):
        objective = Recording(temperature=0.05)
        grad_cache.backward(Plain(network), objective, batch, chunk_tokens=chunk_tokens)
        for seen, tokens in zip(objective.seen, (batch.queries, batch.passages), strict=True):
            with torch.no_grad():
                torch.testing.assert_close(seen, network(tokens.ids, tokens.mask), atol=1e-5, rtol=1e-4)
