"""Bad records: reported together with file, line and field, or left out, counted and listed in a file.

problems = Problems(source="data/scifact", rejects=None)           # on_error: raise
problems.add("corpus.jsonl", 4, "text", "is missing", raw=line)
problems.check()                                                    # DataError naming every problem so far
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from raydr.errors import DataError

MAX_REPORTED = 10
"""So many problems are reported in one error."""
_EXCERPT = 200


class BadFieldError(ValueError):
    """A field of a record that cannot be used; whoever knows file and line turns it into a problem."""

    def __init__(self, field: str, reason: str, detail: str = "") -> None:
        super().__init__(f"field {field!r}: {reason}" + (f": {detail}" if detail else ""))
        self.field, self.reason, self.detail = field, reason, detail


class Problems:
    """Collects bad records. With a `rejects` file they are written there; without one they become a `DataError`."""

    def __init__(self, source: str, rejects: Path | None) -> None:
        self._source = source
        self._messages: list[str] = []
        self._rejects = rejects.open("w", encoding="utf-8") if rejects else None
        self.counts: Counter[str] = Counter()
        """Rejected records by reason."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rejects:
            self._rejects.close()

    def add(self, file: str, line: int | None, field: str | None, reason: str, raw: Any, detail: str = "") -> None:
        """Notes one bad record. `reason` is the kind of fault, `detail` the particular of this one.

        Raises `DataError` when there is no rejects file and enough problems have come together.
        """
        excerpt = _excerpt(raw)
        full = f"{reason}: {detail}" if detail else reason
        if self._rejects:
            self.counts[reason] += 1
            record = {"file": file, "line": line, "field": field, "reason": full, "raw": excerpt}
            self._rejects.write(json.dumps(record, ensure_ascii=False) + "\n")
            return
        place = file + (f", line {line}" if line is not None else "") + (f", field {field!r}" if field else "")
        self._messages.append(f"  {place}: {full}\n    {excerpt}")
        if len(self._messages) >= MAX_REPORTED:
            self.check()

    def check(self) -> None:
        """Raises `DataError` naming every problem collected so far; does nothing when there is none."""
        if not self._messages:
            return
        num = len(self._messages)
        heading = f"the first {num} problems" if num >= MAX_REPORTED else f"{num} problem{'s'[: num != 1]}"
        raise DataError(
            f"{self._source}: {heading} in the data\n"
            + "\n".join(self._messages)
            + "\nmend them, or set data.on_error=skip to leave such records out and list them in rejects.jsonl"
        )


def _excerpt(raw: Any) -> str:
    """The beginning of a bad record as printable text, whatever it holds."""
    if isinstance(raw, bytes):
        raw = raw[: 2 * _EXCERPT].decode("utf-8", errors="backslashreplace")
    elif not isinstance(raw, str):
        raw = json.dumps(raw, ensure_ascii=False, default=str)
    text = raw.encode("utf-8", errors="backslashreplace").decode("utf-8")  # a lone surrogate cannot be written
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…"
