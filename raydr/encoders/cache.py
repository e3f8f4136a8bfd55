"""Where raydr keeps what it can make again: converted networks, what a processor was measured to do."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`RAYDR_CACHE`, else `raydr` in the user's cache folder."""
    if folder := os.environ.get("RAYDR_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raydr"
