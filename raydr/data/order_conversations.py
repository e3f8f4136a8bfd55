"""RankZephyr's training records, which FIRST's are too: a conversation whose answer is a teacher's order of passages.

Notable: a conversation shows passages as `[A] text` (or `[1] text`), each from the start of a line, the query behind
them on a line `Search Query: ...`, and answers `[B] > [A]`; nothing else of its wording counts. What raydr writes has
the passages in the order of their texts' hashes, so that a passage's place says nothing of its rank.

    read_rank_zephyr({"conversations": [{"from": "system", "value": "..."}, ...]}, lookup).candidates   # best first
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from raydr.data.problems import BadFieldError
from raydr.data.records import Record
from raydr.data.training_example import TrainingExample, TrainingPassage, content_id
from raydr.data.training_readers import Lookup, identifier, unread
from raydr.data.training_writers import Written

_FIELD = "conversations"
_IDENTIFIER = r"\[([A-Z]|\d{1,3})\]"
_QUERY = "\nSearch Query: "


def read_rank_zephyr(record: Record, lookup: Lookup) -> TrainingExample:
    """A teacher's order of the passages of a conversation, best first."""
    del lookup
    turns = record.get(_FIELD)
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns):
        raise BadFieldError(_FIELD, "must be a list of turns, the last two the user's and the answer", f"got {turns!r}")
    user, answer = (_said(turns, place) for place in (len(turns) - 2, len(turns) - 1))
    asked, place = f"{_FIELD}[{len(turns) - 2}].value", f"{_FIELD}[{len(turns) - 1}].value"
    shown, found, closing = user.rpartition(_QUERY)
    if not found:
        raise BadFieldError(asked, "has no line 'Search Query: ...' behind the passages")
    _, *parts = re.split(rf"^{_IDENTIFIER} ", shown, flags=re.MULTILINE)
    names, texts = parts[::2], [text.strip() for text in parts[1::2]]
    if not names or names != _identifiers(len(names), letters=names[0] == "A"):
        raise BadFieldError(asked, "must show passages as [A], [B], ... or [1], [2], ...", f"got {names}")
    if "" in texts:
        raise BadFieldError(asked, f"has no text for passage {names[texts.index('')]}")
    order = re.findall(_IDENTIFIER, answer)
    if sorted(order) != sorted(names):
        raise BadFieldError(place, f"must name each of the {len(names)} passages once", f"got {answer!r}")
    text_of = dict(zip(names, texts, strict=True))
    return TrainingExample(
        query=closing.partition("\n")[0].strip().removesuffix("."),
        query_id=identifier(record, "query_id") if record.get("query_id") is not None else None,
        candidates=tuple(TrainingPassage(text_of[name]) for name in order),
        unread=unread(record, {_FIELD, "query_id", "id"}),  # theirs numbers the conversations
    )


def write_rank_zephyr(example: TrainingExample) -> Written:
    """One conversation, with letters up to 26 passages and numbers beyond; texts on one line each."""
    texts = [" ".join(passage.full_text.split()) for passage in example.candidates or example.labelled]
    shown = sorted(range(len(texts)), key=lambda place: content_id(texts[place]))
    names = dict(zip(shown, _identifiers(len(texts), letters=len(texts) <= len(string.ascii_uppercase)), strict=True))
    query = " ".join(example.query.split())
    kind = "letter" if "A" in names.values() else "number"
    lines = [f"{len(texts)} passages follow, each marked by a {kind} in square brackets. The query is: {query}.", ""]
    lines += [f"[{names[place]}] {texts[place]}" for place in shown]
    lines += ["", f"Search Query: {query}."]
    lines += [f"Order all {len(texts)} passages by their relevance to it, the most relevant first, as [] > []."]
    turns = {
        "system": "You judge how relevant passages are to a query.",
        "human": "\n".join(lines),
        "gpt": " > ".join(f"[{names[place]}]" for place in range(len(texts))),
    }
    record = {_FIELD: [{"from": who, "value": value} for who, value in turns.items()]}
    return [record | ({"query_id": example.query_id} if example.query_id is not None else {})], set()


def _identifiers(num: int, *, letters: bool) -> Sequence[str]:
    return list(string.ascii_uppercase[:num]) if letters else [str(number) for number in range(1, num + 1)]


def _said(turns: list[Record], place: int) -> str:
    said = turns[place].get("value", turns[place].get("content"))
    if not isinstance(said, str):
        raise BadFieldError(f"{_FIELD}[{place}].value", "must be a string", f"got {said!r}")
    return said
