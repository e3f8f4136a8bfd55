"""Evaluation during training: how well the current weights rank the dev examples, on all workers together.

Notable: a dual encoder searches exactly among all passages that the dev examples name (positives and mined negatives),
a cross-encoder reorders each query's own positives and negatives. Both are cheaper than a search of the corpus and
harder than random passages; they choose among checkpoints, and are no result to report.

    evaluate(engine, examples, tokenizer)["nDCG@10"]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from raydr.data.examples import ExampleSet
from raydr.encoders.texts import Texts, Vectors
from raydr.train.batches import GroupTokenizer, Tokenized
from raydr.train.distributed import all_parts, most_of_all_workers, num_workers, worker_rank

if TYPE_CHECKING:
    from raydr.train.engine import Engine

_TOKENS_AT_ONCE = 4096
_MEASURES = ("nDCG@10", "RR@10", "R@100")


def evaluate(engine: Engine, examples: ExampleSet, tokenizer: GroupTokenizer) -> dict[str, float]:
    """nDCG@10, RR@10 and R@100 over the dev examples; the same on every worker."""
    engine.eval()
    try:
        with torch.no_grad():
            rank = _rank_all if "queries" in _sample(examples, tokenizer) else _rank_groups
            run = rank(engine, examples, tokenizer)
    finally:
        engine.train()
    return _measure(run, examples)


def _sample(examples: ExampleSet, tokenizer: GroupTokenizer) -> Tokenized:
    return tokenizer.tokenize([examples.query(0)], [examples.passages(examples.positives(0)[:1])])


def _rank_all(engine: Engine, examples: ExampleSet, tokenizer: GroupTokenizer) -> list[list[tuple[int, float]]]:
    """(row, score) of the best hundred passages for every query, among all of the set."""
    queries = [examples.query(row) for row in range(len(examples))]
    passages = examples.passages(range(examples.num_passages))
    own_queries, own_passages = _own(len(queries)), _own(len(passages))
    tokens = tokenizer.tokenize([queries[i] for i in own_queries], [[passages[i]] for i in own_passages])
    query_embeddings = torch.cat(all_parts(_embedded(engine, tokens["queries"], tokenizer.pad_id).float()))

    def scored(passage_embeddings: Tensor) -> Tensor:
        return passage_embeddings.float() @ query_embeddings.T

    # Scores are kept of passages, not embeddings, which may be as wide as a vocabulary.
    scores = torch.cat(all_parts(_embedded(engine, tokens["passages"], tokenizer.pad_id, then=scored))).T
    top = scores.topk(min(100, scores.shape[1]), dim=1)
    return [list(zip(rows, values, strict=True)) for rows, values in zip(top.indices.tolist(), top.values.tolist())]


def _rank_groups(engine: Engine, examples: ExampleSet, tokenizer: GroupTokenizer) -> list[list[tuple[int, float]]]:
    """(row, score) of every query's own positives and negatives."""
    rows = [np.concatenate([examples.positives(i), examples.negatives(i)]).tolist() for i in range(len(examples))]
    own = _own(len(rows))
    tokens = tokenizer.tokenize([examples.query(i) for i in own], [examples.passages(rows[i]) for i in own])["pairs"]
    scores = torch.cat(all_parts(_embedded(engine, tokens, tokenizer.pad_id).float())).tolist()
    run, start = [], 0
    for group in rows:
        run.append(sorted(zip(group, scores[start : start + len(group)], strict=True), key=lambda hit: -hit[1]))
        start += len(group)
    return run


def _own(count: int) -> range:
    """This worker's consecutive share."""
    return range(count * worker_rank() // num_workers(), count * (worker_rank() + 1) // num_workers())


def _embedded(
    engine: Engine, side: Texts | Vectors, pad_id: int, *, then: Callable[[Tensor], Tensor] = lambda output: output
) -> Tensor:
    """What `then` makes of every text's embedding, in order."""
    if isinstance(side, Vectors):
        return then(torch.from_numpy(side.rows.copy()).to(engine.device))
    return _forward(engine, side, pad_id, then=then)


def _forward(
    engine: Engine, texts: Texts, pad_id: int, *, then: Callable[[Tensor], Tensor] = lambda output: output
) -> Tensor:
    """What `then` makes of the network's output for every text, in order; short and long ones do not share a chunk."""
    token_ids = texts.ids
    order = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
    chunks: list[list[int]] = []
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and len(token_ids[order[end]]) * (end + 1 - start) <= _TOKENS_AT_ONCE:
            end += 1
        chunks.append(order[start:end])
        start = end
    # With ZeRO 3 every forward pass is one of all workers, so all make the same number of them, if need be of nothing.
    padded = chunks + [[]] * (max(1, most_of_all_workers(len(chunks), engine.device)) - len(chunks))
    outputs = []
    for chunk in padded:
        own = texts.take(chunk) if chunk else Texts([[pad_id]], side=texts.side)
        outputs.append(then(engine(*own.padded(pad_id).to(engine.device).inputs)[: len(chunk)]))
    return torch.cat(outputs)[torch.argsort(torch.tensor(order, dtype=torch.int64, device=engine.device))]


def _measure(run: list[list[tuple[int, float]]], examples: ExampleSet) -> dict[str, float]:
    import ir_measures

    qrels = [
        ir_measures.Qrel(str(query), str(row), 1) for query in range(len(examples)) for row in examples.positives(query)
    ]
    scored = [
        ir_measures.ScoredDoc(str(query), str(row), score) for query, hits in enumerate(run) for row, score in hits
    ]
    measures = [ir_measures.parse_measure(name) for name in _MEASURES]
    found = ir_measures.calc_aggregate(measures, qrels, scored)
    return {str(measure): float(value) for measure, value in found.items()}
