"""The examples run as they stand, and print what their docstrings promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def _printed(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_quickstart_finds_the_moon():
    question, best, *_ = _printed("examples/quickstart.py").splitlines()
    assert question == "why do the tides come and go"
    assert "moon" in best


def test_a_new_method_runs_through_every_verb():
    metrics = json.loads(_printed("examples/add_a_method.py"))
    assert metrics["R@100"] == 1.0
