"""Highlights: offsets a reader can slice by, and the best stretch of a long text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydr.serve.highlight import SNIPPET_CHARS, highlight


def _marked(text: str, found: list[tuple[int, int]]) -> list[str]:
    return [text[start:end] for start, end in found]


@pytest.mark.parametrize(
    ("query", "text", "words"),
    [
        ("joining frames", "How to join two data frames.", ["join", "frames"]),
        ("JOIN", "join Join joins", ["join", "Join", "joins"]),
        ("read a csv file", "pandas.read_csv(path): a file of values", ["read", "csv", "file"]),
        ("queries", "one query, many queries", ["query", "queries"]),
        ("running", "run and runs", ["run", "runs"]),
        ("über straße", "Über die Straße", ["Über", "Straße"]),
        ("データ", "データ と cat", ["データ"]),
        ("to be", "to be or not", ["to", "be"]),  # only function words: better them than nothing
        ("how to be a cat", "to be a cat", ["cat"]),
        ("moon", "moonlight", []),
        ("a😀b", "x😀 b", ["b"]),
        ("", "anything", []),
    ],
)
def test_words_of_the_query_are_found(query, text, words):
    assert _marked(text, highlight(query, title="", text=text).text) == words


def test_offsets_count_characters_also_behind_emoji():
    text = "😀😀 cat"
    assert highlight("cat", title="", text=text).text == [(3, 6)]


def test_title_and_text_are_marked_apart():
    found = highlight("cat", title="The cat", text="no dog")
    assert found.title == [(4, 7)]
    assert found.text == []
    assert found.snippet == (0, 6)


def test_the_snippet_is_where_most_matches_are():
    text = "cat " + "filler " * 200 + "cat and cat and a third cat " + "filler " * 200
    start, end = highlight("cat", title="", text=text).snippet
    assert text[start:end].count("cat") == 3
    assert end - start <= SNIPPET_CHARS
    assert text[start - 1] == " "
    assert text[end] == " "


def test_without_a_match_the_snippet_is_the_beginning():
    text = "word " * 200
    start, end = highlight("nothing", title="", text=text).snippet
    assert start == 0
    assert 0 < end <= SNIPPET_CHARS


@given(st.text(max_size=80), st.text(max_size=900))
def test_spans_are_ascending_disjoint_and_inside(query, text):
    found = highlight(query, title=text, text=text)
    assert found.title == found.text
    ends = 0
    for start, end in found.text:
        assert ends <= start < end <= len(text)
        ends = end
    start, end = found.snippet
    assert 0 <= start <= end <= len(text)
    assert end - start <= SNIPPET_CHARS
