"""Rows of tables as passages, with their pictures where there are any; and passages as a table.

Notable: pictures are a column `image` of bytes. A column of that name that holds text (the address of a picture, in a
product catalogue) is metadata like any other.

    passages_of(reader.take(rows))          # list[Passage]
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from raydr.types import IMAGE, PASSAGE_ID, TEXT, TITLE, Passage

PICTURES = pa.large_binary()
"""The type of the column; offsets of 64 bits, for a few thousand pictures may exceed 2 GiB."""


def has_pictures(schema: pa.Schema) -> bool:
    """Whether rows may have pictures."""
    place = schema.get_field_index(IMAGE)
    return place >= 0 and schema.field(place).type in (pa.binary(), pa.large_binary())


def passage_columns(schema: pa.Schema) -> list[str]:
    """The columns that a `Passage` is made of, of those that there are."""
    names = [name for name in (PASSAGE_ID, TITLE, TEXT) if name in schema.names]
    return [*names, IMAGE] if has_pictures(schema) else names


def passages_of(table: pa.Table) -> list[Passage]:
    """The rows as passages; titles and texts that are missing are empty."""
    rows = table.select(passage_columns(table.schema)).to_pylist()
    return [Passage(row[PASSAGE_ID], row[TEXT] or "", row.get(TITLE) or "", row.get(IMAGE)) for row in rows]


def passage_table(passages: Sequence[Passage]) -> pa.Table:
    """Passages as the columns passage_id, title, text, and image where one of them has a picture."""
    columns = {PASSAGE_ID: [p.passage_id for p in passages], TITLE: [p.title for p in passages]}
    columns[TEXT] = [p.text for p in passages]
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    if not any(passage.image is not None for passage in passages):
        return table
    return table.append_column(IMAGE, pa.array([passage.image for passage in passages], PICTURES))
