"""Runs and judgements as files: lenient readers, strict writers.

Notable: trec_eval ignores the rank column; it sorts by score and breaks ties by passage id, both descending, with
scores held as float32 (version 9) or float64 (version 10). `read_run` ranks a file exactly so. `write_run` writes a
file that every version ranks exactly as the run in memory is ranked: scores as float32 in the fewest digits that give
the same float32 back, and a score that a tie would move up is lowered by the fewest float32 steps that keep the order
(the scores of n tied hits end up at most n - 1 steps apart, about 1e-7 of the score each).

    run = read_run("bm25.trec.gz")         # TREC (six columns), Tevatron (query, passage, score), MS MARCO (... rank)
    write_run(run, "out/run.trec", tag="bm25")
    qrels = read_qrels("qrels/test.tsv")   # TREC and MS MARCO (four columns), BEIR (header and three columns)
"""

from __future__ import annotations

import gzip
import io
import logging
import re
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal, NoReturn, TypeAlias

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Float64, Int64

from raydr.artifacts import bring, write_durably
from raydr.errors import DataError
from raydr.types import Hit, Qrels, Run

RunFormat: TypeAlias = Literal["auto", "trec", "tevatron", "msmarco"]

_LONGEST_LINE = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_NO_WHITESPACE = re.compile(r"\S+")
_NO_TABS = re.compile(r"[^\t\r\n]+")

_log = logging.getLogger(__name__)


def read_run(path: str | Path, *, format: RunFormat = "auto") -> Run:
    """The run in a file (plain or gzip, columns separated by any whitespace), each query's hits best first.

    `auto` tells the formats apart: six columns are TREC; three columns are MS MARCO when the third holds nothing but
    whole numbers (ranks), otherwise Tevatron (scores). The hits of a rank-only file get the score 1/rank. Raises
    `DataError` naming file and line for anything malformed, and for a passage listed twice for one query.
    """
    path = bring(path)
    columns: dict[str, dict[str, float]] = {}
    num_columns = {"auto": 0, "trec": 6, "tevatron": 3, "msmarco": 3}[format]
    all_ranks = True
    for number, line in _lines(path):
        fields = line.split()
        if len(fields) != num_columns:
            if num_columns or len(fields) not in (3, 6):
                wanted = num_columns or "6 (TREC) or 3 (Tevatron, MS MARCO)"
                _fail(path, number, f"{len(fields)} columns where a run has {wanted}: {line.strip()[:80]!r}")
            num_columns = len(fields)
        query_id, passage_id, text = (fields[0], fields[2], fields[4]) if num_columns == 6 else fields
        try:
            value = float(text)
        except ValueError:
            _fail(path, number, f"the score {text!r} is not a number")
        if not -_FLOAT32_MAX <= value <= _FLOAT32_MAX:
            _fail(path, number, f"the score {text!r} is not a finite float32")
        all_ranks = all_ranks and text.isdecimal()
        hits = columns.setdefault(query_id, {})
        if passage_id in hits:
            _fail(path, number, f"passage {passage_id!r} is listed twice for query {query_id!r}")
        hits[passage_id] = value
    if format == "msmarco" or (format == "auto" and num_columns == 3 and all_ranks):
        return _from_ranks(path, columns)
    run = {query_id: _in_trec_eval_order(hits) for query_id, hits in columns.items()}
    moved = sum([*hits] != [hit.passage_id for hit in run[query_id]] for query_id, hits in columns.items())
    if moved:
        _log.warning(
            "%s: %d of %d queries are not listed in trec_eval's order (score, then passage id, both descending), "
            "which is the one used",
            path,
            moved,
            len(run),
        )
    return run


def write_run(run: Run, path: str | Path, tag: str = "raydr") -> None:
    """Writes a run as a TREC file (gzip when the name ends in .gz), atomically, so that trec_eval ranks it as it is.

    Raises `DataError` when an id or the tag is empty or holds whitespace, a score is not a finite float32, the hits
    are not best first, or a passage occurs twice for a query.
    """
    _check_word(path, "tag", tag)
    buffer = io.StringIO()
    for query_id, hits in run.items():
        _check_word(path, "query id", query_id)
        ids = [hit.passage_id for hit in hits]
        if len(set(ids)) != len(ids):
            raise DataError(f"{path}: query {query_id!r} has a passage twice; merge the hits before writing them")
        if " ".join(ids).split() != ids:  # some id is empty or holds whitespace
            for passage_id in ids:
                _check_word(path, f"passage id of query {query_id!r}", passage_id)
        scores = _order_preserving(np.array([hit.score for hit in hits], np.float64), ids, where=f"{path}: {query_id}")
        texts = pa.array(scores).cast(pa.string()).to_pylist()
        for rank, (passage_id, score) in enumerate(zip(ids, texts, strict=True), start=1):
            buffer.write(f"{query_id} Q0 {passage_id} {rank} {score} {tag}\n")
    _write(path, buffer.getvalue())


def read_qrels(path: str | Path) -> Qrels:
    """The judgements in a file: TREC or MS MARCO (`query 0 passage grade`), or BEIR (`query passage grade`, a header).

    Grades are whole numbers and may be negative (not relevant). Raises `DataError` naming file and line for anything
    malformed, and for a passage judged twice for one query.
    """
    path = bring(path)
    qrels: Qrels = {}
    num_columns = 0
    for number, line in _lines(path):
        # BEIR ids may hold spaces, so tabs are the separators of a line that has enough of them.
        fields = [field.strip() for field in line.split("\t")] if line.count("\t") >= 2 else line.split()
        if num_columns == 0:
            num_columns = len(fields)
            if num_columns == 3 and not _is_whole(fields[2]):
                continue
        if len(fields) != num_columns or num_columns not in (3, 4):
            _fail(path, number, f"{len(fields)} columns where judgements have 4 (TREC) or 3 (BEIR): {line.strip()!r}")
        query_id, passage_id, grade = fields[0], fields[-2], fields[-1]
        if not query_id or not passage_id:
            _fail(path, number, "an empty query or passage id")
        if not _is_whole(grade):
            _fail(path, number, f"the relevance {grade!r} is not a whole number")
        judged = qrels.setdefault(query_id, {})
        if passage_id in judged:
            _fail(path, number, f"passage {passage_id!r} is judged twice for query {query_id!r}")
        judged[passage_id] = int(grade)
    return qrels


def write_qrels(qrels: Qrels, path: str | Path, *, format: Literal["trec", "beir"] = "trec") -> None:
    """Writes judgements atomically: TREC (`query 0 passage grade`) or BEIR (tabs, a header); gzip for .gz names."""
    separator = "\t" if format == "beir" else " "
    lines = ["query-id\tcorpus-id\tscore\n"] if format == "beir" else []
    for query_id, judged in qrels.items():
        for passage_id, relevance in judged.items():
            for name, word in (("query id", query_id), ("passage id", passage_id)):
                _check_word(path, name, word, allowed=_NO_TABS if format == "beir" else _NO_WHITESPACE)
            middle = "" if format == "beir" else f"0{separator}"
            lines.append(f"{query_id}{separator}{middle}{passage_id}{separator}{relevance}\n")
    _write(path, "".join(lines))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Non-blank lines with their numbers from 1; gzip is recognised by its first bytes, not by the name."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    number = 0
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        stream = gzip.GzipFile(fileobj=raw) if is_gzip else raw
        text = io.TextIOWrapper(stream, encoding="utf-8-sig")
        try:
            for number, line in enumerate(iter(lambda: text.readline(_LONGEST_LINE), ""), start=1):
                if len(line) == _LONGEST_LINE:  # whatever a few bytes of gzip unpack to must not fill the memory
                    _fail(path, number, f"more than {_LONGEST_LINE} characters")
                if not line.isspace():
                    yield number, line
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, after line {number}: not UTF-8 text: {error}") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}, after line {number}: a damaged gzip file: {error}") from error


def _in_trec_eval_order(scores: dict[str, float]) -> list[Hit]:
    rounded = np.array([*scores.values()]).astype(np.float32).tolist()
    ranked = sorted(zip(rounded, scores, scores.values(), strict=True), reverse=True)
    return [Hit(passage_id, score) for _, passage_id, score in ranked]


def _from_ranks(path: Path, ranks: dict[str, dict[str, float]]) -> Run:
    run: Run = {}
    for query_id, hits in ranks.items():
        if min(hits.values()) < 1 or len(set(hits.values())) != len(hits) or any(r % 1 for r in hits.values()):
            raise DataError(
                f"{path}: query {query_id!r}: the third column cannot be ranks (they start at 1 and differ); "
                'if it holds scores, read the file with format="tevatron"'
            )
        run[query_id] = [Hit(passage_id, 1 / rank) for passage_id, rank in sorted(hits.items(), key=lambda p: p[1])]
    return run


def _order_preserving(
    scores: Float64[np.ndarray, " hit"], ids: list[str], *, where: str
) -> Float32[np.ndarray, " hit"]:
    """The highest float32 scores, none above the given, that trec_eval sorts into the given order."""
    with np.errstate(over="ignore"):
        rounded = scores.astype(np.float32)
    if not np.isfinite(rounded).all():
        raise DataError(f"{where}: a score is not a finite float32, which a TREC file cannot hold")
    if (np.diff(rounded) > 0).any():
        raise DataError(f"{where}: hits are not best first; sort them by descending score before writing them")
    # A later hit with a smaller id may share its predecessor's score; one with a larger id must score strictly less.
    # On integers that count float32 steps, w[i] = min(s[i], w[i-1] - strict[i]) is one running minimum.
    strict = np.cumsum([0, *(later > earlier for earlier, later in pairwise(ids))])[: len(ids)]
    return _from_steps(np.minimum.accumulate(_to_steps(rounded) + strict) - strict)


def _to_steps(scores: Float32[np.ndarray, " hit"]) -> Int64[np.ndarray, " hit"]:
    """Float32 numbers as integers in the same order, neighbours one apart (both zeros are 0)."""
    bits = scores.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _from_steps(steps: Int64[np.ndarray, " hit"]) -> Float32[np.ndarray, " hit"]:
    magnitude = np.abs(steps).astype(np.int32).view(np.float32)
    return np.where(steps < 0, -magnitude, magnitude)


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _check_word(path: str | Path, name: str, word: str, *, allowed: re.Pattern[str] = _NO_WHITESPACE) -> None:
    if not allowed.fullmatch(word):
        raise DataError(f"{path}: the {name} {word!r} is empty or holds whitespace, which this format cannot keep")


def _write(path: str | Path, text: str) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode("utf-8")
    # No time stamp inside, so equal runs are equal files.
    write_durably(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def _fail(path: Path, line: int, message: str) -> NoReturn:
    raise DataError(f"{path}, line {line}: {message}")
