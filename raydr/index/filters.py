"""The filter language: conditions on a corpus's metadata, the same in batch search and over HTTP.

Notable: a filter is plain JSON, checked before it runs (a caller's mistake names the field and the way out), bounded
in size, and evaluated by Arrow over memory-mapped columns, so nothing of it is ever executed. Conditions are joined by
"and"; a column that holds lists matches when any element does; a missing value matches only `null` and `not`.

    {"year": 2020, "topic": ["biology", "physics"], "price": {"gte": 10, "lt": 20}, "lang": {"not": "de"}}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from raydr.errors import DataError
from raydr.types import PASSAGE_ID, POSITION, TEXT

Filters: TypeAlias = Mapping[str, Any]
"""Column -> value, list of values, or operators."""

MAX_CONDITIONS = 32
MAX_VALUES = 1_000
MAX_IDS = 100_000
MAX_CHARACTERS = 1_000

_RANGES = {"gt": pc.greater, "gte": pc.greater_equal, "lt": pc.less, "lte": pc.less_equal}
_OPERATORS = (*_RANGES, "not")


class FilterError(DataError):
    """A filter that cannot be applied; `field` is the column it is about."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"filters.{field}: {message}")
        self.field = field


def filterable_columns(schema: pa.Schema) -> list[str]:
    """Names a filter may use: everything but the id (see `allow_ids`) and the text."""
    return [name for name in schema.names if name not in (PASSAGE_ID, TEXT, POSITION)]


def row_mask(
    table: pa.Table,
    filters: Filters | None = None,
    *,
    allow_ids: Collection[str] | None = None,
    exclude_ids: Collection[str] = (),
) -> Bool[np.ndarray, " row"]:
    """Which rows of a passages table may be found. Raises `FilterError` naming the field that is wrong."""
    check_filters(filters or {}, table.schema)
    mask = np.ones(table.num_rows, dtype=bool)
    for name, condition in (filters or {}).items():
        mask &= _matches(table.column(name), name, condition)
    if allow_ids is not None:
        mask &= _has_id(table, "allow_ids", allow_ids)
    if exclude_ids:
        mask &= ~_has_id(table, "exclude_ids", exclude_ids)
    return mask


def check_filters(filters: Filters, schema: pa.Schema) -> None:
    """Raises `FilterError` when `filters` is malformed, too large, or names a column or a type that does not fit."""
    if len(filters) > MAX_CONDITIONS:
        raise FilterError("*", f"{len(filters)} conditions; at most {MAX_CONDITIONS} are allowed")
    known = filterable_columns(schema)
    for name, condition in filters.items():
        if name not in known:
            listed = ", ".join(known) or "none (this corpus has no metadata)"
            hint = "; use allow_ids and exclude_ids for ids" if name == PASSAGE_ID else ""
            raise FilterError(str(name)[:100], f"no such column; the columns to filter by are: {listed}{hint}")
        value_type = _value_type(schema.field(name).type)
        for value in _values(name, condition):
            if value is not None:
                _typed(name, value, value_type)


def _values(name: str, condition: Any) -> list[Any]:
    """Every value a condition compares with."""
    if not isinstance(condition, Mapping):
        return _value_list(name, condition)
    if not condition:
        raise FilterError(name, f"no operator given; use one of {', '.join(_OPERATORS)}")
    values = []
    for operator, value in condition.items():
        if operator not in _OPERATORS:
            raise FilterError(name, f"unknown operator {str(operator)[:50]!r}; use one of {', '.join(_OPERATORS)}")
        if operator != "not" and (value is None or isinstance(value, (list, tuple, Mapping))):
            raise FilterError(name, f"{operator} compares with one value, not with {type(value).__name__}")
        values += _value_list(name, value)
    return values


def _value_list(name: str, value: Any) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise FilterError(name, "an empty list matches nothing; leave the condition out or give a value")
    if len(values) > MAX_VALUES:
        raise FilterError(name, f"{len(values)} values; at most {MAX_VALUES} are allowed")
    for item in values:
        if isinstance(item, str) and len(item) > MAX_CHARACTERS:
            raise FilterError(name, f"a value of {len(item)} characters; at most {MAX_CHARACTERS} are allowed")
        if item is not None and not isinstance(item, (str, bool, int, float)):
            raise FilterError(name, f"values are text, numbers, true/false or null, not {type(item).__name__}")
    return values


def _typed(name: str, value: Any, value_type: pa.DataType) -> pa.Scalar:
    """`value` in the column's type; numbers may mix, text stands for dates, nothing else is converted."""
    numeric = pa.types.is_integer(value_type) or pa.types.is_floating(value_type) or pa.types.is_decimal(value_type)
    fits = (
        (isinstance(value, bool) and pa.types.is_boolean(value_type))
        or (isinstance(value, (int, float)) and not isinstance(value, bool) and numeric)
        or (isinstance(value, str) and (_is_text(value_type) or pa.types.is_temporal(value_type)))
    )
    wrong = FilterError(name, f"the column holds {value_type}; {value!r} is not a value of that kind")
    if not fits:
        raise wrong
    try:
        scalar = pa.scalar(value)
    except (OverflowError, UnicodeEncodeError):  # beyond 64 bits, or half of a surrogate pair
        raise wrong from None
    try:
        return scalar.cast(value_type)
    except pa.ArrowInvalid:
        if not numeric:
            raise wrong from None
        return scalar  # 2.5 for a column of integers: it can be compared with, and equals none of them


def _matches(column: pa.ChunkedArray, name: str, condition: Any) -> Bool[np.ndarray, " row"]:
    if not isinstance(condition, Mapping):
        return _equals_any(column, name, condition)
    mask = np.ones(len(column), dtype=bool)
    for operator, value in condition.items():
        if operator == "not":
            mask &= ~_equals_any(column, name, value)
        else:
            scalar = _typed(name, value, _value_type(column.type))
            mask &= _any_element(column, lambda part, op=operator, to=scalar: _RANGES[op](part, to))
    return mask


def _equals_any(column: pa.ChunkedArray, name: str, condition: Any) -> Bool[np.ndarray, " row"]:
    values = _value_list(name, condition)
    value_type = _value_type(column.type)
    scalars = [_typed(name, value, value_type) for value in values if value is not None]
    wanted = pa.array([scalar.as_py() for scalar in scalars if scalar.type == value_type], type=value_type)
    if not len(wanted):  # null alone: the values need not be looked at, and of pictures they are many bytes
        return column.is_null().to_numpy() if None in values else np.zeros(len(column), dtype=bool)
    mask = _any_element(column, lambda part: pc.is_in(part, value_set=wanted))
    return mask | column.is_null().to_numpy() if None in values else mask


def _any_element(column: pa.ChunkedArray, compare: Any) -> Bool[np.ndarray, " row"]:
    """Where `compare` holds for the value, or for any element of a list; missing values never match."""
    if not _is_list(column.type):
        return pc.fill_null(compare(column), False).to_numpy().astype(bool)
    masks = []
    for chunk in column.chunks:
        mask = np.zeros(len(chunk), dtype=bool)
        hits = pc.fill_null(compare(pc.list_flatten(chunk)), False).to_numpy(zero_copy_only=False)
        mask[pc.list_parent_indices(chunk).to_numpy()[hits]] = True
        masks.append(mask)
    return np.concatenate(masks) if masks else np.zeros(0, dtype=bool)


def _has_id(table: pa.Table, name: str, ids: Collection[str]) -> Bool[np.ndarray, " row"]:
    if len(ids) > MAX_IDS:
        raise FilterError(name, f"{len(ids)} ids; at most {MAX_IDS} are allowed")
    column = table.column(PASSAGE_ID)
    try:
        wanted = pa.array(None if isinstance(ids, str) else list(ids), type=column.type)
    except (TypeError, pa.ArrowInvalid, UnicodeEncodeError):
        raise FilterError(name, "a list of passage ids (text) is needed") from None
    return pc.is_in(column, value_set=wanted).to_numpy().astype(bool)


def _value_type(column_type: pa.DataType) -> pa.DataType:
    return column_type.value_type if _is_list(column_type) else column_type


def _is_list(column_type: pa.DataType) -> bool:
    return pa.types.is_list(column_type) or pa.types.is_large_list(column_type)


def _is_text(value_type: pa.DataType) -> bool:
    return pa.types.is_string(value_type) or pa.types.is_large_string(value_type)
