"""Serving under fire: kills, a slow shard, overload, index swaps and a soak, on a real application on loopback.

    python benchmarks/under_fire.py kills --replicas 1 --collection DATA/cranfield      also: --replicas 2, --layout
    python benchmarks/under_fire.py slow --replicas 1 --collection DATA/cranfield
    python benchmarks/under_fire.py load --collection DATA/cranfield --plot docs/images/under_fire_load.png
    python benchmarks/under_fire.py swaps --collection DATA/cranfield --other DATA/cacm
    python benchmarks/under_fire.py soak --minutes 20 --collection DATA/cranfield --plot docs/images/under_fire_soak.png
    python benchmarks/under_fire.py engine --collection DATA/cranfield                  wants vLLM
    python benchmarks/under_fire.py head --away 20 90 --collection DATA/cranfield       wants redis-server

Every answer is compared with what the bare index gives (`fire_load.py`); what is killed is found among this script's
own descendants (`fire_site.py`). Each subcommand is bounded in time and requests and ends by itself:
    kills   four clients; SIGKILL of each part in turn, then of a node with the shards, each watched until all is well
    slow    SIGSTOP of a shard's replica for 25 s; half of the clients ask for partial answers
    load    closed loop to saturation, then an open loop in steps up to three times what that gave
    swaps   another index every 3 s under four clients
    soak    four clients, memory of every process sampled; growth fitted after a third of the time
    engine  a reranker's vLLM process is killed under searches that want it
    head    the head node is killed and started again, its state in memory, in Redis, on disk (`fire_head.py`)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from fire_head import STORAGES, HeadSite, head_dies, head_table
from fire_load import Load, Running, Truth, latency_ms, outcomes, recovery, told
from fire_site import PARTS, Site, build_index, what_runs_beside
from interleaved import markdown, write

CLIENTS = 4
CALM_S = 5.0
"""A kill is over when for so long every answer was good and quick, and every process is back."""


def watch(load: Load, killed: float, whole: Callable[[], bool], limit_s: float = 150) -> float | None:
    """Waits until all is well again; seconds until every process was back, None where that did not happen."""
    back = None
    while time.monotonic() < killed + limit_s:
        time.sleep(0.25)
        if back is None and whole():
            back = time.monotonic() - killed
        recent = [answer for answer in list(load.answers[-2000:]) if answer.done > time.monotonic() - CALM_S]
        calm = bool(recent) and all(answer.good and answer.took_s < 2 for answer in recent)
        if back is not None and calm and time.monotonic() > killed + CALM_S:
            break
    return back


def whole(site: Site) -> Callable[[], bool]:
    """Whether as many processes of each kind run as do now, and none that runs now is gone without another for it."""
    parts = (*PARTS[site.layout], "controller", "proxy", "haproxy")
    before = {part: set(site.pids(part)) for part in parts}
    changed: set[str] = set()

    def is_whole() -> bool:
        now = {part: set(site.pids(part)) for part in parts}
        changed.update(part for part in parts if now[part] != before[part])
        return bool(changed) and all(len(now[part]) >= len(before[part]) for part in parts)

    return is_whole


def kills(arguments: argparse.Namespace) -> None:
    truth = Truth([arguments.index], arguments.texts)
    parts = [*reversed(PARTS[arguments.layout]), "haproxy", "proxy", "controller"]
    if arguments.layout == "apart":
        parts = [part for part in parts if part != "Shard0"] + ["a node with shards"]
    parts = [part for part in parts if part in arguments.only] if arguments.only else parts
    records = []
    site = Site(arguments.index, layout=arguments.layout, replicas=arguments.replicas, shard_nodes=2)
    with site:
        asyncio.run(Load(site.address, truth).closed(CLIENTS, 5))  # not counted
        for part in parts:
            with Running(Load(site.address, truth), seconds=200) as load:
                time.sleep(4)
                is_whole = whole(site)
                killed = time.monotonic()
                if part == "a node with shards":
                    site.kill_shard_node()
                else:
                    site.kill(part)
                back = watch(load, killed, is_whole)
            records.append({"killed": part, "back_s": back, **told(load, killed)})
            print(records[-1], flush=True)
            site.wait_ready()
    title = f"Kills, {arguments.layout}, {arguments.replicas} replica(s) of each"
    write(arguments.out, title, kills_table(records), records)


def kills_table(records: list[dict[str, Any]]) -> str:
    rows = []
    for record in records:
        found = dict(record["outcomes"])
        good = found.pop("right", 0) + found.pop("partial", 0)
        wrong = found.pop("wrong", 0)
        errors = ", ".join(f"{count} x {name}" for name, count in found.items()) or "none"
        back = "never" if record["back_s"] is None else f"{record['back_s']:.1f}"
        figures = [f"{record[name]:.1f}" for name in ("gap_s", "recovered_s")]
        rows.append([record["killed"], f"{good}", f"{wrong}", errors, *figures, back])
    head = ["killed", "right", "wrong", "errors", "longest gap (s)", "last trouble after (s)", "process back after (s)"]
    return markdown(head, rows)


def slow(arguments: argparse.Namespace) -> None:
    truth = Truth([arguments.index], arguments.texts)
    records = []
    with Site(arguments.index, replicas=arguments.replicas, args={"limits": {"shard_timeout_s": 1}}) as site:
        loads = {choice: Load(site.address, truth, {"on_shard_failure": choice}) for choice in ("error", "partial")}
        with Running(loads["error"], clients=2), Running(loads["partial"], clients=2):
            time.sleep(4)
            pid = site.pids("Shard1")[0]
            stopped = time.monotonic()
            os.kill(pid, signal.SIGSTOP)
            try:
                time.sleep(25)
            finally:
                resumed = time.monotonic()
                if pid in site.pids("Shard1"):
                    os.kill(pid, signal.SIGCONT)
            watch(loads["error"], resumed, lambda: True, limit_s=60)
        for choice, load in loads.items():
            held = [answer for answer in load.answers if stopped <= answer.sent < resumed]
            after = recovery(load.answers, resumed)
            record = {"choice": choice, "outcomes": outcomes(held), "recovered_s": after["recovered_s"]}
            record |= {f"p{share}": latency_ms(held, share / 100) for share in (50, 99)}
            record["slowest_ms"] = 1000 * max(answer.took_s for answer in held)
            records.append(record)
    rows = [
        [
            record["choice"],
            ", ".join(f"{count} x {name}" for name, count in record["outcomes"].items()),
            *(f"{record[name]:.0f}" for name in ("p50", "p99", "slowest_ms")),
            f"{record['recovered_s']:.1f}",
        ]
        for record in records
    ]
    head = [
        "on_shard_failure",
        "answers while it was stopped",
        "p50 ms",
        "p99 ms",
        "slowest ms",
        "trouble afterwards (s)",
    ]
    write(arguments.out, f"A stopped shard, {arguments.replicas} replica(s)", markdown(head, rows), records)


def load_steps(arguments: argparse.Namespace) -> None:
    truth = Truth([arguments.index], arguments.texts)
    limits = {"concurrent_requests": arguments.concurrent}
    records = []
    with Site(arguments.index, layout=arguments.layout, args={"limits": limits}) as site:
        asyncio.run(Load(site.address, truth).closed(4, 5))  # not counted
        best = 0.0
        for clients in (1, 4, 16, 64):
            one = Load(site.address, truth)
            asyncio.run(one.closed(clients, arguments.seconds))
            records.append(step(f"closed, {clients} clients", float("nan"), one, arguments.seconds, site))
            best = max(best, records[-1]["answered_per_s"])
        for share in (0.5, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0):
            one = Load(site.address, truth)
            asyncio.run(one.open(share * best, arguments.seconds))
            records.append(step(f"open, {share:g} x", share * best, one, arguments.seconds, site))
            time.sleep(2)
    rows = []
    for record in records:
        offered = "" if np.isnan(record["offered_per_s"]) else f"{record['offered_per_s']:.0f}"
        figures = [f"{record[name]:.0f}" for name in ("answered_per_s", "p50", "p99", "slowest_ms")]
        others = ", ".join(f"{count} x {name}" for name, count in record["others"].items()) or "none"
        rows.append(
            [record["load"], offered, *figures, f"{100 * record['shed']:.0f} %", others, f"{record['mib']:.0f}"]
        )
    head = ["load", "offered/s", "right/s", "p50 ms", "p99 ms", "slowest ms", "shed", "not right", "replicas MiB"]
    write(arguments.out, f"Load, {arguments.layout} ({what_runs_beside()})", markdown(head, rows), records)
    if arguments.plot:
        plot_load([record for record in records if record["load"].startswith("open")], arguments.plot)


def step(name: str, offered: float, load: Load, seconds: float, site: Site) -> dict[str, Any]:
    found = outcomes(load.answers)
    others = {outcome: count for outcome, count in found.items() if outcome != "right"}
    shed = sum(count for outcome, count in others.items() if outcome.startswith(("429", "503")))
    ended = max(answer.done for answer in load.answers) - min(answer.sent for answer in load.answers)
    record = {
        "load": name,
        "offered_per_s": offered,
        "answered_per_s": found.get("right", 0) / max(ended, seconds),
        **{f"p{share}": latency_ms(load.answers, share / 100) for share in (50, 99)},
        "slowest_ms": 1000 * max(answer.took_s for answer in load.answers),
        "shed": shed / len(load.answers),
        "others": others,
        "mib": sum(size for part, size in site.rss_mib().items() if part.split("#")[0] in PARTS[site.layout]),
    }
    print(record, flush=True)
    return record


def swaps(arguments: argparse.Namespace) -> None:
    other = build_index(arguments.other, arguments.work / arguments.other.name, num_shards=3)
    indexes = [arguments.index, other]
    truth = Truth(indexes, arguments.texts)
    records = []
    for layout in PARTS:
        args = {} if layout == "colocated" else {"shard_deployments": 2}
        with (
            Site(arguments.index, layout=layout, args=args) as site,
            Running(Load(site.address, truth), seconds=arguments.seconds + 60) as load,
        ):
            count, end = 0, time.monotonic() + arguments.seconds
            while time.monotonic() < end:
                count += 1
                site.deploy(indexes[count % 2])
                time.sleep(3)
        versions = [answer.version for answer in sorted(load.answers, key=lambda answer: answer.done)]
        changes = sum(a != b for a, b in zip(versions, versions[1:]))
        quantiles = {f"p{share}": latency_ms(load.answers, share / 100) for share in (50, 99)}
        records.append(
            {"layout": layout, "ordered": count, "changes": changes, "outcomes": outcomes(load.answers), **quantiles}
        )
        print(records[-1], flush=True)
    rows = [
        [
            record["layout"],
            str(record["ordered"]),
            ", ".join(f"{n} x {name}" for name, n in record["outcomes"].items()),
            *(f"{record[name]:.0f}" for name in ("p50", "p99")),
            str(record["changes"]),
        ]
        for record in records
    ]
    head = ["layout", "swaps ordered", "answers", "p50 ms", "p99 ms", "changes of version seen"]
    write(arguments.out, f"A swap every 3 s for {arguments.seconds:g} s", markdown(head, rows), records)


def soak(arguments: argparse.Namespace) -> None:
    truth = Truth([arguments.index], arguments.texts)
    samples: list[dict[str, float]] = []
    with (
        Site(arguments.index, layout=arguments.layout) as site,
        Running(Load(site.address, truth), clients=2, seconds=60 * arguments.minutes) as load,
    ):
        started = time.monotonic()
        while (minute := (time.monotonic() - started) / 60) < arguments.minutes:
            samples.append({"minute": minute, **site.rss_mib()})
            time.sleep(5)
    rows = []
    for name in list(samples[0])[1:]:
        points = np.array(
            [(s["minute"], s[name]) for s in samples if name in s and s["minute"] > arguments.minutes / 3]
        )
        slope, _ = np.polyfit(points[:, 0], points[:, 1], 1)
        first = np.median([s[name] for s in samples[:6]])
        rows.append([name, f"{first:.0f}", f"{points[0, 1]:.0f}", f"{points[-1, 1]:.0f}", f"{60 * slope:+.1f}"])
    found = outcomes(load.answers)
    counts = ", ".join(f"{count} x {name}" for name, count in found.items())
    note = f"{counts}; p50 {latency_ms(load.answers, 0.5):.0f} ms, p99 {latency_ms(load.answers, 0.99):.0f} ms\n\n"
    head = ["process", "MiB in the first half minute", "MiB after a third", "MiB at the end", "MiB per hour, fitted"]
    title = f"Soak, {arguments.layout}, {arguments.minutes:g} min ({what_runs_beside()})"
    write(arguments.out, title, note + markdown(head, rows), {"samples": samples, "outcomes": found})
    if arguments.plot:
        plot_soak(samples, arguments.plot)


def engine(arguments: argparse.Namespace) -> None:
    from raydr.llm.small import small_causal_lm

    model = str(small_causal_lm("minilm", arguments.work / "small"))
    settings = {"engine": {"model": model, "dtype": "float32", "max_model_tokens": 1024}, "window_size": 4, "stride": 2}
    rerankers = {"first": {"import_path": "raydr.methods.first:First", "args": settings}}
    options = {"name": "Reranker_first", "health_check_period_s": 5, "max_ongoing_requests": 64}
    args = {"rerankers": rerankers}
    truth = Truth([arguments.index], arguments.texts[:8])

    def reranked(answer: dict[str, Any]) -> str:
        return "right" if answer["reranking"]["applied"] else "partial"

    records = []
    with Site(arguments.index, layout="colocated", args=args, deployments=[options]) as site:
        body = {"rerank": True, "rerank_depth": 4}
        loads = {
            choice: Load(site.address, truth, {**body, "on_rerank_failure": choice}, check=reranked)
            for choice in ("error", "keep_order")
        }
        with Running(loads["error"], clients=2), Running(loads["keep_order"], clients=2):
            deadline = time.monotonic() + 180  # a reranker's engine starts with its replica, for which nobody waits
            while not (before := set(site.pids("engine"))):
                if time.monotonic() > deadline:
                    raise SystemExit("vLLM's process did not appear, see /tmp/ray/session_latest/logs")
                time.sleep(0.5)
            time.sleep(20)
            killed = time.monotonic()
            site.kill("engine")
            back = watch(loads["error"], killed, lambda: bool(set(site.pids("engine")) - before))
        for choice, load in loads.items():
            records.append({"killed": f"vLLM's process, {choice}", "back_s": back, **told(load, killed)})
    names = "`right` counts reranked answers and those left in their first order\n\n"
    write(arguments.out, "vLLM's process killed", names + kills_table(records), records)


def head(arguments: argparse.Namespace) -> None:
    truth = Truth([arguments.index], arguments.texts)
    choices = {"also_killed": (arguments.only or [None])[0], "leftovers": arguments.leftovers}
    records = []
    for storage in arguments.storage:
        if storage == "redis" and shutil.which("redis-server") is None:
            print("redis: skipped, there is no redis-server on the path (Debian: apt-get install redis-server)")
            continue
        for away_s in arguments.away:
            reconnect = {"reconnect_s": arguments.reconnect} if storage != "none" else {}
            with (
                HeadSite(arguments.index, storage=storage, replicas=arguments.replicas, **reconnect) as site,
                Running(Load(site.address, truth), clients=2, seconds=away_s + 400) as load,
            ):
                time.sleep(4)
                records.append({"storage": storage, **reconnect, **head_dies(site, load, away_s, **choices)})
            print(records[-1], flush=True)
    title = f"The head node killed, {arguments.replicas} replica(s) of each ({what_runs_beside()})"
    write(arguments.out, title, head_table(records), records)


def plot_load(records: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    offered = [record["offered_per_s"] for record in records]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.plot(offered, [record["answered_per_s"] for record in records], "o-", label="answered, right")
    left.plot(
        offered, [record["shed"] * record["offered_per_s"] for record in records], "s--", label="refused, 429/503"
    )
    left.set(xlabel="offered requests/s", ylabel="requests/s", ylim=0)
    right.plot(offered, [record["p50"] for record in records], "o-", label="p50")
    right.plot(offered, [record["p99"] for record in records], "s--", label="p99")
    right.set(xlabel="offered requests/s", ylabel="ms, of the answered", ylim=0)
    for axes in (left, right):
        axes.legend(frameon=False)
    save(figure, path)


def plot_soak(samples: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    for name in list(samples[0])[1:]:
        axes.plot([s["minute"] for s in samples if name in s], [s[name] for s in samples if name in s], label=name)
    axes.set(xlabel="minutes", ylabel="resident MiB", ylim=0)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


COMMANDS = {
    "kills": kills,
    "slow": slow,
    "load": load_steps,
    "swaps": swaps,
    "soak": soak,
    "engine": engine,
    "head": head,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--collection", type=Path, required=True, help="a BEIR folder; its queries are what is asked")
    parser.add_argument("--other", type=Path, help="swaps: another one")
    parser.add_argument("--work", type=Path, default=Path("runs/under_fire"), help="where indexes are kept")
    parser.add_argument("--out", type=Path, help="writes OUT.md and OUT.json")
    parser.add_argument("--plot", type=Path, help="load, soak: a PNG")
    parser.add_argument("--layout", choices=PARTS, default="apart")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="kills: only these parts; head: a replica of it while away")
    parser.add_argument("--concurrent", type=int, default=128, help="load: limits.concurrent_requests")
    parser.add_argument("--seconds", type=float, default=15, help="load: of each step; swaps: in all")
    parser.add_argument("--storage", nargs="*", choices=STORAGES, default=["none", "redis"], help="head: of its state")
    parser.add_argument("--away", nargs="*", type=float, default=[20, 90], help="head: for how many seconds")
    parser.add_argument("--reconnect", type=int, help="head: RAY_gcs_rpc_server_reconnect_timeout_s, with storage")
    parser.add_argument("--leftovers", action="store_true", help="head: what an ended worker leaves is not cleared")
    parser.add_argument("--minutes", type=float, default=20, help="soak: how long")
    arguments = parser.parse_args()
    arguments.out = arguments.out or arguments.work / f"{arguments.command}-{arguments.layout}-{arguments.replicas}"
    arguments.work = arguments.work.resolve()
    arguments.index = build_index(arguments.collection, arguments.work / arguments.collection.name).resolve()
    lines = (arguments.collection / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    arguments.texts = [json.loads(line)["text"] for line in lines][:100]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended then too
    COMMANDS[arguments.command](arguments)


if __name__ == "__main__":
    main()
