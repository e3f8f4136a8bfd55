"""Metadata columns: the further fields of a corpus, each with one type for the whole corpus.

Notable: the types are found while streaming. A column has the type that is declared for it, otherwise that of its
first value; whole numbers become float64 when a fraction turns up, nulls fit everywhere, and any other change of type
is an error that says how to declare one. A list of strings stays a list; other lists and objects become JSON text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from datetime import date, time
from decimal import Decimal
from typing import Any, Literal

import pyarrow as pa

from raydr.data.config import MetadataType
from raydr.data.problems import BadFieldError
from raydr.data.records import Record
from raydr.errors import DataError
from raydr.types import RESERVED_COLUMNS

ARROW_TYPES: Mapping[MetadataType, pa.DataType] = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "list<string>": pa.list_(pa.string()),
    "json": pa.string(),
}
_EXACT_IN_FLOAT = 2**53
_INT64 = range(-(2**63), 2**63)


class MetadataColumns:
    """The metadata columns of one corpus and their types so far."""

    def __init__(
        self,
        selection: Literal["all", "none"] | Collection[str],
        declared: Mapping[str, MetadataType],
        reserved: Collection[str] = RESERVED_COLUMNS,
    ) -> None:
        self._selection = selection
        self._reserved = reserved
        self._declared = declared
        self._types: dict[str, MetadataType | None] = {}

    @property
    def types(self) -> dict[str, MetadataType]:
        """Name -> type, in the order of first appearance; a column of nothing but nulls counts as string."""
        return {name: kind or "string" for name, kind in self._types.items()}

    def convert(self, record: Record, own: Collection[str]) -> Record:
        """The metadata of a record; `own` names the fields that are not metadata (id, title, text).

        Raises `BadFieldError` for a value its column cannot hold, `DataError` for a name that raydr reserves.
        """
        if self._selection == "none":
            return {}
        found: Record = {}
        types = dict(self._types)
        for name, value in record.items():
            if name in own or not (self._selection == "all" or name in self._selection):
                continue
            if name not in types:
                types[name] = self._new_column(name)
            if value is None:
                continue
            types[name] = kind = self._declared.get(name) or _widened(name, types[name], value)
            found[name] = _cast(name, value, kind)
        self._types = types  # only now: a rejected record leaves no trace
        return found

    def check_all_found(self, source: str) -> None:
        """Raises `DataError` when a column was asked for that no record has."""
        wanted = self._declared if isinstance(self._selection, str) else self._selection
        missing = sorted(set(wanted) - set(self._types))
        if missing:
            known = ", ".join(sorted(self._types)) or "none"
            raise DataError(f"{source}: data.metadata names {missing}, which no record has; carried are: {known}")

    def _new_column(self, name: str) -> MetadataType | None:
        if name in self._reserved:
            raise DataError(
                f"field {name!r} has a name that raydr uses itself, so it cannot be carried as metadata; "
                "list the fields to carry (data.metadata=[...]) or carry none (data.metadata=none)"
            )
        return self._declared.get(name)


def _widened(name: str, kind: MetadataType | None, value: Any) -> MetadataType:
    """The type of an undeclared column that held `kind` once it also holds `value`."""
    own = _type_of(name, value)
    if kind is None or kind == own or (kind, own) == ("int64", "float64"):
        return own
    if (kind, own) in {("float64", "int64"), ("json", "list<string>")}:
        return kind
    detail = f"{_short(value)} is {own}, earlier records hold {kind}; declare it: data.metadata_types.{name}=string"
    raise BadFieldError(name, "has another type than before", detail)


def _type_of(name: str, value: Any) -> MetadataType:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64"
    if isinstance(value, float):
        return "float64"
    if isinstance(value, str | date | time | Decimal):
        return "string"
    if isinstance(value, list):
        return "list<string>" if all(isinstance(item, str) for item in value) else "json"
    if isinstance(value, dict):
        return "json"
    raise BadFieldError(name, "cannot be carried as metadata", f"a {type(value).__name__}; leave the field out")


def _cast(name: str, value: Any, kind: MetadataType) -> Any:
    """`value` as `kind`; only conversions that lose nothing are made."""
    try:
        return _CASTS[kind](value)
    except (TypeError, ValueError, OverflowError, KeyError) as error:
        raise BadFieldError(name, "does not fit its column", f"{_short(value)} is not a {kind}") from error


def _as_string(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        raise TypeError("bytes are not text")
    if isinstance(value, bool | list | dict):
        return _as_json(value)
    return value.isoformat() if isinstance(value, date | time) else str(value)


def _as_int64(value: Any) -> int | None:
    if isinstance(value, str):
        return _as_int64(int(value)) if value.strip() else None
    number = int(value)
    if isinstance(value, bool) or number != value or number not in _INT64:
        raise ValueError(value)
    return number


def _as_float64(value: Any) -> float | None:
    if isinstance(value, str):
        number = float(value) if value.strip() else None
        if number is not None and not math.isfinite(number):
            raise ValueError(value)
        return number
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) > _EXACT_IN_FLOAT):
        raise ValueError(value)
    return float(value)


def _as_bool(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return {"": None, "true": True, "false": False, "1": True, "0": False}[value.strip().lower()]
    raise ValueError(value)


def _as_strings(value: Any) -> list[str]:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ValueError(value)


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


_CASTS: Mapping[MetadataType, Callable[[Any], Any]] = {
    "string": _as_string,
    "int64": _as_int64,
    "float64": _as_float64,
    "bool": _as_bool,
    "list<string>": _as_strings,
    "json": _as_json,
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
