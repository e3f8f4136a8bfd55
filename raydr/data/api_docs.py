"""The demo corpus: the API documentation of the Python packages installed in this environment, as a BEIR folder.

Notable: real text with real judgements and no download. A passage is one function, class, method or property (id: its
qualified name, title: its signature, text: its docstring without the summary line); a query is a summary line that was
held out, and the object it summarises is relevant. Nothing is imported: sources are parsed. The same environment, size
and seed give the same bytes. Objects whose documentation is the same or nearly the same (re-exports, inherited and
copied docstrings) are one passage; a summary that several objects share has all of them as relevant passages; a
summary that is short, shared by many, or repeated inside its passage becomes no query.

    report = build_api_docs(Path("runs/demo/api_docs"), size=8000)
    ingest(DataConfig(path=report.path, split="test"), out)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from raydr.artifacts import fingerprint, is_finished, open_artifact, write_artifact, write_durably
from raydr.config import Config
from raydr.data.api_objects import ApiObject, read_objects
from raydr.data.api_sources import STANDARD_LIBRARY, find_files, installed_packages
from raydr.data.near_duplicates import near_duplicate_groups
from raydr.errors import DataError

PACKAGES = (
    "numpy", "scipy", "pandas", "torch", "sklearn", "matplotlib", "networkx", "sympy", "pyarrow", "ray", "transformers",
    "sentence_transformers", "datasets", "huggingface_hub", "fsspec", "pydantic", "fastapi", "starlette", "httpx",
    "requests", "aiohttp", "yaml", "PIL", "faiss", "bm25s", "ir_measures", "tqdm", STANDARD_LIBRARY,
)  # fmt: skip
"""What the demo reads by default, where installed: the packages people look things up in."""

SPLITS = ("train", "dev", "test")
_MIN_QUERY_WORDS, _MAX_QUERY_WORDS = 4, 40
_MIN_TEXT_WORDS = 12
_MAX_SHARED = 4
"""A summary that more objects share says nothing about any of them."""
_HELD_OUT = {"test": 10, "dev": 10}
"""Per cent of the summaries; the rest is for training."""
_STARTS_A_LIST = re.compile(r"\s*([-*•>:@]|\w+ *:( |$)|\d+\.)")


class ApiDocsConfig(Config):
    """What decides the corpus."""

    size: int | Literal["all"]
    seed: int
    packages: list[str]
    sources: str
    """SHA-256 over the names and sizes of the source files: another environment is another corpus."""


class ApiDocsReport(Config):
    """What was written, and what was left out and why."""

    path: Path
    passages: dict[str, int]
    """Per package."""
    queries: dict[str, int]
    """Per split."""
    left_out: dict[str, int]
    """Reason -> number of objects or summaries."""


class _Entry(NamedTuple):
    item: ApiObject
    summary: str
    text: str


def build_api_docs(
    out: Path,
    *,
    size: int | Literal["all"] = 8000,
    seed: int = 0,
    packages: Sequence[str] | None = None,
    search_path: Sequence[Path] | None = None,
) -> ApiDocsReport:
    """Writes the corpus to the folder `out`, or reports the one that is already there for the same settings.

    `size` passages are taken evenly from `packages` (default: `PACKAGES`, and with "all" everything installed), those
    with the shortest names first; `search_path` replaces this environment's site-packages. Raises `DataError` when no
    package has documentation, `ArtifactError` when `out` holds something else.
    """
    if size != "all" and size < 1:
        raise DataError(f"size of the API documentation corpus is {size}: give a number of passages, or 'all'")
    wanted = packages or (installed_packages() if size == "all" else PACKAGES)
    files = {name: found for name in wanted if (found := find_files(name, search_path))}
    config = ApiDocsConfig(size=size, seed=seed, packages=list(files), sources=_digest(files))
    if not is_finished(out, fingerprint("api_docs", config, {})):
        with write_artifact(out, kind="api_docs", config=config) as writer:
            entries, left_out = _read_entries(files)
            if not entries:
                raise DataError(f"no documented Python packages among {', '.join(wanted)}: are they installed?")
            chosen = _sample(entries, size, seed)
            queries = _queries(chosen, left_out)
            splits = _write(writer.path, chosen, queries, seed)
            writer.counts.update(passages=len(chosen), queries=len(queries))
            writer.details.update(
                passages=dict(sorted(Counter(entry.item.package for entry in chosen).items())),
                queries=splits,
                left_out=dict(left_out),
            )
    return ApiDocsReport(path=out, **open_artifact(out, kind="api_docs").manifest.details)


def _digest(files: Mapping[str, Sequence[Path]]) -> str:
    names = (f"{file.name}\0{file.stat().st_size}" for found in files.values() for file in found)
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


# ---- from docstrings to entries ---------------------------------------------------------------------------------


def _read_entries(files: Mapping[str, Sequence[Path]]) -> tuple[list[_Entry], Counter[str]]:
    """Every usable object once, sorted by name; and what was left out."""
    left_out: Counter[str] = Counter()
    entries: list[_Entry] = []
    with tqdm(total=sum(map(len, files.values())), desc="reading API docs", unit="file", disable=None) as bar:
        for package, found in files.items():
            bar.set_postfix_str(package)
            for item in read_objects(package, found, on_file=bar.update):
                summary, text = split_docstring(item.doc)
                if len(text.split()) < _MIN_TEXT_WORDS:
                    left_out["no text beside the summary"] += 1
                else:
                    entries.append(_Entry(item, summary, text))
    groups = near_duplicate_groups([f"{entry.summary} {entry.text}" for entry in entries])
    left_out["same or nearly the same documentation"] = len(entries) - len(groups)
    kept = [min((entries[row] for row in group), key=lambda e: _shortness(e.item)) for group in groups]
    return sorted(kept, key=lambda entry: entry.item.name), left_out


def split_docstring(doc: str) -> tuple[str, str]:
    """The summary sentence and the rest, both as plain text (reStructuredText roles and directives' marks removed)."""
    paragraphs = [p for p in re.split(r"\n\s*\n", doc.strip()) if p.strip()]
    while paragraphs and paragraphs[0].lstrip().startswith(".. "):
        paragraphs.pop(0)  # deprecation notices
    if not paragraphs or _is_section(paragraphs[0]):
        return "", _plain("\n\n".join(paragraphs))
    first, *rest = paragraphs
    lines = first.split("\n")
    # A list or an underlined section may follow the summary without a blank line.
    end = next(
        (i for i, line in enumerate(lines) if i and re.match(r"\s*([-*•>:@]|\w+ *:( |$)|\d+\.)", line)), len(lines)
    )
    opening = _plain(" ".join(lines[:end]))
    sentence = re.match(r".+?[.!?](?=\s+[A-Z(`])(?<!e\.g\.)(?<!i\.e\.)(?<!vs\.)(?<!etc\.)", opening)
    summary = sentence[0] if sentence else opening
    remainder = opening[len(summary) :].strip()
    text = "\n\n".join(part for part in [remainder, _plain("\n".join(lines[end:])), _plain("\n\n".join(rest))] if part)
    return summary.strip(), text


def _is_section(paragraph: str) -> bool:
    """Whether a paragraph is a heading such as `Parameters` (underlined) or `Args:` rather than a sentence."""
    lines = paragraph.strip().split("\n")
    underlined = len(lines) > 1 and re.fullmatch(r"\s*[-=~^]{3,}\s*", lines[1]) is not None
    return underlined or re.fullmatch(r"\s*\w+:\s*", lines[0]) is not None


def _plain(text: str) -> str:
    text = re.sub(r":(?:\w+:)?\w+:`~?([^`<]+?)(?:\s*<[^`]*>)?`", r"\1", text)  # :func:`~numpy.mean` -> numpy.mean
    text = re.sub(r"`+([^`\n]+)`+_?", r"\1", text)
    text = re.sub(r"\\ |%\(\w+\)s|(?m:^\s*\.\. (?=\w+::))|(?m:^\s*[-=~^]{3,}\s*$\n?)", "", text)
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"\n\s*\n+", "\n\n", re.sub(r" *\n *", "\n", text)).strip()


# ---- choosing ---------------------------------------------------------------------------------------------------


def _shortness(item: ApiObject) -> tuple[int, int, str]:
    """Orders names from what a package shows first to what it keeps deep; a method stands beside its class."""
    is_member = item.kind in ("method", "property")
    return item.name.count(".") - is_member, len(item.name), item.name


def _sample(entries: Sequence[_Entry], size: int | Literal["all"], seed: int) -> list[_Entry]:
    """`size` entries, as even over the packages as their numbers allow, shallow names first; sorted by name."""
    if size == "all" or size >= len(entries):
        return list(entries)
    by_package: dict[str, list[_Entry]] = defaultdict(list)
    for entry in sorted(entries, key=lambda e: (_shortness(e.item)[0], _hash(seed, e.item.name))):
        by_package[entry.item.package].append(entry)
    # Small packages give all they have; the large ones share what is left.
    chosen: list[_Entry] = []
    ordered = sorted(by_package.items(), key=lambda pair: (len(pair[1]), pair[0]))
    for position, (_, own) in enumerate(ordered):
        share = (size - len(chosen)) // (len(ordered) - position)
        chosen += own[:share]
    return sorted(chosen, key=lambda entry: entry.item.name)


def _queries(entries: Iterable[_Entry], left_out: Counter[str]) -> dict[str, list[_Entry]]:
    """Summary -> the objects it summarises, for the summaries that make a fair query."""
    sharing: dict[str, list[_Entry]] = defaultdict(list)
    for entry in entries:
        sharing[" ".join(_words(entry.summary))].append(entry)
    queries: dict[str, list[_Entry]] = {}
    for words, group in sharing.items():
        if not _MIN_QUERY_WORDS <= len(words.split()) <= _MAX_QUERY_WORDS:
            left_out["summary too short or too long for a query"] += 1
        elif len(group) > _MAX_SHARED:
            left_out["summary shared by too many objects"] += 1
        elif any(f" {words} " in f" {' '.join(_words(e.item.signature + ' ' + e.text))} " for e in group):
            left_out["summary repeated in its own passage"] += 1
        else:
            queries[group[0].summary] = group
    return queries


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _hash(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8], "big")


# ---- writing ----------------------------------------------------------------------------------------------------


def _write(folder: Path, entries: Sequence[_Entry], queries: Mapping[str, list[_Entry]], seed: int) -> dict[str, int]:
    """Writes the BEIR files; returns the number of queries per split."""
    passages = (_passage(entry) for entry in entries)
    ids = {summary: f"summary:{group[0].item.name}" for summary, group in queries.items()}
    _write_lines(folder / "corpus.jsonl", (json.dumps(row, ensure_ascii=False) for row in passages))
    rows = ({"_id": ids[summary], "text": summary} for summary in queries)
    _write_lines(folder / "queries.jsonl", (json.dumps(row, ensure_ascii=False) for row in rows))
    by_split: dict[str, list[str]] = {split: [] for split in SPLITS}
    for summary in queries:
        by_split[_split(" ".join(_words(summary)), seed)].append(summary)
    (folder / "qrels").mkdir()
    for split, own in by_split.items():
        judged = (f"{ids[summary]}\t{entry.item.name}\t1" for summary in own for entry in queries[summary])
        _write_lines(folder / "qrels" / f"{split}.tsv", chain(["query-id\tcorpus-id\tscore"], judged))
    return {split: len(own) for split, own in by_split.items()}


def _passage(entry: _Entry) -> dict[str, Any]:
    item = entry.item
    return {
        "_id": item.name,
        "title": item.signature,
        "text": entry.text,
        "package": item.package,
        "module": item.module,
        "kind": item.kind,
        "source": item.source,
    }


def _split(key: str, seed: int) -> str:
    """The split of a summary: its hash decides, so it does not depend on what else is in the corpus."""
    draw = _hash(seed, f"split:{key}") % 100
    for split, per_cent in _HELD_OUT.items():
        if draw < per_cent:
            return split
        draw -= per_cent
    return "train"


def _write_lines(file: Path, lines: Iterable[str]) -> None:
    write_durably(file, "".join(f"{line}\n" for line in lines).encode())
