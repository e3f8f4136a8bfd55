"""raydr's encoder behind the JSON lines of `st_worker.py`, so that every contender pays the same hop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import st_worker

from raydr.encoders.text import TextEncoder
from raydr.types import Passage


def load(request: dict[str, Any]) -> Any:
    settings = {"model": request["model"], "num_threads": request["threads"], **request["options"]}
    encoder = TextEncoder(TextEncoder.Config(**settings))
    return lambda texts, _: encoder.encode_passages([Passage(str(i), text) for i, text in enumerate(texts)])


if __name__ == "__main__":
    st_worker.load = load
    st_worker.main()
