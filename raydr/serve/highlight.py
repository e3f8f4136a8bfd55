"""Where the words of a query occur in a passage: character offsets for a reader's eye, not a ranking signal.

Notable: words are compared without case and by a light stem (plural and verb endings cut), so that `joining` lights up
`join`; function words light up nothing unless the query has no others. Offsets count Unicode characters.

    >>> highlight("joining frames", title="Join", text="How to join two data frames.").text
    [(7, 11), (21, 27)]
"""

from __future__ import annotations

import re
from bisect import bisect_left

from raydr.serve.answers import Highlights, Span

SNIPPET_CHARS = 240

_WORD = re.compile(r"\w+")
_ENDINGS = ("ations", "ation", "ings", "ing", "ies", "ers", "es", "ed", "er", "ly", "s", "e", "y")
_FUNCTION_WORDS = frozenset(
    "a an and are as at be by can do does for from how i in into is it its of on or that the this to was what when "  # noqa: SIM905
    "where which who why will with you".split()
)


def stem(word: str) -> str:
    """`word` in lower case without a common English ending, at least three letters of it kept."""
    word = word.casefold()
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    # joined -> join, but running -> runn -> run
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "aeioulsz" else word


def query_stems(query: str) -> frozenset[str]:
    """The stems of a query's words, function words left out where others remain."""
    words = [match.group() for match in _WORD.finditer(query.replace("_", " "))]
    telling = [word for word in words if word.casefold() not in _FUNCTION_WORDS]
    return frozenset(stem(word) for word in telling or words)


def spans(text: str, stems: frozenset[str]) -> list[Span]:
    """Every word of `text` with one of the stems. `snake_case` names count as their parts."""
    found = []
    for match in re.finditer(r"[^\W_]+", text):
        if stem(match.group()) in stems:
            found.append(match.span())
    return found


def snippet(text: str, found: list[Span], length: int = SNIPPET_CHARS) -> Span:
    """The stretch of about `length` characters with the most matches (the first of equals), cut between words."""
    if len(text) <= length:
        return (0, len(text))
    starts = [start for start, _ in found]
    best_start, best_count = 0, 0
    for position, start in enumerate(starts):
        count = bisect_left(starts, start + length) - position
        if count > best_count:
            best_start, best_count = start, count
    # Some text before the first match reads better than starting on it.
    start = max(0, min(best_start - length // 6, len(text) - length))
    if start > 0 and (space := text.find(" ", start, best_start + 1)) >= 0:
        start = space + 1
    end = min(len(text), start + length)
    if end < len(text) and (space := text.rfind(" ", start + length // 2, end)) >= 0:
        end = space
    return (start, end)


def highlight(query: str, *, title: str, text: str) -> Highlights:
    """Offsets of the query's words in `title` and `text`, and the best snippet of `text`."""
    stems = query_stems(query)
    in_text = spans(text, stems)
    return Highlights(title=spans(title, stems), text=in_text, snippet=snippet(text, in_text))
