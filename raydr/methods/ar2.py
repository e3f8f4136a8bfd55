"""AR2: adversarial retriever-ranker training. Zhang, Gong, Shen, Lv, Duan, Chen, ICLR 2022 (arXiv 2110.03611).

A dual-encoder retriever G and a cross-encoder ranker D are trained in turns. G proposes candidates; D learns to find
the gold passage among them; then G, with D frozen, learns to give probability to what D could confuse with the gold
passage (adversarial), and to match D's distribution (distillation). `Ar2.fit` is the whole algorithm; one round is:

1. D: listwise cross-entropy over the gold passage and n of G's candidates
2. D scores gold and candidates of every training query, once, as a batch job: it does not change while G is trained
3. G: lambda * adversarial + (1 - lambda) * distillation, over the same n + 1 passages
4. embed the corpus with G, index it, mine the next candidates (`first: retriever`: before the ranker's turn)
5. measure on the dev queries, where `mine.dev_split` names them, beside all rounds before: `round-NN/evaluate`

| equation | function |
| --- | --- |
| eq. 7, ranker | `raydr.losses.listwise` |
| eq. 8-11, adversarial term; the released code's form and the paper's | `adversarial` |
| eq. 12, distillation | `distillation` |

Departures from the paper:

- `adv_form: uniform_incl_pos`, the released code's form, is the default: the paper's literal term has nothing that
  holds the gold passage up. It is a mean over queries; the code sums over the GPU's batch (`adv_reduction: sum`).
- The ranker comes first in a round, as in the code and unlike Algorithm 1 (`first: retriever`).
- The code takes candidates that contain an answer string for positives. Here those judged relevant are never negatives,
  and `mine` may drop more by the retriever's scores.
- Pairs carry segment ids where the ranker's checkpoint has them; the code gives none.
- Queries and passages share one encoder; the code trains two, without tying them.
- A query with several positives is trained towards a random one at each visit; the code takes the first, as the gold
  passage, and in its MS MARCO variant a random one too.
- The ranker is a cross-encoder by default, as in the paper; `ar2_small.yaml` and the demo take a ColBERT, because a
  cross-encoder that has to start from nothing ranks at random after the few steps that two cores can do.

Numbers to reproduce, NQ R@5/20/100 (table 1): warm-up 69.7/80.8/87.1, AR2 77.9/86.0/90.1, on 8 A100.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from raydr.artifacts import Artifact
from raydr.config import Component
from raydr.data.examples import ExampleSet
from raydr.encoders.text import TextEncoderConfig
from raydr.errors import ConfigError
from raydr.methods.base import DualEncoderConfig, DualEncoderMethod, build_method
from raydr.protocols import Reranker
from raydr.storage import Location
from raydr.train.config import TrainConfig
from raydr.train.objective import EmbeddingObjective, Labels, LossOutput
from raydr.train.sampling import BatchSampler, ScoredBatches
from raydr.train.trainer import MODEL, STATE, settings_for

if TYPE_CHECKING:
    from raydr.steps import Steps

_LEAST_ORDERED = 0.7
EPS = 1e-7
"""Inside the logarithms, as in the released code."""


def rewards(ranker_scores: Float[Tensor, "query group"]) -> Float[Tensor, "query group"]:
    """Log sigma(s_gold - s_j): near 0 where the ranker is sure of the gold passage, very negative where it is not."""
    margins = ranker_scores[:, :1] - ranker_scores
    return torch.log(torch.sigmoid(margins) + EPS).detach()


def adversarial(
    retriever_scores: Float[Tensor, "query group"],
    ranker_scores: Float[Tensor, "query group"],
    *,
    form: str = "uniform_incl_pos",
    reduction: str = "mean",
) -> Float[Tensor, ""]:
    """What G minimises to propose passages that D confuses with the gold one.

    `uniform_incl_pos`: sum over all passages of r_j log p(j), the released code's; its stationary point is p(j)
    proportional to |r_j|. `paper`: the expectation of r_j under p over the negatives alone (eq. 8).
    """
    r = rewards(ranker_scores)
    if form == "paper":
        shares = functional.softmax(retriever_scores[:, 1:].float(), dim=1)
        per_query = (shares * r[:, 1:]).sum(dim=1)
    else:
        shares = functional.softmax(retriever_scores.float(), dim=1)
        per_query = (r * torch.log(shares + EPS)).sum(dim=1)
    return per_query.sum() if reduction == "sum" else per_query.mean()


def distillation(
    retriever_scores: Float[Tensor, "query group"],
    ranker_scores: Float[Tensor, "query group"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Cross-entropy of G's distribution against D's, which is fixed; `temperature` divides D's scores."""
    target = functional.softmax(ranker_scores.float() / temperature, dim=1).detach()
    shares = functional.softmax(retriever_scores.float(), dim=1)
    return -(target * torch.log(shares + EPS)).sum(dim=1).mean()


def _warn_of_guessing(share: float) -> None:
    if share < _LEAST_ORDERED:
        print(
            f"ar2: the ranker puts only {share:.0%} of the training pairs in the right order, and the retriever is "
            "about to follow it: give it more steps first (ranker_warmup_steps), a higher rate, or a better start",
            file=sys.stderr,
        )


class Ar2Config(DualEncoderConfig):
    """The schedule and the weights of both players; the values of NQ in table 8, but for the number of rounds."""

    normalize: bool | None = False
    """Inner products of embeddings of any length, as in the paper: a normalised score has too small a range for the
    ranker's distribution at temperature 1 (raise `score_scale` to train a normalised checkpoint)."""
    score_scale: float = Field(default=1.0, gt=0)
    """Retriever scores are multiplied by it (1 / temperature of the paper, which is 1)."""
    num_negatives: int = Field(default=15, ge=1)
    """Negatives of each query, for both players (table 8)."""
    ranker: Component = Component(import_path="raydr.methods.cross_encoder:CrossEncoderRanker")
    """The ranker as a method; its `num_negatives` is set to this method's."""
    ranker_learning_rate: float = Field(default=1e-6, gt=0)
    """A tenth of the retriever's (table 8)."""
    ranker_warmup_steps: int = Field(default=2000, ge=1)
    """Updates of the ranker on the first candidates, before the rounds (D0)."""
    ranker_warmup_learning_rate: float = Field(default=1e-5, gt=0)
    """Of these updates."""
    rounds: int = Field(default=10, ge=1)
    """Adversarial rounds; each ends with a new index."""
    ranker_steps: int = Field(default=500, ge=1)
    """Updates of the ranker in a round."""
    retriever_steps: int = Field(default=1500, ge=1)
    """Updates of the retriever in a round."""
    first: Literal["ranker", "retriever"] = "ranker"
    """Who is trained first in a round: the ranker (released code) or the retriever (Algorithm 1)."""
    adv_lambda: float = Field(default=0.5, ge=0, le=1)
    """Weight of the adversarial term; the rest is distillation. 0 is a setting of the authors' later code."""
    adv_form: Literal["uniform_incl_pos", "paper"] = "uniform_incl_pos"
    """The released code's adversarial term, or eq. 8 to the letter."""
    adv_reduction: Literal["mean", "sum"] = "mean"
    """Over the queries of a worker's batch; the code sums, which makes the weight depend on the batch."""
    ranker_scale: float = Field(default=1.0, gt=0)
    """The ranker's scores are multiplied by it in both terms: a ColBERT's lie closer together than the logits of a
    cross-encoder, which the paper's game is made for."""
    ranker_temperature: float = Field(default=1.0, gt=0)
    """Divides the ranker's scores in the distillation."""
    scores: Location | None = None
    """The ranker's scores of the training examples; each round sets it."""
    trained_ranker: str | None = None
    """Folder of the trained ranker; training sets it, and the method then reranks with it."""

    @property
    def turns(self) -> tuple[str, str]:
        """The players in the order of a round."""
        return ("ranker", "retriever") if self.first == "ranker" else ("retriever", "ranker")


class Adversarial(EmbeddingObjective):
    """L_G over each query's own group: no in-batch negatives, for neither player."""

    gather = False

    def __init__(self, config: Ar2Config) -> None:
        self._config = config

    def loss(
        self, queries: Float[Tensor, "query dim"], passages: Float[Tensor, "passage dim"], batch: Labels
    ) -> LossOutput:
        if batch.teacher_scores is None:
            raise ConfigError("AR2's retriever learns from a ranker's scores; Ar2.fit makes them")
        config = self._config
        ranker = config.ranker_scale * batch.teacher_scores
        groups = passages.view(len(queries), -1, passages.shape[1])
        scores = config.score_scale * torch.einsum("qd,qgd->qg", queries, groups)
        adv = adversarial(scores, ranker, form=config.adv_form, reduction=config.adv_reduction)
        dist = distillation(scores, ranker, temperature=config.ranker_temperature)
        loss = config.adv_lambda * adv + (1 - config.adv_lambda) * dist
        # How sure both are of the gold passage.
        shares = {
            "retriever_share": functional.softmax(scores.detach().float(), dim=1)[:, 0].mean(),
            "ranker_share": functional.softmax(ranker.float() / config.ranker_temperature, dim=1)[:, 0].mean(),
        }
        return LossOutput(loss, {"adversarial": adv.detach(), "distillation": dist.detach(), **shares})


class Ar2(DualEncoderMethod):
    """Both players, and the loop."""

    Config: ClassVar[type[Ar2Config]] = Ar2Config

    config: Ar2Config

    def fit(self, steps: Steps) -> Component:
        """Algorithm 1. The retriever starts as its checkpoint is: train that one first (G0) where it needs a warm-up.

        Every step is made once, in a folder of its round: a run that was killed anywhere is run again from the top,
        goes on where it was, and ends with the same two models.
        """
        if steps.config.mine.source_file is not None:
            raise ConfigError(
                "mine.source_file: AR2 mines new candidates in every round, and a file holds one set; leave it out"
            )
        retriever, ranker = self._retriever(self.config.model), self._ranker()
        index = steps.base(retriever)
        examples, dev = steps.mine(retriever, index, "examples"), steps.dev(retriever, index)
        runs = steps.evaluate(retriever, index, "base")
        scorer = steps.train(ranker, self._warmup_plan(steps), examples, "ranker-warmup", dev=dev)  # D0
        ranker = self._ranker(model=scorer)
        ranker_state = retriever_state = None
        weights = self.config.model
        for number in range(1, self.config.rounds + 1):
            folder = f"round-{number:02d}"
            for player in self.config.turns:
                plan = self._plan(steps, player, number)
                if player == "ranker":
                    scorer = steps.train(
                        ranker, plan, examples, f"{folder}/ranker", dev=dev, start=ranker_state, keep_state=True
                    )
                    ranker_state = scorer.path / STATE
                else:
                    scores = steps.score(self._ranker(model=scorer), examples, f"{folder}/scores")
                    _warn_of_guessing(scores.manifest.details.get("ordered_share", 1.0))
                    student = self._with({"scores": str(scores.path.resolve())})
                    model = steps.train(
                        student, plan, examples, f"{folder}/retriever", dev=dev, start=retriever_state, keep_state=True
                    )
                    retriever_state, weights = model.path / STATE, _folder(model)
                    retriever = self._retriever(weights)
                    index = steps.index(retriever, folder)  # the refresh: both sides of the index are this round's
                    examples = steps.mine(retriever, index, f"{folder}/examples")
            runs = steps.evaluate(self._both(weights, scorer), index, folder, baselines=runs)
        return self._both(weights, scorer)

    def build_objective(self) -> Adversarial:
        return Adversarial(self.config)

    def build_batches(self, examples: ExampleSet, *, batch_size: int, seed: int) -> BatchSampler:
        config = self.config
        if config.scores is None:
            raise ConfigError("AR2's retriever is trained by Ar2.fit (`raydr train`), which scores the examples first")
        return ScoredBatches(
            examples,
            scores=config.scores,
            batch_size=batch_size,
            num_negatives=config.num_negatives,
            depth=config.negative_depth,
            seed=seed,
        )

    @property
    def ranker(self) -> Component | None:
        """The trained ranker; None before training."""
        trained = self.config.trained_ranker
        return self._ranker(model=trained) if trained is not None else None

    def build_reranker(self) -> Reranker | None:
        return build_method(self.ranker).build_reranker() if self.ranker is not None else None

    def _both(self, weights: str, scorer: Artifact) -> Component:
        """The method with what both players have learned."""
        return self._with({"model": weights, "trained_ranker": _folder(scorer)})

    def _retriever(self, model: str) -> Component:
        """The retriever as what encodes: without the settings that only training reads, so that with others of these
        what was embedded before stays.
        """
        only_trained_with = Ar2Config.model_fields.keys() - TextEncoderConfig.model_fields.keys()
        args = {name: value for name, value in self.component.args.items() if name not in only_trained_with}
        return Component(import_path=self.component.import_path, args={**args, "model": model})

    def _ranker(self, model: Artifact | str | None = None) -> Component:
        """The ranker as a method, starting from `model` (None: from what the config names)."""
        args = {**self.config.ranker.args, "num_negatives": self.config.num_negatives}
        if model is not None:
            args["model"] = model if isinstance(model, str) else _folder(model)
        return Component(import_path=self.config.ranker.import_path, args=args)

    def _warmup_plan(self, steps: Steps) -> TrainConfig:
        changes = {
            "max_steps": self.config.ranker_warmup_steps,
            "learning_rate": self.config.ranker_warmup_learning_rate,
            "schedule_steps": None,
        }
        return settings_for(self._ranker(), steps.train_config.model_copy(update=changes))

    def _plan(self, steps: Steps, player: str, number: int) -> TrainConfig:
        """A player's part of round `number`: one schedule and one optimiser over all rounds."""
        config = self.config
        is_ranker = player == "ranker"
        each = config.ranker_steps if is_ranker else config.retriever_steps
        rate = config.ranker_learning_rate if is_ranker else steps.train_config.learning_rate
        changes = {"max_steps": number * each, "schedule_steps": config.rounds * each, "learning_rate": rate}
        # A block that ended early would throw the count of steps out, and what is handed on is the last.
        plan = steps.train_config.model_copy(update={**changes, "keep": "last", "patience": 0})
        return settings_for(self._ranker(), plan) if is_ranker else plan


def _folder(model: Artifact) -> str:
    return str((model.path / MODEL).resolve())
