"""Texts in which people marked the named entities: read, checked, brought to one set of labels, kept as examples.

Notable: what is wrong is named with file, line and field. Collections mark different things: wnut17 has six kinds,
topres19th marks places alone, where every person's name is an O; `annotated` (by default the kinds that occur) says
what was looked for, and the rest is neither right nor wrong in training (raydr/train/tagging.py).

| layout | what a file holds |
| --- | --- |
| JSON lines | one text a line: `tokens` and `tags` (B-, I-, O), of equal length |
| CoNLL (any other suffix) | one token a line, first column the token, last the tag; a blank line ends a text |

| label of the source | here |
| --- | --- |
| person, per | PER |
| group, corporation, org, organisation, organization | ORG |
| location, loc, gpe, geo-loc, facility, building, street | LOC |
| product, creative-work, misc | MISC |

    texts = read_tagged(TaggedSource(path="data/ner/topres19th/train.jsonl"))
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from raydr.artifacts import fingerprint, is_finished, write_artifact
from raydr.config import Config
from raydr.data.entities import KINDS, entities_of, joined
from raydr.data.examples import KIND, Example, ExampleSet, ExampleWriter, QueryLabels
from raydr.data.files import Folder, SourceFile, read_lines
from raydr.data.ocr import noisy_query
from raydr.data.problems import Problems
from raydr.data.records import JsonLines, Record
from raydr.errors import DataError
from raydr.storage import named
from raydr.types import Annotation, Query

Kind = Literal["PER", "ORG", "LOC", "MISC"]
USUAL_LABELS: dict[str, Kind] = {
    **dict.fromkeys(("person", "per"), "PER"),
    **dict.fromkeys(("group", "corporation", "org", "organisation", "organization"), "ORG"),
    **dict.fromkeys(("location", "loc", "gpe", "geo-loc", "facility", "building", "street"), "LOC"),
    **dict.fromkeys(("product", "creative-work", "misc"), "MISC"),
}
_HINT = "mend them; a label that raydr does not know is given its kind with labels={NAME: PER}"


class TaggedSource(Config):
    """A file of texts with marked entities."""

    path: str
    """JSON lines (`.jsonl`) or CoNLL; any URI pyarrow opens."""
    labels: dict[str, Kind] = Field(default_factory=dict)
    """What the file's own labels mean, beside the usual ones: {ship: MISC}."""
    annotated: tuple[Kind, ...] | None = None
    """What was looked for; null: the kinds that occur in the file. Where only LOC was, a person's name is an O in the
    file and is not taken for one here."""


class NoiseConfig(Config):
    """Misread copies of texts to train on, beside the texts as they are."""

    copies: int = Field(default=1, ge=0)
    """So many of each text."""
    rates: tuple[float, float] = (0.02, 0.12)
    """The share of misread characters of a copy lies between these."""


class TaggedText(NamedTuple):
    """A text in which entities were marked."""

    name: str
    """File and line."""
    text: str
    annotation: Annotation
    offsets: list[tuple[int, int]]
    """Where each token of the file stands in the text."""


def read_tagged(source: TaggedSource) -> list[TaggedText]:
    """The texts of a file. Raises `DataError` naming file, line and field."""
    file = next(iter(Folder.open(source.path).files()), None)
    if file is None or not Folder.open(source.path).is_file:
        raise DataError(f"{source.path}: is a folder; name a file of marked texts in it")
    known = {**USUAL_LABELS, **{name.lower(): kind for name, kind in source.labels.items()}}
    with Problems(source.path, hint=_HINT) as problems:
        marked = [
            (line, tokens, _kinds(file.name, line, tags, known, problems))
            for line, tokens, tags in _texts(file, problems)
        ]
        problems.check()
    found = {tag.partition("-")[2] for _, _, tags in marked for tag in tags} - {""}
    labels = source.annotated or tuple(kind for kind in KINDS if kind in found)
    if not labels:
        raise DataError(f"{source.path}: no entity is marked in any of its {len(marked)} texts")
    if beyond := found - set(labels):
        raise DataError(f"{source.path}: {min(beyond)} is marked, and `annotated` leaves it out; add it there")
    texts = []
    for line, tokens, tags in marked:
        text, offsets = joined(tokens)
        annotation = Annotation(tuple(entities_of(tags, offsets)), labels)
        texts.append(TaggedText(f"{file.name}:{line}", text, annotation, offsets))
    return texts


def tagged_examples(
    sources: Sequence[TaggedSource], out: Path, *, noise: NoiseConfig | None = None, seed: int = 0
) -> ExampleSet:
    """The texts of all sources, and misread copies of them, as the examples `out`; finished ones stay as they are.

    A file that was changed makes them anew.
    """
    noise = noise or NoiseConfig(copies=0)
    stamps = [file.stamp for source in sources for file in Folder.open(source.path).files()]
    settings: dict[str, Any] = {
        "tagged": [source.model_dump(mode="json") for source in sources],
        "files": stamps,
        "noise": noise.model_dump(mode="json"),
        "seed": seed,
    }
    if is_finished(out, fingerprint(KIND, settings, {})):
        print(f"tagger: {named(out)} has these examples already", file=sys.stderr)
        return ExampleSet.open(out)
    clean = [
        Query(f"{number}/{marked.name}", marked.text, annotation=marked.annotation)
        for number, source in enumerate(sources)
        for marked in read_tagged(source)
    ]
    rng = np.random.default_rng(seed)
    queries = list(clean)
    for copy in range(noise.copies):
        for query in clean:
            misread = noisy_query(query, rate=float(rng.uniform(*noise.rates)), rng=rng)
            queries.append(misread._replace(query_id=f"{query.query_id}/{copy + 1}"))
    with (
        write_artifact(out, kind=KIND, config=settings) as artifact,
        ExampleWriter(out, labels=QueryLabels(has_annotations=True)) as writer,
    ):
        writer.add([Example(query) for query in queries if query.text.strip()])
        artifact.counts |= writer.counts
    return ExampleSet.open(out)


def _texts(file: SourceFile, problems: Problems) -> Iterator[tuple[int, list[str], list[str]]]:
    """(line, tokens, tags) of each text that can be read."""
    if file.suffix in (".jsonl", ".json"):
        for line, record in JsonLines(file).read(problems, lambda _: None):
            tokens, tags = (_strings(record, field) for field in ("tokens", "tags"))
            if tokens is None or tags is None:
                field = "tokens" if tokens is None else "tags"
                problems.add(file.name, line, field, "must be a list of strings", record)
            elif len(tokens) != len(tags):
                detail = f"{len(tags)} tags for {len(tokens)} tokens"
                problems.add(file.name, line, "tags", "must be as many as the tokens", record, detail)
            elif tokens:
                yield line, tokens, tags
        return
    tokens, tags, first = [], [], 0
    for number, raw in read_lines(file):
        try:
            columns = raw.decode("utf-8").split()
        except UnicodeDecodeError as error:
            problems.add(file.name, number, None, "not valid UTF-8", raw, f"byte {error.start + 1} of the line")
            continue
        if not columns or columns[0] == "-DOCSTART-":
            if tokens:
                yield first, tokens, tags
            tokens, tags = [], []
        elif len(columns) < 2:
            problems.add(file.name, number, None, "a token without a tag", raw)
        else:
            first = first if tokens else number
            tokens.append(columns[0])
            tags.append(columns[-1])
    if tokens:
        yield first, tokens, tags


def _strings(record: Record, field: str) -> list[str] | None:
    values = record.get(field)
    is_right = isinstance(values, list) and all(isinstance(value, str) for value in values)
    return values if is_right else None


def _kinds(file: str, line: int, tags: list[str], known: dict[str, Kind], problems: Problems) -> list[str]:
    """The tags with the labels of this module."""
    kinds = []
    for place, tag in enumerate(tags, start=1):
        prefix, _, label = tag.partition("-")
        if tag == "O":
            kinds.append(tag)
        elif prefix not in ("B", "I") or label.lower() not in known:
            reason = "is not a BIO tag of a known label"
            problems.add(file, line, "tags", reason, tags, f"tag {place}, {tag!r}; known: {', '.join(sorted(known))}")
            return ["O"] * len(tags)
        else:
            kinds.append(f"{prefix}-{known[label.lower()]}")
    return kinds
