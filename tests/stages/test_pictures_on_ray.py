"""Pictures prepared on Ray: the same corpus as in one process, record by record, whatever is wrong with some."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from raydr.artifacts import open_artifact
from raydr.data.config import DataConfig
from raydr.data.files import Folder
from raydr.data.images import ImageConfig
from raydr.data.pictures import ImageReader, Origin, Pending, prepare_here
from raydr.errors import DataError
from raydr.stages.pictures_on_ray import preparation, prepare_on_ray
from raydr.verbs.config import RunConfig
from raydr.verbs.ingest import ingest


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 20 + shade % 7), (shade, 255 - shade, 0)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """300 passages, of which some are texts alone, some name a damaged picture or none; queries that are pictures."""
    folder = tmp_path / "in"
    (folder / "img").mkdir(parents=True)
    (folder / "qrels").mkdir()
    rows = []
    for number in range(300):
        row = {"_id": f"p{number}", "text": f"text {number}", "img": f"img/{number}.png", "n": number, "tags": ["a"]}
        if number % 50 == 7:
            (folder / "img" / f"{number}.png").write_bytes(png(number % 256)[:-40])
        elif number % 50 != 8 and number % 3:
            (folder / "img" / f"{number}.png").write_bytes(png(number % 256))
            row["text"] = None if number % 2 else row["text"]
        elif number % 50 != 8:
            row["img"] = None
        rows.append(json.dumps(row) + "\n")
    (folder / "corpus.jsonl").write_text("".join(rows))
    numbers = (1, 2, 7, 10, 11)
    queries = [{"_id": f"q{number}", "image": f"img/{number}.png", "task": "a"} for number in numbers]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    lines = [f"q{number}\tp{place}\t1\n" for place, number in enumerate(numbers)]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """All tables, and the records that were left out in the order of their lines: which is told first may differ."""
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.parquet")}
    return {**found, "rejects": b"\n".join(sorted((folder / "rejects.jsonl").read_bytes().splitlines()))}


@pytest.mark.ray
def test_the_corpus_is_that_of_one_process(ray_cluster: str, source: Path, tmp_path: Path) -> None:
    data = DataConfig(path=str(source), images=ImageConfig(size=16), on_error="skip")
    here = ingest(RunConfig(data=data, out=tmp_path / "here", runtime="local"))
    there = ingest(RunConfig(data=data, out=tmp_path / "there", runtime="ray"))
    assert files(here.path) == files(there.path)
    assert here.manifest.counts == there.manifest.counts
    assert here.manifest.counts["rejected"] == 14, "12 passages, a query, and its judgement"
    assert here.manifest.details == there.manifest.details
    assert here.fingerprint == there.fingerprint
    assert not (there.path / ".pictures").exists()
    open_artifact(there.path).verify()

    assert pq.read_table(there.path / "queries.parquet")["query_id"].to_pylist() == ["q1", "q2", "q10", "q11"]


@pytest.mark.ray
def test_a_node_that_does_not_see_the_pictures(ray_cluster: str, tmp_path: Path) -> None:
    """It must not look as if all pictures were missing."""
    reader = replace(ImageReader.of(ImageConfig(), Folder.open(str(tmp_path))), root="/nowhere/at/all")

    def pending() -> Iterator[Pending]:
        yield Pending(["a"], "a.png", Origin("corpus.jsonl", 1, "img", {}))

    with pytest.raises(DataError, match="a node of the Ray cluster does not see this folder"):
        list(prepare_on_ray(pending(), reader, tmp_path / "scratch"))


def test_it_is_used_where_the_verb_runs_on_ray() -> None:
    assert preparation("local") is prepare_here
    assert preparation("ray") is prepare_on_ray
