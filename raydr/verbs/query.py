"""query: one question to an index in this process, without a server; what `raydr search "words"` does.

    raydr search "join two data frames on a column" --index runs/demo/index --mode hybrid
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

_SNIPPET_CHARS = 400


def print_hits(hits: Sequence[dict[str, Any]], *, query: str) -> None:
    """Prints hits (`id`, `score`, `title`, `text`) for a person: bold titles where stdout is a terminal."""
    bold, dim, plain = ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")
    width = min(shutil.get_terminal_size().columns, 110)
    print(f"{bold}{query}{plain}")
    if not hits:
        print("  nothing found")
    for rank, hit in enumerate(hits, start=1):
        title = textwrap.shorten(hit["title"] or hit["id"], width - 14, placeholder=" ...")
        snippet = textwrap.shorten(hit["text"][:_SNIPPET_CHARS], width - 6, placeholder=" ...")
        print(f"  {rank}. {bold}{title}{plain}  {dim}{hit['score']:.3f}{plain}")
        if snippet:
            print(f"     {dim}{snippet}{plain}")
    print()
