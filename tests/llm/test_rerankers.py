"""The other rerankers over a language model: an order that is written, and yes or no for every passage."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from raydr.errors import ConfigError
from raydr.llm.engine import EngineConfig, build_engine
from raydr.llm.generation import GenerationReranker
from raydr.llm.yes_no import Content, YesNoReranker
from raydr.types import Hit, Passage, Query

PASSAGES = {str(n): Passage(str(n), f"text number {n} " * (1 + n), "Title" if n % 2 else "") for n in range(9)}
HITS = [Hit(passage_id, 1.0) for passage_id in PASSAGES]
QUERY = Query("q", "which number")


def engine(folder) -> dict:
    return {"model": str(folder), "backend": "transformers", "dtype": "float32"}


def test_a_written_order_is_followed_by_windows(causal_lm):
    folder = causal_lm("Llama")
    reranker = GenerationReranker(GenerationReranker.Config(engine=engine(folder), window_size=4, stride=2))
    ranked = reranker.rerank(QUERY, HITS, PASSAGES)
    assert sorted(hit.passage_id for hit in ranked) == sorted(PASSAGES)
    # The first window is what the model writes for the last four passages.
    texts = [f"{p.title}. {p.text}" if p.title else p.text for p in list(PASSAGES.values())[-4:]]
    prompt = reranker.prompt.encode(QUERY.text, texts, reserve=20)
    own = build_engine(EngineConfig(**engine(folder)))
    length = len(reranker.prompt.answer(range(4)))
    written = asyncio.run(own.generate(prompt, max_tokens=length))
    window = asyncio.run(GenerationReranker(reranker._config).rank_window(QUERY.text, texts))
    assert list(window.order) == reranker.prompt.places(written, 4)
    assert [window.scores[place] for place in window.order] == [4, 3, 2, 1]


def test_yes_and_no_are_compared_for_every_passage(causal_lm):
    folder = causal_lm("Llama")
    reranker = YesNoReranker(YesNoReranker.Config(engine=engine(folder)))
    reranker.start()
    ranked = reranker.rerank(QUERY, HITS, PASSAGES)
    assert sorted(hit.passage_id for hit in ranked) == sorted(PASSAGES)
    scores = [hit.score for hit in ranked]
    assert scores == sorted(scores, reverse=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    best = PASSAGES[ranked[0].passage_id]
    text = f"{best.title}. {best.text}" if best.title else best.text
    config = reranker.config
    turn = config.question.replace("{query}", QUERY.text).replace("{candidate}", " ".join(text.split()))
    ids = tokenizer(f"{config.system}\n\n{turn}\n\n", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1]
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    assert ranked[0].score == pytest.approx((logits[yes] - logits[no]).item(), abs=1e-4)
    np.testing.assert_allclose(
        [hit.score for hit in reranker.rerank_many([(QUERY, HITS), (QUERY, HITS[:3])], PASSAGES)[0]], scores, atol=1e-5
    )


def test_a_question_always_fits(causal_lm):
    settings = {**engine(causal_lm("Llama")), "max_model_tokens": 96}
    reranker = YesNoReranker(YesNoReranker.Config(engine=settings, max_passage_words=5000))
    for text in ("", "word " * 5000, "x" * 9000, "a-b" * 3000):
        assert len(reranker._prompt(Content("query " * 400), Content(text))) < 96


def test_a_query_cannot_bring_in_the_passage_and_thoughts_may_stand_before_the_answer(causal_lm):
    settings = {"engine": engine(causal_lm("Llama")), "before_answer": "Thoughts: none. "}
    reranker = YesNoReranker(YesNoReranker.Config(**settings))
    prompt = reranker.engine.tokenizer.decode(reranker._prompt(Content("is {candidate} there"), Content("an elephant")))
    assert prompt.count("an elephant") == 1
    assert prompt.endswith("thoughts : none.")


def test_answers_that_begin_alike_are_refused(causal_lm):
    reranker = YesNoReranker(YesNoReranker.Config(engine=engine(causal_lm("Llama")), yes="yes", no="Yes"))
    with pytest.raises(ConfigError, match="begin with the same token"):
        reranker.start()
