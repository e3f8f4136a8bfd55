"""Bad records: reported together with file, line and field, or left out, counted and listed in a file.

problems = Problems("data/scifact")                                  # on_error: raise
problems.add("corpus.jsonl", 4, "text", "is missing", raw=line)
problems.check()                                                     # DataError naming every problem so far
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from raydr.errors import DataError

MAX_REPORTED = 10
"""So many problems are reported in one error."""
_EXCERPT = 200
_HINT = "mend them, or set data.on_error=skip to leave such records out and list them in rejects.jsonl"


class BadFieldError(ValueError):
    """A field of a record that cannot be used; whoever knows file and line turns it into a problem."""

    def __init__(self, field: str, reason: str, detail: str = "") -> None:
        super().__init__(f"field {field!r}: {reason}" + (f": {detail}" if detail else ""))
        self.field, self.reason, self.detail = field, reason, detail


class Problem(NamedTuple):
    """One bad record."""

    file: str
    line: int | None
    field: str | None
    reason: str
    raw: str
    """The beginning of the record."""

    def __str__(self) -> str:
        line = f", line {self.line}" if self.line is not None else ""
        field = f", field {self.field!r}" if self.field else ""
        return f"{self.file}{line}{field}: {self.reason}"


class Problems:
    """Collects bad records. With a `rejects` file they are written there; without one they become a `DataError`."""

    def __init__(
        self, source: str, rejects: Path | None = None, *, limit: int | None = MAX_REPORTED, hint: str = _HINT
    ) -> None:
        self._source, self._limit, self._hint = source, limit, hint
        self._rejects = rejects.open("w", encoding="utf-8") if rejects else None
        self.found: list[Problem] = []
        """What `check` would report; stays empty with a rejects file."""
        self.counts: Counter[str] = Counter()
        """Bad records by reason."""

    def __enter__(self) -> Problems:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rejects:
            self._rejects.close()

    def add(self, file: str, line: int | None, field: str | None, reason: str, raw: Any, detail: str = "") -> None:
        """Notes one bad record. `reason` is the kind of fault, `detail` the particular of this one.

        Raises `DataError` when there is no rejects file and as many problems as `limit` have come together.
        """
        problem = Problem(file, line, field, f"{reason}: {detail}" if detail else reason, excerpt(raw))
        self.counts[reason] += 1
        if self._rejects:
            self._rejects.write(json.dumps(problem._asdict(), ensure_ascii=False) + "\n")
            return
        self.found.append(problem)
        if self._limit is not None and len(self.found) >= self._limit:
            self.check()

    def check(self) -> None:
        """Raises `DataError` naming every problem collected so far; does nothing when there is none."""
        if not self.found:
            return
        num = len(self.found)
        heading = f"the first {num} problems" if num == self._limit else f"{num} problem{'s'[: num != 1]}"
        lines = [f"  {problem}\n    {problem.raw}" for problem in self.found]
        raise DataError("\n".join([f"{self._source}: {heading} in the data", *lines, self._hint]))


def excerpt(raw: Any) -> str:
    """The beginning of a bad record as printable text, whatever it holds."""
    if isinstance(raw, bytes):
        raw = raw[: 2 * _EXCERPT].decode("utf-8", errors="backslashreplace")
    elif not isinstance(raw, str):
        raw = json.dumps(raw, ensure_ascii=False, default=_beginning)
    text = raw.encode("utf-8", errors="backslashreplace").decode("utf-8")  # a lone surrogate cannot be written
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…"


def _beginning(value: Any) -> str:
    """What JSON does not know as text; of a picture's bytes no more than the excerpt shows."""
    return str(value[:_EXCERPT] if isinstance(value, bytes) else value)
