"""The whole system in plain Python: encode, search, refine, search again, rerank. No Ray, no files.

Notable: this is the reference the distributed paths are tested against: `jobs/search.py` on Ray Data and the Serve
application give the hits this gives. Start reading raydr here; `examples/quickstart.py` runs it.

    pipeline = Pipeline(encoder, index, passages)
    hits = pipeline.search([Query("q1", "how do I join two frames")], k=10)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raydr.prf import refined
from raydr.protocols import Encoder, Index, QueryRefiner, Reranker, TopK
from raydr.types import Found, Hit, Passage, Query, Run


@dataclass
class Pipeline:
    """An encoder, an index that its embeddings were added to, and the optional later stages."""

    encoder: Encoder
    index: Index
    passages: Mapping[str, Passage]
    refiner: QueryRefiner | None = None
    reranker: Reranker | None = None

    def search(self, queries: Sequence[Query], k: int) -> Run:
        """The `k` best passages of each query, best first, after refining and reranking where configured."""
        embeddings = self.encoder.encode_queries(queries)
        if self.refiner is not None:
            first = to_hits(self.index, self.index.search(embeddings, self.refiner.num_feedback))
            embeddings = refined(self.refiner, queries, embeddings, [self._found(hits) for hits in first])
        ranked = to_hits(self.index, self.index.search(embeddings, k))
        if self.reranker is not None:
            ranked = [self.reranker.rerank(q, hits, self.passages) for q, hits in zip(queries, ranked, strict=True)]
        return {query.query_id: hits for query, hits in zip(queries, ranked, strict=True)}

    def _found(self, hits: list[Hit]) -> Found:
        passages = [self.passages[hit.passage_id] for hit in hits]
        if self.refiner is not None and self.refiner.reads == "embeddings":
            embeddings: Any = self.encoder.encode_passages(passages)
            return Found(hits, embeddings=embeddings)
        return Found(hits, passages)


def to_hits(index: Index, top: TopK) -> list[list[Hit]]:
    """Rows to passage ids, one list of hits per query; rows of -1 (fewer than `k` exist) fall away."""
    ids = index.passage_ids
    return [
        [Hit(ids[row], float(score)) for row, score in zip(rows, scores, strict=True) if row >= 0]
        for rows, scores in zip(top.rows, top.scores, strict=True)
    ]
