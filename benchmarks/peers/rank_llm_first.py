"""rank_llm's FIRST path (use_logits, use_alpha, batched sliding windows on vLLM): one round for every line it reads.

    pip install --target DIR --no-deps rank_llm==0.25.7 ftfy dacite python-dotenv tiktoken wcwidth
    PYTHONPATH=DIR python benchmarks/peers/rank_llm_first.py MODEL LISTS.json NUM_PASSAGES

LISTS.json holds rounds of lists: {"query": ..., "passages": [...]}. Each line of the answer is JSON: seconds, and the
order of every list as places; the first also holds a prompt.
"""

import functools
import json
import sys
import time
import types
from pathlib import Path

answers = sys.stdout
sys.stdout = sys.stderr  # vLLM's and rank_llm's own prints, which begin when they are imported

import vllm  # noqa: E402

# In half precision the letters of a model that ranks at random lie too near to one another for one order.
vllm.LLM = functools.partial(vllm.LLM, dtype="float32")

# Its LiT5 rerankers, which nothing here asks for, import names that transformers 5 no longer has.
_lit5 = types.ModuleType("rank_llm.rerank.listwise.rank_fid")
_lit5.RankFiDDistill = _lit5.RankFiDScore = object
sys.modules[_lit5.__name__] = _lit5

from rank_llm.data import Candidate, Query, Request, Result  # noqa: E402
from rank_llm.rerank.listwise import RankListwiseOSLLM  # noqa: E402


def requests_of(lists: list[dict]) -> list[Request]:
    return [
        Request(
            query=Query(text=own["query"], qid=str(number)),
            candidates=[
                Candidate(docid=str(place), score=1.0 - place / 1000, doc={"text": text})
                for place, text in enumerate(own["passages"])
            ],
        )
        for number, own in enumerate(lists)
    ]


def main(model: str, file: str, num_passages: int) -> None:
    rounds = json.loads(Path(file).read_text(encoding="utf-8"))
    reranker = RankListwiseOSLLM(
        model=model,
        context_size=4096,
        device="cpu",
        variable_passages=True,
        window_size=20,
        stride=10,
        use_logits=True,
        use_alpha=True,
    )
    first = requests_of(rounds[0])[0]
    result = Result(query=first.query, candidates=first.candidates, invocations_history=[])
    prompt, _ = reranker.create_prompt(result, 0, 20)
    print(json.dumps({"prompt": prompt}), file=answers, flush=True)
    for number, _ in enumerate(sys.stdin):
        started = time.perf_counter()
        results = reranker.rerank_batch(requests_of(rounds[number]), rank_end=num_passages)
        seconds = time.perf_counter() - started
        orders = [[int(candidate.docid) for candidate in result.candidates] for result in results]
        print(json.dumps({"seconds": seconds, "orders": orders}), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
