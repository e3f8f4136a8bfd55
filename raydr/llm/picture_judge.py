"""Zero-shot reranking by a multimodal language model: MM-Embed, section 4.3 (Lin et al., ICLR 2025).

An instruction-tuned model that reads pictures (LLaVA-NeXT in the paper, here any that transformers loads with
AutoModelForImageTextToText) is shown the query, one candidate and what is looked for, and asked whether the candidate
satisfies the request, True or False. The score is the share of True among the two,

    s = exp(l_True) / (exp(l_True) + exp(l_False)) = sigmoid(l_True - l_False),

with l the log-probabilities of the first token that is answered; the retriever's first ten hits are sorted by it, ties
keep their order, and the hits behind them stay. Notable: it is `YesNoReranker` with other words and settings. The
departures: the paper's wording is not published, so this one is raydr's own; and as a model may write "True", " True"
or "true", l counts all spellings that are one token (`spellings: own` counts only the one that is set).

The paper finds that it helps with questions of picture and text together, and is no use, or worse, for plain captions.

    reranker: {import_path: "raydr.llm.picture_judge:PictureJudge",
               args: {engine: {model: llava-hf/llava-v1.6-mistral-7b-hf, backend: auto, max_model_tokens: 8192}}}
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from pydantic import Field

from raydr.errors import ConfigError
from raydr.llm.yes_no import YesNoReranker


class PictureJudge(YesNoReranker):
    """A `Reranker` that asks a model that reads pictures whether a candidate satisfies the request."""

    class Config(YesNoReranker.Config):
        system: str = "You judge whether a candidate satisfies a request. Answer with one word, True or False."
        question: str = (
            "Request: {instruction}\nQuery: {query}\n\nCandidate: {candidate}\n\n"
            "Does the candidate satisfy the request for this query? Answer True or False."
        )
        instruction: str = "Find what matches the query."
        yes: str = "True"
        no: str = "False"
        spellings: Literal["own", "all"] = "all"
        scores: Literal["log_odds", "probability"] = "probability"
        depth: int | None = Field(default=10, ge=1)

    @cached_property
    def _answers(self) -> tuple[list[int], list[int]]:
        if self.engine.pictures is None:
            engine = self.config.engine
            why = "which takes no pictures" if engine.backend == "remote" else "a model of text"
            raise ConfigError(
                f"engine: {engine.model} runs on {engine.backend}, {why}; choose a LLaVA-NeXT, Qwen2-VL or another "
                "checkpoint that reads pictures, and backend vllm, transformers or auto"
            )
        return super()._answers
