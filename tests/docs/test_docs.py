"""The documents are true: links resolve, code compiles, imports exist, commands parse, generated pages are fresh.

Notable: every `raydr` command that takes a config is run with `--dry-run`, so a renamed field breaks the page that
mentions it.

    pytest tests/docs
"""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raydr.cli import build_parser, main
from raydr.config import import_object

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The fenced blocks of a page in these languages."""
    for language, body in re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
        if language in languages:
            yield body


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as MkDocs and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in the page's shell blocks."""
    for block in blocks(page, "sh", "bash", "console"):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            for part in re.split(r"\s+(?:&&|\|)\s+", line):
                if words := shlex.split(part, comments=True):
                    yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


@by_page
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


@by_page
def test_python_compiles_and_its_imports_exist(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("raydr"):
                for name in node.names:
                    assert import_object(f"{node.module}:{name.name}") is not None


@by_page
def test_commands_exist(page, capsys):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for program, *words in commands(page):
        if program == "make":
            assert {word for word in words if "=" not in word} <= targets, words
        elif program == "raydr":
            _check_raydr(words)
        elif program == "python" and words[0] != "-m":
            assert (ROOT / words[0]).is_file(), words
        elif program in ("ray", "serve"):
            for word in words:
                assert not word.endswith((".py", ".yaml")) or word.isupper() or (ROOT / word).is_file(), words


def _check_raydr(words: list[str]) -> None:
    parser = build_parser()
    arguments, overrides = parser.parse_known_args(words)
    assert all("=" in override and not override.startswith("-") for override in overrides), words
    if str(getattr(arguments, "config", "")).endswith(".yaml"):
        config = ROOT / arguments.config
        assert main([words[0], str(config), *arguments.overrides, *overrides, "--dry-run"]) == 0, words


@by_page
def test_no_number_waits_to_be_filled_in(page):
    assert not re.findall(r"FILL:[\w-]+", page.read_text(encoding="utf-8"))


def test_the_configuration_page_is_what_the_schemas_say():
    script = ROOT / "docs" / "make_configuration.py"
    run = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_plans_are_what_the_planner_says():
    page = runpy.run_path(str(ROOT / "docs" / "make_scaling.py"))
    text = page["PAGE"].read_text(encoding="utf-8")
    assert text.count("```sh\nraydr plan") == text.count("```text\n") == len(page["_BLOCKS"].findall(text))
    assert page["refreshed"](text) == text, "run python docs/make_scaling.py"


def test_every_field_says_what_it_means():
    assert runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))["fields_without_meaning"]() == []
