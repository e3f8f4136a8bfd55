"""A pointwise reranker: how much likelier the language model says yes than no, passage by passage.

Notable: scores are of one scale whatever else is in the list, so they compare across lists; it costs a prompt
per passage. All passages of a list are asked about at the same time.

    reranker: {import_path: "raydr.llm.yes_no:YesNoReranker", args: {engine: {model: FOLDER_OR_HUB_NAME}}}
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from pydantic import Field

from raydr.config import Config
from raydr.errors import ConfigError
from raydr.llm.engine import EngineConfig
from raydr.llm.prompt import Chat, filled
from raydr.llm.reranker import EngineReranker
from raydr.types import Hit, Passage, Query


class YesNoReranker(EngineReranker):
    """A `Reranker` by the log-odds of two answers."""

    class Config(Config):
        engine: EngineConfig
        """The language model, and what runs it."""
        system: str = "You judge whether a passage answers a query. Answer with one word."
        """System message; where the chat template has no such role it opens the user's turn."""
        question: str = "Query: {query}\n\nPassage: {candidate}\n\nDoes the passage answer the query?"
        """The user's turn. `{query}`; `{candidate}`: title and text."""
        yes: str = "yes"
        """The answer that speaks for a passage; its first token counts."""
        no: str = "no"
        """The answer that speaks against it."""
        before_answer: str = ""
        """Text that the answer stands behind, such as the empty thoughts of Qwen3-Reranker:
        "<think>\\n\\n</think>\\n\\n"."""
        title_separator: str = ". "
        """Stands between title and text of a passage that has a title."""
        max_passage_words: int = Field(default=300, ge=1)
        """Words read of a passage."""
        max_query_words: int = Field(default=100, ge=1)
        """Words read of a query."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.engine)
        self.config = config

    def start(self) -> None:
        _ = self._answers

    async def rerank_async(self, query: Query, hits: Sequence[Hit], passages: Mapping[str, Passage]) -> list[Hit]:
        separator = self.config.title_separator
        texts = [passages[hit.passage_id].joined(separator) for hit in hits]
        scores = np.array(await asyncio.gather(*(self._score(query.text, text) for text in texts)))
        order = np.argsort(-scores, kind="stable")
        return [Hit(hits[place].passage_id, float(scores[place])) for place in order]

    async def _score(self, query: str, text: str) -> float:
        prompt = self._prompt(query, text)
        yes, no = await self.engine.next_token_logprobs(prompt, self._answers)
        return yes - no

    def _prompt(self, query: str, text: str) -> list[int]:
        query = self._chat.clean(query, self.config.max_query_words)
        query = self._chat.cut(query, max(1, self.engine.max_model_tokens // 4))
        text = self._chat.clean(text, self.config.max_passage_words)
        empty = len(self._ids(query, ""))
        room = self.engine.max_model_tokens - 1 - empty
        if room < 0:
            raise ConfigError(f"the question needs {empty} tokens, and the model reads {self.engine.max_model_tokens}")
        # Tokens at the seams may differ by a few from those of the text alone.
        for spare in (0, 4, 16, room):
            ids = self._ids(query, self._chat.cut(text, max(0, room - spare)))
            if len(ids) < self.engine.max_model_tokens:
                break
        return ids

    def _ids(self, query: str, text: str) -> list[int]:
        turn = filled(self.config.question, {"query": query, "candidate": text})
        return self._chat.ids(self._chat.render(turn) + self.config.before_answer)

    @cached_property
    def _chat(self) -> Chat:
        return Chat(self.engine.tokenizer, self.config.system)

    @cached_property
    def _answers(self) -> list[int]:
        """First tokens of the two answers in their place behind a prompt."""
        prompt = self._chat.render(self.config.question) + self.config.before_answer
        start = self._chat.ids(prompt)
        found = []
        for answer in (self.config.yes, self.config.no):
            ids = self._chat.ids(prompt + answer)
            if ids[: len(start)] != start or len(ids) == len(start):
                raise ConfigError(f"{answer!r} behind the prompt does not begin with a token of its own")
            found.append(ids[len(start)])
        if found[0] == found[1]:
            raise ConfigError(f"{self.config.yes!r} and {self.config.no!r} begin with the same token here")
        return found
