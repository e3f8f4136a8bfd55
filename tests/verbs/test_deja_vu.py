"""`raydr deja-vu`: files in, table and page out; safe whatever the articles hold; mistakes told in words."""

from __future__ import annotations

import csv
import html
import json
import re

import pytest

from raydr.cli import main
from tests.taggers import gazetteer_tagger

OLD = [
    ("Fire", "1860-08-23", "Herald", "Poole", "A great fire in London destroyed the mill of John Smith last night"),
    ("Fire", "1860-08-25", "Times", "Bath", "A great fire in London destrcyed the mill of John Smith last nigbt"),
    ("Vote", "1901", "Herald", "Poole", "Parliament rejected the tax on bread after a long and bitter debate"),
    (
        "=1+1",
        "1902-01-02",
        "Times",
        "Bath",
        "<script>alert(1)</script> The harvest of wheat was good & plenty, says Mary",
    ),
    ("Undated", "", "", "", "The ship sank in a storm with all hands and its cargo of wool"),
]
TODAY = [
    ("Paris mill burns", "2024-05-06", "A huge fire in Paris ruined the factory of Anna Clark at night"),
    ("Lawmakers say no", "2024-05-07", "Congress refused a new levy on food after long debate"),
]


@pytest.fixture
def files(tmp_path):
    with (tmp_path / "old.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([("headline", "date", "newspaper", "city", "ocr_text"), *OLD])
    rows = [{"title": title, "date": date, "text": text} for title, date, text in TODAY]
    (tmp_path / "today.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / "old.csv"), str(tmp_path / "today.jsonl"), "--column", "text=ocr_text", "--runtime", "local"]


@pytest.fixture(scope="module")
def tagger(tmp_path_factory) -> str:
    return str(gazetteer_tagger(tmp_path_factory.mktemp("tagger"), max_positions=256))


def table(out):
    with (out / "deja_vu.csv").open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def test_files_in_table_and_page_out(files, tagger, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["deja-vu", *files, "--tagger", tagger, "--out", str(out)]
    assert main([*arguments, "-k", "4"]) == 0
    assert str(out / "deja_vu.html") in capsys.readouterr().out
    rows = table(out)
    assert [row["title"] for row in rows if row["rank"] == "1"] == ["Fire", "Vote"]
    assert len(rows) == 8, "one of the five is a reprint"
    first = rows[0]
    assert first["copies"] == "2" and first["query_masked_names"] == "Paris; Anna Clark"
    assert "destroyed" in first["text"] and first["masked_names"] == "London; John Smith"
    assert [float(row["similarity"]) for row in rows[:4]] == sorted(float(r["similarity"]) for r in rows[:4])[::-1]
    assert {row["title"] for row in rows} == {"Fire", "Vote", "'=1+1", "Undated"}
    page = (out / "deja_vu.html").read_text()
    assert '<mark title="place">Paris</mark>' in page and '<mark title="person">John Smith</mark>' in page
    assert "<script" not in page and "&lt;script&gt;" in page and "default-src 'none'" in page
    assert not re.search(r"(?:src|href)=", page)
    assert "1 reprint left out" in page
    assert html.unescape(page).count("A great fire in London") == 0, "the name is marked inside"
    # Another question to the same articles embeds nothing again.
    made = (out / "embed/manifest.json").stat().st_mtime_ns
    assert main([*arguments, "-k", "1", "--from-year", "1900", "--to-year", "1950", "--publication", "Times"]) == 0
    assert (out / "embed/manifest.json").stat().st_mtime_ns == made
    assert [row["title"] for row in table(out)] == ["'=1+1", "'=1+1"]
    assert "only the years 1900 to 1950" in (out / "deja_vu.html").read_text()


def test_reprints_are_kept_when_asked_for(files, tmp_path):
    out = tmp_path / "out"
    assert main(["deja-vu", *files, "--no-masking", "--reprints", "--out", str(out), "-k", "5"]) == 0
    rows = table(out)
    assert [row["title"] for row in rows[:2]] == ["Fire", "Fire"] and len(rows) == 10
    assert "<mark title" not in (out / "deja_vu.html").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["there is no tagger yet", "--train-tagger MARKED.jsonl", "--tagger dell-research-harvard"]),
        (["--tagger", "minilm"], ["is no token classifier"]),
        (["--no-masking", "--place", "Pool"], ["no article has the place 'Pool'", "nearest: 'Poole'"]),
        (["--no-masking", "--from-year", "1950"], ["no article is of the years", "they are of 1860 to 1902"]),
        (["--no-masking", "--from-year", "9", "--to-year", "8"], ["from_year (9) is after to_year (8)"]),
        (["--no-masking", "--column", "date=day"], ["old.csv: has no column 'day' for the date"]),
        (["--tagger", "a", "--train-tagger", "b"], ["name a tagger, or train one"]),
    ],
)
def test_mistakes_are_told_in_words(files, tmp_path, capsys, options, words):
    assert main(["deja-vu", *files, "--out", str(tmp_path / "out"), *options]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert "Traceback" not in message and "(got {" not in message


def test_articles_without_a_word_are_an_archive_as_well(files, tmp_path):
    (tmp_path / "old.csv").write_text("ocr_text\n.\nx\n")
    assert main(["deja-vu", *files, "--out", str(tmp_path / "out"), "--no-masking"]) == 0
    assert {row["text"] for row in table(tmp_path / "out")} == {".", "x"}
