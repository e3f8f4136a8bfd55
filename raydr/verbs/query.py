"""query: one question to an index in this process, without a server; what `raydr search "words"` does.

raydr search "join two data frames on a column" --index runs/demo/index --mode hybrid
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal


def answer(index: Path, text: str, *, k: int, mode: Literal["dense", "bm25", "hybrid"]) -> list[dict[str, Any]]:
    """The `k` best hits for one query: `id`, `score`, `title`, `text` and the corpus's own columns.

    The index names its encoder, so nothing else is needed. Raises `ArtifactError` when there is no index.
    """
    import numpy as np

    from raydr.encoders.factory import EncoderFactory
    from raydr.index.reader import IndexReader
    from raydr.stages.config import SearchConfig
    from raydr.stages.prf import build_learned
    from raydr.stages.search import Searcher
    from raydr.types import PASSAGE_ID, SCORE, Query

    reader = IndexReader.open(index)
    config = SearchConfig(mode=mode, k=k)
    with ExitStack() as stack:
        build_refiner = partial(build_learned, reader.method)
        searcher = Searcher(reader, config, EncoderFactory(reader.method), build_refiner, use_ray=False, stack=stack)
        table = searcher.hits([Query("query", text)], None)
    ids, scores = table.column(PASSAGE_ID).to_pylist(), table.column(SCORE).to_pylist()
    found = reader.passages(np.flatnonzero(reader.select(allow_ids=ids)))
    by_id = {passage.pop(PASSAGE_ID): passage for passage in found}
    return [{"id": id_, "score": score, **by_id[id_]} for id_, score in zip(ids, scores, strict=True)]


def print_hits(hits: Sequence[dict[str, Any]], *, query: str) -> None:
    """Prints hits (`id`, `score`, `title`, `text`) for a person: bold titles where stdout is a terminal."""
    bold, dim, plain = ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")
    width = min(shutil.get_terminal_size().columns, 110)
    print(f"{bold}{query}{plain}")
    if not hits:
        print("  nothing found")
    for rank, hit in enumerate(hits, start=1):
        title = _cut(hit["title"] or hit["id"], width - 13)
        snippet = _cut(hit["text"], width - 5)
        print(f"  {rank}. {bold}{title}{plain}  {dim}{hit['score']:.3f}{plain}")
        if snippet:
            print(f"     {dim}{snippet}{plain}")
    print()


def _cut(text: str, width: int) -> str:
    """The start of a text on one line of at most `width` characters."""
    line = " ".join(text[: 4 * width].split())
    return line if len(line) <= width else line[: width - 4] + " ..."
