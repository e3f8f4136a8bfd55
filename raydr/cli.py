"""The `raydr` command: what a person types. It parses, calls the same functions as the jobs, and prints.

Notable: results go to stdout, progress and notes to stderr; exit status 0 is success, 1 a failure, 2 a mistake in what
was asked (config, data, artifact) with one message that says what to do; heavy imports happen inside the commands, so
`raydr --help` is immediate.

    raydr demo
    raydr search "join two data frames on a column"
    raydr reproduce jobs/configs/zero_shot.yaml data.path=DIR data.split=test out=OUT
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raydr.cli_actions import add_data, add_reproductions, add_update, command, location
from raydr.errors import ConfigError, RaydrError
from raydr.verbs import deja_vu_options
from raydr.version import __version__

DEMO_INDEX = Path("runs/demo/index")

_VERBS = {
    "ingest": "read and check a corpus, its queries and judgements (OUT/corpus)",
    "embed": "embed a corpus (OUT/corpus, OUT/embed)",
    "index": "build the FAISS shards and the BM25 side (OUT/index)",
    "search": "search: type a query, or give a config to search with a whole query set (OUT/search/run.trec)",
    "rerank": "reorder a run with a reranker (OUT/rerank/run.trec)",
    "evaluate": "measure a run against judgements (OUT/evaluate/metrics.json, report.html), or compare run files",
    "reproduce": "all of the above in order, skipping what is finished",
    "mine": "find negatives for training queries in an index (OUT/examples)",
    "train": "train the method, from mining to the model (OUT/train)",
}

_EPILOG = """\
start here:
  raydr doctor                                    is this machine ready?
  raydr demo                                      embed, index, evaluate and serve this environment's own documentation
  raydr search "join two data frames"             search what the demo indexed, without a server
  raydr demo-images                               search by picture: pictures drawn here, a model trained on them

your own collection (a BEIR folder: corpus.jsonl, queries.jsonl, qrels/test.tsv), with a checkout's configs:
  raydr reproduce jobs/configs/zero_shot.yaml data.path=DIR data.split=test out=OUT
  raydr serve OUT/index                           the search page and the HTTP API on http://127.0.0.1:8000

on a cluster: ray job submit --working-dir . -- python jobs/reproduce.py CONFIG.yaml key=value ...
"""

_VERB_EPILOG = """\
key=value sets any field of the config by its dotted name; the value is read as YAML:
  data.path=DIR  data.split=test  out=OUT  runtime=ray  search.k=100  evaluate.measures=[nDCG@10,AP]
`--dry-run` prints the resolved config; docs/configuration.md lists every field.
"""

_PLAN_EPILOG = """\
what a plan is made of, each a field with its meaning in docs/configuration.md:
  corpus.passages (required), corpus.tokens_per_passage   index.factory, index.shard_bytes, index.search.nprobe
  encoder.layers, encoder.hidden, encoder.dim             search.qps, search.p99_ms, search.replicas
  node.cores, node.memory_gib, node.price_per_hour        gpu_node.gpus, gpu_node.peak_flops, gpu_node.price_per_hour
  rerank.network.layers, rerank.kind, rerank.depth        train.queries, train.batch_size

examples:
  raydr plan corpus.passages=1e7 search.qps=50                             on nodes of 16 cores, with MiniLM, exactly
  raydr plan corpus.passages=1e7 index.factory=HNSW32 node.price_per_hour=0.8
  raydr plan corpus.passages=1e9 index.factory=IVF4096,PQ48 index.search.nprobe=16 --brief
  raydr plan corpus.passages=1e9 gpu_node.gpus=8 units.gpu_embed_share=0.3  a GPU's share of its peak is yours to give
  raydr plan --measure > here.yaml && raydr plan here.yaml corpus.passages=1e7      with this machine's own figures

Every figure comes with its formula and with the command, commit and hardware that measured what it rests on. What
nobody has measured is a question mark; a cost appears where a node has a price. docs/scaling.md works through three
sizes.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = _parse(argv)
    try:
        return arguments.run(arguments) or 0
    except RaydrError as error:
        print(f"raydr: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("raydr: interrupted; run the same command again and it goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `raydr ... | head`: the reader has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses, and takes `key=value` also after an option, where argparse has closed the list of positionals."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raydr",
        description="Dense retrieval, end to end, on a Ray cluster, with the same code on a laptop.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"raydr {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demos(commands)
    for verb, help_text in _VERBS.items():
        _add_verb(commands, verb, help_text)
    _add_serve(commands)
    deja_vu_options.add_options(
        command(commands, "deja-vu", deja_vu_options.run, deja_vu_options.HELP, deja_vu_options.EPILOG)
    )
    add_update(commands)
    add_data(commands)
    add_reproductions(commands)
    _add_plan(commands)
    _add_doctor(commands)
    return parser


def _add_verb(commands: Any, verb: str, help_text: str) -> None:
    parser = command(commands, verb, _run_verb, help_text, _VERB_EPILOG)
    parser.set_defaults(verb=verb)
    if verb == "search":
        parser.set_defaults(run=_run_search)
        parser.add_argument("config", metavar="QUERY|CONFIG", help="words to search for, or a YAML config")
        parser.add_argument("--index", type=location, default=DEMO_INDEX, help="index to search (default: the demo's)")
        parser.add_argument("-k", type=int, default=5, help="number of results (default: 5)")
        parser.add_argument("--mode", choices=["dense", "bm25", "hybrid"], default="dense", help="default: dense")
    elif verb == "evaluate":
        parser.set_defaults(run=_run_evaluate)
        parser.add_argument(
            "config", metavar="CONFIG|QRELS", help="a YAML config, or a qrels file to measure runs with"
        )
    else:
        parser.add_argument("config", metavar="CONFIG", help="a YAML config; left out: the defaults, zero-shot")
    words, about = ("key=value|RUN", "; or run files") if verb == "evaluate" else ("key=value", "")
    parser.add_argument("overrides", nargs="*", metavar=words, help=f"override a field of the config{about}")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--output", choices=["text", "json"], default="text", help="form of the result on stdout")


def _add_demos(commands: Any) -> None:
    again = "A second run reuses what is finished. Stop the server with Ctrl-C."
    documents = command(
        commands,
        "demo",
        _run_demo,
        "search the documentation of the packages installed here: embed, index, evaluate, serve",
        again,
    )
    pictures = command(
        commands,
        "demo-images",
        _run_demo_images,
        "search pictures that this machine draws: train, embed, index, evaluate, serve",
        again,
    )
    for parser, example, out in (
        (documents, "size=all takes everything (or size=3000)", "runs/demo"),
        (pictures, "such as size=400 or clip_steps=200", "runs/demo_images"),
    ):
        parser.add_argument("overrides", nargs="*", metavar="key=value", help=example)
        parser.add_argument("--out", type=Path, help=f"folder of the artifacts ({out})")
        parser.add_argument("--port", type=int, help="port of the search page on 127.0.0.1 (8000)")
        parser.add_argument("--no-serve", action="store_true", help="stop after the evaluation")


def _add_serve(commands: Any) -> None:
    parser = command(
        commands,
        "serve",
        _run_serve,
        "serve an index: the search page and the HTTP API",
        "For replicas, autoscaling, API keys and limits use a Serve config: serve run serve_configs/search.yaml",
    )
    which = {"type": location, "default": DEMO_INDEX}
    parser.add_argument("index", nargs="?", **which, help="index to serve (default: the demo's)")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")


def _add_plan(commands: Any) -> None:
    parser = command(
        commands,
        "plan",
        _run_plan,
        "say what a corpus, an index, a load and models need in nodes, memory, hours and money",
        _PLAN_EPILOG,
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML config; left out: the defaults")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a field of the plan")
    parser.add_argument("--brief", action="store_true", help="only the table and what to mind, without the formulas")
    parser.add_argument("--measure", action="store_true", help="measure this machine's figures and print them as YAML")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--output", choices=["text", "json"], default="text", help="form of the result on stdout")


def _add_doctor(commands: Any) -> None:
    parser = command(commands, "doctor", _run_doctor, "check this machine and say what is missing")
    parser.add_argument("--ray", action="store_true", help="also start a small Ray cluster and run a task on it")
    parser.add_argument(
        "--verify", type=location, metavar="DIR", help="compare all artifacts in DIR with their checksums"
    )
    parser.add_argument("--output", choices=["text", "json"], default="text", help="form of the result on stdout")


def _run_verb(arguments: argparse.Namespace) -> int:
    from raydr.config import load
    from raydr.verbs.config import RunConfig

    config = load(RunConfig, *_config_and_overrides(arguments))
    if arguments.dry_run:
        print(_as_yaml(config.model_dump(mode="json")), end="")
        return 0
    _warn_of_paths_inside_a_job(config.out)
    artifact = _verb_function(arguments.verb)(config)
    if arguments.output == "json":
        print(json.dumps({"artifact": str(artifact.path), **artifact.manifest.model_dump(exclude={"files"})}, indent=2))
    elif artifact.manifest.kind == "evaluation":
        print((artifact.path / "summary.txt").read_text(), end="")
    else:
        print(artifact.path)
    return 0


def _config_and_overrides(arguments: argparse.Namespace) -> tuple[str | None, list[str]]:
    """The config file, None where the first word is an override already: the defaults, and what is given."""
    path, overrides = arguments.config, arguments.overrides
    if path is not None and "=" in path and not Path(path).is_file():
        return None, [path, *overrides]
    return path, overrides


def _as_yaml(content: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(content, sort_keys=False)


def _verb_function(verb: str) -> Any:
    from importlib import import_module

    return getattr(import_module(f"raydr.verbs.{verb}"), verb)


def _warn_of_paths_inside_a_job(out: Path) -> None:
    if "runtime_resources" in str(Path.cwd()) and not out.is_absolute():
        print(
            f"raydr: out={out} lies in this job's copy of the working directory, {Path.cwd()}; "
            "give an absolute path to keep the results",
            file=sys.stderr,
        )


def _run_search(arguments: argparse.Namespace) -> int:
    text = arguments.config
    if text.endswith((".yaml", ".yml")):
        return _run_verb(arguments)
    if arguments.overrides:
        raise ConfigError(f"quote the query: raydr search {' '.join([text, *arguments.overrides])!r}")
    from raydr.verbs.query import answer, print_hits

    hits = answer(arguments.index, text, k=arguments.k, mode=arguments.mode)
    if arguments.output == "json":
        print(json.dumps(hits, indent=2))
    else:
        print_hits(hits, query=text)
    return 0


def _run_evaluate(arguments: argparse.Namespace) -> int:
    if arguments.config.endswith((".yaml", ".yml")) or "=" in arguments.config:
        return _run_verb(arguments)
    settings = [word for word in arguments.overrides if "=" in word]
    runs = [location(word) for word in arguments.overrides if "=" not in word]
    if not runs:
        raise ConfigError("name the run files to measure: raydr evaluate qrels.txt run.trec [run.trec ...] [key=value]")
    from raydr.config import load
    from raydr.evaluation.config import EvaluateConfig
    from raydr.verbs.evaluate import compare_files

    config = load(EvaluateConfig, None, [word.removeprefix("evaluate.") for word in settings])
    print(compare_files(Path(arguments.config), runs, config), end="")
    return 0


def _run_demo(arguments: argparse.Namespace) -> int:
    from raydr.config import load
    from raydr.verbs.demo import DemoConfig, demo

    demo(load(DemoConfig, None, _demo_overrides(arguments)))
    return 0


def _run_demo_images(arguments: argparse.Namespace) -> int:
    from raydr.config import load
    from raydr.verbs.demo_images import DemoImagesConfig, demo_images

    demo_images(load(DemoImagesConfig, None, _demo_overrides(arguments)))
    return 0


def _demo_overrides(arguments: argparse.Namespace) -> list[str]:
    options = {"out": arguments.out, "port": arguments.port, "serve": "false" if arguments.no_serve else None}
    return [*arguments.overrides, *(f"{name}={value}" for name, value in options.items() if value is not None)]


def _run_serve(arguments: argparse.Namespace) -> int:
    from raydr.verbs.serve import serve_until_interrupted

    serve_until_interrupted(arguments.index, host=arguments.host, port=arguments.port)
    return 0


def _run_plan(arguments: argparse.Namespace) -> int:
    from raydr.config import load
    from raydr.planning.config import PlanConfig
    from raydr.planning.plan import as_json, as_text, make_plan

    if arguments.measure:
        if arguments.config or arguments.overrides:
            raise ConfigError(
                "--measure takes no config: raydr plan --measure > here.yaml, then raydr plan here.yaml ..."
            )
        from raydr.planning.measure import measure

        units = measure(say=lambda what: print(f"measuring: {what}", file=sys.stderr))
        print(_as_yaml({"units": units}) if arguments.output == "text" else json.dumps({"units": units}, indent=2))
        return 0
    config = load(PlanConfig, *_config_and_overrides(arguments))
    if arguments.dry_run:
        print(_as_yaml(config.model_dump(mode="json")), end="")
        return 0
    plan = make_plan(config)
    print(as_json(plan) if arguments.output == "json" else as_text(plan, brief=arguments.brief))
    return 0


def _run_doctor(arguments: argparse.Namespace) -> int:
    from raydr.doctor import as_json, as_table, run_doctor, verified

    checks = verified(arguments.verify) if arguments.verify else run_doctor(with_ray=arguments.ray)
    print(as_json(checks) if arguments.output == "json" else as_table(checks))
    return 1 if any(check.status == "fail" for check in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
