"""Pictures, names and a text collection in one pool, as folders that `data.path` names: for benchmarks/multimodal.py.

Two folders, because what a picture shows in the test part is shown nowhere in the training part:

    OUT/train   pictures and names of the train and dev parts, the paragraphs of SQuAD; queries of train and dev
    OUT/test    pictures and names of the test part, the same paragraphs; queries of test

| task | query | looks for |
| --- | --- | --- |
| emoji: text to image | a name | its picture |
| emoji: keyword to image | a keyword | every plain picture that carries it |
| emoji: image to text | a picture | its name |
| emoji: image,text to image | a picture and "the same with dark skin tone" | the pictures that fit |
| squad: text to text | a question | its paragraph |

Pictures with the very same pixels are all right where one of them is. Each part is one pool of all modalities; the
picture that a query asks with (`asked_with`) is in it, and no answer to it.

    python benchmarks/emoji_collection.py --data DATA --out runs/emoji
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

INSTRUCTIONS = {
    "emoji: text to image": [
        "Find the picture that the name describes.",
        "Which picture is called this?",
        "Retrieve the image with the following name.",
    ],
    "emoji: keyword to image": [
        "Find a picture that has to do with the word.",
        "Which pictures would be tagged with this word?",
        "Retrieve images that fit the keyword.",
    ],
    "emoji: image to text": [
        "Find the name of the picture.",
        "What is this picture called?",
        "Retrieve the text that names the image.",
    ],
    "emoji: image,text to image": [
        "Find the picture changed as the text says.",
        "Which picture is like this one but for the change described?",
        "Retrieve the image that results from changing this image as described.",
    ],
    "squad: text to text": [
        "Find the paragraph that answers the question.",
        "Which paragraph holds the answer to this question?",
        "Retrieve the passage that answers the question.",
    ],
}
TEXT_TASK = "squad: text to text"


def write_collections(data: Path, out: Path) -> None:
    """Both folders, from the collections `emoji_noto` and `squad` in `data`."""
    pictures = pq.read_table(data / "emoji_noto/images.parquet").to_pylist()
    for part, splits in (("train", ("train", "dev")), ("test", ("test",))):
        _write(data, out / part, [row for row in pictures if row["split"] in splits], splits)


def _write(data: Path, folder: Path, pictures: list[dict[str, Any]], splits: tuple[str, ...]) -> None:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    passages = [{"passage_id": row["id"], "text": "", "image": row["png"]} for row in pictures]
    passages += [{"passage_id": f"name-{row['id']}", "text": row["name"], "image": None} for row in pictures]
    passages += [
        {"passage_id": f"squad-{row['_id']}", "text": f"{row['title']} {row['text']}".strip(), "image": None}
        for row in _lines(data / "squad/corpus.jsonl.gz")
    ]
    schema = pa.schema({"passage_id": pa.string(), "text": pa.string(), "image": pa.binary()})
    pq.write_table(pa.Table.from_pylist(passages, schema=schema), folder / "passages.parquet")
    queries: list[dict[str, Any]] = []
    for split in splits:
        own = list(_queries(data, [row for row in pictures if row["split"] == split], split))
        queries += [query for query, _ in own]
        lines = [f"{query['query_id']}\t{target}\t1" for query, targets in own for target in targets]
        (folder / f"qrels/{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    schema = pa.schema(
        {
            "query_id": pa.string(),
            "text": pa.string(),
            "image": pa.binary(),
            "instructions": pa.list_(pa.string()),
            "task": pa.string(),
            "asked_with": pa.string(),
        }
    )
    pq.write_table(pa.Table.from_pylist(queries, schema=schema), folder / "queries.parquet")


def _queries(data: Path, pictures: list[dict[str, Any]], split: str) -> Iterator[tuple[dict[str, Any], Iterable[str]]]:
    """Queries of a part, with what they look for."""
    by_id = {row["id"]: row for row in pictures}
    twins: dict[str, list[str]] = {}
    for row in pictures:
        twins.setdefault(row["same_as"] or row["id"], []).append(row["id"])

    def alike(ids: Iterable[str]) -> list[str]:
        found = (twins[by_id[one]["same_as"] or one] for one in ids if one in by_id)
        return sorted({one for group in found for one in group})

    def query(query_id: str, task: str, text: str, picture: str | None = None) -> dict[str, Any]:
        image = by_id[picture]["png"] if picture is not None else None
        asked = {"query_id": query_id, "text": text, "image": image, "asked_with": picture}
        return {**asked, "instructions": INSTRUCTIONS[task], "task": task}

    for row in pictures:
        yield query(f"t-{row['id']}", "emoji: text to image", row["name"]), alike([row["id"]])
        names = [f"name-{one}" for one in alike([row["id"]])]
        yield query(f"i-{row['id']}", "emoji: image to text", "", row["id"]), names
    texts = {line["_id"]: line for line in _lines(data / "emoji_noto/text2image/queries.jsonl")}
    for query_id, targets in _qrels(data / f"emoji_noto/text2image/qrels/{split}.tsv").items():
        if texts[query_id]["kind"] == "keyword":
            yield query(f"k-{query_id}", "emoji: keyword to image", texts[query_id]["text"]), alike(targets)
    for line in _lines(data / "emoji_noto/composed.jsonl.gz"):
        if line["split"] == split and line["image_id"] in by_id and (targets := alike(line["target_ids"])):
            yield query(f"c-{line['_id']}", "emoji: image,text to image", line["text"], line["image_id"]), targets
    asked = {line["_id"]: line["text"] for line in _lines(data / "squad/queries.jsonl")}
    for query_id, targets in _qrels(data / f"squad/qrels/{split}.tsv").items():
        yield query(f"s-{query_id}", TEXT_TASK, asked[query_id]), [f"squad-{one}" for one in targets]


def _qrels(file: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in file.read_text().splitlines()[1:]:
        query_id, passage_id, relevance = line.split("\t")
        if int(relevance) >= 1:
            found.setdefault(query_id, []).append(passage_id)
    return found


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
        for line in lines:
            yield json.loads(line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    options = parser.parse_args()
    write_collections(options.data, options.out)
