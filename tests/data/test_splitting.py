"""Documents become passages that cover them completely, are exact pieces of them, and stay within the limit."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydr.data.config import DataConfig, SplitDocuments
from raydr.data.ingest import ingest
from raydr.data.splitting import DocumentSplitter, load_tokenizer, spans
from raydr.errors import ConfigError


def covered(pieces: list[str], document: str) -> bool:
    """Whether the pieces, each found at or before the end of the one before, make up the whole document."""
    end = 0
    for piece in pieces:
        begin = next((at for at in range(end, -1, -1) if document.startswith(piece, at)), None)
        if begin is None:
            return False
        end = max(end, begin + len(piece))
    return end == len(document)


@given(
    text=st.text(
        st.characters(exclude_categories=["Cs"]) | st.sampled_from("  \n\t.,äß日本😀👩‍👩‍👧abć\x00"), max_size=300
    ),
    max_tokens=st.integers(1, 12),
    overlap=st.integers(0, 11),
)
@settings(max_examples=60)
def test_nothing_is_lost(text: str, max_tokens: int, overlap: int) -> None:
    config = SplitDocuments(max_tokens=max_tokens, overlap_tokens=min(overlap, max_tokens - 1))
    [pieces] = DocumentSplitter(config).split([text])
    assert all(piece in text for piece in pieces)
    assert covered(pieces, text)
    if text.strip():
        assert all(pieces), "no passage is empty"


@given(
    words=st.lists(st.integers(1, 4), min_size=1, max_size=60),
    max_tokens=st.integers(4, 10),
    overlap=st.integers(0, 3),
)
def test_words_stay_whole_and_overlap_is_bounded(words: list[int], max_tokens: int, overlap: int) -> None:
    """Words of one to four tokens, one character each: the spans can be checked against the word borders."""
    word_ids = [word for word, length in enumerate(words) for _ in range(length)]
    num = len(word_ids)
    found = spans(range(num), word_ids, num, max_tokens=max_tokens, overlap_tokens=overlap)
    borders = {0, num} | {at for at in range(1, num) if word_ids[at] != word_ids[at - 1]}
    assert found[0][0] == 0
    assert found[-1][1] == num
    for begin, end in found:
        assert {begin, end} <= borders
        assert 0 < end - begin <= max_tokens
    for (_, end), (begin, _) in pairwise(found):
        assert 0 <= end - begin <= overlap


def test_hand_worked() -> None:
    found = spans(range(0, 20, 2), range(10), 20, max_tokens=4, overlap_tokens=1)
    assert found == [(0, 8), (6, 14), (12, 20)]


def test_word_longer_than_a_passage_is_torn() -> None:
    assert spans(range(6), [0] * 6, 6, max_tokens=4, overlap_tokens=1) == [(0, 4), (4, 6)]


def test_passages_keep_within_the_limit_when_tokenized_again() -> None:
    text = "The quick brown fox, unbelievably antidisestablishmentarian, jumps! " * 40
    config = SplitDocuments(max_tokens=32, overlap_tokens=8)
    [pieces] = DocumentSplitter(config).split([text])
    tokenizer = load_tokenizer("minilm")
    lengths = [len(tokenizer.encode(piece, add_special_tokens=False)) for piece in pieces]
    assert max(lengths) <= 32
    assert min(lengths[:-1]) > 20, "passages are about as long as they may be"


def test_unknown_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.split_documents\.tokenizer"):
        load_tokenizer(str(tmp_path))


def test_ids_titles_and_judgements_of_split_documents(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(
        '{"_id": "long", "title": "T", "text": "one two three four five six", "year": 1}\n'
        '{"_id": "short", "title": "", "text": "seven", "year": 2}\n'
        '{"_id": "a title alone", "title": "U", "text": "", "year": 3}\n'.replace("a title alone", "title")
    )
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "x"}\n')
    (tmp_path / "qrels.tsv").write_text("q 0 long 1\n")
    config = DataConfig(path=str(tmp_path), split_documents=SplitDocuments(max_tokens=3, overlap_tokens=1))
    corpus = ingest(config, tmp_path / "out")
    rows = pa.concat_tables(corpus.passages()).to_pylist()
    assert [(row["passage_id"], row["document_id"], row["title"], row["text"], row["year"]) for row in rows] == [
        ("long#0", "long", "T", "one two three ", 1),
        ("long#1", "long", "T", "three four five ", 1),
        ("long#2", "long", "T", "five six", 1),
        ("short#0", "short", "", "seven", 2),
        ("title#0", "title", "U", "", 3),
    ]
    assert [row["position"] for row in rows] == [0, 1, 2, 3, 4]
    assert corpus.is_split
    assert corpus.metadata_columns == ["year"]
    assert corpus.qrels() == {"q": {"long": 1}}
    assert corpus.artifact.manifest.counts["documents"] == 3


def test_whole_meetings(collection: Callable[[str], Path], tmp_path: Path) -> None:
    """The first twenty transcripts, 48,000 characters each on average."""
    with gzip.open(collection("qmsum") / "corpus.jsonl.gz", "rt", encoding="utf-8") as stream:
        lines = list(islice(stream, 20))
    (tmp_path / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")
    config = DataConfig(path=str(tmp_path), split_documents=SplitDocuments(max_tokens=250, overlap_tokens=30))
    corpus = ingest(config, tmp_path / "out")
    assert corpus.num_passages > 200
    pieces: dict[str, list[str]] = {}
    for row in pa.concat_tables(corpus.passages()).to_pylist():
        assert row["passage_id"] == f"{row['document_id']}#{len(pieces.get(row['document_id'], []))}"
        pieces.setdefault(row["document_id"], []).append(row["text"])
    documents = {row["_id"]: row["text"] for row in map(json.loads, lines)}
    assert pieces.keys() == documents.keys()
    for document_id, text in documents.items():
        assert covered(pieces[document_id], text)
