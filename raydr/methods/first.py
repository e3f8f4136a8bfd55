"""FIRST: Faster Improved Listwise Reranking with Single Token Decoding (Reddy et al., EMNLP 2024, arXiv 2406.15657).

A listwise reranker names the passages of a window by letters and writes their order, `[C] > [A] > [B]`. FIRST reads the
order off the logits of all letters where the first letter would be written, and trains exactly these logits:

1. write query and passages into a prompt, passages marked [A], [B], ...; end it with the bracket `[`
2. s_i = logit of letter i as the next token; the window's order is s, descending, ties as they came
3. slide the window from the tail of the list to its head, `stride` at a time; the best rise with it
4. training: L = L_LM + lambda L_rank; L_LM is the language-modelling loss of the whole answer of the teacher
5. L_rank = mean over pairs r_i < r_j of log(1 + exp(s_j - s_i)) / (r_i + r_j), r the teacher's ranks

| equation | function |
| --- | --- |
| single-token decoding | `FirstReranker.rank_window` |
| windows, tail to head | `raydr.llm.windows.ranked_by_windows` |
| weighted RankNet | `raydr.losses.ranknet` |
| L = L_LM + lambda L_rank | `FirstObjective.__call__` |
| NEFTune | `raydr.models.causal_lm.CausalLm` |

Deviations: the ranking loss is computed from integer ranks in float32, where the released code compares the model's own
logits and loses tied pairs; lists of every length are ranked, where the released loop skips a list of `window_size -
stride`; the language-modelling loss is a mean over the tokens of the worker's batch, as there. Passages keep their
scores when they move, where the released code hands the old scores out in the new order.

Numbers to reproduce: average nDCG@10 over 11 BEIR sets 54.3 (Contriever's top 100, Zephyr-7B).

    reranker: {import_path: "raydr.methods.first:First", args: {engine: {model: castorini/first_mistral}}}
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from raydr.config import Component, part_of, validate
from raydr.data.example_files import FILE_SOURCE
from raydr.data.spans import span_examples, span_queries
from raydr.encoders.texts import Texts
from raydr.errors import ConfigError
from raydr.llm.engine import load_llm_tokenizer
from raydr.llm.listwise import ListwiseConfig, ListwiseReranker, RankedWindow
from raydr.llm.prompt import ListwisePrompt
from raydr.llm.small import small_causal_lm
from raydr.losses import lambdarank, listnet, ranknet
from raydr.methods.base import RankerMethod
from raydr.stages.score import open_scores
from raydr.storage import Location
from raydr.train.objective import LossOutput, TrainBatch
from raydr.train.sampling import BatchSampler, Group
from raydr.train.trainer import MODEL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from raydr.data.examples import ExampleSet
    from raydr.models.causal_lm import CausalLm
    from raydr.protocols import Reranker
    from raydr.steps import Steps
    from raydr.train.batches import GroupTokenizer, Tokenized
    from raydr.train.config import TrainConfig
    from raydr.types import Passage, Query


class FirstReranker(ListwiseReranker):
    """Ranks a window by one token's logits. Scores are natural log-probabilities of the letters."""

    Config = ListwiseConfig

    async def rank_window(self, query: str, passages: Sequence[str]) -> RankedWindow:
        prompt = self.prompt.encode(query, passages)
        scores = await self.engine.next_token_logprobs(prompt, self.prompt.letters[: len(passages)])
        return RankedWindow(np.argsort(-np.asarray(scores), kind="stable").tolist(), scores)


class FirstObjective:
    """An `Objective`: the answer's language-modelling loss, and a ranking loss over the letters' logits."""

    def __init__(
        self,
        prompt: ListwisePrompt,
        *,
        end: int,
        objective: Literal["combined", "generation", "ranking"],
        ranking_loss: Literal["ranknet", "ranknet_unweighted", "lambdarank", "listnet"],
        ranking_weight: float,
    ) -> None:
        self._prompt, self._end = prompt, end
        self._lm_weight = 0.0 if objective == "ranking" else 1.0
        self._ranking_weight = {"combined": ranking_weight, "generation": 0.0, "ranking": 1.0}[objective]
        self._ranking_loss = {
            "ranknet": ranknet,
            "ranknet_unweighted": functools.partial(ranknet, weighted=False),
            "lambdarank": lambdarank,
            "listnet": listnet,
        }[ranking_loss]

    def __call__(self, model: Any, batch: TrainBatch) -> LossOutput:
        if batch.pairs is None or batch.labels.teacher_scores is None:
            raise ConfigError("FIRST is trained on windows with a teacher's order; its method builds both")
        ranks = to_ranks(batch.labels.teacher_scores)
        # The bracket belongs to the answer that is learned, and the letters' logits are those behind it.
        answers = self._answers(ranks)
        prompts, mask = without_last(batch.pairs.ids, batch.pairs.mask)
        logits = model(prompts, mask, answers)
        scores = logits[:, 1, self._prompt.letters[: ranks.shape[1]]]
        lm_loss = functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        rank_loss = self._ranking_loss(scores, ranks)
        loss = self._lm_weight * lm_loss + self._ranking_weight * rank_loss
        first = (scores.argmax(dim=1) == ranks.argmin(dim=1)).float().mean()
        metrics = {"lm_loss": lm_loss, "rank_loss": rank_loss, "first_is_right": first}
        return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})

    def _answers(self, ranks: Tensor) -> Tensor:
        orders = ranks.argsort(dim=1, stable=True).tolist()
        rows = [[self._prompt.bracket, *self._prompt.answer(order), self._end] for order in orders]
        return torch.tensor(rows, device=ranks.device)


def to_ranks(teacher_scores: Tensor) -> Tensor:
    """Ranks from 1; equal scores share one, so that they make no pair."""
    return (teacher_scores[:, None, :] > teacher_scores[:, :, None]).sum(dim=2) + 1


def without_last(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Texts padded on the right, each without its last token."""
    if mask is None:
        return ids[:, :-1], None
    lengths = mask.sum(dim=1, keepdim=True) - 1
    shorter = (torch.arange(ids.shape[1], device=ids.device) < lengths).to(mask.dtype)
    return ids, shorter


class WindowBatches:
    """Windows of a query's candidates with the teacher's scores; all windows of a batch of one size.

    Each batch is of `window_size` passages or, with probability `short_share`, of a smaller random size, so that short
    lists are learned as well. Where judgements alone are known, one of a window's passages is a positive, or nothing
    would be learned from it; of a teacher's order any passages are drawn, as a sliding window may hold any.
    With probability `shuffled_share` they stand in random order, else as the retriever ranked them, where the miner
    left its scores. The teacher is a ranker (`scores`, an artifact of `raydr.stages.score`); without one, the
    scores that a file of examples gave, or else the judgements: what is relevant before what was mined, and no order
    among the mined, whose own scores are the retriever's.
    """

    def __init__(
        self,
        examples: ExampleSet,
        *,
        batch_size: int,
        window_size: int,
        short_share: float,
        shuffled_share: float,
        seed: int,
        scores: Path | None = None,
    ) -> None:
        self._batch_size, self._window_size, self._short_share = batch_size, window_size, short_share
        self._shuffled_share, self._seed = shuffled_share, seed
        given = open_scores(scores, examples) if scores is not None else None
        self._candidates: list[_Candidates] = []
        for row in range(len(examples)):
            rows = np.concatenate([examples.positives(row), examples.negatives(row)])
            if len(rows) < 2:
                raise ConfigError(
                    f"query {examples.query(row).query_id!r} has {len(rows)} candidate; FIRST learns an order of at "
                    "least two: mine negatives (`raydr mine`)"
                )
            teacher, miner = _teacher_and_miner(examples, row)
            teacher = given[row] if given is not None else teacher
            num_positives = len(examples.positives(row))
            is_order = len(np.unique(teacher[num_positives:])) > 1  # without the positives, too, there is one to learn
            num_first = len(rows) if is_order else num_positives
            self._candidates.append(_Candidates(rows, num_first, teacher, miner))

    def __iter__(self) -> Iterator[list[Group]]:
        rng = np.random.default_rng(self._seed)
        queries: list[int] = []
        while True:
            while len(queries) < self._batch_size:
                queries += [int(row) for row in rng.permutation(len(self._candidates))]
            batch, queries = queries[: self._batch_size], queries[self._batch_size :]
            size = self._window_size
            if rng.random() < self._short_share:
                size = int(rng.integers(2, self._window_size + 1))
            size = min(size, *(len(self._candidates[row].rows) for row in batch))
            yield [self._window(row, size, rng) for row in batch]

    def _window(self, row: int, size: int, rng: np.random.Generator) -> Group:
        candidates = self._candidates[row]
        first = rng.integers(candidates.num_first)
        others = np.delete(np.arange(len(candidates.rows)), first)
        chosen = rng.permutation([first, *rng.permutation(others)[: size - 1]])
        if candidates.miner_scores is not None and rng.random() >= self._shuffled_share:
            chosen = chosen[np.argsort(-candidates.miner_scores[chosen], kind="stable")]
        scores = candidates.teacher_scores[chosen]
        return Group(row, tuple(int(r) for r in candidates.rows[chosen]), tuple(float(s) for s in scores))


class _Candidates(NamedTuple):
    """What a query's windows are drawn from: rows of passages, positives first; each window holds at least one of the
    first `num_first`.
    """

    rows: np.ndarray
    num_first: int
    teacher_scores: np.ndarray
    miner_scores: np.ndarray | None


def _teacher_and_miner(examples: ExampleSet, row: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Scores of an example's positives and negatives, in this order, where no ranker was asked: those to learn, and
    the retriever's, where the miner left them.
    """
    num_positives, num_negatives = len(examples.positives(row)), len(examples.negatives(row))
    judged = np.repeat(np.array([1, 0], dtype=np.float32), [num_positives, num_negatives])
    scores = np.concatenate([examples.positive_scores(row), examples.negative_scores(row)])
    if len(scores) != num_positives + num_negatives:
        return judged, None
    is_from_file = set(examples.negative_sources(row)) == {FILE_SOURCE}
    return (scores, None) if is_from_file else (judged, scores)


@dataclass(frozen=True)
class WindowTokenizer:
    """A `GroupTokenizer`: each query's window as one prompt, in the place of pairs."""

    config: First.Config

    def tokenize(self, queries: Sequence[Query], groups: Sequence[Sequence[Passage]]) -> Tokenized:
        prompt, separator = _prompt(self.config), self.config.prompt.title_separator
        texts = [[passage.joined(separator) for passage in group] for group in groups]
        reserve = len(prompt.answer(range(self.config.window_size))) + 1
        pairs = zip(queries, texts, strict=True)
        return {"pairs": Texts([prompt.encode(query.text, own, reserve=reserve) for query, own in pairs])}

    @property
    def pad_id(self) -> int:
        return 0  # masked wherever it stands


def _prompt(config: First.Config) -> ListwisePrompt:
    return _prompt_of(config.model_dump_json(), config.engine.model)


@functools.lru_cache(maxsize=4)
def _prompt_of(config: str, model: str) -> ListwisePrompt:
    settings = First.Config.model_validate_json(config)
    return ListwisePrompt(
        load_llm_tokenizer(model),
        settings.prompt,
        max_tokens=settings.max_prompt_tokens,
        num_identifiers=settings.window_size,
    )


def _first_training(steps: Steps, **changes: int) -> TrainConfig:
    """The run's settings of training for one that comes before the examples'."""
    ignored = {"schedule_steps": None, "evaluate_every": 0, "patience": 0}
    return steps.train_config.model_copy(update={**changes, **ignored})


class First(RankerMethod):
    """Trains the reranker; what it leaves opens in vLLM and transformers and is served as a `FirstReranker`."""

    class Config(ListwiseConfig):
        start: Literal["causal", "encoder"] = "causal"
        """What `engine.model` is when training starts: `causal`, a language model; `encoder`, a small BERT such as
        `minilm`, out of which a small language model is made first (raydr/llm/small.py)."""
        span_steps: int = Field(default=0, ge=0)
        """Steps of a first training in which spans of the corpus look for the chunks they were cut from
        (raydr/data/spans.py), meant for a language model that was made out of an encoder. 0: none."""
        span_batch_size: int = Field(default=32, ge=1)
        """Windows in a batch of it; they are short."""
        taught_steps: int = Field(default=0, ge=0)
        """Steps of a second training, before that on the examples: the retriever's hits for spans of the corpus, in the
        order of `teacher`. 0: none."""
        taught_queries: int = Field(default=2000, ge=1)
        """Spans whose hits the teacher orders."""
        teacher: Component = Component(import_path="raydr.methods.colbert:ColBertRanker")
        """A ranker: a ColBERT, which ranks well untrained where it is a sentence encoder, or a cross-encoder."""
        retriever: Component = Component(import_path="raydr.methods.zero_shot:ZeroShot")
        """Whose hits it learns to reorder, and reorders."""
        objective: Literal["combined", "generation", "ranking"] = "combined"
        """`combined`: L_LM + lambda L_rank; `generation`: L_LM alone, as listwise rerankers are; `ranking`: L_rank."""
        ranking_loss: Literal["ranknet", "ranknet_unweighted", "lambdarank", "listnet"] = "ranknet"
        """Loss of the letters' logits (paper: weighted RankNet)."""
        ranking_weight: float = Field(default=10.0, ge=0)
        """lambda: 10 for weighted RankNet, 1 for LambdaRank and unweighted RankNet, 0.1 for ListNet (released code)."""
        neftune_alpha: float = Field(default=5.0, ge=0)
        """Noise on embeddings in training; 0: none."""
        short_share: float = Field(default=0.5, ge=0, le=1)
        """Share of batches with fewer than `window_size` passages."""
        shuffled_share: float = Field(default=0.5, ge=0, le=1)
        """Share of windows whose passages stand in random order; in the others they stand as the retriever ranked
        them, as they do where hits are reranked (RankZephyr's lists come both ways)."""
        max_prompt_tokens: int = Field(default=4096, ge=32)
        """Longest prompt and answer in training; passages are cut to fit."""
        teacher_scores: Location | None = None
        """A ranker's scores of the training examples (an artifact of `raydr.stages.score`), whose order is learned;
        null: the scores or orders of a file of examples, or else what is judged relevant before what was mined."""

    config: Config
    is_measured_on_dev = False

    def fit(self, steps: Steps) -> Component:
        """Made out of an encoder, trained on spans and taught by a ranker where the config says so, then trained on the
        examples.
        """
        method: First = self
        if self.config.start == "encoder":
            method = method._from(small_causal_lm(self.config.engine.model, steps.config.out / "start"))
        if self.config.span_steps:
            method = method._from(self._trained_on_spans(method, steps))
        if self.config.taught_steps:
            method = method._from(self._taught(method, steps))
        return RankerMethod.fit(method, steps)

    def _trained_on_spans(self, learner: First, steps: Steps) -> Path:
        num_steps, batch_size = self.config.span_steps, self.config.span_batch_size
        spans = span_examples(
            steps.corpus,
            steps.config.out / "spans",
            num_examples=num_steps * batch_size,
            num_negatives=self.config.window_size - 1,
            seed=steps.train_config.seed,
        )
        plan = _first_training(steps, max_steps=num_steps, batch_size=batch_size)
        # The config's scores are of the real examples.
        return steps.train(learner._with({"teacher_scores": None}), plan, spans, "span-training").path / MODEL

    def _taught(self, learner: First, steps: Steps) -> Path:
        queries = span_queries(
            steps.corpus,
            steps.config.out / "span-queries",
            num_queries=self.config.taught_queries,
            seed=steps.train_config.seed,
        )
        retriever = self.config.retriever
        examples = steps.mine(retriever, steps.base(retriever), "span-hits", queries=queries)
        scores = steps.score(self.config.teacher, examples, "span-scores")
        taught = learner._with({"teacher_scores": str(scores.path.resolve())})
        plan = _first_training(steps, max_steps=self.config.taught_steps)
        return steps.train(taught, plan, examples, "taught").path / MODEL

    def _from(self, model: Path) -> First:
        """This method over the checkpoint `model`, which has had its first trainings."""
        args = {**self.trained(str(model.resolve())).args, "span_steps": 0, "taught_steps": 0}
        return First(validate(First.Config, args, where="method.args"))

    def trained(self, model: str) -> Component:
        engine = self.config.engine.model_dump(mode="json", exclude_unset=True)
        return self._with({"engine": {**engine, "model": model}, "start": "causal"})

    def build_reranker(self) -> Reranker:
        return FirstReranker(part_of(ListwiseConfig, self.config))

    def build_model(self) -> CausalLm:
        from transformers import AutoModelForCausalLM

        from raydr.encoders.checkpoint import load_transformer, locate
        from raydr.models.causal_lm import CausalLm

        path = locate(self.config.engine.model)
        try:
            network = load_transformer(AutoModelForCausalLM, path, dtype=torch.float32)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(f"{path}: transformers cannot load this as a causal language model: {error}") from error
        return CausalLm(network, neftune_alpha=self.config.neftune_alpha)

    def build_objective(self) -> FirstObjective:
        end = load_llm_tokenizer(self.config.engine.model).eos_token_id
        if end is None:
            raise ConfigError(f"{self.config.engine.model}: its tokenizer has no end token to close an answer with")
        return FirstObjective(
            _prompt(self.config),
            end=end,
            objective=self.config.objective,
            ranking_loss=self.config.ranking_loss,
            ranking_weight=self.config.ranking_weight,
        )

    def build_tokenizer(self) -> GroupTokenizer:
        return WindowTokenizer(self.config)

    def build_batches(self, examples: ExampleSet, *, batch_size: int, seed: int) -> BatchSampler:
        return WindowBatches(
            examples,
            batch_size=batch_size,
            window_size=self.config.window_size,
            short_share=self.config.short_share,
            shuffled_share=self.config.shuffled_share,
            seed=seed,
            scores=self.config.teacher_scores,
        )

    def save_model(self, model: nn.Module, folder: Path) -> None:
        from raydr.encoders.checkpoint import locate
        from raydr.encoders.export import save_transformer

        save_transformer(model.transformer, locate(self.config.engine.model), folder)
