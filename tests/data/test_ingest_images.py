"""Corpora with pictures: every way to hold one gives the same artifact, bad ones are told, texts stay as they are."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raydr.artifacts import open_artifact
from raydr.config import validate
from raydr.data import pictures
from raydr.data.config import Columns, DataConfig, SplitDocuments
from raydr.data.corpus import Corpus
from raydr.data.files import Folder
from raydr.data.images import ImageConfig, decode_rgb
from raydr.data.ingest import ingest, ingest_queries
from raydr.data.pictures import ImageReader, Origin, Pending, prepare_here
from raydr.errors import ConfigError, DataError

IMAGES = ImageConfig(size=32)
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 128, 0)}


def png(colour: str, size: tuple[int, int] = (48, 24)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


PASSAGES = [
    {"_id": "p1", "text": "a red thing", "image": "red", "year": 1},
    {"_id": "p2", "text": "only words", "image": None, "year": 2},
    {"_id": "p3", "text": None, "image": "blue", "year": 3},
]
QUERIES: list[dict[str, Any]] = [
    {
        "_id": "q1",
        "text": None,
        "image": "green",
        "instruction": ["Find it.", "Look for it."],
        "task": "a",
        "copies": 3,
    },
    {"_id": "q2", "text": "words", "image": None, "instruction": ["Find words."], "task": None, "copies": None},
    {"_id": "q3", "text": "not judged", "image": "red", "instruction": None, "task": None, "copies": None},
]
QRELS = "query-id\tcorpus-id\tscore\nq2\tp2\t1\nq1\tp3\t1\n"


def write_tables(folder: Path, form: str) -> Path:
    """The same corpus with its pictures in one of the forms they may have."""
    (folder / "qrels").mkdir(parents=True)
    (folder / "qrels" / "test.tsv").write_text(QRELS)
    encoded = {colour: base64.b64encode(png(colour)).decode() for colour in COLOURS}
    if form == "files":
        (folder / "pictures").mkdir()
        for colour in COLOURS:
            (folder / "pictures" / f"{colour}.png").write_bytes(png(colour))
        value = {colour: f"pictures/{colour}.png" for colour in COLOURS}
    elif form == "bytes":
        value = {colour: png(colour) for colour in COLOURS}
    elif form == "struct":
        value = {colour: {"bytes": png(colour), "path": f"{colour}.png"} for colour in COLOURS}
    elif form == "data URLs":
        value = {colour: f"data:image/png;base64,{text}" for colour, text in encoded.items()}
    else:
        value = encoded
    passages, queries = (
        [row | {"image": row["image"] and value[row["image"]]} for row in rows] for rows in (PASSAGES, QUERIES)
    )
    if form in ("bytes", "struct"):
        pq.write_table(pa.Table.from_pylist(passages), folder / "passages.parquet")
        pq.write_table(pa.Table.from_pylist(queries), folder / "queries.parquet")
    else:
        (folder / "corpus.jsonl").write_text(json_lines(passages))
        (folder / "queries.jsonl").write_text(json_lines(queries))
    return folder


def colour_of(image: bytes | None) -> str | None:
    if image is None:
        return None
    pixels = decode_rgb(image)
    assert pixels.shape == (16, 32, 3), "prepared to the size asked for"
    return next(name for name, rgb in COLOURS.items() if (pixels == rgb).all())


def rows_of(corpus: Corpus) -> list[dict]:
    return pa.concat_tables(corpus.passages()).to_pylist()


def query_rows(path: Path) -> list[dict]:
    return pq.read_table(path / "queries.parquet").to_pylist()


def rejects(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("form", ["files", "bytes", "struct", "base64", "data URLs"])
def test_every_form_gives_the_same_tables(tmp_path: Path, form: str) -> None:
    corpus = ingest(DataConfig(path=str(write_tables(tmp_path / "in", form)), images=IMAGES), tmp_path / "out")

    rows = rows_of(corpus)
    assert [(row["passage_id"], row["text"], colour_of(row["image"])) for row in rows] == [
        ("p1", "a red thing", "red"),
        ("p2", "only words", None),
        ("p3", "", "blue"),
    ]
    assert [row["position"] for row in rows] == [0, 1, 2]
    assert corpus.metadata_columns == ["year"]
    assert pq.read_schema(corpus.passage_files[0]).field("image").type == pa.binary()

    schema = pq.read_schema(corpus.path / "queries.parquet")
    assert schema == pa.schema(
        {
            "query_id": pa.string(),
            "text": pa.string(),
            "image": pa.binary(),
            "instructions": pa.list_(pa.string()),
            "task": pa.string(),
            "copies": pa.int64(),
        }
    )
    found = [{**row, "image": colour_of(row["image"])} for row in query_rows(corpus.path)]
    assert found == [
        {
            "query_id": "q1",
            "text": "",
            "image": "green",
            "instructions": ["Find it.", "Look for it."],
            "task": "a",
            "copies": 3,
        },
        {
            "query_id": "q2",
            "text": "words",
            "image": None,
            "instructions": ["Find words."],
            "task": None,
            "copies": 1,
        },
    ]
    assert corpus.qrels() == {"q2": {"p2": 1}, "q1": {"p3": 1}}
    counts = {"passages": 3, "passage_images": 2, "queries": 2, "query_images": 1, "qrels": 2, "rejected": 0}
    assert corpus.artifact.manifest.counts == counts
    assert not any(name.startswith(".") for name in (path.name for path in corpus.path.iterdir()) if name != ".lock")


def test_csv_with_paths_and_an_instruction(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "red.png").write_bytes(png("red"))
    (folder / "passages.csv").write_text("id,text,img\na,,red.png\nb,words,\n")
    (folder / "queries.csv").write_text("id,query,query_img_path,instruction,copies\nq,,red.png,Find it.,2\n")
    corpus = ingest(DataConfig(path=str(folder), images=IMAGES), tmp_path / "out")
    assert [(row["text"], colour_of(row["image"])) for row in rows_of(corpus)] == [("", "red"), ("words", None)]
    [query] = query_rows(corpus.path)
    assert (query["instructions"], query["copies"], colour_of(query["image"])) == (["Find it."], 2, "red")
    assert "task" not in query


def test_hugging_face_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"id": ["a", "b"], "text": ["", "words"], "image": [Image.new("RGB", (48, 24), "blue"), None]}
    features = datasets.Features({"id": datasets.Value("string"), "text": datasets.Value("string")})
    features["image"] = datasets.Image()
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "in")
    corpus = ingest(DataConfig(path=str(tmp_path / "in"), images=IMAGES), tmp_path / "out")
    assert [colour_of(row["image"]) for row in rows_of(corpus)] == ["blue", None]


def test_columns_with_other_names(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    rows = {"id": ["a", "b"], "photo": [png("red"), None], "text": ["", "words"], "image": ["x", "y"]}
    pq.write_table(pa.table(rows), folder / "passages.parquet")
    config = {"path": str(folder), "images": IMAGES}
    with pytest.raises(DataError, match="'image' has a name that raydr uses itself"):
        ingest(DataConfig(**config, columns=Columns(image="photo")), tmp_path / "out")
    corpus = ingest(DataConfig(**config, columns=Columns(image="photo"), metadata="none"), tmp_path / "out")
    assert [colour_of(row["image"]) for row in rows_of(corpus)] == ["red", None]
    with pytest.raises(DataError, match=r"has no column for the image \(tried foto\)"):
        ingest(DataConfig(**config, columns=Columns(image="foto")), tmp_path / "out2")


def test_a_table_with_neither_text_nor_picture_is_told_so(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "colour": ["red"]}), tmp_path / "passages.parquet")
    with pytest.raises(DataError, match="has no column for the text"):
        ingest(DataConfig(path=str(tmp_path), images=IMAGES), tmp_path / "out")


def test_config_refuses_what_cannot_work() -> None:
    for values, message in [
        ({"columns": {"image": "photo"}}, r"need data\.images"),
        ({"columns": {"query_image": "photo"}}, r"need data\.images"),
        ({"images": {}, "metadata": ["image"]}, "column name of raydr"),
        ({"images": {"size": 4}}, "greater than or equal to 8"),
        ({"images": {"max_pixels": 10**9}}, "89478485"),
    ]:
        with pytest.raises(ConfigError, match=message):
            validate(DataConfig, {"path": "x", **values}, where="test")


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A corpus of files, with what lies beside and outside of its folder."""
    folder = tmp_path / "shop"
    (folder / "img").mkdir(parents=True)
    (folder / "img" / "good.png").write_bytes(png("red"))
    (folder / "img" / "cut.png").write_bytes(png("red", (300, 300))[:-200])
    (folder / "img" / "words.txt").write_text("no picture")
    (folder / "img" / "empty.png").write_bytes(b"")
    (tmp_path / "secret.png").write_bytes(png("blue"))
    (folder / "img" / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "img" / "inside.png").symlink_to(folder / "img" / "good.png")
    (folder / "up").symlink_to(tmp_path)
    os.mkfifo(folder / "img" / "pipe.png")
    return folder


BAD_IMAGES = {
    "no such file": ("img/none.png", "picture names no file: img/none.png"),
    "a folder": ("img", "picture names no file: img"),
    "a pipe": ("img/pipe.png", "picture names no file: img/pipe.png"),
    "up and out": ("../secret.png", "picture leads out of the source's folder: ../secret.png"),
    "down, up and out": ("img/../../secret.png", "leads out of the source's folder"),
    "absolute": ("/etc/passwd", "leads out of the source's folder: /etc/passwd"),
    "home": ("~/x.png", "leads out of the source's folder"),
    "NUL": ("img/good.png\0", "leads out of the source's folder"),
    "a link": ("img/link.png", "leads out of the source's folder: img/link.png: by a symbolic link, to /"),
    "a folder's link": ("up/secret.png", "leads out of the source's folder"),
    "damaged": ("img/cut.png", "picture is damaged: img/cut.png: "),
    "text": ("img/words.txt", "picture is not a picture that can be read: img/words.txt"),
    "empty": ("img/empty.png", "picture is empty: img/empty.png"),
    "URL": ("https://example.org/a.png", "is a URL, and pictures are not fetched: https://example.org/a.png"),
    "file URL": ("file:///etc/passwd", "is a URL"),
    "data URL of text": ("data:text/html;base64,aGVsbG8gd29ybGQgaGVsbG8=", "neither base64 nor a data:image"),
    "cut base64": (base64.b64encode(png("red")).decode()[:-60], "picture is damaged"),
    "long text": ("x" * 5000, "is neither a path nor the base64 of a picture"),
    "number": (5, "must be a path, bytes or base64: got int"),
    "list": (["img/good.png"], "must be a path, bytes or base64: got list"),
}


@pytest.mark.parametrize("bad", BAD_IMAGES)
def test_bad_picture(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture, bad: str) -> None:
    value, reason = BAD_IMAGES[bad]
    rows = [{"_id": id_, "text": "", "img": path} for id_, path in [("a", "img/good.png"), ("b", value)]]
    (shop / "corpus.jsonl").write_text(json_lines([*rows, {"_id": "z", "img": "img/inside.png"}]))

    with pytest.raises(DataError) as caught:
        ingest(DataConfig(path=str(shop), images=IMAGES), tmp_path / "out")
    assert "corpus.jsonl, line 2, field 'img': " in str(caught.value)
    assert reason in str(caught.value)

    corpus = ingest(DataConfig(path=str(shop), images=IMAGES, on_error="skip"), tmp_path / "out")
    assert [(row["passage_id"], colour_of(row["image"])) for row in rows_of(corpus)] == [("a", "red"), ("z", "red")]
    [reject] = rejects(corpus.path)
    assert (reject["file"], reject["line"], reject["field"]) == ("corpus.jsonl", 2, "img")
    assert reason in reject["reason"]
    assert reject["raw"].startswith('{"_id": "b"')
    assert corpus.artifact.manifest.counts["rejected"] == 1
    assert sum(corpus.artifact.manifest.details["rejected"].values()) == 1
    assert "records left out: 1 (" in capsys.readouterr().err


def test_too_large_a_picture_is_not_read(shop: Path, tmp_path: Path) -> None:
    with (shop / "img" / "huge.png").open("wb") as stream:
        stream.truncate(1 << 40)  # a terabyte of nothing
    (shop / "corpus.jsonl").write_text(json_lines([{"_id": "a", "img": "img/huge.png"}]))
    with pytest.raises(DataError, match=r"too many bytes: img/huge.png: 1,099,511,627,776, and 20,971,520 are allowed"):
        ingest(DataConfig(path=str(shop), images=IMAGES), tmp_path / "out")


def test_what_follows_from_a_bad_picture(shop: Path, tmp_path: Path) -> None:
    """A judgement of a passage or query that was left out is left out as well, and an id is not free again."""
    passages = [
        {"_id": "a", "img": "img/cut.png"},
        {"_id": "a", "img": "img/good.png"},
        {"_id": "b", "img": "img/good.png"},
    ]
    queries = [{"_id": "q1", "image": "img/cut.png"}, {"_id": "q2", "image": "img/good.png"}]
    (shop / "corpus.jsonl").write_text(json_lines(passages))
    (shop / "queries.jsonl").write_text(json_lines(queries))
    (shop / "qrels").mkdir()
    (shop / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tb\t1\nq2\ta\t1\nq2\tb\t1\n")
    config = DataConfig(path=str(shop), images=IMAGES, on_error="skip")
    corpus = ingest(config, tmp_path / "out")
    assert [row["passage_id"] for row in rows_of(corpus)] == ["b"]
    assert [row["query_id"] for row in query_rows(corpus.path)] == ["q2"]
    assert corpus.qrels() == {"q2": {"b": 1}}
    told = [(one["file"], one["line"], one["reason"].partition(":")[0]) for one in rejects(corpus.path)]
    assert [*sorted(told[:2]), *told[2:]] == [  # which of the first two comes first depends on the threads
        ("corpus.jsonl", 1, "picture is damaged"),
        ("corpus.jsonl", 2, "duplicate id"),
        ("qrels/test.tsv", 3, "names an unknown passage"),
        ("queries.jsonl", 1, "picture is damaged"),
        ("qrels/test.tsv", None, "names a query whose picture is bad"),
    ]
    again = ingest_queries(config, corpus, tmp_path / "queries")
    assert (query_rows(again.path), again.qrels()) == (query_rows(corpus.path), corpus.qrels())

    (shop / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tb\t1\n")
    with pytest.raises(DataError, match="no judgement can be used"):
        ingest(config, tmp_path / "out")


def test_bad_instructions_and_copies(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(json_lines([{"_id": "a", "text": "x"}]))
    bad = [
        ({"instruction": 5}, "'instruction': must be a text or a list of texts: got int"),
        ({"instruction": ["a", " "]}, "'instruction': must be a text or a list of texts"),
        ({"task": 5}, "'task': must be a string"),
        ({"copies": 0}, "'copies': must be at least 1: got 0"),
        ({"copies": 1.5}, "'copies': must be a whole number"),
        ({"text": None}, "'text': must be a string: got null"),
        ({"text": " "}, "'text': is empty"),
    ]
    for fields, message in bad:
        (tmp_path / "queries.jsonl").write_text(json_lines([{"_id": "q", "text": "x", **fields}]))
        with pytest.raises(DataError) as caught:
            ingest(DataConfig(path=str(tmp_path), images=IMAGES), tmp_path / "out")
        assert message in str(caught.value)


def test_parts_before_the_first_picture_get_the_column(tmp_path: Path) -> None:
    rows = [{"_id": str(n), "text": "words"} for n in range(1500)] + [{"_id": "last", "img": "red.png"}]
    (tmp_path / "corpus.jsonl").write_text(json_lines(rows))
    (tmp_path / "red.png").write_bytes(png("red"))
    corpus = ingest(DataConfig(path=str(tmp_path), images=IMAGES), tmp_path / "out")
    assert len({table.schema for table in corpus.passages()}) == 1
    assert [colour_of(row["image"]) for row in rows_of(corpus)] == [None] * 1500 + ["red"]
    open_artifact(corpus.path).verify()


def test_passages_of_a_document_keep_its_picture(tmp_path: Path) -> None:
    rows = [
        {"_id": "a", "text": "one two three four five six seven eight", "img": "red.png"},
        {"_id": "b", "text": "x"},
    ]
    (tmp_path / "corpus.jsonl").write_text(json_lines([*rows, {"_id": "c", "img": "red.png"}]))
    (tmp_path / "red.png").write_bytes(png("red"))
    split = SplitDocuments(max_tokens=4, overlap_tokens=0)
    corpus = ingest(DataConfig(path=str(tmp_path), images=IMAGES, split_documents=split), tmp_path / "out")
    found = [(row["passage_id"], colour_of(row["image"])) for row in rows_of(corpus)]
    assert found == [("a#0", "red"), ("a#1", "red"), ("b#0", None), ("c#0", "red")]


def digest(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_texts_alone_stay_as_they_are(tiny_beir: Path, tmp_path: Path) -> None:
    """Artifacts made before pictures were known stay current: same settings, same columns, same files."""
    corpus = ingest(DataConfig(path=str(tiny_beir)), tmp_path / "out")
    assert set(corpus.artifact.manifest.config["data"]) == {
        "path", "format", "split", "passages", "queries", "qrels", "columns", "metadata", "metadata_types", "on_error",
        "on_empty", "split_documents",
    }  # fmt: skip
    assert set(corpus.artifact.manifest.config["data"]["columns"]) == {
        "passage_id", "title", "text", "query_id", "query_text", "relevance",
    }  # fmt: skip
    assert corpus.artifact.manifest.counts == {"passages": 10, "queries": 3, "qrels": 4, "rejected": 0}
    assert pq.read_schema(corpus.path / "queries.parquet").names == ["query_id", "text"]
    with_setting = ingest(DataConfig(path=str(tiny_beir), images=IMAGES), tmp_path / "out2")
    own, other = digest(corpus.path), digest(with_setting.path)
    del own["manifest.json"], other["manifest.json"]
    assert own == other, "a source without pictures is the same with data.images"


def test_a_field_called_image_is_metadata_where_no_pictures_are_read(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(
        json_lines([{"_id": "a", "text": "x", "image": "https://example.org/a.png"}])
    )
    corpus = ingest(DataConfig(path=str(tmp_path)), tmp_path / "out")
    assert corpus.metadata_columns == ["image"]
    assert rows_of(corpus)[0]["image"] == "https://example.org/a.png"


def test_pictures_are_prepared_once_in_order_and_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    reader = ImageReader.of(IMAGES, None)
    together, first_may_end, calls = threading.Barrier(2, timeout=10), threading.Event(), []
    given = 0

    class Slow(ImageReader):
        def prepare(self, image: bytes | str) -> bytes:
            calls.append(image)
            if image in (b"0", b"1"):
                together.wait()  # two threads work at the same time
            if image == b"0":
                first_may_end.wait(10)
            return b"prepared " + (image if isinstance(image, bytes) else image.encode())

    def pending() -> Iterator[Pending]:
        nonlocal given
        for number in range(100):
            given += 1
            if given == pictures._WAITING_PER_THREAD * 2 + 1:  # no more are asked for before the first is done
                first_may_end.set()
            image = None if number == 50 else str(number).encode()
            yield Pending([number], image, Origin("f", number, "image", ""))

    slow = Slow(reader.config, None, "")
    for done, one in enumerate(prepare_here(pending(), slow, tmp_path)):
        assert one.row == [done]
        assert one.image == (None if done == 50 else f"prepared {done}".encode())
        assert given - done <= pictures._WAITING_PER_THREAD * 2 + 1
    assert given == 100
    assert sorted(calls) == sorted(str(number).encode() for number in range(100) if number != 50)


def test_a_reader_stays_inside_on_any_filesystem(shop: Path, tmp_path: Path) -> None:
    for uri in (str(shop), shop.as_uri(), f"local://{shop}"):
        reader = ImageReader.of(IMAGES, Folder.open(uri))
        assert colour_of(reader.prepare("img/good.png")) == "red"
        for path in ("img/link.png", "../secret.png", "up/secret.png"):
            with pytest.raises(pictures.ImageError, match="leads out"):
                reader.prepare(path)
    one_file = ImageReader.of(IMAGES, Folder.open(str(shop / "img" / "good.png")))
    assert colour_of(one_file.prepare("good.png")) == "red"
    with pytest.raises(pictures.ImageError, match="this source has no folder"):
        ImageReader.of(IMAGES, None).prepare("img/good.png")
