"""The conventional listwise reranker: the language model writes the whole order of a window, letter by letter.

Notable: it is what FIRST is measured against, with the same prompt, windows and engine. An answer is read tolerantly:
letters named twice or not there count once or not at all, passages not named follow as they came. The model gives no
score, so a passage's is its place in its window, counted from the end.

    reranker: {import_path: "raydr.llm.generation:GenerationReranker", args: {engine: {model: FOLDER}}}
"""

from __future__ import annotations

from collections.abc import Sequence

from raydr.llm.listwise import ListwiseConfig, ListwiseReranker, RankedWindow


class GenerationReranker(ListwiseReranker):
    """Ranks a window by writing its order."""

    Config = ListwiseConfig

    async def rank_window(self, query: str, passages: Sequence[str]) -> RankedWindow:
        num = len(passages)
        length = len(self.prompt.answer(range(num)))
        prompt = self.prompt.encode(query, passages, reserve=length + 1)
        answer = await self.engine.generate(prompt, max_tokens=length)
        order = self.prompt.places(answer, num)
        scores = [0.0] * num
        for place, passage in enumerate(order):
            scores[passage] = float(num - place)
        return RankedWindow(order, scores)
