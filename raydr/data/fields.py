"""Which fields of a record hold the id, the title, the text and the grade, and whether they can be used.

Notable: ids are strings without whitespace or control characters, because TREC runs and qrels separate columns by
whitespace; a whole number is taken as the string it is written as. A name is looked up once per table: the configured
one, otherwise the first usual one that the table has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias

from raydr.data.config import Columns
from raydr.data.problems import BadFieldError
from raydr.data.records import Record, Records
from raydr.errors import DataError

Names: TypeAlias = Mapping[str, tuple[str, ...]]
"""Role (passage_id, title, text, relevance, ...) -> the names to try, in order."""

_PASSAGE_IDS = ("passage_id", "_id", "id", "doc_id", "docid", "pid")
_QUERY_IDS = ("query_id", "query-id", "_id", "id", "qid")
_BREAKS_TREC_FILES = re.compile(r"[\s\x00-\x1f\x7f]")
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")
_INT64 = range(-(2**63), 2**63)
_OPTIONAL = frozenset({"title", "instructions", "task", "copies", "excluded_ids"})
_PICTURES: Mapping[str, str] = {"text": "image", "query_text": "query_image"}
"""A text's role -> that of the picture which may stand in for it."""
_IMAGES = ("image", "img", "image_path", "img_path")
_QUERY_IMAGES = ("image", "query_image", "img", "image_path", "img_path", "query_img_path")


def passage_names(columns: Columns, *, beir: bool = False, images: bool = False) -> Names:
    pictures = {"image": _names(columns.image, _IMAGES)} if images else {}
    return pictures | {
        "passage_id": _names(columns.passage_id, ("_id",) if beir else _PASSAGE_IDS),
        "title": _names(columns.title, ("title",)),
        "text": _names(
            columns.text, ("text",) if beir else ("text", "contents", "content", "passage", "document_text", "body")
        ),
    }


def query_names(columns: Columns, *, beir: bool = False, images: bool = False) -> Names:
    further: dict[str, tuple[str, ...]] = {"excluded_ids": ("excluded_ids",)}
    if images:
        further |= {
            "query_image": _names(columns.query_image, _QUERY_IMAGES),
            "instructions": ("instructions", "instruction"),
            "task": ("task",),
            "copies": ("copies",),
        }
    return further | {
        "query_id": _names(columns.query_id, ("_id",) if beir else _QUERY_IDS),
        "query_text": _names(columns.query_text, ("text",) if beir else ("text", "query", "query_text", "question")),
    }


def qrels_names(columns: Columns) -> Names:
    """The names in a judgements table, where ids often have other names than in the tables they point to."""
    passage_ids = ("passage_id", "corpus-id", "corpus_id", "doc_id", "docid", "pid", "document_id")
    return {
        "query_id": (*_names(columns.query_id, ()), "query_id", "query-id", "qid"),
        "passage_id": (*_names(columns.passage_id, ()), *passage_ids),
        "relevance": _names(columns.relevance, ("relevance", "score", "label", "rel", "grade")),
    }


def _names(configured: str | None, usual: tuple[str, ...]) -> tuple[str, ...]:
    return (configured,) if configured else usual


class Fields:
    """The fields of one table by role. The getters raise `BadFieldError` naming the field."""

    def __init__(self, table: Records, names: Names) -> None:
        self._table = table
        self.table = table.name
        """What messages call the table."""
        self._names = names
        self._found: dict[str, str] = {}
        self.own: frozenset[str] = frozenset()
        """The fields that have a role; the others are metadata."""

    def locate(self, record: Record) -> None:
        """Looks up the names that are not known yet.

        Raises `DataError` when the table has fixed columns and none of them fits.
        """
        if len(self._found) == len(self._names):
            return
        for role, candidates in self._names.items():
            if role in self._found:
                continue
            if name := next((name for name in candidates if name in record), None):
                self._found[role] = name
                self.own |= {name}
            elif self._table.fixed_columns and not self._may_be_missing(role):
                raise DataError(
                    f"{self._table.name}: has no column for the {role} (tried {', '.join(candidates)}); "
                    f"it has {', '.join(record)}; name the right one: data.columns.{role}=NAME"
                )

    def identifier(self, record: Record, role: str) -> str:
        """The id: a non-empty string without whitespace."""
        field, value = self._get(record, role)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise BadFieldError(field, "must be a string", f"got {_kind(value)}")
        if not value:
            raise BadFieldError(field, "is empty")
        if _BREAKS_TREC_FILES.search(value):
            detail = f"{value!r}; ids in TREC runs and qrels end at a blank"
            raise BadFieldError(field, "has whitespace or control characters", detail)
        return value

    def string(self, record: Record, role: str, *, optional: bool = False) -> str:
        """The text of a role; what is optional, as the title is, may be missing or null and is then empty."""
        if (optional or role in _OPTIONAL) and self.value(record, role) is None:
            return ""
        field, value = self._get(record, role)
        if not isinstance(value, str):
            raise BadFieldError(field, "must be a string", f"got {_kind(value)}")
        return value

    def strings(self, record: Record, role: str) -> list[str]:
        """The texts of a role that is a string or a list of strings; none where it is missing, null or empty."""
        value = self.value(record, role)
        texts = [value] if isinstance(value, str) and value.strip() else value or []
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise BadFieldError(self.name(role), "must be a text or a list of texts", f"got {_kind(value)}")
        return texts

    def grade(self, record: Record) -> int:
        """The relevance: a whole number, negative ones included."""
        return _whole_number(*self._get(record, "relevance"))

    def count(self, record: Record, role: str) -> int | None:
        """A whole number from 1 on; None where it is missing, null or empty."""
        value = self.value(record, role)
        if value in (None, ""):
            return None
        number = _whole_number(self.name(role), value)
        if number < 1:
            raise BadFieldError(self.name(role), "must be at least 1", f"got {number}")
        return number

    def value(self, record: Record, role: str) -> object:
        """Whatever the record has in the field of a role; None where it has no such field."""
        return record.get(self._found.get(role, ""))

    def name(self, role: str) -> str:
        """What the field of a role is called here."""
        return self._found.get(role, self._names[role][0])

    def _may_be_missing(self, role: str) -> bool:
        """Whether a table may do without a column for it; a picture's column that the config names must be there."""
        if role in _PICTURES:
            return _PICTURES[role] in self._found
        return role in _OPTIONAL or (role in _PICTURES.values() and len(self._names[role]) > 1)

    def _get(self, record: Record, role: str) -> tuple[str, object]:
        field = self.name(role)
        if field not in record:
            raise BadFieldError(field, "is missing")
        return field, record[field]


def _whole_number(field: str, value: object) -> int:
    if isinstance(value, str) and _WHOLE_NUMBER.fullmatch(value.strip()):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value not in _INT64:
        raise BadFieldError(field, "must be a whole number", f"got {_kind(value)}")
    return value


def _kind(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
