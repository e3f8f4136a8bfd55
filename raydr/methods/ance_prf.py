"""ANCE-PRF: a second query encoder reads the query and the passages that a first search found; the index stays.

"Improving Query Representations for Dense Retrieval with Pseudo Relevance Feedback", HongChien Yu, Chenyan Xiong, Jamie
Callan, CIKM 2021, arXiv 2108.13454, and its reproduction over other retrievers, Hang Li, Shengyao Zhuang, Ahmed Mourad,
Xueguang Ma, Jimmy Lin, Guido Zuccon, ECIR 2022, arXiv 2112.06400. Written after their code (yuhongqian/ANCE-PRF,
ielab/APR, Pyserini); of the papers only the abstracts were at hand.

1. search once with the retriever: q0 = f_q(query), its first k hits are the feedback, whatever is judged of them
2. q1 = f_prf(query, text of the k hits); f_prf starts as a copy of f_q and is all that is trained
3. search again with q1 alone, in the same index
4. loss = -log softmax of q1 . d+ against q1 . d-, over one positive and m negatives of the first search; every d is the
   frozen vector that the index has (scores are divided by `temperature`: 1 in the papers, whose vectors are long)

| formula | where |
| --- | --- |
| the input of f_prf | `raydr.encoders.feedback`: `assembled`, `masked` |
| the loss (APR's, listwise over each query's own block) | `FrozenPassages.loss`, `raydr.losses.listwise` |
| negatives: 100 of the first 1000 but for judged ones, 20 of them an epoch | `mine.keep: random`, `SlicedBatches` |
| vector PRF, its rivals without parameters | `raydr.prf`, `search.prf.method: average` or `rocchio` |

Departures from the code:

- AdamW; the authors' LAMB is not here.
- ANCE's head (a linear layer and a normalisation behind the first token) is no pooling of raydr's: the retriever is one
  that raydr opens or has trained.
- APR encodes a batch's passages anew, cut to 128 tokens; here their vectors come from the index, as the original's.
- Training queries are shuffled; the original's stream shows the 20 triples of a query one after the other.
- A query with fewer than k hits (a filter left no more) keeps q0.

Numbers to reproduce (Pyserini, the authors' ANCE checkpoint, k = 3): nDCG@10 .6807 on TREC DL 2019 (ANCE .6452), .6948
on DL 2020 (.6458), MRR@10 .3441 on MS MARCO dev (.3302); without lower-casing .6776, .6736 and .3418.

    raydr reproduce jobs/configs/ance_prf_small.yaml data.path=DIR data.split=test out=OUT
    search: {prf: {method: learned, refiner: {import_path: "raydr.methods.ance_prf:AncePrf", args: {...}}}}
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from raydr.config import Component, part_of
from raydr.data.examples import ExampleSet
from raydr.encoders.feedback import FeedbackEncoder, FeedbackInput, LearnedFeedback
from raydr.encoders.text import TextEncoder
from raydr.encoders.texts import Texts, Vectors
from raydr.errors import ConfigError
from raydr.losses import contrastive, listwise
from raydr.methods.base import Method, build_method
from raydr.protocols import Encoder, QueryRefiner
from raydr.stages.passage_embeddings import PassageEmbeddings
from raydr.train.batches import GroupTokenizer, Tokenized
from raydr.train.objective import EmbeddingObjective, Labels, LossOutput
from raydr.train.sampling import BatchSampler, Group, RandomBatches, shuffled
from raydr.train.trainer import MODEL
from raydr.types import Passage, Query

if TYPE_CHECKING:
    from raydr.steps import Steps


class AncePrfConfig(FeedbackInput):
    """What f_prf reads, what it starts from and what it is trained with."""

    retriever: Component = Component(import_path="raydr.methods.zero_shot:ZeroShot")
    """The method whose index is searched, as it was trained; f_prf starts from its query encoder."""
    model: str | None = None
    """Folder of the trained f_prf; null: the retriever's own weights, which have not learned to read feedback."""
    num_negatives: int = Field(default=20, ge=1)
    """Negatives of each query in a batch (m)."""
    negatives: Literal["slices", "random"] = "slices"
    """`slices`: of `num_candidates` each epoch takes the next `num_negatives`, in a shuffled order that a query keeps
    (APR); `random`: drawn anew of all at every visit."""
    num_candidates: int = Field(default=100, ge=1)
    """Candidates of each query that negatives come from: so many are drawn of those that were mined."""
    temperature: float = Field(default=1.0, gt=0)
    """What inner products are divided by in the loss. 1, the papers', is for vectors of any length. Those of length 1
    have scores so alike that hardly anything is learned of them: give the retriever's own temperature (0.05)."""
    in_batch: bool = False
    """Whether the other queries' passages are negatives too."""
    gather: bool = True
    """in_batch: whether those of all workers are."""
    passage_embeddings: str | None = None
    """The frozen vectors of the examples' passages (kind "passage_embeddings"). Null: `raydr train` takes them from the
    index."""

    @model_validator(mode="after")
    def _enough_candidates(self) -> AncePrfConfig:
        if self.num_candidates < self.num_negatives:
            raise ValueError(
                f"num_candidates ({self.num_candidates}) must not be less than num_negatives ({self.num_negatives})"
            )
        return self


class FrozenPassages(EmbeddingObjective):
    """The listwise loss over each query's own block, or over all passages of the batch; scores are inner products."""

    def __init__(self, *, in_batch: bool, temperature: float) -> None:
        self._in_batch, self._temperature = in_batch, temperature

    def loss(
        self, queries: Float[Tensor, "query dim"], passages: Float[Tensor, "passage dim"], batch: Labels
    ) -> LossOutput:
        own_passages = passages.unflatten(0, (-1, batch.group_size))
        own = (queries[:, None, :] * own_passages).sum(dim=2)
        accuracy = (own[:, :1] > own[:, 1:]).all(dim=1).float().mean()
        if self._in_batch:
            loss = contrastive(queries @ passages.T, batch.positives, temperature=self._temperature)
        else:
            loss = listwise(own, batch.groups(batch.positives), temperature=self._temperature)
        return LossOutput(loss, {"accuracy": accuracy.detach()})


class SlicedBatches(RandomBatches):
    """Random groups of every (query, positive) pair once an epoch, each with the next slice of the pair's candidates.

    A pair's candidates are `num_candidates` of its query's negatives, drawn and shuffled by the seed once and for all;
    visit n takes those from n * num_negatives on, around the end to the beginning. Source: APR's `data.py`.
    """

    def __init__(self, examples: ExampleSet, *, num_candidates: int, num_negatives: int, seed: int, batch_size: int):
        super().__init__(examples, batch_size=batch_size, num_negatives=num_negatives, seed=seed)
        self._num_candidates = num_candidates
        self._pairs = [(row, place) for row in self._rows for place in range(len(examples.positives(row)))]

    def __iter__(self) -> Iterator[list[Group]]:
        rng = np.random.default_rng(self._seed)
        order, visits = shuffled(range(len(self._pairs)), rng), Counter[int]()
        while True:
            batch = []
            for pair in (next(order) for _ in range(self._batch_size)):
                batch.append(self._visit(pair, visits[pair], rng))
                visits[pair] += 1
            yield batch

    def _visit(self, pair: int, visit: int, rng: np.random.Generator) -> Group:
        row, place = self._pairs[pair]
        found = self._examples.negatives(row)
        drawn = np.random.default_rng([self._seed, pair]).permutation(found)[: self._num_candidates]
        own = np.arange(visit * self._num_negatives, (visit + 1) * self._num_negatives) % len(drawn)
        group = Group(row, (int(self._examples.positives(row)[place]), *drawn[own].tolist()))
        return group._replace(wording=int(rng.integers(2**31))) if self._examples.has_instructions else group


@dataclass(frozen=True)
class FeedbackTokenizer:
    """Queries with their feedback as token ids, passages as the vectors that are kept of them."""

    method: Component
    """An `AncePrf` with `passage_embeddings`."""

    def tokenize(self, queries: Sequence[Query], groups: Sequence[Sequence[Passage]]) -> Tokenized:
        encoder, embeddings = _opened(self.method.model_dump_json())
        ids = [passage.passage_id for group in groups for passage in group]
        return {"queries": Texts(encoder.reader.ids(queries)), "passages": Vectors(embeddings.of(ids))}

    @property
    def pad_id(self) -> int:
        return _opened(self.method.model_dump_json())[0].network.pad_id


@functools.lru_cache(maxsize=4)
def _opened(component: str) -> tuple[FeedbackEncoder, PassageEmbeddings]:
    method: Any = build_method(Component.model_validate_json(component))
    return method.build_feedback_encoder(), method.embeddings()


class AncePrf(Method):
    """A query encoder that reads feedback, for the index of any retriever of texts."""

    Config: ClassVar[type[AncePrfConfig]] = AncePrfConfig
    config: AncePrfConfig

    @functools.cached_property
    def _retriever(self) -> Method:
        return build_method(self.config.retriever)

    def build_encoder(self) -> Encoder:
        """The retriever's: of the first search's queries, and of all passages."""
        return self._retriever.build_encoder()

    @property
    def preprocessing_version(self) -> str:
        """The retriever's."""
        return self._retriever.preprocessing_version

    def preprocess_queries(self, queries: Sequence[Query]) -> list[Query]:
        """As the retriever does it, with the feedback's passages as its passages."""
        flat = iter(self._retriever.preprocess_passages([passage for query in queries for passage in query.feedback]))
        found = self._retriever.preprocess_queries([query._replace(feedback=()) for query in queries])
        return [
            done._replace(feedback=tuple(next(flat) for _ in query.feedback))
            for done, query in zip(found, queries, strict=True)
        ]

    def preprocess_passages(self, passages: Sequence[Passage]) -> list[Passage]:
        return self._retriever.preprocess_passages(passages)

    def build_feedback_encoder(self) -> FeedbackEncoder:
        """f_prf. Raises `ConfigError` for a retriever of other things than texts, or a checkpoint of other settings."""
        encoder = self.encoder()
        text = getattr(encoder, "inner", encoder)
        if not isinstance(text, TextEncoder):
            raise ConfigError(
                f"retriever: {self.config.retriever.import_path} encodes with {type(text).__name__}; feedback is read "
                "by a copy of an encoder of texts (raydr.encoders.text)"
            )
        return FeedbackEncoder(encoder, text, part_of(FeedbackInput, self.config), self.config.model)

    def build_refiner(self, encoder: Encoder) -> QueryRefiner:
        """Raises `ConfigError` where `encoder`, that of the index, is not the retriever's."""
        feedback = self.build_feedback_encoder()
        base = feedback.trained_with["base_encoder"]
        if encoder.version != base:
            raise ConfigError(
                f"retriever: its encoder is {base}, but the index was made by {encoder.version}; name the index's own "
                "method as the retriever, or embed and index the corpus with this one"
            )
        return LearnedFeedback(feedback, self.preprocess_queries)

    def fit(self, steps: Steps) -> Component:
        """The first search of the training queries, the frozen vectors of what it found, and one training."""
        config = self.config
        index = steps.base(config.retriever)
        examples = steps.mine(config.retriever, index, "examples", num_feedback=config.num_feedback)
        dev = steps.dev(config.retriever, index, num_feedback=config.num_feedback)
        kept = steps.embeddings_of(index, [examples, dev], "passage_embeddings")
        student = self._with({"passage_embeddings": str(kept.path.resolve())})
        model = steps.train(student, steps.train_config, examples, "train", dev=dev)
        return self.trained(str((model.path / MODEL).resolve()))

    def build_model(self) -> nn.Module:
        return self.build_feedback_encoder().network.load_network("float32")

    def build_tokenizer(self) -> GroupTokenizer:
        self._kept()
        return FeedbackTokenizer(self.component)

    def save_model(self, model: nn.Module, folder: Path) -> None:
        self.build_feedback_encoder().save(model, folder)

    def _kept(self) -> str:
        """Where the frozen vectors are."""
        if self.config.passage_embeddings is None:
            raise ConfigError(
                "passage_embeddings: name the artifact with the vectors of the examples' passages; `raydr train` and "
                "`raydr reproduce` make it"
            )
        return self.config.passage_embeddings

    def embeddings(self) -> PassageEmbeddings:
        """The frozen vectors. Raises `ConfigError` where they are not named or not the retriever's."""
        kept, base = PassageEmbeddings.open(self._kept()), self.encoder().version
        if kept.encoder_version != base:
            raise ConfigError(
                f"passage_embeddings: of the encoder {kept.encoder_version}, but the retriever's is {base}; give the "
                "command again, which makes them of this one"
            )
        return kept

    def build_objective(self) -> EmbeddingObjective:
        objective = FrozenPassages(in_batch=self.config.in_batch, temperature=self.config.temperature)
        objective.gather = self.config.in_batch and self.config.gather
        return objective

    def build_batches(self, examples: ExampleSet, *, batch_size: int, seed: int) -> BatchSampler:
        config, kept = self.config, examples.num_feedback
        if config.num_feedback and (kept is None or kept < config.num_feedback):
            raise ConfigError(
                f"num_feedback: the examples in {examples.artifact.path} keep {kept or 0} hits of a first search, "
                f"{config.num_feedback} are read; mine them with mine.num_feedback={config.num_feedback} (a file of "
                "examples has none)"
            )
        settings = {"batch_size": batch_size, "num_negatives": config.num_negatives, "seed": seed}
        if config.negatives == "random":
            return RandomBatches(examples, **settings)
        return SlicedBatches(examples, num_candidates=config.num_candidates, **settings)
