"""MM-Embed: universal multimodal retrieval with a multimodal language model.

Lin, Lee, Shoeybi, Lin, Catanzaro, Ping, ICLR 2025 (arXiv 2411.02571). One embedding for any mix of text and picture,
steered by an instruction:

1. M^rand: train with the other queries' positives as negatives
2. mine: search the pool of all modalities with M^rand, the first 50 of each query;
   C1: of another modality than the instruction asks for, ranked above the positive;
   C2: of the right modality, ranked below 45
3. M^hard: train with one more negative for each query, drawn from C1 or C2 with equal probability
4. MM-Embed: go on with text retrieval mixed in, each batch either of a text task or of the mixture of the others

| equation | function |
| --- | --- |
| contrastive loss over all positives and hard negatives of the batch, section 3.1 | `raydr.losses.contrastive` |
| C1 and C2, section 3.2 | `raydr.stages.modality` |
| EOS, mean and latent-attention pooling, with the instruction left out (NV-Embed) | `raydr.models.multimodal` |

Deviations: what the paper's text does not settle is a setting: M^hard starts from the weights that M^rand started from,
or from M^rand (`hard_from`); the temperature; the share of C1. Its hyperparameters (LoRA of rank 8, alpha 64, learning
rate 1e-4) are not verified. Queries of tasks that only the last stage trains on are named in `text_tasks`. Steps 2 and
3 may be done again with M^hard (`hard_rounds`), which the paper does not do.

To reproduce (M-BEIR, global pool, mean of 16 tasks, hit@5 or hit@10): 52.7 (UniIR's CLIP-SF: 48.9).

    method: {import_path: "raydr.methods.mm_embed:MMEmbed", args: {model: llava-hf/llava-v1.6-mistral-7b-hf}}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor

from raydr.errors import ConfigError
from raydr.llm.small_multimodal import small_llava
from raydr.losses import contrastive
from raydr.methods.base import MultimodalConfig, MultimodalMethod
from raydr.storage import Location
from raydr.train.objective import EmbeddingObjective, Labels, LossOutput
from raydr.train.sampling import BatchSampler, HomogeneousBatches, ModalityBatches, RandomBatches
from raydr.train.trainer import MODEL

if TYPE_CHECKING:
    from pathlib import Path

    from raydr.config import Component
    from raydr.data.examples import ExampleSet
    from raydr.steps import Steps

Stage = Literal["random", "hard", "text"]


class QueryToCandidate(EmbeddingObjective):
    """The contrastive loss of every query over all positives and hard negatives of the batch."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def loss(
        self, queries: Float[Tensor, "query dim"], passages: Float[Tensor, "passage dim"], batch: Labels
    ) -> LossOutput:
        loss = contrastive(queries @ passages.T, batch.positives, temperature=self._temperature)
        return LossOutput(loss, {})


class MMEmbed(MultimodalMethod):
    """A multimodal language model as a retriever, trained in stages."""

    class Config(MultimodalConfig):
        start: Literal["checkpoint", "encoder"] = "checkpoint"
        """`encoder`: `model` is a text encoder, which is made a LLaVA-NeXT with the vision tower of `tower` before
        training."""
        tower: Location | None = None
        """`start: encoder`: the folder of a trained dual encoder of raydr's (`raydr.methods.clip`)."""
        temperature: float = Field(default=0.05, gt=0)
        """Scores are divided by it; not stated by the paper."""
        stage: Stage = "random"
        """Which training a network is built for: set by `fit`."""
        wrong_modality_share: float = Field(default=0.5, ge=0, le=1)
        """How often a hard negative is one of the wrong modality, where a query has both kinds (section 3.2)."""
        hard_from: Literal["start", "random"] = "start"
        """Whether M^hard is trained from the weights M^rand was trained from, or from M^rand."""
        random_steps: PositiveInt = 1000
        """Steps of M^rand (the paper: 2 epochs)."""
        hard_steps: PositiveInt = 1000
        """Steps of M^hard (the paper: 2 epochs), in each of its rounds."""
        hard_rounds: PositiveInt = 1
        """How often negatives are mined and M^hard is trained with them; a further round mines with the last one's
        M^hard and goes on from it."""
        text_steps: int = Field(default=0, ge=0)
        """Steps that go on with text retrieval mixed in (about 4,500 in the paper); 0: none."""
        text_tasks: tuple[str, ...] = ()
        """Tasks of text retrieval, which only the last stage trains on."""
        text_batches: Literal["kind", "task"] = "kind"
        """Of what a batch of the last stage is: of one text task or of the mixture of all others (`kind`), where
        passages of another modality stay among the negatives; or of one task, whichever it is (`task`)."""

    config: Config

    def build_objective(self) -> EmbeddingObjective:
        return QueryToCandidate(self.config.temperature)

    def build_batches(self, examples: ExampleSet, *, batch_size: int, seed: int) -> BatchSampler:
        config = self.config
        if config.stage == "text":
            tasks = {examples.task(row) or "" for row in range(len(examples))}
            others = tasks.difference(config.text_tasks)
            return HomogeneousBatches(
                examples,
                joined_tasks=[others] if config.text_batches == "kind" else [],
                batch_size=batch_size,
                seed=seed,
                wrong_modality_share=config.wrong_modality_share,
            )
        without = frozenset(config.text_tasks)
        if config.stage == "random":
            return RandomBatches(examples, batch_size=batch_size, num_negatives=0, seed=seed, without_tasks=without)
        return ModalityBatches(
            examples,
            batch_size=batch_size,
            seed=seed,
            wrong_modality_share=config.wrong_modality_share,
            without_tasks=without,
        )

    def fit(self, steps: Steps) -> Component:
        """M^rand, mining, M^hard, and the text stage where there is one."""
        if steps.config.mine.modality_aware is None:
            raise ConfigError("mine.modality_aware: MM-Embed mines by modality; set it, if only to {}")
        if self.config.text_steps and not self.config.text_tasks:
            raise ConfigError("text_steps: name the tasks of text retrieval that are mixed in: method.args.text_tasks")
        start = self._start(steps)
        found_by = self._train(steps, "random", start, steps.positives("examples_positive"))
        examples = self._mined(steps, found_by, "random_index", "examples_hard")
        hard = self._train(steps, "hard", str(found_by) if self.config.hard_from == "random" else start, examples)
        for number in range(2, self.config.hard_rounds + 1):
            examples = self._mined(steps, hard, f"hard_index_{number}", f"examples_hard_{number}")
            hard = self._train(steps, "hard", str(hard), examples, f"train_hard_{number}")
        if not self.config.text_steps:
            return self._trained(hard)
        return self._trained(self._train(steps, "text", str(hard), examples))

    def _mined(self, steps: Steps, found_by: Path, index: str, examples: str) -> ExampleSet:
        """Negatives among the hits of the weights `found_by`; the last two are folders."""
        method = self._trained(found_by)
        return steps.mine(method, steps.index(method, index), examples)

    def _trained(self, model: Path) -> Component:
        return self._with({"model": str(model), "start": "checkpoint", "tower": None})

    def _start(self, steps: Steps) -> str:
        """The checkpoint that training starts from."""
        if self.config.start == "checkpoint":
            return self.config.model
        if self.config.tower is None:
            raise ConfigError("tower: start: encoder needs a vision tower; name a trained dual encoder's folder")
        folder, seed = steps.config.out / "start", steps.train_config.seed
        return str(small_llava(self.config.model, folder, tower=str(self.config.tower), seed=seed).resolve())

    def _train(self, steps: Steps, stage: Stage, model: str, examples: ExampleSet, folder: str | None = None) -> Path:
        """The weights that a stage ends with, trained from `model`; in `train_` and its name, or in `folder`."""
        config = steps.train_config.model_copy(update={"max_steps": getattr(self.config, f"{stage}_steps")})
        trained = steps.train(
            self._with({"model": model, "start": "checkpoint", "stage": stage}),
            config,
            examples,
            folder or f"train_{stage}",
        )
        return (trained.path / MODEL).resolve()
