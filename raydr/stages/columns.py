"""What a stage asks of the table it is given, checked on entry."""

from __future__ import annotations

from collections.abc import Iterable

from raydr.errors import DataError


def require_columns(present: Iterable[str], needed: Iterable[str], *, stage: str) -> None:
    """Raises `DataError` naming the columns that `stage` needs and the table lacks."""
    names = list(present)
    if missing := [name for name in needed if name not in names]:
        raise DataError(
            f"{stage} needs the column{'s'[: len(missing) > 1]} {', '.join(missing)}; "
            f"this table has {', '.join(sorted(names)) or 'none'}. Rename what it has, or ingest the corpus again"
        )
