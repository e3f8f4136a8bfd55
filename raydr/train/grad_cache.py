"""The gradient of a loss over many embeddings in the memory of a few: gradient caching, written once for every loss.

1. embed all texts, chunk by chunk, without keeping activations
2. loss of all embeddings (joined over workers); its gradient with respect to each own embedding is the cache
3. embed each chunk again, with activations, and continue the backward pass from its cached gradients

Notable: exact, not an approximation: the second embedding of a chunk draws the same dropout as the first, because the
random state is put back. It needs nothing of the loss but that it is a function of embeddings, and nothing of the
engine but that gradients of several backward passes add up, so it works with every ZeRO stage, with accumulation and
with any temperature. Texts are sorted by length before they are cut into chunks, so chunks are padded to their own
longest text. A side that comes as ready embeddings is used as it is. Source: Gao et al. 2021 (arXiv 2101.06983).

    output = backward(engine, objective, batch, chunk_tokens=4096, weight=1.0)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from raydr import series
from raydr.models.tokens import ReadyEmbeddings
from raydr.train.distributed import join, join_labels, join_tokens, most_of_all_workers, num_workers
from raydr.train.objective import EmbeddingObjective, Labels, LossOutput, Side, Tokens, TrainBatch

_BUCKET_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Tokens, padding included, of texts of like length that go through the network together where nothing is cached."""


@runtime_checkable
class Trainable(Protocol):
    """What is needed of an engine: a forward pass, and backward passes whose gradients add up until the step."""

    @property
    def device(self) -> torch.device: ...

    def __call__(self, *inputs: Tensor | str | None) -> Any:
        """Embeddings of `Tokens.inputs`: Float[Tensor, "text dim"]."""
        ...

    def backward(self, loss: Float[Tensor, ""]) -> None: ...


def backward(
    engine: Trainable,
    objective: EmbeddingObjective,
    batch: TrainBatch,
    *,
    chunk_tokens: int | None,
    weight: float = 1.0,
) -> LossOutput:
    """Adds the gradient of `weight` times the batch's loss to the weights; returns the loss and the metrics.

    With `chunk_tokens` None all texts go through the network once, and all their activations are kept; with a number,
    in chunks of so many tokens, twice.
    """
    plans = [_plan(side.to(engine.device), chunk_tokens) for side in batch.sides]
    if chunk_tokens is None:
        embeddings = [plan.embed(engine) for plan in plans]
        output, scaled = _loss(objective, embeddings, batch, weight, engine.device)
        engine.backward(scaled)
        return output
    for plan in plans:
        plan.embed_for_cache(engine)
    output, scaled = _loss(objective, [plan.cached for plan in plans], batch, weight, engine.device)
    scaled.backward()
    for plan in plans:
        plan.continue_backward(engine)
    return output


def _loss(
    objective: EmbeddingObjective, own: list[Tensor], batch: TrainBatch, weight: float, device: torch.device
) -> tuple[LossOutput, Tensor]:
    """The loss, and what to differentiate: times the number of workers where all compute the same loss, because their
    gradients are averaged, each having only those of its own rows.
    """
    labels = _labels(objective, batch, device)
    if not objective.gather:
        output = objective.loss(own[0].float(), own[1].float(), labels)
        return output, output.loss * weight
    output = objective.loss(join(own[0].float()), join(own[1].float()), labels)
    return output, output.loss * weight * num_workers()


def _labels(objective: EmbeddingObjective, batch: TrainBatch, device: torch.device) -> Labels:
    """The labels of the batch that the loss sees, with what the objective's teacher says of it."""
    labels = batch.labels.to(device)
    if objective.gather:
        labels = join_labels(labels)
    if objective.in_batch_teacher is None and not objective.reads_tokens:
        return labels
    queries, passages = (tokens.to(device) for tokens in batch.texts)
    if objective.reads_tokens:
        joined = [join_tokens(side) if objective.gather else side for side in (queries, passages)]
        labels = dataclasses.replace(labels, query_tokens=joined[0], passage_tokens=joined[1])
    if objective.in_batch_teacher is None:
        return labels
    if objective.gather:
        queries = join_tokens(queries)
    with torch.no_grad():
        scores = objective.in_batch_teacher(queries, passages).T.contiguous()
    return dataclasses.replace(labels, in_batch_teacher=(join(scores) if objective.gather else scores).T)


def outputs(engine: Trainable, tokens: Tokens) -> Float[Tensor, "text ..."]:
    """The network's output of every text, with its graph, for objectives that call the model themselves: texts of like
    length go through it together, so little is spent on padding.
    """
    return _Plan(tokens, None).embed(engine)


class _Plan:
    """The texts of one side, sorted by length and cut into chunks."""

    def __init__(self, tokens: Tokens, chunk_tokens: int | None) -> None:
        lengths = tokens.lengths
        self._order = torch.argsort(lengths, stable=True)
        self._tokens = tokens.take(self._order)
        most = chunk_tokens or _BUCKET_TOKENS[tokens.ids.device.type]
        widths = lengths[self._order].tolist()
        self._bounds = list(_cut(widths, most))
        computed = sum((end - start) * widths[end - 1] for start, end in self._bounds)
        series.count("raydr_train_padding_tokens_total", computed - sum(widths))
        # Each pass is one of all workers in ZeRO 2 and 3, so all make the same number of them.
        _split_into(self._bounds, most_of_all_workers(len(self._bounds), lengths.device))
        self._states: list[tuple[Tensor, Tensor | None]] = []
        self.cached: Float[Tensor, "text dim"]

    def embed(self, engine: Trainable) -> Float[Tensor, "text ..."]:
        """Outputs in the order of the input, with their graph."""
        return torch.cat([self._forward(engine, *bounds) for bounds in self._bounds])[torch.argsort(self._order)]

    def embed_for_cache(self, engine: Trainable) -> None:
        """Embeddings without a graph, in the order of the input; notes the random state before each chunk."""
        parts = []
        with torch.no_grad():
            for bounds in self._bounds:
                self._states.append(_random_state(engine.device))
                parts.append(self._forward(engine, *bounds))
        self.cached = torch.cat(parts)[torch.argsort(self._order)].requires_grad_()

    def continue_backward(self, engine: Trainable) -> None:
        """Each chunk again, and the backward pass from the gradients that `cached` has by now."""
        cached_gradients = self.cached.grad
        if cached_gradients is None:  # a loss that looks at one side only
            return
        gradients = cached_gradients[self._order]
        for (start, end), state in zip(self._bounds, self._states, strict=True):
            with _with_random_state(state, engine.device):
                embeddings = self._forward(engine, start, end)
            engine.backward((embeddings.float() * gradients[start:end]).sum())

    def _forward(self, engine: Trainable, start: int, end: int) -> Float[Tensor, "text ..."]:
        return engine(*self._tokens.part(start, end).inputs)


class _Ready:
    """A side that is embedded already: no network sees it, on any worker, and it has no gradient."""

    def __init__(self, side: ReadyEmbeddings) -> None:
        self.cached = side.embeddings

    def embed(self, engine: Trainable) -> Float[Tensor, "text dim"]:
        del engine
        return self.cached

    def embed_for_cache(self, engine: Trainable) -> None:
        """There is nothing to do."""

    def continue_backward(self, engine: Trainable) -> None:
        """Likewise."""


def _plan(side: Side, chunk_tokens: int | None) -> _Plan | _Ready:
    return _Ready(side) if isinstance(side, ReadyEmbeddings) else _Plan(side, chunk_tokens)


def _cut(lengths: list[int], chunk_tokens: int) -> Iterator[tuple[int, int]]:
    """Bounds of consecutive chunks of ascending lengths, each at most `chunk_tokens` when padded, or one text."""
    start = 0
    for end in range(1, len(lengths) + 1):
        is_last = end == len(lengths)
        if is_last or lengths[end] * (end + 1 - start) > chunk_tokens:
            yield start, end
            start = end


def _split_into(bounds: list[tuple[int, int]], count: int) -> None:
    """Halves the largest chunks until there are `count`, which is at most the number of texts."""
    while len(bounds) < count:
        place = max(range(len(bounds)), key=lambda i: bounds[i][1] - bounds[i][0])
        start, end = bounds[place]
        bounds[place : place + 1] = [(start, (start + end) // 2), ((start + end) // 2, end)]


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _with_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> Generator[None]:
    """Runs the block from `state`, and leaves the random state as it was before."""
    before = _random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(before, device)


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
