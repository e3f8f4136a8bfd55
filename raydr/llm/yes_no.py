"""A pointwise reranker: how much likelier the language model says yes than no, candidate by candidate.

Notable: scores are of one scale whatever else is in the list, so they compare across lists; it costs a prompt
per passage. All passages of a list are asked about at the same time. Queries and passages may be pictures, or have one
beside their text, where the model reads pictures; each stands in its place of the prompt, before the text. A model of
text reads the text alone. What comes first in the question is the same for all passages of a list and is kept by an
engine with a prefix cache, so the query should.

    reranker: {import_path: "raydr.llm.yes_no:YesNoReranker", args: {engine: {model: FOLDER_OR_HUB_NAME}}}
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from pydantic import Field
from scipy.special import expit

from raydr.config import Config
from raydr.data.images import ImageError, decode_rgb
from raydr.errors import ConfigError
from raydr.llm.engine import EngineConfig
from raydr.llm.prompt import Chat, filled
from raydr.llm.reranker import EngineReranker
from raydr.types import MODALITIES, Hit, Modality, Passage, Query, with_rest

if TYPE_CHECKING:
    from PIL.Image import Image


class Content(NamedTuple):
    """What a query or a passage holds."""

    text: str
    picture: Image | None = None


class YesNoReranker(EngineReranker):
    """A `Reranker` by the log-odds of two answers."""

    class Config(Config):
        engine: EngineConfig
        """The language model, and what runs it."""
        system: str = "You judge whether a passage answers a query. Answer with one word."
        """System message; where the chat template has no such role it opens the user's turn."""
        question: str = "Query: {query}\n\nPassage: {candidate}\n\nDoes the passage answer the query?"
        """The user's turn. `{query}`; `{candidate}`: title and text; `{instruction}`: what the query looks for. A
        picture stands before the text of the two."""
        instruction: str = ""
        """For queries that bring none of their own."""
        yes: str = "yes"
        """The answer that speaks for a passage; its first token counts."""
        no: str = "no"
        """The answer that speaks against it."""
        spellings: Literal["own", "all"] = "own"
        """`own`: the answers as they are written above; `all`: also in small letters, in capitals, and behind a space,
        where that is one token; the probabilities of an answer's spellings are added."""
        scores: Literal["log_odds", "probability"] = "log_odds"
        """With l_yes and l_no the log-probabilities of the answers, `log_odds`: l_yes - l_no; `probability`:
        exp(l_yes) / (exp(l_yes) + exp(l_no)), between 0 and 1. Both give the same order."""
        depth: int | None = Field(default=None, ge=1)
        """Hits of a list that are judged, null: all; the others follow as they came, with lower scores that only say
        so."""
        before_answer: str = ""
        """Text that the answer stands behind, such as the empty thoughts of Qwen3-Reranker:
        "<think>\\n\\n</think>\\n\\n"."""
        title_separator: str = ". "
        """Stands between title and text of a passage that has a title."""
        max_passage_words: int = Field(default=300, ge=1)
        """Words read of a passage."""
        max_query_words: int = Field(default=100, ge=1)
        """Words read of a query, and of an instruction."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.engine)
        self.config = config

    def start(self) -> None:
        _ = self._answers

    @property
    def modalities(self) -> frozenset[Modality]:
        """What the language model reads; asking starts the engine."""
        return frozenset(MODALITIES if self.engine.pictures is not None else MODALITIES[:1])

    async def rerank_async(self, query: Query, hits: Sequence[Hit], passages: Mapping[str, Passage]) -> list[Hit]:
        depth = len(hits) if self.config.depth is None else self.config.depth
        judged, rest = hits[:depth], hits[depth:]
        found = [passages[hit.passage_id] for hit in judged]
        if self.engine.pictures is not None and any(given.image is not None for given in (query, *found)):
            asked, candidates = await asyncio.to_thread(self._contents, query, found)
        else:
            asked, candidates = self._contents(query, found)
        instruction = query.instruction or self.config.instruction
        odds = np.array(await asyncio.gather(*(self._log_odds(asked, shown, instruction) for shown in candidates)))
        scores = expit(odds) if self.config.scores == "probability" else odds
        order = np.argsort(-odds, kind="stable")
        return with_rest([Hit(judged[place].passage_id, float(scores[place])) for place in order], rest)

    def _contents(self, query: Query, passages: Sequence[Passage]) -> tuple[Content, list[Content]]:
        separator = self.config.title_separator
        asked = Content(query.text, self._picture(query.image, f"query {query.query_id!r}"))
        return asked, [
            Content(passage.joined(separator), self._picture(passage.image, f"passage {passage.passage_id!r}"))
            for passage in passages
        ]

    def _picture(self, data: bytes | None, whose: str) -> Image | None:
        """Decoded, where the model reads pictures. Raises `ImageError` naming whose it is."""
        if data is None or self.engine.pictures is None:
            return None
        from PIL import Image

        try:
            picture = Image.fromarray(decode_rgb(data))
            self.engine.pictures.num_tokens(picture)
        except ImageError as error:
            raise ImageError(f"{whose}: its picture {error}") from error
        return picture

    async def _log_odds(self, query: Content, candidate: Content, instruction: str) -> float:
        sides = {"query": query, "candidate": candidate}
        pictures = [picture for name in self._places if (picture := sides[name].picture) is not None]
        yes, no = self._answers
        prompt = self._prompt(query, candidate, instruction)
        found = await self.engine.next_token_logprobs(prompt, [*yes, *no], pictures)
        return float(np.logaddexp.reduce(found[: len(yes)]) - np.logaddexp.reduce(found[len(yes) :]))

    def _prompt(self, query: Content, candidate: Content, instruction: str = "") -> list[int]:
        limit, chat, config = self.engine.max_model_tokens, self._chat, self.config
        asked = chat.cut(chat.clean(query.text, config.max_query_words), max(1, limit // 4))
        instruction = chat.cut(chat.clean(instruction, config.max_query_words), max(1, limit // 8))
        query = query._replace(text=asked)
        text = chat.clean(candidate.text, config.max_passage_words)
        visual = self._visual_tokens(query) + self._visual_tokens(candidate)
        empty = len(self._ids(query, candidate._replace(text=""), instruction)) + visual
        room = limit - 1 - empty
        if room < 0:
            shown = f", {visual} of them pictures'," if visual else ""
            way_out = "; raise engine.max_model_tokens, or store smaller pictures (data.images.size)" if visual else ""
            raise ConfigError(f"the question needs {empty} tokens{shown} and the model reads {limit}{way_out}")
        # Tokens at the seams may differ by a few from those of the text alone.
        for spare in (0, 4, 16, room):
            ids = self._ids(query, candidate._replace(text=chat.cut(text, max(0, room - spare))), instruction)
            if len(ids) + visual < limit:
                break
        return ids

    def _visual_tokens(self, content: Content) -> int:
        """Of its picture, beside the placeholder."""
        reader = self.engine.pictures
        return 0 if reader is None or content.picture is None else reader.num_tokens(content.picture) - 1

    def _ids(self, query: Content, candidate: Content, instruction: str) -> list[int]:
        values = {"query": self._written(query), "candidate": self._written(candidate), "instruction": instruction}
        return self._chat.ids(self._chat.render(filled(self.config.question, values)) + self.config.before_answer)

    def _written(self, content: Content) -> str:
        return content.text if content.picture is None else self._chat.picture + content.text

    @cached_property
    def _places(self) -> list[str]:
        """The two sides in the order in which the question names them, which is that of their pictures."""
        return re.findall(r"\{(query|candidate)\}", self.config.question)

    @cached_property
    def _chat(self) -> Chat:
        return Chat(self.engine.tokenizer, self.config.system, self.engine.pictures)

    @cached_property
    def _answers(self) -> tuple[list[int], list[int]]:
        """First tokens of the two answers in their place behind a prompt."""
        self._check_pictures()
        yes, no = (self._first_tokens(answer) for answer in (self.config.yes, self.config.no))
        if shared := set(yes) & set(no):
            token = self.engine.tokenizer.convert_ids_to_tokens(shared.pop())
            raise ConfigError(f"{self.config.yes!r} and {self.config.no!r} begin with the same token here, {token!r}")
        return yes, no

    def _first_tokens(self, answer: str) -> list[int]:
        prompt = self._chat.render(self.config.question) + self.config.before_answer
        start = self._chat.ids(prompt)
        ids = self._chat.ids(prompt + answer)
        if ids[: len(start)] != start or len(ids) == len(start):
            raise ConfigError(f"{answer!r} behind the prompt does not begin with a token of its own")
        found = [ids[len(start)]]
        if self.config.spellings == "all":
            for spelling in (answer, answer.lower(), answer.upper(), answer.capitalize()):
                for space in ("", " "):
                    other = self._chat.ids(prompt + space + spelling)
                    if other[:-1] == start:
                        found.append(other[-1])
        return list(dict.fromkeys(found))

    def _check_pictures(self) -> None:
        """Raises `ConfigError` where a picture would not have one place in a prompt, and one token there."""
        reader = self.engine.pictures
        if reader is None:
            return
        if len(set(self._places)) < len(self._places):
            raise ConfigError("question: names {query} or {candidate} twice, and a picture can stand in one place only")
        if self._chat.ids(self._chat.render(self._chat.picture)).count(reader.token_id) != 1:
            name = self.engine.tokenizer.name_or_path
            raise ConfigError(f"{name}: {reader.placeholder!r} is no token of its own, so pictures have no place")
