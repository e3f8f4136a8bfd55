"""A fixed small set of the fuzzers' cases, over everything that raydr reads and every route; thousands run by hand:
`python benchmarks/fuzz.py --cases 1000`, `python benchmarks/fuzz_http.py --cases 10000`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def _run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / script), *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_no_file_is_answered_with_anything_but_a_result_or_an_error_that_names_it():
    assert " 0 findings" in _run("fuzz.py", "--cases", "25", "--seed", "11")


@pytest.mark.slow
def test_no_request_is_answered_with_anything_but_what_the_api_names():
    assert "0 findings" in _run("fuzz_http.py", "--cases", "150", "--seed", "11")
