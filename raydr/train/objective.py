"""What a method is trained for: `EmbeddingObjective` for losses over embeddings, `Objective` for everything else.

Notable: an `EmbeddingObjective` sees the embeddings of the whole batch, gathered from all workers, and never the model,
so gathering and gradient caching are written once, elsewhere, for every loss. The rows of a batch are query-major: the
group of query i is the passages i * group to (i + 1) * group, its first one is a positive.

    class Contrastive(EmbeddingObjective):
        def loss(self, queries, passages, batch):
            return LossOutput(contrastive(queries @ passages.T, batch.positives, temperature=0.05))
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from raydr.models.tokens import ReadyEmbeddings, Tokens


@dataclass(frozen=True)
class Labels:
    """What a batch knows beside its texts. Rows number passages of the example set: equal rows are equal passages."""

    passage_rows: Int[Tensor, " passage"]
    """Which passage each column of the score matrix is."""
    positive_rows: Int[Tensor, "query positive"]
    """All known positives of each query, whether in the batch or not; padded with -1."""
    teacher_scores: Float[Tensor, "query group"] | None = None
    """A teacher's score of every passage of a query's own group."""
    clusters: Int[Tensor, " query"] | None = None
    """A label that queries share (a topic, a task), for objectives that restrict pairs to it."""
    in_batch_teacher: Float[Tensor, "query passage"] | None = None
    """A teacher's score of every passage of the batch for every query, for objectives that distil in-batch pairs. It is
    of the batch the objective sees: where the batches of all workers are joined, of the joined one."""
    query_tokens: Tokens | None = None
    """The texts themselves, for objectives that read them (`EmbeddingObjective.reads_tokens`); as above, of the batch
    the objective sees."""
    passage_tokens: Tokens | None = None

    token_labels: Int[Tensor, "query query_token"] | None = None
    """The label of each token of each query, of texts that a tagger is trained on; padded with 0."""

    def to(self, device: torch.device) -> Labels:
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return dataclasses.replace(self, **moved)

    @property
    def group_size(self) -> int:
        return len(self.passage_rows) // max(1, len(self.positive_rows))

    @property
    def positives(self) -> Bool[Tensor, "query passage"]:
        """Whether a passage of the batch is relevant to a query; other queries' and repeated passages included."""
        return (self.positive_rows[:, :, None] == self.passage_rows).any(dim=1)

    @property
    def own_positive(self) -> Int[Tensor, " query"]:
        """Column of each query's own positive: the first of its group."""
        return torch.arange(len(self.positive_rows), device=self.passage_rows.device) * self.group_size

    def groups(self, scores: Shaped[Tensor, "query passage"]) -> Shaped[Tensor, "query group"]:
        """Each query's scores of its own group, cut out of the score matrix of the batch."""
        columns = self.own_positive[:, None] + torch.arange(self.group_size, device=scores.device)
        return scores.gather(1, columns)


@runtime_checkable
class InBatchTeacher(Protocol):
    """A frozen model that judges passages for queries it does not belong to; it reads the student's token ids."""

    def __call__(self, queries: Tokens, passages: Tokens) -> Float[Tensor, "query passage"]: ...


Side: TypeAlias = Tokens | ReadyEmbeddings


@dataclass(frozen=True)
class TrainBatch:
    """One worker's share of a batch."""

    labels: Labels
    queries: Side | None = None
    """To be embedded, or embedded already where their side is frozen; so the passages."""
    passages: Side | None = None
    """The passages of all groups, query-major."""
    pairs: Tokens | None = None
    """Query and passage as one text, for a cross-encoder, in place of the two: the pairs of all groups, query-major."""
    names: list[str] = field(default_factory=list)
    """Ids of the queries, for error messages."""

    @property
    def sides(self) -> tuple[Side, Side]:
        """Queries and passages. Raises `TypeError` for a batch of pairs, which has neither."""
        if self.queries is None or self.passages is None:
            raise TypeError("an EmbeddingObjective needs queries and passages, and this method's tokenizer gives pairs")
        return self.queries, self.passages

    @property
    def texts(self) -> tuple[Tokens, Tokens]:
        """The same as token ids. Raises `TypeError` where one of them is embedded already."""
        queries, passages = self.sides
        if isinstance(queries, ReadyEmbeddings) or isinstance(passages, ReadyEmbeddings):
            raise TypeError("token ids are asked for of a side that this method's tokenizer gives as ready embeddings")
        return queries, passages

    def to(self, device: torch.device) -> TrainBatch:
        sides = {name: getattr(self, name) for name in ("queries", "passages", "pairs")}
        moved = {name: side.to(device) for name, side in sides.items() if side is not None}
        return dataclasses.replace(self, labels=self.labels.to(device), **moved)


class LossOutput(NamedTuple):
    loss: Float[Tensor, ""]
    metrics: dict[str, float | Tensor]
    """Further figures of the batch, for the log; means over workers are taken of them."""


@runtime_checkable
class Objective(Protocol):
    """Loss of a model on a worker's own batch: for networks that read query and passage together, and anything else."""

    def __call__(self, model: nn.Module, batch: TrainBatch) -> LossOutput: ...


class EmbeddingObjective(ABC):
    """A loss over the embeddings of a batch, which is what most papers on dense retrieval invent.

    `gather` says whether the batch is that of all workers (in-batch negatives from everywhere) or the worker's own.
    """

    gather: bool = True
    reads_tokens: bool = False
    """Whether the loss looks at the texts beside their embeddings: at `Labels.query_tokens` and `passage_tokens`."""
    in_batch_teacher: InBatchTeacher | None = None
    """Gives `Labels.in_batch_teacher`: each worker asks it about its own passages, for the queries of all."""

    @abstractmethod
    def loss(
        self, queries: Float[Tensor, "query dim"], passages: Float[Tensor, "passage dim"], batch: Labels
    ) -> LossOutput:
        """The loss of the batch. Called with embeddings in float32; must be a mean over queries (not a sum), so that
        the mean over workers is the loss of the joined batch where `gather` is off.
        """
