"""What a user writes today without raydr: BEIR folder -> sentence-transformers -> FAISS -> ir_measures, in one script.

python benchmarks/peers/plain_chain.py DIR SPLIT MODEL [BATCH] [PRECISION]
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import faiss
import ir_measures
from ir_measures import RR, R, nDCG
from sentence_transformers import SentenceTransformer


def read_jsonl(folder: Path, name: str) -> list[dict]:
    path = next(folder.glob(name + ".jsonl*"))
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return [json.loads(line) for line in lines]


def main(folder: Path, split: str, model_path: str, batch: int = 32, precision: str = "float32") -> None:
    qrels = [line.split("\t") for line in (folder / f"qrels/{split}.tsv").read_text().splitlines()[1:]]
    judged = {row[0] for row in qrels}
    passages = read_jsonl(folder, "corpus")
    queries = [q for q in read_jsonl(folder, "queries") if q["_id"] in judged]
    model = SentenceTransformer(model_path, device="cpu", model_kwargs={"dtype": precision})
    texts = [f"{p.get('title', '')} {p['text']}".strip() for p in passages]
    options = {"batch_size": batch, "convert_to_numpy": True, "normalize_embeddings": True}
    index = faiss.IndexFlatIP(model.get_sentence_embedding_dimension())
    index.add(model.encode(texts, **options).astype("float32"))
    scores, rows = index.search(model.encode([q["text"] for q in queries], **options).astype("float32"), 1000)
    run = [
        ir_measures.ScoredDoc(query["_id"], passages[row]["_id"], float(score))
        for query, line, values in zip(queries, rows, scores, strict=True)
        for row, score in zip(line, values, strict=True)
        if row >= 0
    ]
    judgements = [ir_measures.Qrel(q, d, int(r)) for q, d, r in qrels]
    measured = ir_measures.calc_aggregate([nDCG @ 10, RR @ 10, R @ 100], judgements, run)
    print(json.dumps({str(measure): value for measure, value in measured.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], *map(int, sys.argv[4:5]), *sys.argv[5:6])
