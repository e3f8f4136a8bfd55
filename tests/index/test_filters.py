"""The filter language: what matches, what is refused and how the refusal reads."""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydr.index.filters import FilterError, row_mask

TABLE = pa.concat_tables(
    [
        pa.table(
            {
                "passage_id": ["a", "b"],
                "title": ["A", ""],
                "text": ["x", "y"],
                "year": pa.array([1990, 2000], type=pa.int32()),
                "price": [1.5, None],
                "lang": ["de", "en"],
                "tags": pa.array([["red", "blue"], []], type=pa.list_(pa.string())),
                "open": [True, False],
                "day": [datetime.date(2020, 1, 1), datetime.date(2021, 1, 1)],
            }
        ),
        pa.table(
            {
                "passage_id": ["c", "d"],
                "title": ["C", None],
                "text": ["x", "z"],
                "year": pa.array([2010, None], type=pa.int32()),
                "price": [2.5, 3.5],
                "lang": [None, "en"],
                "tags": pa.array([None, ["blue", None]], type=pa.list_(pa.string())),
                "open": [None, True],
                "day": [None, datetime.date(2022, 1, 1)],
            }
        ),
    ]
)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, "abcd"),
        ({"year": 2000}, "b"),
        ({"year": [1990, 2010]}, "ac"),
        ({"year": {"gte": 1990, "lt": 2010}}, "ab"),
        ({"year": {"gt": 1990.5}}, "bc"),
        ({"year": 1990.5}, ""),
        ({"year": 10**12}, ""),
        ({"year": {"lt": 10**12}}, "abc"),
        ({"year": {"not": 2000}}, "acd"),
        ({"year": {"not": [1990, None]}}, "bc"),
        ({"year": None}, "d"),
        ({"year": [None, 1990]}, "ad"),
        ({"year": {"gte": 1990, "not": 2000}}, "ac"),
        ({"price": {"lte": 2.5}}, "ac"),
        ({"price": 1.5}, "a"),
        ({"lang": "en"}, "bd"),
        ({"lang": "en", "year": 2000}, "b"),
        ({"tags": "blue"}, "ad"),
        ({"tags": ["red", "green"]}, "a"),
        ({"tags": {"not": "red"}}, "bcd"),
        ({"tags": None}, "c"),
        ({"open": True}, "ad"),
        ({"day": "2021-01-01"}, "b"),
        ({"day": {"gte": "2021-01-01"}}, "bd"),
        ({"title": "A"}, "a"),
    ],
)
def test_what_matches(filters, expected):
    assert "".join(np.array(list("abcd"))[row_mask(TABLE, filters)]) == expected


def test_id_lists():
    assert row_mask(TABLE, allow_ids=["a", "d", "unknown"]).tolist() == [True, False, False, True]
    assert row_mask(TABLE, allow_ids=[]).tolist() == [False] * 4
    assert row_mask(TABLE, {"lang": "en"}, exclude_ids=["b"]).tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("filters", "field", "message"),
    [
        (
            {"yaer": 1},
            "yaer",
            "no such column; the columns to filter by are: title, year, price, lang, tags, open, day",
        ),
        ({"text": "x"}, "text", "no such column"),
        ({"passage_id": "a"}, "passage_id", "use allow_ids"),
        ({"year": "2000"}, "year", "the column holds int32; '2000' is not a value of that kind"),
        ({"year": True}, "year", "the column holds int32"),
        ({"year": 10**30}, "year", "the column holds int32"),
        ({"lang": "\ud800"}, "lang", "the column holds string"),
        ({"lang": 3}, "lang", "the column holds string"),
        ({"open": 1}, "open", "the column holds bool"),
        ({"day": "yesterday"}, "day", "the column holds date32"),
        ({"year": {}}, "year", "no operator given"),
        ({"year": {"$gt": 1}}, "year", "unknown operator '$gt'; use one of gt, gte, lt, lte, not"),
        ({"year": {"gt": [1]}}, "year", "gt compares with one value"),
        ({"year": {"gt": None}}, "year", "gt compares with one value"),
        ({"year": {"not": {"gt": 1}}}, "year", "values are text, numbers"),
        ({"year": []}, "year", "an empty list"),
        ({"year": [[1]]}, "year", "values are text, numbers"),
        ({"year": list(range(2000))}, "year", "at most 1000"),
        ({"lang": "x" * 2000}, "lang", "at most 1000"),
        ({f"c{n}": 1 for n in range(40)}, "*", "at most 32"),
    ],
)
def test_what_is_refused_names_the_field(filters, field, message):
    with pytest.raises(FilterError, match=f"(?s).*{message.replace('$', '[$]')}") as caught:
        row_mask(TABLE, filters)
    assert caught.value.field == field


def test_id_lists_are_bounded():
    with pytest.raises(FilterError, match="at most 100000"):
        row_mask(TABLE, allow_ids=[str(n) for n in range(100_001)])
    with pytest.raises(FilterError, match="allow_ids: a list of passage ids"):
        row_mask(TABLE, allow_ids="abc")
    for wrong in (3, "\ud800"):
        with pytest.raises(FilterError, match="exclude_ids: a list of passage ids"):
            row_mask(TABLE, exclude_ids=["a", wrong])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["gt", "not", "x"]), inner, max_size=2),
    max_leaves=5,
)


@given(
    st.dictionaries(st.sampled_from(["year", "price", "lang", "tags", "open", "day", "text", "?"]), JSON, max_size=3)
)
def test_any_json_is_answered_or_refused(filters):
    try:
        assert row_mask(TABLE, filters).shape == (4,)
    except FilterError as error:
        assert str(error).startswith("filters.")
