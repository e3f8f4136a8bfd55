"""Bad input: every kind is an error that names file, line and field, or is left out, counted and listed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydr.artifacts import is_finished
from raydr.data.config import DataConfig
from raydr.data.ingest import ingest
from raydr.errors import DataError

GOOD = '{"_id": "a", "title": "A", "text": "first"}\n'
BAD_PASSAGES = {
    "not JSON": ('{"_id": "b", "text": "torn', None, "not valid JSON"),
    "a JSON array": ('[{"_id": "b"},', None, "one object per line"),
    "not an object": ('["b", "text"]', None, "not a JSON object"),
    "NaN": ('{"_id": "b", "text": "x", "n": NaN}', None, "NaN is not JSON"),
    "deeply nested": ('{"_id": "b", "x": ' + "[" * 100_000, None, "not valid JSON"),
    "key twice": ('{"_id": "b", "_id": "c", "text": "x"}', None, "'_id' is there twice"),
    "no id": ('{"text": "x"}', "_id", "is missing"),
    "id is null": ('{"_id": null, "text": "x"}', "_id", "must be a string"),
    "id is a list": ('{"_id": ["b"], "text": "x"}', "_id", "must be a string"),
    "id is empty": ('{"_id": "", "text": "x"}', "_id", "is empty"),
    "id with a blank": ('{"_id": "b c", "text": "x"}', "_id", "whitespace"),
    "id with a tab": ('{"_id": "b\\tc", "text": "x"}', "_id", "whitespace"),
    "id with a NUL": ('{"_id": "b\\u0000", "text": "x"}', "_id", "control characters"),
    "id with a no-break space": ('{"_id": "b\\u00a0c", "text": "x"}', "_id", "whitespace"),
    "duplicate id": ('{"_id": "a", "text": "x"}', "_id", "duplicate id: 'a'"),
    "no text": ('{"_id": "b", "title": "t"}', "text", "is missing"),
    "text is a number": ('{"_id": "b", "text": 5}', "text", "must be a string: got int"),
    "text is null": ('{"_id": "b", "text": null}', "text", "must be a string: got null"),
    "title is a list": ('{"_id": "b", "title": [], "text": "x"}', "title", "must be a string"),
    "empty": ('{"_id": "b", "title": " ", "text": "\\n"}', "text", "is empty"),
    "lone surrogate": ('{"_id": "b", "text": "\\ud800"}', None, "lone surrogate"),
    "not UTF-8": (b'{"_id": "b", "text": "\xff"}', None, "not valid UTF-8"),
}


def write(folder: Path, corpus: str | bytes, queries: str = "", qrels: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.jsonl").write_bytes(corpus if isinstance(corpus, bytes) else corpus.encode())
    if queries:
        (folder / "queries.jsonl").write_text(queries)
    if qrels:
        (folder / "qrels").mkdir(exist_ok=True)
        (folder / "qrels" / "test.tsv").write_text(qrels)
    return folder


def rejects(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("bad", BAD_PASSAGES)
def test_bad_passage(tmp_path: Path, capsys: pytest.CaptureFixture, bad: str) -> None:
    line, field, reason = BAD_PASSAGES[bad]
    raw = line if isinstance(line, bytes) else line.encode()
    folder = write(tmp_path / "in", GOOD.encode() + b"\n" + raw + b"\n" + GOOD.replace('"a"', '"z"').encode())

    with pytest.raises(DataError) as caught:
        ingest(DataConfig(path=str(folder)), tmp_path / "out")
    place = "corpus.jsonl, line 3" + (f", field '{field}'" if field else "")
    assert place in str(caught.value)
    assert reason in str(caught.value)
    assert "data.on_error=skip" in str(caught.value)
    assert not is_finished(tmp_path / "out")

    corpus = ingest(DataConfig(path=str(folder), on_error="skip"), tmp_path / "out")
    assert pa.concat_tables(corpus.passages())["passage_id"].to_pylist() == ["a", "z"]
    [reject] = rejects(corpus.path)
    assert (reject["file"], reject["line"], reject["field"]) == ("corpus.jsonl", 3, field)
    assert reason in reject["reason"]
    assert reject["raw"]
    assert corpus.artifact.manifest.counts["rejected"] == 1
    assert "records left out: 1 (" in capsys.readouterr().err


def test_several_problems_are_reported_at_once(tmp_path: Path) -> None:
    lines = GOOD + "".join(f'{{"_id": "{n}"}}\n' for n in range(30))
    with pytest.raises(DataError) as caught:
        ingest(DataConfig(path=str(write(tmp_path / "in", lines))), tmp_path / "out")
    assert "the first 10 problems" in str(caught.value)
    assert str(caught.value).count("field 'text': is missing") == 10


def test_empty_passages_can_be_kept(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", GOOD + '{"_id": "b", "title": "", "text": ""}\n')
    corpus = ingest(DataConfig(path=str(folder), on_empty="keep"), tmp_path / "out")
    assert pa.concat_tables(corpus.passages(["text"]))["text"].to_pylist() == ["first", ""]


def test_cranfield_has_two_empty_passages(collection: Callable[[str], Path], tmp_path: Path) -> None:
    path = str(collection("cranfield"))
    with pytest.raises(DataError, match=r"2 problems(.|\n)*line 471, field 'text'(.|\n)*line 995, field 'text'"):
        ingest(DataConfig(path=path), tmp_path / "out")
    assert ingest(DataConfig(path=path, on_empty="keep"), tmp_path / "out").num_passages == 1400
    skipped = ingest(DataConfig(path=path, on_error="skip"), tmp_path / "out")
    assert skipped.num_passages == 1398
    # Skipping costs a judgement, because one of the two is judged; keeping costs nothing.
    assert [(reject["file"], reject["line"]) for reject in rejects(skipped.path)] == [
        ("corpus.jsonl.gz", 471),
        ("corpus.jsonl.gz", 995),
        ("qrels/test.tsv", 990),
    ]


HEADER = "query-id\tcorpus-id\tscore\n"
BAD_QRELS = {
    "unknown query": ("nobody\ta\t1", "query_id", "names an unknown query: 'nobody'"),
    "unknown passage": ("q1\tnowhere\t1", "passage_id", "names an unknown passage: 'nowhere'"),
    "fraction": ("q1\tb\t0.5", "relevance", "must be a whole number"),
    "word": ("q1\tb\tyes", "relevance", "must be a whole number"),
    "underscore": ("q1\tb\t1_0", "relevance", "must be a whole number"),
    "no grade": ("q1\tb", None, "wrong number of columns: 2 instead of 3"),
    "blanks for tabs": ("q1 b 1", None, "wrong number of columns: 1 instead of 3"),
    "judged twice": ("q1\ta\t2", "passage_id", "judged twice"),
}


@pytest.mark.parametrize("bad", BAD_QRELS)
def test_bad_judgement(tmp_path: Path, bad: str) -> None:
    line, field, reason = BAD_QRELS[bad]
    corpus = GOOD + '{"_id": "b", "text": "second"}\n'
    queries = '{"_id": "q1", "text": "what"}\n'
    folder = write(tmp_path / "in", corpus, queries, HEADER + f"q1\ta\t1\n{line}\n")
    place = "qrels/test.tsv, line 3" + (f", field '{field}'" if field else "")
    with pytest.raises(DataError) as caught:
        ingest(DataConfig(path=str(folder)), tmp_path / "out")
    assert f"{place}: {reason}" in str(caught.value)

    skipped = ingest(DataConfig(path=str(folder), on_error="skip"), tmp_path / "out")
    assert skipped.qrels() == {"q1": {"a": 1}}
    [reject] = rejects(skipped.path)
    assert (reject["file"], reject["line"], reject["field"]) == ("qrels/test.tsv", 3, field)


def test_missing_header_is_not_taken_for_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", GOOD, '{"_id": "q1", "text": "what"}\n', "q1\ta\t1\n")
    with pytest.raises(DataError, match=r"qrels/test.tsv, line 1: a judgement where the header row"):
        ingest(DataConfig(path=str(folder)), tmp_path / "out")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"_id": "q1", "text": "again"}', "line 2, field '_id': duplicate id"),
        ('{"_id": "q2", "text": " "}', "line 2, field 'text': is empty"),
        ('{"_id": "q2"}', "line 2, field 'text': is missing"),
    ],
)
def test_bad_query(tmp_path: Path, line: str, message: str) -> None:
    folder = write(tmp_path / "in", GOOD, '{"_id": "q1", "text": "what"}\n' + line)
    with pytest.raises(DataError, match=f"queries.jsonl, {message}"):
        ingest(DataConfig(path=str(folder)), tmp_path / "out")


def test_judgements_of_a_rejected_passage_are_rejected_too(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "in",
        GOOD + '{"_id": "b", "text": ""}\n',
        '{"_id": "q1", "text": "what"}\n',
        HEADER + "q1\ta\t1\nq1\tb\t1\n",
    )
    corpus = ingest(DataConfig(path=str(folder), on_error="skip"), tmp_path / "out")
    assert corpus.qrels() == {"q1": {"a": 1}}
    assert [reject["file"] for reject in rejects(corpus.path)] == ["corpus.jsonl", "qrels/test.tsv"]


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the source is empty"):
        ingest(DataConfig(path=str(write(tmp_path / "in", ""))), tmp_path / "out")
    folder = write(tmp_path / "in", "{}\n{}\n")
    with pytest.raises(DataError, match="all 2 records were rejected"):
        ingest(DataConfig(path=str(folder), on_error="skip"), tmp_path / "out")


def test_judgements_need_queries(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", GOOD, qrels=HEADER + "q1\ta\t1\n")
    with pytest.raises(DataError, match=r"data\.queries=FILE"):
        ingest(DataConfig(path=str(folder)), tmp_path / "out")


def test_cut_archive_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    content = gzip.compress("".join(f'{{"_id": "{n}", "text": "x"}}\n' for n in range(5000)).encode())
    (tmp_path / "corpus.jsonl.gz").write_bytes(content[:-20])
    with pytest.raises(DataError, match=r"corpus\.jsonl\.gz: cannot be read to its end"):
        ingest(DataConfig(path=str(tmp_path), on_error="skip"), tmp_path / "out")


def test_missing_column_of_a_table_names_the_ones_there_are(tmp_path: Path) -> None:
    (tmp_path / "corpus.csv").write_text("key,text\n1,x\n")
    with pytest.raises(DataError, match=r"corpus.csv: has no column for the passage_id .*it has key, text"):
        ingest(DataConfig(path=str(tmp_path)), tmp_path / "out")
    pq.write_table(pa.table({"id": ["a"], "words": ["x"]}), tmp_path / "corpus.parquet")
    with pytest.raises(DataError, match=r"data.columns.text=NAME"):
        ingest(DataConfig(path=str(tmp_path / "corpus.parquet")), tmp_path / "out")


def test_bad_rows_of_tables(tmp_path: Path) -> None:
    (tmp_path / "corpus.csv").write_text('id,text\na,"two\nlines"\nb\nc,"x"y\nd,fine\n')
    corpus = ingest(DataConfig(path=str(tmp_path / "corpus.csv"), on_error="skip"), tmp_path / "out")
    assert pa.concat_tables(corpus.passages())["passage_id"].to_pylist() == ["a", "d"]
    assert [(reject["line"], reject["reason"].split(":")[0]) for reject in rejects(corpus.path)] == [
        (4, "wrong number of columns"),
        (5, "not valid CSV"),
    ]

    (tmp_path / "collection.tsv").write_text("1\tone\n2\n3\tthree\tfields\n")
    corpus = ingest(DataConfig(path=str(tmp_path / "collection.tsv"), on_error="skip"), tmp_path / "out")
    assert [reject["line"] for reject in rejects(corpus.path)] == [2, 3]

    (tmp_path / "bad.parquet").write_bytes(b"PAR1 this is no Parquet file PAR1")
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read as Parquet"):
        ingest(DataConfig(path=str(tmp_path / "bad.parquet")), tmp_path / "out")


@pytest.mark.parametrize(
    ("first", "second", "declared", "reason"),
    [
        ("1", '"one"', {}, "has another type than before"),
        ('"one"', "1", {}, "declare it: data.metadata_types.m=string"),
        ("true", "1", {}, "has another type than before"),
        ('["x"]', '["x", 1]', {}, "has another type than before"),
        ("1", "0.5", {"m": "int64"}, "0.5 is not a int64"),
        ("1", "9223372036854775808", {}, "is not a int64"),
        ("true", '"perhaps"', {"m": "bool"}, "is not a bool"),
        ('["x"]', '"x"', {"m": "list<string>"}, "is not a list<string>"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path: Path, first: str, second: str, declared: dict, reason: str) -> None:
    lines = f'{{"_id": "a", "text": "x", "m": {first}}}\n{{"_id": "b", "text": "x", "m": {second}}}\n'
    folder = write(tmp_path / "in", lines)
    with pytest.raises(DataError) as caught:
        ingest(DataConfig(path=str(folder), metadata_types=declared), tmp_path / "out")
    assert "corpus.jsonl, line 2, field 'm'" in str(caught.value)
    assert reason in str(caught.value)
    skipped = ingest(DataConfig(path=str(folder), metadata_types=declared, on_error="skip"), tmp_path / "out")
    assert skipped.num_passages == 1


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("string", ["1", "true", '"x"', '{"a": 1}'], ["1", "true", "x", '{"a": 1}']),
        ("int64", ['"12"', "3.0", '""', "null"], [12, 3, None, None]),
        ("float64", ["1", '"0.5"', "2.5"], [1.0, 0.5, 2.5]),
        ("bool", ['"True"', "false", '"0"'], [True, False, False]),
        ("json", ["[1, 2]", '"x"', "null"], ["[1, 2]", '"x"', None]),
    ],
)
def test_declared_metadata_is_converted_without_loss(
    tmp_path: Path, kind: str, values: list[str], expected: list
) -> None:
    lines = "".join(f'{{"_id": "{n}", "text": "x", "m": {value}}}\n' for n, value in enumerate(values))
    corpus = ingest(DataConfig(path=str(write(tmp_path / "in", lines)), metadata_types={"m": kind}), tmp_path / "out")
    assert pa.concat_tables(corpus.passages())["m"].to_pylist() == expected
