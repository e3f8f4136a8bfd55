"""What a job does when a node's memory runs out and Ray ends the worker that takes it: once, and every time.

A Ray cluster of its own whose memory monitor acts at a little more than what the machine uses now. An encoder (or a
training step) takes more than that, the first time or always. Prints what came out, and the seconds.

    python benchmarks/out_of_memory.py --work /tmp/oom --out benchmarks/out_of_memory
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from interleaved import markdown, write

from raydr.artifacts import open_artifact
from raydr.errors import RaydrError
from raydr.methods.contrastive import Contrastive
from raydr.stages.pool import RESTARTS
from tests.corpora import WordCounts

ROOM_BYTES = 4 << 30
"""What the cluster may take on top of what the machine uses now; without the hungry passage it takes half of it."""
TAKEN_BYTES = 10 << 30
_PATIENCE_S = 300.0


def take(where: str) -> None:
    """Takes memory until somebody ends this process; with `OOM_ONCE`, only the first to come here."""
    mark = Path(os.environ["OOM_MARK"])
    with (mark / "log").open("a") as log:
        log.write(f"{where} {os.getpid()} {time.time()}\n")
    if os.environ.get("OOM_ONCE"):
        try:
            (mark / "taken").mkdir()
        except FileExistsError:
            return
    held = []
    for _ in range(TAKEN_BYTES >> 27):
        held.append(np.ones(1 << 24))
        time.sleep(0.03)
    time.sleep(5)


class Hungry(WordCounts):
    """Counts words, which takes no memory to speak of, but for one passage."""

    def encode_passages(self, passages: Any) -> Any:
        if any(passage.passage_id == "p200" for passage in passages):
            take("encode")
        return super().encode_passages(passages)


def embed(work: Path) -> dict[str, Any]:
    from raydr.config import Component
    from raydr.data.config import DataConfig
    from raydr.verbs.config import RunConfig
    from raydr.verbs.embed import embed

    source = work / "source"
    source.mkdir(exist_ok=True)
    rows = [json.dumps({"_id": f"p{n}", "text": f"number {n}"}) for n in range(400)]
    (source / "corpus.jsonl").write_text("\n".join(rows))
    run = RunConfig(
        out=work / "run",
        runtime="ray",
        data=DataConfig(path=str(source)),
        method=Component(import_path="out_of_memory:Hungry"),
        embed={"passages_per_block": 20, "num_workers": (2, 2), "worker_cpus": 1},  # type: ignore[arg-type]
    )
    return {"passages": embed(run).manifest.counts["passages"]}


class HungryContrastive(Contrastive):
    def build_objective(self) -> Any:
        objective = super().build_objective()
        kept = objective.loss
        steps = [0]

        def loss(*arguments: Any, **named: Any) -> Any:
            steps[0] += 1
            if steps[0] == 8:
                take("train")
            return kept(*arguments, **named)

        objective.loss = loss  # type: ignore[method-assign]
        return objective


def train(work: Path) -> dict[str, Any]:
    from raydr.config import Component
    from raydr.train.config import TrainConfig
    from raydr.train.trainer import train_model
    from tests.train.tiny import SETTINGS, tiny_checkpoint, write_topic_examples

    model = tiny_checkpoint(work / "checkpoint")
    method = Component(import_path="out_of_memory:HungryContrastive", args={"model": str(model), "num_negatives": 1})
    config = TrainConfig(**{**SETTINGS, "num_workers": 1, "max_steps": 12, "checkpoint_every": 3, "max_failures": 2})
    return train_model(method, config, write_topic_examples(work / "examples"), work / "run").manifest.details


def child(what: str, work: Path) -> None:
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
    RESTARTS.update(max_restarts=3, max_task_retries=3)  # of 20, to see the end of it sooner
    started = time.perf_counter()
    try:
        found: dict[str, Any] = {"done": {"embed": embed, "train": train}[what](work)}
    except RaydrError as error:
        found = {"refused": str(error)}
    except Exception as error:  # noqa: BLE001 (what comes out is what is asked)
        found = {"raised": f"{type(error).__name__}: {str(error)[-1500:]}"}
    print(json.dumps({**found, "seconds": time.perf_counter() - started}, default=str), flush=True)
    os._exit(0)


def case(what: str, work: Path, *, once: bool) -> dict[str, Any]:
    """A job whose memory runs out; where that ended it and happens but once, the same command is given again."""
    work.mkdir(parents=True)
    found = run(what, work, once=once)
    if once and "refused" in found:
        again = run(what, work, once=once)
        seconds = found["seconds"] + again.get("seconds", 0)
        found = {"refused first": found["refused"], **again, "seconds": seconds}
    log = work / "log"
    found["tries"] = len(log.read_text().splitlines()) if log.exists() else 0
    if "done" in found:
        open_artifact(work / "run" / ("embed" if what == "embed" else "")).verify()
    return found


def run(what: str, work: Path, *, once: bool) -> dict[str, Any]:
    """A job in a process of its own, ended with all that it started where it does not end itself."""
    memory = psutil.virtual_memory()
    share = (memory.total - memory.available + ROOM_BYTES) / memory.total
    own = os.environ | {
        "RAY_memory_usage_threshold": f"{share:.4f}",
        "RAY_memory_monitor_refresh_ms": "100",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "OOM_MARK": str(work),
        "OOM_ONCE": "1" if once else "",
        "RAY_ADDRESS": "local",
    }
    command = [sys.executable, __file__, "--child", what, "--work", str(work), "--out", "-"]
    with (work / "errors").open("w") as errors:
        process = subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        output, _ = process.communicate(timeout=_PATIENCE_S)
        found = json.loads(output.splitlines()[-1])
    except subprocess.TimeoutExpired:
        found = {"hangs": f"nothing came out in {_PATIENCE_S:.0f} s"}
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for member in [process, *family]:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--out", type=Path, required=True, help="OUT.md and OUT.json are written")
    parser.add_argument("--only", nargs="*", default=["embed", "train"], help="embed, train")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.work)
    found = {}
    for what in arguments.only:
        for once in (True, False):
            name = f"{what}, {'once' if once else 'always'}"
            found[name] = case(what, arguments.work.resolve() / name.replace(", ", "-"), once=once)
            print(name, found[name], file=sys.stderr, flush=True)
    rows = [
        [
            name,
            str(own["tries"]),
            f"{own.get('seconds', 0):.0f}",
            str({k: v for k, v in own.items() if k not in ("tries", "seconds")})[:600],
        ]
        for name, own in found.items()
    ]
    write(arguments.out, "Out of memory", markdown(["job", "tries", "s", "what came out"], rows), found)


if __name__ == "__main__":
    main()
