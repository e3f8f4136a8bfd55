"""News Deja Vu: historical articles that tell a similar story about other people and places.

Franklin, Silcock, Arora, Bryan, Dell, NLP+CSS 2024 (arXiv 2406.15593). Encoders match on names; so names are taken out,
of query and passage alike:

1. tag: a token classifier that is used to OCR errors finds persons, organisations, places and other names
2. mask: each of them gives way to one mask token, which then is the encoder's own
3. embed: a dual encoder, trained to bring articles on the same story together
4. search: exact nearest neighbours by cosine

| part | function |
| --- | --- |
| tagging and masking, code of newsdejavu 0.0.3 | `raydr.encoders.tagger`, `raydr.encoders.masking` |
| the tagger's training | `raydr.train.tagging` |
| online contrastive loss, code of sbert-wrapper | `raydr.losses.online_contrastive` |
| same-story pairs, hard negatives without a common topic | `raydr.stages.same_story` |

Deviations: masking by offsets in the original string, in windows that overlap, where the package rebuilds a text from
the tagger's output and loses what is beyond 512 tokens (`mask.form: package` does as it does). Texts are masked in
training as well, which the paper does not say. Pairs come as groups, a positive and negatives for each query, and hard
ones are chosen among those of all workers; the authors train on one device with pairs in any order. Tagger and encoder
are settings; the paper starts from the lab's own duplicate detector, here from any encoder.

To reproduce: no retrieval figure is published; the tagger's F1 is 86.5 (PER 94.3, LOC 90.8, ORG 80.7).

    method: {import_path: "raydr.methods.news_deja_vu:NewsDejaVu", args: {tagger: {model: runs/a/tagger/train/model}}}
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from raydr.encoders.masking import MASK, MaskConfig, Masked, Masker
from raydr.encoders.tagger import TRAIN_ONE, EntityTagger, TaggerConfig
from raydr.encoders.text import TextEncoder, TextEncoderConfig
from raydr.errors import ConfigError
from raydr.losses import online_contrastive
from raydr.methods.base import DualEncoderConfig, DualEncoderMethod
from raydr.stages.preprocess import preprocess_examples
from raydr.stages.same_story import StoryConfig, same_story_examples
from raydr.train.batches import BatchTokenizer, GroupTokenizer
from raydr.train.objective import EmbeddingObjective, Labels, LossOutput
from raydr.train.tagging import TaggerTraining, train_tagger
from raydr.train.trainer import MODEL
from raydr.types import Passage, Query

if TYPE_CHECKING:
    from raydr.config import Component
    from raydr.data.examples import ExampleSet
    from raydr.protocols import Encoder
    from raydr.steps import Steps


class SameStory(EmbeddingObjective):
    """Online contrastive loss over the pairs of a query and the passages of its own group.

    The batch is that of all workers, because the choice of hard pairs is one of the whole batch, and a sum.
    """

    def __init__(self, margin: float) -> None:
        self._margin = margin

    def loss(
        self, queries: Float[Tensor, "query dim"], passages: Float[Tensor, "passage dim"], batch: Labels
    ) -> LossOutput:
        cosines = functional.normalize(queries, dim=1) @ functional.normalize(passages, dim=1).T
        distances, positives = 1 - batch.groups(cosines), batch.groups(batch.positives)
        loss = online_contrastive(distances.flatten(), positives.flatten(), margin=self._margin)
        nearest = positives.gather(1, distances.argmin(dim=1, keepdim=True))
        return LossOutput(loss, {"accuracy": nearest.float().mean().detach()})


class MaskTokenEncoder(TextEncoder):
    """Reads masked texts: each mask becomes the checkpoint's own mask token, and one that a text might hold itself
    (`[SEP]`) its separators, as in the package.
    """

    def _query_texts(self, queries: Sequence[Query]) -> list[str]:
        return [self._own(text) for text in super()._query_texts(queries)]

    def _passage_texts(self, passages: Sequence[Passage]) -> list[str]:
        return [self._own(text) for text in super()._passage_texts(passages)]

    def _own(self, text: str) -> str:
        mask, separators = self._own_tokens
        return text.replace(MASK, mask).replace("[SEP]", separators) if MASK in text or "[SEP]" in text else text

    @cached_property
    def _own_tokens(self) -> tuple[str, str]:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(
            self.checkpoint.path, local_files_only=True, trust_remote_code=False
        )
        if tokenizer.mask_token is None:
            raise ConfigError(
                f"model {self.config.model!r}: its tokenizer has no mask token to put in the place of names; take an "
                "encoder such as minilm or all-mpnet-base-v2"
            )
        ends = [token for token in (tokenizer.eos_token, tokenizer.sep_token) if token]
        return tokenizer.mask_token, f" {' '.join(ends)} "


class MaskTokenTokenizer(BatchTokenizer):
    """A `BatchTokenizer` of masked texts."""

    @property
    def encoder(self) -> MaskTokenEncoder:
        return _encoder(self.config)


@functools.lru_cache(maxsize=4)
def _encoder(config: TextEncoderConfig) -> MaskTokenEncoder:
    return MaskTokenEncoder(config)


class NewsDejaVu(DualEncoderMethod):
    """Tag, mask, embed."""

    class Config(DualEncoderConfig):
        num_negatives: int = Field(default=1, ge=0)
        """Negative pairs of each positive pair."""
        tagger: TaggerConfig | None = None
        """What finds the names; null: the one that `tagger_training` leaves."""
        tagger_training: TaggerTraining | None = None
        """Train a tagger first, and take that."""
        masking: bool = True
        """Whether names are masked; false embeds the texts as they are, to compare with, or texts that are masked."""
        mask: MaskConfig = MaskConfig()
        """Which names are masked, and how."""
        margin: float = Field(default=0.5, gt=0)
        """Negative pairs are pushed to this cosine distance (model card: 0.5)."""
        stories: StoryConfig | None = None
        """Train on articles of the corpus that tell the same story, by a column; null: on judged queries."""

        @model_validator(mode="after")
        def _one_tagger(self) -> NewsDejaVu.Config:
            if self.tagger is not None and self.tagger_training is not None:
                raise ValueError("tagger and tagger_training: name a tagger, or train one")
            return self

    config: Config

    @cached_property
    def masker(self) -> Masker:
        """What masks queries and passages. Raises `ConfigError` where there is no tagger yet."""
        if self.config.tagger is None:
            trained = "`raydr train` of this config trains its tagger; " if self.config.tagger_training else ""
            raise ConfigError(f"tagger: masking needs a tagger; {trained}{TRAIN_ONE}; or set masking: false")
        return Masker(self.config.mask, EntityTagger(self.config.tagger))

    @property
    def preprocessing_version(self) -> str:
        return self.masker.version if self.config.masking else ""

    def preprocess_queries(self, queries: Sequence[Query]) -> list[Query]:
        masked = self.masked([query.text for query in queries])
        return [query._replace(text=own.masked) for query, own in zip(queries, masked, strict=True)]

    def preprocess_passages(self, passages: Sequence[Passage]) -> list[Passage]:
        texts = self.masked([text for passage in passages for text in (passage.title, passage.text)])
        return [
            passage._replace(title=title.masked, text=text.masked)
            for passage, title, text in zip(passages, texts[::2], texts[1::2], strict=True)
        ]

    def masked(self, texts: Sequence[str]) -> list[Masked]:
        """Texts as queries and passages are masked; as they are, without masking."""
        return self.masker.mask(texts) if self.config.masking else [Masked(text, (), text) for text in texts]

    def build_encoder(self) -> Encoder:
        return MaskTokenEncoder(self.encoder_config)

    def build_tokenizer(self) -> GroupTokenizer:
        return MaskTokenTokenizer(self.encoder_config)

    def build_objective(self) -> EmbeddingObjective:
        return SameStory(self.config.margin)

    def fit(self, steps: Steps) -> Component:
        """The tagger where it is to be trained; then the pairs, masked once, and the encoder trained on them."""
        method = self
        if self.config.masking and self.config.tagger_training is not None:
            model = train_tagger(self.config.tagger_training, steps.config.out / "tagger")
            method = self._built({"tagger": {"model": str(model)}, "tagger_training": None})
        examples, dev = method._examples(steps)
        if self.config.masking:
            examples = preprocess_examples(examples, method, steps.config.out / "examples_masked")
            if dev is not None:
                dev = preprocess_examples(dev, method, steps.config.out / "examples_dev_masked")
        unmasked = method._with({"masking": False, "tagger": None})
        trained = steps.train(unmasked, steps.train_config, examples, "train", dev=dev)
        return method.trained(str((trained.path / MODEL).resolve()))

    def _examples(self, steps: Steps) -> tuple[ExampleSet, ExampleSet | None]:
        if self.config.stories is None:
            return steps.examples(self.component)
        index = steps.base(self.component)
        examples = same_story_examples(
            steps.corpus, index.parent / "embed", self.config.stories, steps.config.out / "examples"
        )
        return examples, steps.dev(self.component, index)

    def _built(self, changes: dict) -> NewsDejaVu:
        return self._with(changes).build()
