"""Articles of newspapers with their dates, from CSV, TSV, JSON lines or Parquet, whatever the columns are called.

Notable: columns are found by their usual names or named by hand; every fault is told with file, row and column, and
none is guessed away: a date such as 03/04/1860, which means two days, is refused. A year alone is a date.

    articles = read_articles("old.csv", columns={"text": "ocr_text"})
    articles[0].date                                                # "1860-08-23"
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from typing import NamedTuple

from raydr.data.files import Folder, SourceFile
from raydr.data.problems import Problems
from raydr.data.records import CsvRows, JsonLines, ParquetRows, Record, Records
from raydr.errors import DataError
from raydr.progress import Progress

USUAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "text": ("text", "article", "body", "content", "full_text", "article_text", "ocr", "ocr_text"),
    "title": ("title", "headline", "heading"),
    "date": ("date", "published", "publication_date", "pub_date", "date_published", "issue_date", "year"),
    "publication": ("publication", "newspaper", "newspaper_name", "paper", "source", "journal"),
    "place": ("place", "city", "town", "location", "state"),
    "id": ("id", "_id", "article_id", "key"),
    "ocr_quality": ("ocr_quality", "ocr_confidence", "ocrquality", "confidence"),
}
"""What a column holds, and the names it goes by."""
_FORMATS = ("%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%d %B %Y", "%B %d, %Y", "%d %b %Y", "%b %d, %Y", "%B %d %Y")
_YEAR = re.compile(r"\d{4}")
_MONTH = re.compile(r"(\d{4})[-/](\d{1,2})")
_HINT = "mend them in the file; a column that is not the right one is named with --column text=NAME"


class Article(NamedTuple):
    """One article; what is not known is empty, or None."""

    article_id: str
    text: str
    title: str = ""
    date: str = ""
    """In ISO form; the year alone, or year and month, where no more is known."""
    publication: str = ""
    place: str = ""
    ocr_quality: float | None = None
    """As the source says it."""

    @property
    def year(self) -> int | None:
        return int(self.date[:4]) if self.date else None

    @property
    def day(self) -> int | None:
        """The day's number, of a date that names one."""
        return datetime.date.fromisoformat(self.date).toordinal() if len(self.date) == len("1860-08-23") else None

    @property
    def whole(self) -> str:
        """Title and text."""
        return f"{self.title}\n\n{self.text}" if self.title and self.text else self.title or self.text


def read_articles(
    path: str, *, columns: Mapping[str, str] | None = None, all_columns: bool = True, name: str = "articles"
) -> list[Article]:
    """All articles of a file; with `all_columns` off, a column that is named and not there is looked for by its usual
    names. Raises `DataError` naming file, row and column of everything that is wrong, and where no column with a text
    is found.
    """
    folder = Folder.open(path)
    if not folder.is_file:
        raise DataError(f"{path}: is a folder; name one file of articles (.csv, .tsv, .jsonl or .parquet)")
    table = _table(folder.files()[0])
    articles: list[Article] = []
    seen: dict[str, int] = {}
    found: dict[str, str] = {}
    with (
        Problems(path, hint=_HINT) as problems,
        Progress(f"read {name}", total=table.size, unit=table.unit) as progress,
    ):
        for row, record in table.read(problems, progress.update):
            if not found or not table.fixed_columns:
                found = _columns(
                    table.name,
                    record,
                    columns or {},
                    all_columns=all_columns and table.fixed_columns,
                    has_text=table.fixed_columns or not seen,
                )
            article = _article(record, found, row, table.name, problems)
            if article is None:
                continue
            if article.article_id in seen:
                detail = f"{article.article_id!r} is that of row {seen[article.article_id]} as well"
                problems.add(table.name, row, found.get("id"), "the id is there twice", record, detail)
            seen[article.article_id] = row
            articles.append(article)
        problems.check()
    if not articles:
        raise DataError(f"{path}: holds no articles")
    return articles


def _table(file: SourceFile) -> Records:
    suffix = file.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return CsvRows(file, "\t" if suffix == ".tsv" else ",")
    if suffix in (".jsonl", ".ndjson", ".json"):
        return JsonLines(file)
    if suffix in (".parquet", ".pq"):
        return ParquetRows(file)
    raise DataError(
        f"{file.name}: articles are read from .csv, .tsv, .jsonl and .parquet files; save it as one of them"
    )


def _columns(
    file: str, record: Record, named: Mapping[str, str], *, all_columns: bool, has_text: bool
) -> dict[str, str]:
    """Role -> column. Raises `DataError` for a named column that is not there, and where there is no text."""
    if unknown := sorted(set(named) - set(USUAL_NAMES)):
        raise DataError(f"--column {unknown[0]}: is none of {', '.join(USUAL_NAMES)}")
    lower = {name.lower().strip(): name for name in reversed(record)}
    found = {}
    for role, usual in USUAL_NAMES.items():
        if named.get(role) in record:
            found[role] = named[role]
        elif role in named and all_columns:
            raise DataError(
                f"{file}: has no column {named[role]!r} for the {role}; its columns are {', '.join(record)}"
            )
        elif name := next((lower[name] for name in usual if name in lower), None):
            found[role] = name
    if has_text and "text" not in found and "title" not in found:
        raise DataError(
            f"{file}: has no column with the articles' texts (looked for {', '.join(USUAL_NAMES['text'])}); its "
            f"columns are {', '.join(record)}; name the right one: --column text=NAME"
        )
    return found


def _article(record: Record, found: dict[str, str], row: int, file: str, problems: Problems) -> Article | None:
    texts = {}
    for role in ("text", "title", "publication", "place", "id"):
        value = record.get(found.get(role, ""))
        if isinstance(value, bool) or (value is not None and not isinstance(value, str | int | float)):
            problems.add(file, row, found[role], "must be a text", record, f"got {type(value).__name__}")
            return None
        texts[role] = "" if value is None else str(value).strip()
    if not texts["text"] and not texts["title"]:
        field = found.get("text") or found.get("title") or "text"
        problems.add(file, row, field, "is empty: an article needs a text", record)
        return None
    try:
        date = iso_date(record.get(found.get("date", "")))
        quality = _quality(record.get(found.get("ocr_quality", "")))
    except ValueError as error:
        problems.add(file, row, found.get(str(error.args[0])), str(error.args[1]), record)
        return None
    return Article(
        texts["id"] or f"row-{row}",
        texts["text"],
        texts["title"],
        date,
        texts["publication"],
        texts["place"],
        quality,
    )


def iso_date(value: object) -> str:
    """A date in ISO form; empty where there is none. Raises `ValueError("date", reason)` for what is none, or two."""
    if value is None or value == "":
        return ""
    if isinstance(value, datetime.datetime):
        return value.date().isoformat()
    if isinstance(value, datetime.date):
        return value.isoformat()
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
    if _YEAR.fullmatch(text):
        return text
    if (month := _MONTH.fullmatch(text)) and 1 <= int(month[2]) <= 12:
        return f"{month[1]}-{int(month[2]):02d}"
    for form in _FORMATS:
        try:
            return datetime.datetime.strptime(text, form).date().isoformat()
        except ValueError:
            continue
    try:
        return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).date().isoformat()
    except ValueError:
        shown = text[:40]
        raise ValueError("date", f"is no date: {shown!r}; write 1860-08-23, 23 August 1860, 1860-08 or 1860") from None


def _quality(value: object) -> float | None:
    if value is None or value == "":
        return None
    try:
        return float(str(value))
    except ValueError:
        raise ValueError("ocr_quality", f"must be a number: {str(value)[:40]!r}") from None
