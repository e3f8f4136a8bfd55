"""The serving stage of a plan: how many parts an index is searched in, on how many nodes, and how long an answer takes.

Notable: FAISS gives one query one core, and a deployment searches its shards one after the other; so a query is quicker
the more Shard deployments there are, until calling them, which one event loop does, takes longer than what it saves.
The least number that keeps the latency asked for is taken, and where none does, the quickest.

Latency rests on three rules, none of them exact. One search in a hundred is `tail_ratio` slower than the median; of D
that are waited for, the slowest decides (Dean and Barroso, The Tail at Scale, 2013), here for log-normal times. Waiting
stretches times by 1 / (1 - busy_share), as with one server and random arrivals: at 70 % that gives 56 ms from the 16.8
measured with one client, and 52 were measured (benchmarks/results.md, W6, colocated).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from raydr.planning.config import PlanConfig
from raydr.planning.sheet import Sheet, readable, slowest
from raydr.planning.stages import (
    GIB,
    HNSW_DIM,
    HNSW_ROWS,
    MINILM_WEIGHTS,
    StagePlan,
    billed,
    shards,
    values,
)
from raydr.planning.structure import Structure, structure
from raydr.planning.units import Figure

_MOST_DEPLOYMENTS = 100_000


class _Layout(NamedTuple):
    """A number of Shard deployments, each searching so many of the shards; none: everything in one replica."""

    deployments: int
    p99_ms: float


def plan_search(config: PlanConfig, figures: Mapping[str, Figure]) -> StagePlan:
    """Serving the index at the load asked for."""
    parts, node = structure(config.index.factory, config.encoder.dim), config.node
    sheet = Sheet(
        values(config, figures)
        | {"hnsw_rows": HNSW_ROWS, "hnsw_dim": HNSW_DIM, "minilm_weights": MINILM_WEIGHTS}
        | {"weights": config.encoder.weights, "cores": node.cores}
        | {"node_bytes": node.memory_gib * GIB, "memory_share": config.memory_share}
        | {"nprobe": config.index.search.nprobe or 1, "ef_search": config.index.search.ef_search or 16}
    )
    num_shards = shards(sheet, config) or 1
    sheet.line("row_bytes", "code_bytes + link_bytes + refine_bytes", "bytes")
    # Vectors stay in the page cache; ids are held beside them, an offset each.
    sheet.line("copy_bytes", "passages * (row_bytes + id_bytes + 8) + num_shards * fixed_bytes", "bytes")
    sheet.line("for_index_bytes", "node_bytes * memory_share - serve_node_bytes", "bytes")
    room = sheet["for_index_bytes"] or 0.0
    warnings: list[str] = []
    if room <= 0:
        warnings.append("node.memory_gib: nothing is left for the index beside what serving itself takes")
        sheet.let(for_index_bytes=node.memory_gib * GIB * 0.1)
    nodes_by_memory = sheet.line("nodes_by_memory", "ceil(copy_bytes / for_index_bytes)", "nodes a copy") or 1.0
    sheet.line("query_ms", f"1000 * ({_work(parts)})", "core-ms, over all shards")
    sheet.line("encode_ms", "query_encode_ms * weights / minilm_weights", "core-ms")
    layout = _best(sheet, int(num_shards), int(nodes_by_memory), config.search.p99_ms)
    deployments = layout.deployments if layout else int(nodes_by_memory)
    sheet.let(deployments=deployments, calls=0.0)
    if deployments:
        sheet.line("calls", "deployments + 1", "calls a query, the encoder's among them")
    sheet.line("tail", "slowest(tail_ratio, max(1, deployments))", "x the median")
    sheet.line("part_ms", "query_ms / max(1, deployments)", "ms")
    p99 = sheet.line(
        "p99", "tail * (serve_overhead_ms + encode_ms + calls * serve_call_ms + part_ms) / (1 - busy_share)", "ms"
    )
    sheet.line("work_ms", "serve_core_ms + encode_ms + calls * serve_call_ms + query_ms", "core-ms a query")
    sheet.line("cores_needed", "qps * work_ms / 1000 / busy_share", "cores")
    sheet.line("ingresses", "ceil(qps * (serve_core_ms + calls * serve_call_ms) / 1000 / busy_share)", "replicas")
    sheet.line("nodes_a_copy", "max(nodes_by_memory, ceil(deployments / cores))", "nodes")
    sheet.line("copies", "max(min_copies, ceil(cores_needed / (cores * nodes_a_copy)))", "copies")
    nodes = sheet.line("nodes", "copies * nodes_a_copy", "nodes")
    memory = sheet.line("memory_per_node", "serve_node_bytes + copy_bytes / nodes_a_copy", "bytes")
    if p99 is not None and p99 > config.search.p99_ms:
        warnings.append(
            f"search.p99_ms: {readable(config.search.p99_ms)} ms cannot be had; the least is {readable(p99)} ms, with "
            f"{deployments or 'no'} Shard deployments. Scan less (IVF with a low nprobe, HNSW), or lower busy_share"
        )
    warnings += _doubts(config, parts, sheet, deployments)
    disk = sheet.line("disk", "passages * (row_bytes + text_bytes + id_bytes + 8) + num_shards * fixed_bytes", "bytes")
    plan = StagePlan("search", sheet.lines, sheet.used, nodes, memory, disk, config.search.hours, warnings=warnings)
    return billed(plan, node)


def _work(parts: Structure) -> str:
    """The formula of the core-seconds that one query takes in all shards together."""
    if parts.kind == "flat":
        return "passages * code_bytes / flat_scan_bytes_per_s"
    if parts.kind == "sq":
        return "passages * coded_dim / sq_scan_values_per_s"
    if parts.kind == "hnsw":
        # As many candidates as FAISS keeps, at least k; a step more for each doubling of a shard.
        return (
            "num_shards * max(ef_search, k) * max(1, log2(rows_per_shard) / log2(hnsw_rows)) * dim / hnsw_dim"
            " / hnsw_candidates_per_s"
        )
    visited = "passages * min(1, nprobe / lists)"
    scan = {
        "flat": f"{visited} * code_bytes / ivf_flat_bytes_per_s",
        "sq": f"{visited} * coded_dim / ivf_sq_values_per_s",
        "pq": f"{visited} * code_bytes / ivf_pq_codes_per_s",
    }[parts.coding]
    return f"num_shards * lists * coded_dim * 4 / flat_scan_bytes_per_s + {scan}"


def _best(sheet: Sheet, num_shards: int, nodes_by_memory: int, p99_ms: float) -> _Layout | None:
    """The fewest deployments that keep the latency, else the quickest number; None where a figure is missing."""
    names = ("serve_overhead_ms", "encode_ms", "serve_call_ms", "query_ms", "tail_ratio", "busy_share")
    found = [sheet[name] for name in names]
    given = [value for value in found if value is not None]
    if len(given) < len(found):
        return None
    overhead, encode, call, query, ratio, busy = given

    def p99(deployments: int) -> float:
        calls = deployments + 1 if deployments else 0
        alone = overhead + encode + calls * call + query / max(1, deployments)
        return slowest(ratio, max(1, deployments)) * alone / (1 - busy)

    # A deployment holds whole shards, so there are at most as many as shards; 0 is everything in one replica.
    least = 0 if nodes_by_memory == 1 else nodes_by_memory
    most = max(least, min(num_shards, _MOST_DEPLOYMENTS))
    tried = [_Layout(number, p99(number)) for number in _numbers(least, most)]
    return next((layout for layout in tried if layout.p99_ms <= p99_ms), min(tried, key=lambda layout: layout.p99_ms))


def _numbers(least: int, most: int) -> list[int]:
    """All numbers up to 1,000 above the least, then steps of a hundredth."""
    numbers, number = [], least
    while number <= most:
        numbers.append(number)
        number += max(1, (number - least) // 100 if number - least > 1000 else 1)
    return numbers


def _doubts(config: PlanConfig, parts: Structure, sheet: Sheet, deployments: int) -> list[str]:
    """What the figures do not cover."""
    found = []
    rows = sheet["rows_per_shard"] or 0.0
    if parts.kind == "hnsw" and rows > 4 * HNSW_ROWS:
        found.append(
            f"the HNSW figures are of {HNSW_ROWS:,.0f} rows, a shard here has {rows:,.0f}: beyond the processor's "
            "caches a step takes longer, and ef_search has to grow for the same recall"
        )
    if parts.kind in ("flat", "sq"):
        found.append("the scan is one core's alone; cores of a node share its memory, which has been measured for two")
    if parts.coding == "sq" and "SQ8" not in config.index.factory:
        found.append("the scan of SQ8 stands for this one's, which has not been measured")
    if parts.num_lists and "_HNSW" in config.index.factory:
        found.append("choosing lists is counted as exact, though an HNSW over the centroids takes less")
    if deployments > 100:
        found.append(
            f"{deployments} Shard deployments: raydr asks all of them from one Ingress, with no level in between, and "
            "no more than two have been measured"
        )
    if parts.refine_bytes:
        found.append("reading the candidates' exact embeddings is not counted in the latency; it has not been measured")
    if config.corpus.passages * (config.corpus.id_bytes + 8) > config.memory_share * config.node.memory_gib * GIB:
        found.append(
            "raydr search of a whole query set keeps every passage id in its own process, more than a node has; the "
            "served index keeps a shard's ids with the shard"
        )
    return found
