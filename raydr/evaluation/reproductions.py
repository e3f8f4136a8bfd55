"""Reproductions as data: one YAML of commands with expected scores, and the page rendered from it.

Notable: a row says what to type, which score must come out, within what tolerance, and whose figure that is; what was
last measured, when, on what hardware, at which commit and with which versions is written into the row by
`raydr.evaluation.reproduction_runner` and never by hand. A new method adds its rows to `docs/reproductions.yaml` and
renders the page again; CI checks that the two agree.

    raydr reproductions run scifact-minilm     # run the commands, compare, update the YAML and the page
    raydr reproductions check                  # is the YAML valid, and the page what it renders to?
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, model_validator

from raydr.artifacts import write_durably
from raydr.config import Config, read_yaml, validate
from raydr.errors import ConfigError

ROWS_FILE = Path("docs/reproductions.yaml")
PAGE_FILE = Path("docs/reproductions.md")

_HEADER = """\
# Commands, the scores they must give, and what was last measured (`verified`, written by `raydr reproductions run`,
# which also keeps this layout). The fields are documented in raydr/evaluation/reproductions.py.
"""


class Verified(Config):
    """What the last run that reproduced the row measured."""

    measured: dict[str, float]
    date: str
    """UTC, ISO 8601."""
    commit: str
    """`-dirty` behind it: with changes to tracked files that were not committed."""
    wall_s: float
    """Of all commands together, from nothing."""
    hardware: str
    versions: dict[str, str]


class Reproduction(Config):
    """One row."""

    id: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    """Also the heading, and so the anchor, of its section on the page."""
    title: str
    source: str
    """The paper or page the expected figure comes from."""
    figure: Literal["published", "own"]
    """Whose figure `expected` is: published elsewhere, or raydr's own, recorded to notice a change."""
    dataset: str
    """Folder below the data directory; the row is skipped where it is absent."""
    commands: list[str] = Field(min_length=1)
    """Run in order from the repository's root; {data} and {out} stand for the data directory and an empty folder."""
    metrics: str = "{out}/evaluate/metrics.json"
    """The flat JSON of measures that the commands leave."""
    expected: dict[str, float] = Field(min_length=1)
    """Measure (ir_measures name) -> score."""
    tolerance: float = Field(gt=0)
    """Largest absolute difference from `expected`."""
    needs_gpu: bool = False
    timeout_s: int = 3600
    """For each command."""
    note: str = ""
    verified: Verified | None = None

    @model_validator(mode="after")
    def _commands_write_to_out(self) -> Reproduction:
        if not any("{out}" in command for command in self.commands):
            raise ValueError("no command names {out}, so nothing would say where the scores are")
        return self


def read_rows(path: Path = ROWS_FILE) -> list[Reproduction]:
    """The rows of the YAML. Raises `ConfigError` naming the row and the field."""
    content = read_yaml(path)
    rows = content.get("reproductions")
    if not isinstance(rows, list) or len(content) != 1:
        raise ConfigError(f"{path}: wants one key, `reproductions`, with a list of rows")
    parsed = []
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: a row is a mapping of fields, this is {type(row).__name__}")
        parsed.append(validate(Reproduction, row, where=f"{where} ({row.get('id', 'no id')})"))
    ids = [row.id for row in parsed]
    if repeated := sorted({id_ for id_ in ids if ids.count(id_) > 1}):
        raise ConfigError(f"{path}: the id {repeated[0]!r} is used twice")
    return parsed


def write_rows(rows: Sequence[Reproduction], path: Path = ROWS_FILE) -> None:
    """Writes the YAML in its one layout; fields at their defaults are left out."""
    content = {"reproductions": [row.model_dump(mode="json", exclude_defaults=True) for row in rows]}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10_000)
    write_durably(path, (_HEADER + text.replace("\n- ", "\n\n- ")).encode())


def select_rows(rows: Sequence[Reproduction], ids: Sequence[str]) -> list[Reproduction]:
    """The rows with these ids, all of them for none. Raises `ConfigError` for an unknown id, with the nearest known."""
    by_id = {row.id: row for row in rows}
    for id_ in ids:
        if id_ not in by_id:
            close = difflib.get_close_matches(id_, by_id, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(by_id)}"
            raise ConfigError(f"no reproduction {id_!r}; {hint}")
    return [by_id[id_] for id_ in ids] if ids else list(rows)


def render_page(rows: Sequence[Reproduction]) -> str:
    """The documentation page: a table of scores, then each row's commands to copy."""
    lines = [
        "# Reproductions",
        "",
        "Copy a command, get the score. Each row below is run by `raydr reproductions run`, which compares what it",
        "measures with the expected figure and writes both here; this page is made from `docs/reproductions.yaml`.",
        "`$RAYDR_DATA` is the folder that holds the collections as BEIR folders.",
        "",
        "| reproduction | measure | expected | measured | last verified |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        for index, (measure, expected) in enumerate(row.expected.items()):
            name = f"[{row.title}](#{row.id})" if index == 0 else ""
            figure = f"{expected:g} ± {row.tolerance:g}" + (" (own figure)" if row.figure == "own" else "")
            verified = row.verified if row.verified and measure in row.verified.measured else None
            value = f"{verified.measured[measure]:.4f}" if verified else "not yet"
            date = verified.date[:10] if verified else ""
            lines.append(f"| {name} | {measure} | {figure} | {value} | {date} |")
    for row in rows:
        lines += _section(row)
    return "\n".join(lines) + "\n"


def write_page(rows: Sequence[Reproduction], page_file: Path = PAGE_FILE) -> None:
    """Renders the page to its file."""
    write_durably(page_file, render_page(rows).encode())


def check_page(rows_file: Path = ROWS_FILE, page_file: Path = PAGE_FILE) -> None:
    """Raises `ConfigError` when the YAML is not valid, or the page is not what it renders to."""
    page = render_page(read_rows(rows_file))
    if not page_file.is_file() or page_file.read_text(encoding="utf-8") != page:
        raise ConfigError(f"{page_file} does not match {rows_file}; run: raydr reproductions render")


def _section(row: Reproduction) -> list[str]:
    places = {"data": "$RAYDR_DATA", "out": f"runs/reproductions/{row.id}"}
    lines = ["", f"## {row.id}", "", f"{row.title}. Source: {row.source}", ""]
    if row.note:
        lines += [row.note, ""]
    lines += ["```bash", *(filled(command, places) for command in row.commands), "```"]
    if row.verified:
        versions = ", ".join(f"{package} {number}" for package, number in row.verified.versions.items())
        others = ", ".join(f"{measure} {value:.4f}" for measure, value in row.verified.measured.items())
        lines += [
            "",
            f"Last verified {row.verified.date[:10]} at commit `{row.verified.commit}` in {row.verified.wall_s:.0f} s",
            f"on {row.verified.hardware}; {versions}. All that was measured: {others}.",
        ]
    return lines


def filled(text: str, places: Mapping[str, str]) -> str:
    """`text` with {data} and {out} replaced; other braces stay."""
    return re.sub(r"\{(data|out)\}", lambda match: places[match[1]], text)
