"""Whatever text a corpus holds, every format gives it back character by character."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydr.data.config import DataConfig
from raydr.data.ingest import ingest
from raydr.types import Passage

ANY = st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n\r\t\x00\x85\u2028,\"'\\ é😀")
IDS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1, max_size=8)
TEXTS = st.text(ANY, min_size=1, max_size=30).filter(str.strip)
ONE_LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\r"), min_size=1).filter(str.strip)


def write_jsonl(folder: Path, passages: list[Passage]) -> None:
    with (folder / "corpus.jsonl").open("w", encoding="utf-8", newline="") as stream:
        for n, passage in enumerate(passages):
            row = {"_id": passage.passage_id, "title": passage.title, "text": passage.text}
            stream.write(json.dumps(row, ensure_ascii=n % 2 == 0) + "\n")


def write_csv(folder: Path, passages: list[Passage]) -> None:
    with (folder / "passages.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
        writer.writerow(["id", "title", "text"])
        writer.writerows((passage.passage_id, passage.title, passage.text) for passage in passages)


def write_parquet(folder: Path, passages: list[Passage]) -> None:
    rows = [{"id": passage.passage_id, "title": passage.title, "text": passage.text} for passage in passages]
    pq.write_table(pa.Table.from_pylist(rows), folder / "passages.parquet")


def write_msmarco(folder: Path, passages: list[Passage]) -> None:
    lines = "".join(f"{passage.passage_id}\t{passage.text}\n" for passage in passages)
    (folder / "collection.tsv").write_bytes(lines.encode())


def back(write: Callable[[Path, list[Passage]], None], passages: list[Passage]) -> list[Passage]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "in"
        folder.mkdir()
        write(folder, passages)
        rows = pa.concat_tables(ingest(DataConfig(path=str(folder)), Path(name) / "out").passages()).to_pylist()
    return [Passage(row["passage_id"], row["text"], row["title"]) for row in rows]


def corpora(texts: st.SearchStrategy[str], titles: st.SearchStrategy[str]) -> st.SearchStrategy[list[Passage]]:
    passages = st.tuples(IDS, texts, titles).map(lambda row: Passage(*row))
    return st.lists(passages, min_size=1, max_size=5, unique_by=lambda passage: passage.passage_id)


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
@given(passages=corpora(TEXTS, TEXTS | st.just("")))
@settings(max_examples=20)
def test_any_text(write: Callable[[Path, list[Passage]], None], passages: list[Passage]) -> None:
    assert back(write, passages) == passages


@given(passages=corpora(ONE_LINE, st.just("")))
@settings(max_examples=20)
def test_any_text_of_one_line_in_ms_marco(passages: list[Passage]) -> None:
    assert back(write_msmarco, passages) == passages
