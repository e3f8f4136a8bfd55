"""Search in a few lines of Python, without Ray and without files.

python examples/quickstart.py "why do the tides come and go"
"""

import sys

from raydr.encoders.text import TextEncoder
from raydr.index.shard import VectorIndex
from raydr.pipeline import Pipeline
from raydr.types import Passage, Query

TEXTS = {
    "moon": "The natural satellite of the Earth; its pull makes the sea rise and fall.",
    "sun": "The star at the centre of the planets, source of light and heat.",
    "cat": "A small furry animal that purrs and hunts mice at night.",
    "piano": "A keyboard instrument whose hammers strike strings.",
    "bread": "Flour, water and salt, leavened and baked.",
}


def main(question: str) -> None:
    passages = [Passage(passage_id, text) for passage_id, text in TEXTS.items()]
    encoder = TextEncoder(TextEncoder.Config())  # all-MiniLM-L6-v2, which is installed with raydr
    index = VectorIndex("Flat")  # any FAISS factory string: HNSW32, IVF64,SQ8, ...
    index.add([passage.passage_id for passage in passages], encoder.encode_passages(passages))

    pipeline = Pipeline(encoder, index, {passage.passage_id: passage for passage in passages})
    run = pipeline.search([Query("q1", question)], k=3)

    print(question)
    for hit in run["q1"]:
        print(f"  {hit.score:.3f}  {hit.passage_id:<6} {TEXTS[hit.passage_id]}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "why do the tides come and go")
