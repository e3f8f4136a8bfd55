"""Runs every `raydr plan` command of docs/scaling.md and puts what it prints into the block behind it.

Notable: a command is a `sh` block, its output the `text` block that follows, so the page cannot drift from the planner
or from its figures. `--check` writes nothing and fails when the page is out of date.

    python docs/make_scaling.py [--check]
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

from raydr.cli import main

PAGE = Path(__file__).with_name("scaling.md")
_BLOCKS = re.compile(r"^```sh\nraydr (plan .*?)^```\n\n```text\n.*?^```$", re.S | re.M)


def refreshed(page: str) -> str:
    """The page with the output of each of its commands as it is now."""
    return _BLOCKS.sub(lambda block: f"```sh\nraydr {block[1]}```\n\n```text\n{printed(block[1])}```", page)


def printed(command: str) -> str:
    """What `raydr COMMAND` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if main(shlex.split(command.replace("\\\n", " "))):
            sys.exit(f"raydr {command} failed")
    return out.getvalue()


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(refreshed(text), encoding="utf-8")
    elif refreshed(text) != text:
        sys.exit(f"{PAGE} is out of date: run python {Path(sys.argv[0])}")
