"""Articles from every kind of file, and what is wrong with them by file, row and column."""

from __future__ import annotations

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydr.data.articles import Article, iso_date, read_articles
from raydr.errors import DataError

ROWS = [
    {
        "id": "x",
        "headline": "A fire",
        "body": "It burnt.",
        "date": "1860-08-23",
        "newspaper": "Herald",
        "city": "Poole",
    },
    {"id": "y", "headline": "", "body": "Nobody came.", "date": "1861", "newspaper": "", "city": ""},
]
EXPECTED = [
    Article("x", "It burnt.", "A fire", "1860-08-23", "Herald", "Poole"),
    Article("y", "Nobody came.", "", "1861"),
]


def as_csv(rows, comma=","):
    return "\n".join([comma.join(rows[0]), *(comma.join(row.values()) for row in rows)])


def test_every_kind_of_file_holds_the_same(tmp_path):
    (tmp_path / "a.csv").write_text(as_csv(ROWS))
    (tmp_path / "a.tsv").write_text(as_csv(ROWS, "\t"))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.parquet"):
        assert read_articles(str(tmp_path / name)) == EXPECTED
    assert EXPECTED[0].day is not None and EXPECTED[1].day is None and EXPECTED[1].year == 1861
    assert EXPECTED[0].whole == "A fire\n\nIt burnt."


def test_columns_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("When,What\n1860,It burnt\n")
    path = str(tmp_path / "a.csv")
    assert read_articles(path, columns={"text": "What", "date": "When"}) == [Article("row-2", "It burnt", date="1860")]
    with pytest.raises(DataError, match=r"a\.csv: has no column with the articles' texts.*When, What.*--column text="):
        read_articles(path)
    with pytest.raises(DataError, match="no column 'Where' for the place; its columns are When, What"):
        read_articles(path, columns={"text": "What", "place": "Where"})
    assert read_articles(path, columns={"text": "What", "place": "Where"}, all_columns=False)
    with pytest.raises(DataError, match="--column txt: is none of text"):
        read_articles(path, columns={"txt": "What"})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("03/04/1860,It burnt,q", ["line 3", "'date'", "is no date: '03/04/1860'", "1860-08-23"]),
        ("1860,,q", ["line 3", "'text'", "is empty"]),
        ("1860,It burnt,p", ["line 3", "'id'", "'p' is that of row 2 as well"]),
        ("1860,It burnt", ["line 3", "wrong number of columns"]),
        ("1860-13-40,It burnt,q", ["line 3", "'date'", "is no date"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, row, words):
    (tmp_path / "a.csv").write_text(f"date,text,id\n1860,fine,p\n{row}\n")
    with pytest.raises(DataError) as error:
        read_articles(str(tmp_path / "a.csv"))
    assert all(word in str(error.value) for word in ["a.csv", *words]), error.value


def test_values_that_are_no_texts_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ["a"]}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 1, field 'text': must be a text: got list"):
        read_articles(str(tmp_path / "a.jsonl"))
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{"date": "1860"}\n')
    with pytest.raises(DataError, match=r"c\.jsonl, line 2, field 'text': is empty"):
        read_articles(str(tmp_path / "c.jsonl"))
    (tmp_path / "b.jsonl").write_text('{"text": "a", "ocr_quality": "good"}\n')
    with pytest.raises(DataError, match="field 'ocr_quality': must be a number: 'good'"):
        read_articles(str(tmp_path / "b.jsonl"))


@pytest.mark.parametrize("name", ["a.docx", "empty.csv", "folder"])
def test_what_is_no_table_is_refused(tmp_path, name):
    (tmp_path / name).mkdir() if name == "folder" else (tmp_path / name).write_text("text\n" if ".csv" in name else "x")
    with pytest.raises(DataError, match=name):
        read_articles(str(tmp_path / name))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("23 August 1860", "1860-08-23"),
        ("Aug 3, 1860", "1860-08-03"),
        ("1860/8/3", "1860-08-03"),
        ("1860-8", "1860-08"),
        (1860, "1860"),
        (1860.0, "1860"),
        ("2024-05-06T07:08:09Z", "2024-05-06"),
        (datetime.datetime(1860, 8, 23, 4), "1860-08-23"),
        (datetime.date(1860, 8, 23), "1860-08-23"),
        (None, ""),
        ("", ""),
    ],
)
def test_dates(value, expected):
    assert iso_date(value) == expected
