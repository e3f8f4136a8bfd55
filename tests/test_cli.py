"""The command line: its surface is frozen here, its mistakes exit with 2 and a message that helps."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest

from raydr.cli import build_parser, main

SURFACE = {
    "demo": {"overrides", "--out", "--port", "--no-serve"},
    "demo-images": {"overrides", "--out", "--port", "--no-serve"},
    "ingest": {"config", "overrides", "--dry-run", "--output"},
    "embed": {"config", "overrides", "--dry-run", "--output"},
    "index": {"config", "overrides", "--dry-run", "--output"},
    "search": {"config", "overrides", "--dry-run", "--output", "--index", "-k", "--mode"},
    "rerank": {"config", "overrides", "--dry-run", "--output"},
    "evaluate": {"config", "overrides", "--dry-run", "--output"},
    "reproduce": {"config", "overrides", "--dry-run", "--output"},
    "train": {"config", "overrides", "--dry-run", "--output"},
    "mine": {"config", "overrides", "--dry-run", "--output"},
    "serve": {"index", "--host", "--port"},
    "deja-vu": {
        *("articles", "queries", "--out", "-k", "--from-year", "--to-year", "--publication", "--place", "--column"),
        *("--tagger", "--train-tagger", "--tagger-steps", "--encoder", "--reprints", "--within-days", "--no-masking"),
        "--runtime",
    },
    "update show": {"index"},
    "update add": {"index", "run_folder", "--replace"},
    "update delete": {"index", "ids", "--missing-ok"},
    "update compact": {"index"},
    "data validate": {"source", "--from", "--corpus", "--queries"},
    "data convert": {
        "source",
        "target",
        "--from",
        "--to",
        "--corpus",
        "--queries",
        "--target-corpus",
        "--qrels",
        "--rejects",
    },
    "reproductions run": {"ids", "--data", "--out"},
    "reproductions check": set(),
    "reproductions render": set(),
    "plan": {"config", "overrides", "--brief", "--measure", "--dry-run", "--output"},
    "doctor": {"--ray", "--verify", "--output"},
}


def _surface(parser: argparse.ArgumentParser, name: str = "") -> dict[str, set[str]]:
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if nested:
        choices = nested[0].choices.items()
        return {key: words for word, inner in choices for key, words in _surface(inner, f"{name} {word}").items()}
    return {name.strip(): {(a.option_strings or [a.dest])[0] for a in parser._actions if a.dest != "help"}}


def test_the_surface_is_what_users_rely_on():
    assert _surface(build_parser()) == SURFACE


def test_help_is_immediate_and_imports_nothing_heavy():
    code = (
        "import sys, raydr.cli; raydr.cli.build_parser().format_help(); print([m for m in HEAVY if m in sys.modules])"
    )
    heavy = "HEAVY = ['ray', 'torch', 'faiss', 'transformers', 'numpy', 'pandas', 'pyarrow', 'pydantic']; "
    printed = subprocess.run([sys.executable, "-c", heavy + code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_dry_run_prints_the_resolved_config(capsys):
    assert main(["embed", "jobs/configs/zero_shot.yaml", "--dry-run", "data.split=dev", "search.k=7"]) == 0
    printed = capsys.readouterr().out
    assert "split: dev" in printed and "k: 7" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["embed", "nowhere.yaml"], ["nowhere.yaml", "no such config"]),
        (["embed", "jobs/configs/zero_shot.yaml", "data.spilt=dev"], ["data.spilt", "did you mean 'split'"]),
        (["embed", "jobs/configs/zero_shot.yaml", "data.path=/nowhere/at/all"], ["/nowhere/at/all"]),
        (["search", "join", "frames"], ["quote the query"]),
        (["search", "join frames", "--index", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["reproduce", "jobs/configs/zero_shot.yaml", "method.import_path=nothing"], ["package.module:Name"]),
    ],
)
def test_a_mistake_exits_with_2_and_says_what_to_do(arguments, words, capsys, tmp_path, monkeypatch):
    arguments = [*arguments, f"out={tmp_path}"] if arguments[0] != "search" else arguments
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert "Traceback" not in message


def test_without_a_config_the_defaults_hold(capsys):
    assert main(["embed", "data.path=somewhere", "out=there", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "path: somewhere" in printed and "ZeroShot" in printed


def test_output_json_is_json(tmp_path, capsys, tiny_beir):
    status = main(
        ["ingest", "jobs/configs/zero_shot.yaml", f"data.path={tiny_beir}", f"out={tmp_path}", "--output", "json"]
    )
    assert status == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "corpus"
