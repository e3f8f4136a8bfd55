"""Reading a corpus: every format gives the same artifact, real collections arrive whole, finished work is reused."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from raydr.artifacts import open_artifact
from raydr.data.config import Columns, DataConfig
from raydr.data.corpus import Corpus
from raydr.data.files import Folder
from raydr.data.ingest import ingest
from raydr.errors import ArtifactError, ConfigError, DataError
from raydr.types import Query

PASSAGES = [
    {"_id": "d1", "title": "Moon", "text": "It causes\nthe tides, “often”.", "year": 1969, "tags": ["sky", "sea"]},
    {"_id": "d2", "title": "", "text": 'A cat purrs; it says "miau".', "year": None, "tags": []},
    {"_id": "d3", "title": "Title only", "text": "", "year": 2001, "tags": ["x"]},
]
QUERIES = [{"_id": "q1", "text": "tides"}, {"_id": "q2", "text": "pets"}, {"_id": "q3", "text": "in no split"}]
QRELS = [("q1", "d1", 2), ("q1", "d2", -1), ("q2", "d2", 1)]


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_beir(folder: Path, compress: Callable[[bytes], bytes] = bytes, suffix: str = "") -> Path:
    (folder / "qrels").mkdir(parents=True)
    (folder / f"corpus.jsonl{suffix}").write_bytes(compress(json_lines(PASSAGES).encode()))
    (folder / f"queries.jsonl{suffix}").write_bytes(compress(json_lines(QUERIES).encode()))
    rows = "".join(f"{q}\t{p}\t{grade}\n" for q, p, grade in QRELS)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq3\td3\t1\n")
    return folder


def texts(corpus: Corpus) -> list[tuple[str, str, str]]:
    rows = pa.concat_tables(corpus.passages()).to_pylist()
    assert [row["position"] for row in rows] == list(range(len(rows)))
    return [(row["passage_id"], row["title"], row["text"]) for row in rows]


EXPECTED = [(row["_id"], row["title"], row["text"]) for row in PASSAGES]


@pytest.mark.parametrize(
    ("compress", "suffix"),
    [
        (bytes, ""),
        (gzip.compress, ".gz"),
        (lambda data: gzip.compress(data[:50]) + gzip.compress(data[50:]), ".gz"),
        (bz2.compress, ".bz2"),
        (lambda data: pa.compress(data, codec="zstd", asbytes=True), ".zst"),
    ],
    ids=["plain", "gz", "gz of two members", "bz2", "zst"],
)
def test_beir_folder(tmp_path: Path, compress: Callable[[bytes], bytes], suffix: str) -> None:
    corpus = ingest(DataConfig(path=str(write_beir(tmp_path / "in", compress, suffix))), tmp_path / "out")

    assert texts(corpus) == EXPECTED
    assert corpus.queries() == [Query("q1", "tides"), Query("q2", "pets")], "only queries of the split"
    assert corpus.qrels() == {"q1": {"d1": 2, "d2": -1}, "q2": {"d2": 1}}
    assert corpus.metadata_columns == ["year", "tags"]
    table = pa.concat_tables(corpus.passages(["year", "tags"]))
    assert table.schema.field("year").type == pa.int64()
    assert table.to_pylist()[0] == {"year": 1969, "tags": ["sky", "sea"]}
    assert not corpus.is_split


def test_split_is_chosen_or_named(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "in")
    assert ingest(DataConfig(path=str(folder), split="dev"), tmp_path / "dev").qrels() == {"q3": {"d3": 1}}
    with pytest.raises(DataError, match=r"'train'; there are: dev, test"):
        ingest(DataConfig(path=str(folder), split="train"), tmp_path / "train")
    (folder / "qrels" / "test.tsv").rename(folder / "qrels" / "train.tsv")
    with pytest.raises(DataError, match=r"choose one: data\.split=NAME out of dev, train"):
        ingest(DataConfig(path=str(folder)), tmp_path / "none")


def test_corpus_alone_has_no_judgements(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(json_lines(PASSAGES))
    corpus = ingest(DataConfig(path=str(tmp_path)), tmp_path / "out")
    assert (corpus.num_passages, corpus.queries(), corpus.has_qrels) == (3, [], False)
    with pytest.raises(DataError, match="no judgements"):
        corpus.qrels()


def test_queries_without_judgements_are_all_kept(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(json_lines(PASSAGES))
    (tmp_path / "queries.jsonl").write_text(json_lines(QUERIES))
    corpus = ingest(DataConfig(path=str(tmp_path)), tmp_path / "out")
    assert [query.query_id for query in corpus.queries()] == ["q1", "q2", "q3"]
    with pytest.raises(DataError, match=r"'test'; there are: none, so leave data\.split out"):
        ingest(DataConfig(path=str(tmp_path), split="test"), tmp_path / "out2")


def test_files_named_one_by_one(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "in")
    (folder / "corpus.jsonl").rename(folder / "articles.jsonl")
    (tmp_path / "judged.txt").write_text("q2 0 d2 1\n")
    config = DataConfig(path=str(folder), passages="articles.jsonl", qrels=(tmp_path / "judged.txt").as_uri())
    assert ingest(config, tmp_path / "out").qrels() == {"q2": {"d2": 1}}
    one_file = DataConfig(path=str(folder / "articles.jsonl"), queries="queries.jsonl", qrels="qrels/dev.tsv")
    assert ingest(one_file, tmp_path / "out2").qrels() == {"q3": {"d3": 1}}
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file or folder in"):
        ingest(DataConfig(path=str(folder), passages="nowhere.jsonl"), tmp_path / "out3")


def test_ms_marco_folder(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "collection.tsv").write_text('0\tThe "first" passage\n1\tThe second\r\n')
    (folder / "queries.dev.tsv").write_text("10\twhat is first\n11\tnever judged\n")
    (folder / "qrels.dev.small.tsv").write_text("10\t0\t1\t1\n")
    corpus = ingest(DataConfig(path=str(folder), split="dev.small"), tmp_path / "out")
    assert texts(corpus) == [("0", "", 'The "first" passage'), ("1", "", "The second")]
    assert corpus.queries() == [Query("10", "what is first")]
    assert corpus.qrels() == {"10": {"1": 1}}


def test_csv_with_quoted_line_breaks_and_own_names(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    text = 'several\n\nlines, and a "quote"\r\nand ' + "long " * 40_000
    with (folder / "passages.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["key", "body", "year"], ["a", text, "1999"], ["b", "short", ""]])
    (folder / "queries.csv").write_text("qid,query\nq1,what\n")
    (folder / "qrels.csv").write_text("qid,docid,rel\nq1,b,3\n")
    config = DataConfig(
        path=str(folder), columns=Columns(passage_id="key", text="body"), metadata_types={"year": "int64"}
    )
    corpus = ingest(config, tmp_path / "out")
    assert texts(corpus) == [("a", "", text), ("b", "", "short")]
    assert pa.concat_tables(corpus.passages(["year"]))["year"].to_pylist() == [1999, None]
    assert corpus.qrels() == {"q1": {"b": 3}}


def test_parquet_folder_with_several_files_and_whole_number_ids(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "passages").mkdir(parents=True)
    for part in range(2):
        rows = {"id": [2 * part, 2 * part + 1], "contents": ["even", "odd"], "embedding": [[0.5], [0.5]]}
        pq.write_table(pa.table(rows), folder / "passages" / f"{part}.parquet")
    (folder / "queries.jsonl").write_text('{"id": 7, "query": "which"}\n')
    (folder / "qrels.tsv").write_text("7 0 3 1\n")
    config = DataConfig(path=str(folder), metadata="none", format="parquet")
    corpus = ingest(config, tmp_path / "out")
    assert [row[0] for row in texts(corpus)] == ["0", "1", "2", "3"]
    assert corpus.metadata_columns == []
    assert corpus.qrels() == {"7": {"3": 1}}
    with pytest.raises(DataError, match="field 'embedding' has a name that raydr uses itself"):
        ingest(DataConfig(path=str(folder)), tmp_path / "all")


def test_hugging_face_dataset_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    corpus_rows = datasets.Dataset.from_list(PASSAGES)
    queries = datasets.Dataset.from_list(QUERIES)
    qrels = datasets.Dataset.from_list([{"query-id": q, "corpus-id": p, "score": grade} for q, p, grade in QRELS])
    corpus_rows.save_to_disk(tmp_path / "alone")
    assert texts(ingest(DataConfig(path=str(tmp_path / "alone")), tmp_path / "out1")) == EXPECTED

    folder = tmp_path / "three"
    datasets.DatasetDict({"corpus": corpus_rows}).save_to_disk(folder / "corpus")
    queries.save_to_disk(folder / "queries")
    datasets.DatasetDict({"test": qrels, "dev": qrels.select([0])}).save_to_disk(folder / "qrels")
    corpus = ingest(DataConfig(path=str(folder), split="test"), tmp_path / "out2")
    assert texts(corpus) == EXPECTED
    assert corpus.qrels() == {"q1": {"d1": 2, "d2": -1}, "q2": {"d2": 1}}
    with pytest.raises(DataError, match="there are: dev, test"):
        ingest(DataConfig(path=str(folder), split="train"), tmp_path / "out3")


def test_ir_datasets_id(tmp_path: Path) -> None:
    """The package's own reading classes over local files stand in for a downloaded collection."""
    ir_datasets = pytest.importorskip("ir_datasets")
    from ir_datasets.formats import TrecQrels, TsvDocs, TsvQueries
    from ir_datasets.util import StringFile

    name = "raydr-test-collection/dev"
    if name not in ir_datasets.registry:
        dataset = ir_datasets.Dataset(
            TsvDocs(StringFile("d1\tabout tides\nd2\tabout cats\n")),
            TsvQueries(StringFile("q1\ttides\n")),
            TrecQrels(StringFile("q1 0 d1 2\n"), {}),
        )
        ir_datasets.registry.register(name, dataset)
    corpus = ingest(DataConfig(path=name), tmp_path / "out")
    assert texts(corpus) == [("d1", "", "about tides"), ("d2", "", "about cats")]
    assert corpus.qrels() == {"q1": {"d1": 2}}
    assert ingest(DataConfig(path="irds:raydr-test-collection", split="dev"), tmp_path / "out2").num_passages == 2
    with pytest.raises(DataError, match=r"ids of this collection: raydr-test-collection/dev"):
        ingest(DataConfig(path="irds:raydr-test-collection", split="test"), tmp_path / "out3")


def test_ir_datasets_without_a_network_says_so(tmp_path: Path) -> None:
    ir_datasets = pytest.importorskip("ir_datasets")
    from ir_datasets.formats import TsvDocs
    from ir_datasets.util import Download, RequestsDownload

    name = "raydr-test-not-downloaded"
    if name not in ir_datasets.registry:
        nobody_listens = Download([RequestsDownload("http://127.0.0.1:9/docs.tsv", tries=1)], stream=True)
        ir_datasets.registry.register(name, ir_datasets.Dataset(TsvDocs(nobody_listens)))
    with pytest.raises(
        DataError, match="raydr-test-not-downloaded docs: ir_datasets cannot read it(.|\n)*IR_DATASETS_HOME"
    ):
        ingest(DataConfig(path=name), tmp_path / "out")


def test_unknown_path_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        ingest(DataConfig(path=str(tmp_path / "missing")), tmp_path / "out")
    with pytest.raises(DataError, match="neither pyarrow nor fsspec can open this URI"):
        ingest(DataConfig(path="nosuchscheme://bucket/x"), tmp_path / "out")
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(DataError, match=r"cannot tell the format \(found: notes.md\)"):
        ingest(DataConfig(path=str(tmp_path)), tmp_path / "out")


def test_uri_and_any_pyarrow_filesystem(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "in", gzip.compress, ".gz")
    assert texts(ingest(DataConfig(path=folder.as_uri()), tmp_path / "out")) == EXPECTED

    in_memory = pafs._MockFileSystem()
    in_memory.create_dir("bucket/scifact")
    with in_memory.open_output_stream("bucket/scifact/corpus.jsonl.gz", compression=None) as stream:
        stream.write((folder / "corpus.jsonl.gz").read_bytes())
    file = Folder(in_memory, "bucket/scifact", "mock:///bucket/scifact").find("corpus.jsonl")
    assert file is not None
    with file.chunks(lambda _: None) as chunks:
        assert b"".join(chunks) == json_lines(PASSAGES).encode()

    subtree = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    assert [file.name for file in Folder(subtree, "in", "sub").files()] == ["corpus.jsonl.gz", "queries.jsonl.gz"]


def test_finished_corpus_is_reused_until_the_source_changes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_beir(tmp_path / "in")
    config = DataConfig(path=str(folder))
    first = ingest(config, tmp_path / "out")
    again = ingest(config, tmp_path / "out")
    assert again.artifact.manifest == first.artifact.manifest
    assert "reused" in capsys.readouterr().err

    with (folder / "corpus.jsonl").open("a") as stream:
        stream.write(json_lines([{"_id": "d4", "text": "new"}]))
    assert ingest(config, tmp_path / "out").num_passages == 4
    assert ingest(config.model_copy(update={"split": "dev"}), tmp_path / "out").qrels() == {"q3": {"d3": 1}}


def test_corpus_open_refuses_what_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        Corpus.open(tmp_path)


def test_parts_are_contiguous_and_bounded(tmp_path: Path) -> None:
    rows = [{"_id": str(n), "text": f"passage {n}"} for n in range(3000)]
    (tmp_path / "corpus.jsonl").write_text(json_lines(rows))
    corpus = ingest(DataConfig(path=str(tmp_path)), tmp_path / "out")
    sizes = [table.num_rows for table in corpus.passages()]
    assert sum(sizes) == corpus.num_passages == 3000
    assert len(sizes) > 1, "a small corpus must give several workers something to do"
    assert [row[0] for row in texts(corpus)] == [str(n) for n in range(3000)]


def test_metadata_types_are_one_for_all_parts(tmp_path: Path) -> None:
    """A fraction, and a column, that turn up after the first part was written change the first part too."""
    rows = [{"_id": str(n), "text": "x", "size": n, "note": None} for n in range(2000)]
    rows.append({"_id": "last", "text": "x", "size": 0.5, "note": "late", "extra": {"a": [1]}})
    (tmp_path / "corpus.jsonl").write_text(json_lines(rows))
    corpus = ingest(DataConfig(path=str(tmp_path)), tmp_path / "out")
    assert len({table.schema for table in corpus.passages()}) == 1
    last = pa.concat_tables(corpus.passages()).to_pylist()[-1]
    assert (last["size"], last["note"], last["extra"]) == (0.5, "late", '{"a": [1]}')
    assert corpus.metadata_columns == ["size", "note", "extra"]
    open_artifact(corpus.path).verify()


def test_metadata_can_be_chosen(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "in")
    corpus = ingest(DataConfig(path=str(folder), metadata=["year"]), tmp_path / "out")
    assert corpus.metadata_columns == ["year"]
    with pytest.raises(DataError, match=r"\['yaer'\], which no record has"):
        ingest(DataConfig(path=str(folder), metadata=["yaer"]), tmp_path / "out2")


def test_config_refuses_what_cannot_work() -> None:
    from raydr.config import validate

    for values, message in [
        ({"path": "x", "metadata": ["score"]}, "column name of raydr"),
        ({"path": "x", "metadata": ["a"], "metadata_types": {"b": "int64"}}, "does not select"),
        ({"path": "x", "split_documents": {"max_tokens": 10, "overlap_tokens": 10}}, "must be less than max_tokens"),
        ({"path": "x", "pasages": "y"}, "did you mean 'passages'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            validate(DataConfig, values, where="test")


@pytest.mark.parametrize(
    ("name", "num_passages", "num_queries", "num_qrels"),
    [("scifact", 5183, 300, 339), ("squad", 646, 978, 978), ("fnc1", 2559, 353, 2700), ("fetaqa", 992, 293, 293)],
)
def test_real_collections_arrive_whole(
    collection: Callable[[str], Path], tmp_path: Path, name: str, num_passages: int, num_queries: int, num_qrels: int
) -> None:
    folder = collection(name)
    corpus = ingest(DataConfig(path=str(folder), split="test"), tmp_path / "out")
    assert corpus.num_passages == num_passages
    assert len(corpus.queries()) == num_queries
    assert sum(len(grades) for grades in corpus.qrels().values()) == num_qrels
    with gzip.open(folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    assert texts(corpus) == [(row["_id"], row["title"], row["text"]) for row in rows]
