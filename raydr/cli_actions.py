"""How a command of `raydr` is declared, and the commands that have actions of their own: update, data, reproductions.

Notable: as in `raydr/cli.py`, which makes the parser, heavy imports happen inside the actions.

    raydr update show OUT/index        raydr data validate examples.jsonl        raydr reproductions check
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def command(commands: Any, name: str, run: Any, help_text: str, epilog: str | None = None) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def location(text: str) -> Path:
    """A path, or the place of a bucket's URL."""
    from raydr.errors import ConfigError
    from raydr.storage import place

    try:
        return place(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_update(commands: Any) -> None:
    parser = command(commands, "update", None, "change an index that is in use: add, delete, compact, show")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    show = command(actions, "show", _run_update_show, "what an index holds")
    add = command(actions, "add", _run_update_add, "add the embedded corpus of another run as new shards")
    delete = command(actions, "delete", _run_update_delete, "delete passages; they are never found again")
    compact = command(actions, "compact", _run_update_compact, "rewrite shards without their deleted passages")
    for action in (show, add, delete, compact):
        action.add_argument("index", type=location, help="the index, such as OUT/index")
    add.add_argument("run_folder", metavar="NEW", type=location, help="folder of a run: raydr embed CONFIG out=NEW")
    add.add_argument("--replace", action="store_true", help="passages that are there already are replaced")
    delete.add_argument("ids", nargs="+", metavar="ID", help="passage ids")
    delete.add_argument("--missing-ok", action="store_true", help="ids that are not there are no error")


def add_data(commands: Any) -> None:
    parser = command(commands, "data", None, "check and convert files of training examples")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    validate = command(
        actions, "validate", _run_validate, "check every line; name file, line and field of what is wrong"
    )
    convert = command(actions, "convert", _run_convert, "write training examples in the format of another tool")
    for action in (validate, convert):
        action.add_argument("source", help="a JSONL file of training examples")
        action.add_argument("--from", dest="source_format", default="auto", help="its format (default: recognised)")
        action.add_argument("--corpus", help="the corpus, where examples name passages by id")
        action.add_argument("--queries", help="the queries, where examples name them by id")
    convert.add_argument("target", type=Path, help="file to write")
    convert.add_argument(
        "--to", dest="target_format", required=True, help="format to write; docs/data_formats.md has all"
    )
    convert.add_argument("--target-corpus", type=Path, help="where the passages go, where the target names them by id")
    convert.add_argument("--qrels", help="judgements that turn candidates into positives and negatives")
    convert.add_argument("--rejects", type=Path, help="leave bad lines out, and list them in this file")


def add_reproductions(commands: Any) -> None:
    parser = command(
        commands,
        "reproductions",
        None,
        "run the published numbers again and compare",
        "The rows are docs/reproductions.yaml; collections are looked for in RAYDR_DATA.",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    run = command(actions, "run", _run_reproductions, "run rows and check their scores against what is expected")
    run.add_argument("ids", nargs="*", metavar="ID", help="rows to run (default: all)")
    run.add_argument("--data", type=Path, help="folder of the collections (default: RAYDR_DATA)")
    run.add_argument("--out", type=Path, help="keep the runs in this folder")
    command(actions, "check", _run_reproductions_check, "is docs/reproductions.md what the rows say?")
    command(actions, "render", _run_reproductions_render, "write docs/reproductions.md from the rows")


def _run_update_show(arguments: argparse.Namespace) -> int:
    from raydr.verbs.update import describe

    print(describe(arguments.index))
    return 0


def _run_update_add(arguments: argparse.Namespace) -> int:
    from raydr.verbs.update import add

    add(arguments.index, arguments.run_folder, replace=arguments.replace)
    return _run_update_show(arguments)


def _run_update_delete(arguments: argparse.Namespace) -> int:
    from raydr.index.store import delete

    delete(arguments.index, arguments.ids, missing_ok=arguments.missing_ok)
    return _run_update_show(arguments)


def _run_update_compact(arguments: argparse.Namespace) -> int:
    from raydr.index.store import compact

    compact(arguments.index)
    return _run_update_show(arguments)


def _run_validate(arguments: argparse.Namespace) -> int:
    from raydr.data.training_formats import validate

    checked = validate(arguments.source, arguments.source_format, corpus=arguments.corpus, queries=arguments.queries)
    for problem in checked.problems:
        print(problem)
    for field, count in checked.unread.items():
        print(f"note: {field} is not used by raydr ({count} examples)")
    print(f"{arguments.source}: {checked.format}, {checked.num_examples} examples, {len(checked.problems)} bad lines")
    return 1 if checked.problems else 0


def _run_convert(arguments: argparse.Namespace) -> int:
    from raydr.data.training_formats import convert

    done = convert(
        arguments.source,
        arguments.target,
        arguments.target_format,
        source_format=arguments.source_format,
        corpus=arguments.corpus,
        queries=arguments.queries,
        target_corpus=arguments.target_corpus,
        qrels=arguments.qrels,
        rejects=arguments.rejects,
    )
    for lost, count in done.losses.items():
        print(f"note: {arguments.target_format} has no place for {lost}; lost in {count} examples", file=sys.stderr)
    if done.num_rejected:
        print(f"{done.num_rejected} bad lines left out, listed in {arguments.rejects}", file=sys.stderr)
    print(f"{arguments.target}: {done.num_records} records from {done.num_examples} examples ({done.source_format})")
    return 0


def _run_reproductions(arguments: argparse.Namespace) -> int:
    from raydr.evaluation.reproduction_runner import run_rows

    outcomes = []
    for outcome in run_rows(arguments.ids, data=arguments.data, out=arguments.out):
        print(f"{outcome.status:<10} {outcome.row.id}: {outcome.message}", flush=True)
        outcomes.append(outcome)
    return 1 if any(outcome.status in {"differs", "failed"} for outcome in outcomes) else 0


def _run_reproductions_check(_: argparse.Namespace) -> int:
    from raydr.evaluation.reproductions import check_page

    check_page()
    return 0


def _run_reproductions_render(_: argparse.Namespace) -> int:
    from raydr.evaluation.reproductions import read_rows, write_page

    write_page(read_rows())
    return 0
