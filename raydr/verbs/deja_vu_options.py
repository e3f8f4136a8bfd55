"""The command line of `raydr deja-vu`: its options, and what it prints. Light, so that `raydr --help` is immediate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "find old articles that tell a story like today's, about other people and places"
EPILOG = """\
OLD and TODAY are CSV, TSV, JSON lines or Parquet files with one article a row. Columns are found by their usual names
(text, title, date, publication, place, id, ocr_quality); others are named: --column text=ocr_text.

examples:
  raydr deja-vu old.csv today.csv --train-tagger marked.jsonl         the first time: trains what finds the names
  raydr deja-vu old.csv today.csv --from-year 1900 --to-year 1929     from then on
  raydr deja-vu old.csv other.csv --publication "The Poole Herald" -k 20

results: OUT/deja_vu.csv for a spreadsheet, OUT/deja_vu.html to read. docs/deja_vu.md explains all of it.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options; each is a field of `raydr.verbs.deja_vu.DejaVuConfig`."""
    parser.add_argument("articles", metavar="OLD", help="file of the old articles")
    parser.add_argument("queries", metavar="TODAY", help="file of the articles of today")
    parser.add_argument("--out", type=Path, help="folder of the results (runs/deja_vu)")
    parser.add_argument("-k", type=int, help="old articles for each of today's (10)")
    parser.add_argument("--from-year", type=int, metavar="YEAR", help="only articles of this year and later")
    parser.add_argument("--to-year", type=int, metavar="YEAR", help="only articles of this year and earlier")
    for name, what in (("publication", "of this newspaper"), ("place", "from this place")):
        parser.add_argument(f"--{name}", action="append", metavar="NAME", help=f"only articles {what}; may be repeated")
    parser.add_argument(
        "--column", action="append", type=_column, metavar="WHAT=NAME", help="what a column is called, text=ocr_text"
    )
    parser.add_argument("--tagger", metavar="MODEL", help="what finds names: a folder, or a model of the hub")
    parser.add_argument(
        "--train-tagger", action="append", metavar="FILE", help="train it on texts with marked names; may be repeated"
    )
    parser.add_argument("--tagger-steps", type=int, metavar="N", help="how long it is trained (600)")
    parser.add_argument("--encoder", metavar="MODEL", help="what compares texts (minilm, which is installed)")
    parser.add_argument("--reprints", action="store_true", default=None, help="keep all copies of a reprinted article")
    parser.add_argument(
        "--within-days", type=int, metavar="N", help="copies of an article are printed within so many days (30)"
    )
    parser.add_argument(
        "--no-masking", dest="masking", action="store_false", default=None, help="compare names as well"
    )
    parser.add_argument("--runtime", choices=["auto", "local", "ray"], help="auto: on Ray with many articles")


def run(arguments: argparse.Namespace) -> int:
    """Does what was asked, and prints where the results are."""
    from raydr.config import validate
    from raydr.verbs.deja_vu import DejaVuConfig, deja_vu

    given: dict[str, Any] = {}
    for name in DejaVuConfig.model_fields:
        value = getattr(arguments, "column" if name == "columns" else name, None)
        if value is not None:
            given[name] = dict(value) if name == "columns" else value
    table, page = deja_vu(validate(DejaVuConfig, given, where="raydr deja-vu"))
    print(f"table: {table}\npage:  {page}")
    return 0


def _column(text: str) -> tuple[str, str]:
    what, is_there, name = text.partition("=")
    if not is_there or not what or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form text=NAME")
    return what, name
