"""W8: BM25 over a BEIR folder: indexing, searching, and what it finds. raydr against plain bm25s (numpy and numba).

    python benchmarks/bm25.py --data ../shared/data/scifact --rounds 7

Both use Lucene's formula with k1 1.2 and b 0.75, English stop words and Snowball's stemmer, over title and text. Their
scores must be the same before a speed counts. raydr also breaks ties by id, drops what matches no word and writes the
index to disk when it builds one; plain bm25s only indexes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import bm25s
import ir_measures
import numpy as np
import Stemmer

sys.path.insert(0, str(Path(__file__).parent))
from interleaved import markdown, rounds, spread, write

from raydr.index.bm25 import BM25
from raydr.index.config import BM25Config

K = 100


def read(folder: Path) -> tuple[list[str], list[str], list[str], list[str], list[Any]]:
    """Passage ids and texts, query ids and texts, judgements of the test split."""
    with gzip.open(folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as stream:
        passages = [json.loads(line) for line in stream]
    lines = (folder / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]
    qrels = [ir_measures.Qrel(q, p, int(grade)) for q, p, grade in (line.split("\t") for line in lines)]
    judged = {qrel.query_id for qrel in qrels}
    queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    queries = [query for query in queries if query["_id"] in judged]
    texts = [f"{p['title']} {p['text']}" if p["title"] else p["text"] for p in passages]
    return [p["_id"] for p in passages], texts, [q["_id"] for q in queries], [q["text"] for q in queries], qrels


def index_plain(texts: list[str], backend: str) -> bm25s.BM25:
    tokens = bm25s.tokenize(texts, stemmer=Stemmer.Stemmer("english"), show_progress=False)
    scorer = bm25s.BM25(method="lucene", k1=1.2, b=0.75, backend=backend)
    scorer.index(tokens, show_progress=False)
    return scorer


def search_plain(scorer: bm25s.BM25, queries: list[str], k: int, num_threads: int) -> tuple[np.ndarray, np.ndarray]:
    stemmer = Stemmer.Stemmer("english")
    tokens = bm25s.tokenize(queries, stemmer=stemmer, show_progress=False)
    found = scorer.retrieve(tokens, k=k, show_progress=False, n_threads=num_threads)
    return found.scores, found.documents


def index_raydr(texts: list[str], folder: Path) -> BM25:
    with tempfile.TemporaryDirectory(dir=folder) as path:
        BM25.build(texts, BM25Config()).save(Path(path))
        return BM25.open(Path(path))


def search_raydr(index: BM25, queries: list[str], k: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    top = index.search(queries, k, ids_of=ids.__getitem__)
    return top.scores, top.rows


def ndcg(scores: np.ndarray, rows: np.ndarray, ids: np.ndarray, query_ids: list[str], qrels: list[Any]) -> float:
    run = {
        query_id: {ids[row]: float(score) for score, row in zip(line, found, strict=True) if row >= 0 and score > 0}
        for query_id, line, found in zip(query_ids, scores, rows, strict=True)
    }
    measure = ir_measures.nDCG @ 10
    return ir_measures.calc_aggregate([measure], qrels, run)[measure]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a BEIR folder with a test split")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--copies", type=int, default=1, help="repeat the corpus, to see how cost grows")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    ids, texts, query_ids, queries, qrels = read(arguments.data)
    ids = np.array([f"{id_}#{copy}" if copy else id_ for copy in range(arguments.copies) for id_ in ids], dtype=object)
    texts = texts * arguments.copies
    with tempfile.TemporaryDirectory() as folder:
        builders = {
            "raydr": partial(index_raydr, texts, Path(folder)),
            "bm25s": partial(index_plain, texts, "numpy"),
            "bm25s numba": partial(index_plain, texts, "numba"),
        }
        started = time.perf_counter()
        built = {name: build() for name, build in builders.items()}
        searches = {
            "raydr": partial(search_raydr, built["raydr"], queries, K, ids),
            "bm25s": partial(search_plain, built["bm25s"], queries, K, 0),
            "bm25s, 2 threads": partial(search_plain, built["bm25s"], queries, K, 2),
            "bm25s numba": partial(search_plain, built["bm25s numba"], queries, K, 0),
        }
        found = {name: search() for name, search in searches.items()}
        for name, (scores, _) in found.items():
            ours = np.maximum(found["raydr"][0], 0)  # -inf where nothing matches, which bm25s scores 0
            np.testing.assert_allclose(np.sort(scores.clip(0), axis=1), np.sort(ours, axis=1), rtol=1e-5, err_msg=name)
        print(f"outputs agree ({time.perf_counter() - started:.1f} s)", file=sys.stderr)
        indexing = rounds(builders, arguments.rounds)
        searching = rounds(searches, arguments.rounds)
    table = markdown(
        ["contender", "passages/s indexed"],
        [[name, spread([len(texts) / t for t in times])] for name, times in indexing.items()],
    )
    table += "\n" + markdown(
        ["contender", "queries/s", "nDCG@10"],
        [
            [name, spread([len(queries) / t for t in times]), f"{ndcg(*found[name], ids, query_ids, qrels):.4f}"]
            for name, times in searching.items()
        ],
    )
    title = f"W8: BM25 over {len(texts)} passages ({arguments.data.name}), {len(queries)} queries, top {K}"
    write(arguments.out / "bm25", title, table, {"indexing": indexing, "searching": searching})


if __name__ == "__main__":
    main()
