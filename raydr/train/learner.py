"""What can be trained: a network, what it reads, what makes a batch, what it is trained for, how it is kept.

Notable: methods are learners that encode as well (raydr/methods/base.py); a learner that encodes nothing, such as the
tagger of raydr/train/tagging.py, goes through the same trainer. It is built from its import path and arguments wherever
it is needed, so it travels as configuration and never as a pickled object.

    train_model(EntityTagger(EntityTagger.Config()).component, TrainConfig(), examples, Path("runs/a/tagger"))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from raydr.config import Component, Config, ConfigClass
from raydr.errors import ConfigError

if TYPE_CHECKING:  # torch takes seconds to import, and only training needs it
    from torch import nn

    from raydr.data.examples import ExampleSet
    from raydr.train.batches import GroupTokenizer
    from raydr.train.objective import EmbeddingObjective, Objective
    from raydr.train.sampling import BatchSampler


class Learner:
    """Base of everything that is trained. Subclasses set `Config` and override what the trainer asks for."""

    Config: ClassVar[ConfigClass] = Config

    config: Any
    """An instance of this class's own `Config`; a subclass may declare it so."""
    is_measured_on_dev: ClassVar[bool] = True
    """Whether training can rank the dev examples with the network: one embedding per text, or one score per pair."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def component(self) -> Component:
        """The learner as configuration."""
        return self._with({})

    def trained(self, model: str) -> Component:
        """This learner with the weights in the folder `model`: what is used after training."""
        return self._with({"model": model})

    def _with(self, changes: dict[str, Any]) -> Component:
        args = {**self.config.model_dump(mode="json", exclude_unset=True), **changes}
        return Component(import_path=f"{type(self).__module__}:{type(self).__qualname__}", args=args)

    def build_model(self) -> nn.Module:
        """The network to train, in float32, with the weights it starts from."""
        raise self._not_trained

    def build_objective(self) -> Objective | EmbeddingObjective:
        """What it is trained for. One object for the whole training."""
        raise self._not_trained

    def build_batches(self, examples: ExampleSet, *, batch_size: int, seed: int) -> BatchSampler:
        """Which examples make a batch of `batch_size` queries, those of all workers together."""
        raise self._not_trained

    def tokenizer(self) -> GroupTokenizer:
        """What training reads: `build_tokenizer`, and what stands in front of it."""
        return self.build_tokenizer()

    def build_tokenizer(self) -> GroupTokenizer:
        """Texts to the token ids that `build_model`'s network reads."""
        raise self._not_trained

    def save_model(self, model: nn.Module, folder: Path) -> None:
        """Writes a trained network as a checkpoint that is opened again by the learner that `trained` names."""
        raise self._not_trained

    @property
    def _not_trained(self) -> ConfigError:
        return ConfigError(f"{type(self).__name__} is not trained; choose a method that is, such as Contrastive")
