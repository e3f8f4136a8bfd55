"""The stages of a plan that run once, or beside the search: embedding, indexing, reranking, training.

Notable: every figure is a line of a sheet, so its formula is printed as it was computed. Core-hours and GPU-hours are
what is paid for, idle time included; steps that raydr runs in one process, however many nodes there are, are named.

    plan_embedding(config, figures).nodes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from raydr.planning.config import GpuNodeShape, Network, NodeShape, PlanConfig
from raydr.planning.sheet import Line, Number, Sheet, readable
from raydr.planning.structure import structure
from raydr.planning.units import Figure

GIB = 2.0**30
MINILM_WEIGHTS = 10_616_832
"""What `query_encode_ms` was measured with: 6 x (4 x 384^2 + 2 x 384 x 1536)."""
HNSW_ROWS, HNSW_DIM, HNSW_EF = 50_000.0, 384.0, 40.0
"""What the HNSW figures of units.yaml were measured at."""
_CORPUS = "passages * (text_bytes + id_bytes + 8)"
"""Bytes of a corpus, at most: its Parquet is compressed. What raydr compares with checksums is read by several threads
and counted as one core's work, because no disk has been measured that feeds more.
"""


@dataclass(frozen=True)
class StagePlan:
    """What one stage needs. None stands for what rests on a figure that nobody has measured."""

    name: str
    lines: list[Line]
    used: set[str]
    """Names of all values its formulas rest on."""
    nodes: Number
    memory_bytes: Number
    """On each node."""
    disk_bytes: Number
    """Altogether."""
    hours: Number
    """From its start to its end; of serving: hours that are paid for."""
    core_hours: Number = None
    """Paid for on nodes without GPUs; None where the stage runs on GPUs."""
    gpu_hours: Number = None
    cost: Number = None
    """None where the node has no price."""
    warnings: list[str] = field(default_factory=list)


def values(config: PlanConfig, figures: Mapping[str, Figure]) -> dict[str, Number]:
    """Everything a formula may name: the config's figures and the unit figures."""
    corpus, search, index = config.corpus, config.search, config.index
    parts = structure(index.factory, config.encoder.dim)
    return {
        **{name: figure.value for name, figure in figures.items()},
        **corpus.model_dump(),
        **search.model_dump(exclude={"replicas"}),
        "dim": config.encoder.dim,
        "coded_dim": parts.dim,
        "code_bytes": parts.code_bytes,
        "link_bytes": parts.link_bytes,
        "refine_bytes": parts.refine_bytes,
        "fixed_bytes": parts.fixed_bytes,
        "lists": parts.num_lists,
        "train_sample": min(index.train_sample, corpus.passages),
        "shard_bytes": index.shard_bytes,
        "ef_construction": index.ef_construction,
        "within_hours": config.within_hours,
        "working_share": config.working_share,
        "passages_per_block": config.passages_per_block,
        "min_copies": search.replicas,
    }


def plan_embedding(config: PlanConfig, figures: Mapping[str, Figure]) -> StagePlan:
    """Embedding the corpus on Ray Data."""
    sheet = Sheet(values(config, figures) | _network(config.encoder))
    sheet.line("tokens", "passages * tokens_per_passage", "tokens")
    sheet.line("flops_per_token", "2 * weights + 4 * layers * hidden * tokens_per_passage", "FLOP")
    sheet.line("work", "tokens * flops_per_token", "FLOP")
    node = config.gpu_node or config.node
    # A processor's rate was measured with tokenising in it; before a GPU, the node's processors may be too slow.
    at_least = "tokens / (cores * tokenize_per_s)" if isinstance(node, GpuNodeShape) else ""
    nodes, _ = _batch_nodes(sheet, node, "cpu_embed_flops", "gpu_embed_share", at_least)
    workers = node.gpus if isinstance(node, GpuNodeShape) else max(1, node.cores // 4)  # as raydr's pool takes them
    extra = max(0, 4 * (config.encoder.all_weights - MINILM_WEIGHTS - 30_522 * 384))
    sheet.let(workers=workers, extra_weights_bytes=extra)
    memory = sheet.line("memory_per_node", "workers * (embed_worker_bytes + extra_weights_bytes)", "bytes")
    disk = sheet.line("disk", "passages * (4 * dim + id_bytes + 8) * embedding_file_ratio", "bytes")
    corpus = sheet.line("compare_h", f"{_CORPUS} / checksum_bytes_per_s / 3600", "h in one process")
    serial = sheet.line("checksum_h", "disk / checksum_bytes_per_s / 3600", "h in one process")
    hours = sheet.line("hours", "compare_h + node_hours / nodes + checksum_h", "h")
    files = sheet.line("files", "ceil(passages / passages_per_block)", "files")
    # stages/embed.py counts every position in one array, beside the column it reads them from.
    driver = sheet.line("driver_memory", "passages * 16", "bytes")
    warnings = _fits(node, memory, config)
    reading, hours_of_one = sheet.get("reading_s"), sheet["node_hours"]
    if reading and hours_of_one and reading / 3600 >= hours_of_one * config.working_share * 0.999:
        warnings.append("tokenising on the node's processors takes longer than the GPUs: give the nodes more cores")
    if _over(driver, config.node.memory_gib * GIB):
        warnings.append(
            f"the driver checks that every passage was embedded in {readable(driver, 'bytes')} of its own memory, more "
            "than a node has: embed the corpus in parts (a run for each), or give the driver a larger node"
        )
    if _over(serial, config.within_hours):
        warnings.append(
            f"the driver reads every file once more for its checksum: {readable(serial, 'h')} in one process"
        )
    if _over(corpus, config.within_hours):
        warnings.append(f"the driver first compares the corpus with its checksums: {readable(corpus, 'h')}")
    if _over(files, 1e6):
        warnings.append(f"{readable(files)} files: raise embed.passages_per_block (plan with passages_per_block=...)")
    return _batch("embed", sheet, node, nodes, hours, memory, disk, warnings)


def plan_index(config: PlanConfig, figures: Mapping[str, Figure]) -> StagePlan:
    """Building the shards, one task each."""
    parts, index, node = structure(config.index.factory, config.encoder.dim), config.index, config.node
    sheet = Sheet(values(config, figures) | {"hnsw_rows": HNSW_ROWS, "hnsw_dim": HNSW_DIM, "hnsw_ef": HNSW_EF})
    num_shards = shards(sheet, config)
    sheet.line("row_bytes", "code_bytes + link_bytes + refine_bytes", "bytes")
    sheet.line("index_bytes", "passages * row_bytes + num_shards * fixed_bytes", "bytes")
    disk = sheet.line("disk", "index_bytes + passages * (text_bytes + id_bytes + 8)", "bytes")
    sheet.line("io_s", "(passages * 4 * dim + disk) / index_io_bytes_per_s", "core-s")
    add = ""
    if parts.links:
        add = "passages * ef_construction / hnsw_ef * dim / hnsw_dim * max(1, log2(rows_per_shard) / log2(hnsw_rows))"
        add += " / hnsw_build_per_s"
    elif parts.num_lists:
        books = " + 512 * coded_dim" if parts.coding == "pq" else ""  # each piece is compared with its 256 centroids
        add = f"passages * (2 * lists * coded_dim{books}) / gemm_flops"
    sheet.let(add_s=0.0, train_s=0.0)
    if add:
        sheet.line("add_s", add, "core-s")
    serial: Number = 0.0
    if parts.needs_training:
        # One process reads all embeddings for its sample, then trains: ten rounds of k-means over 256 points a list.
        terms = []
        if parts.num_lists:
            terms.append("10 * min(train_sample, 256 * lists) * 2 * lists * coded_dim / gemm_flops")
        if parts.coding == "pq":  # 25 rounds over 256 points a centroid, for every piece
            terms.append("25 * min(train_sample, 65536) * 256 * code_bytes / pq_train_distances_per_s")
        if terms:
            sheet.line("train_s", " + ".join(terms), "core-s")
        serial = sheet.line("sample_h", "passages * 4 * dim / index_io_bytes_per_s / 3600", "h in one process")
    sheet.line("core_h", "(io_s + add_s + train_s) / 3600", "core-h")
    sheet.let(cores=node.cores)
    nodes = sheet.line("nodes", "min(num_shards, ceil(core_h / working_share / cores / within_hours))", "nodes")
    sheet.line("embeddings_bytes", "passages * (4 * dim + id_bytes + 8) * embedding_file_ratio", "bytes")
    both = f"(embeddings_bytes + {_CORPUS}) / checksum_bytes_per_s / 3600"
    compare = sheet.line("compare_h", both, "h in one process, before the shards")
    checksum = sheet.line("checksum_h", "disk / checksum_bytes_per_s / 3600", "h in one process")
    alone = "compare_h + sample_h + checksum_h" if parts.needs_training else "compare_h + checksum_h"
    recall: Number = 0.0
    if index.recall is not None and not parts.is_exact:
        # All embeddings are read to draw the queries and again for the truth, the index's files when it is searched.
        # Choosing the best of the products has not been measured and comes on top.
        sheet.let(recall_queries=min(index.recall.num_queries, config.corpus.passages))
        reading = "2 * passages * 4 * dim / index_io_bytes_per_s + index_bytes / checksum_bytes_per_s"
        products = "2 * dim * recall_queries * passages / (cores * gemm_flops)"
        recall = sheet.line("recall_h", f"({reading} + {products}) / 3600", "h in one process")
        alone += " + recall_h"
    words: list[str] = []
    if index.bm25 is not None:
        words, alone = _words(sheet, config), f"{alone} + bm25_h"
    hours = sheet.line("hours", f"core_h / working_share / (nodes * cores) + {alone}", "h")
    sheet.line("shards_at_once", "min(cores, ceil(num_shards / nodes))", "shards")
    shard = "rows_per_shard * (4 * dim + row_bytes + id_bytes + 8) + fixed_bytes"
    sheet.line("reading_ahead", "min(4 * rows_per_shard * 4 * dim, shard_read_bytes)", "bytes a shard")
    memory = sheet.line("memory_per_node", f"shards_at_once * ({shard} + reading_ahead)", "bytes")
    warnings = _fits(node, memory, config, "; a shard is built in memory: take a smaller index.shard_bytes")
    if parts.num_lists:
        warnings += _lists(sheet, parts.num_lists)
    if parts.links and _over(sheet["rows_per_shard"], 2**31 - 1):
        warnings.append(
            "index.shard_bytes: FAISS numbers an HNSW graph's rows with 32 bits; a shard has at most 2^31 - 1"
        )
    if _over(num_shards, 10_000):
        warnings.append(f"{readable(num_shards)} shards, all of them in one manifest: raise index.shard_bytes")
    if _over(serial, config.within_hours):
        warnings.append(f"one process reads every embedding to draw its training sample: {readable(serial, 'h')}")
    if _over(checksum, config.within_hours):
        warnings.append(f"the driver reads every file once more for its checksum: {readable(checksum, 'h')}")
    if _over(compare, config.within_hours):
        warnings.append(f"the driver first compares corpus and embeddings, file by file: {readable(compare, 'h')}")
    if _over(recall, config.within_hours):
        warnings.append(
            f"one process measures the recall, {readable(recall, 'h')}: set index.recall=null, and measure a sample"
        )
    warnings += words
    if parts.coding == "pq" or parts.num_lists:
        warnings.append(
            "recall is not planned: raydr index measures it and writes it in the manifest; try a sample first"
        )
    return _batch("index", sheet, node, nodes, hours, memory, disk, warnings)


def shards(sheet: Sheet, config: PlanConfig) -> Number:
    """The number of shards and of rows in each, as `raydr index` makes them."""
    given = config.index.num_shards
    number = sheet.line(
        "num_shards", f"min(passages, {given})" if given else "ceil(passages * 4 * dim / shard_bytes)", "shards"
    )
    sheet.line("rows_per_shard", "ceil(passages / num_shards)", "rows")
    return number


def _lists(sheet: Sheet, num_lists: int) -> list[str]:
    """What is wrong with the number of IVF lists of a shard."""
    found = []
    sample, rows = sheet["train_sample"] or 0, sheet["rows_per_shard"] or 0
    if num_lists > sample:
        found.append(f"index.factory: {num_lists} lists cannot be trained on {sample:,.0f}: raise index.train_sample")
    elif 39 * num_lists > sample:
        found.append(
            f"index.train_sample: FAISS wants 39 embeddings a list, {39 * num_lists:,}; the sample has {sample:,.0f}"
        )
    if num_lists > rows / 39:
        found.append(
            f"index.factory: every shard has all {num_lists:,} lists, of {rows / num_lists:.1f} rows each; take fewer "
            "lists or larger shards"
        )
    return found


def _words(sheet: Sheet, config: PlanConfig) -> list[str]:
    """The word side is one structure, built in one process, whatever the number of shards; what is wrong with that."""
    texts = sheet.line("bm25_texts", "passages * text_bytes", "bytes")
    seconds = "bm25_texts / checksum_bytes_per_s + bm25_texts / bm25_build_bytes_per_s"  # compared, then indexed
    hours = sheet.line("bm25_h", f"({seconds}) / 3600", "h in one process")
    if not (_over(hours, config.within_hours) or _over(texts, config.memory_share * config.node.memory_gib * GIB / 4)):
        return []
    return [
        f"index.bm25: the word side is built in one process, in {readable(hours, 'h')} and with all "
        f"{readable(texts, 'bytes')} of text in memory, and a query scores every passage; set index.bm25=null"
    ]


def plan_reranking(config: PlanConfig, figures: Mapping[str, Figure]) -> StagePlan:
    """Reranking the hits of every query, while it waits."""
    load = config.rerank
    if load is None:
        raise ValueError("rerank: nothing is reranked in this plan")
    node = config.gpu_node or config.node
    sheet = Sheet(
        values(config, figures)
        | _network(load.network)
        | load.model_dump(include={"depth", "window_size", "stride", "prompt_tokens"})
        | {"lists_per_s": load.qps or config.search.qps}
    )
    if load.kind == "listwise":
        sheet.line("passes", "1 + ceil(max(0, depth - window_size) / stride)", "windows a list, one after the other")
        sheet.line("pass_tokens", "min(depth, window_size) * tokens_per_passage + prompt_tokens", "tokens")
    else:
        sheet.line("passes", "depth", "pairs a list")
        sheet.line("pass_tokens", "tokens_per_passage + prompt_tokens", "tokens")
    sheet.line("flops_per_token", "2 * weights + 4 * layers * hidden * pass_tokens", "FLOP")
    sheet.line("work_per_list", "passes * pass_tokens * flops_per_token", "FLOP")
    devices = _rate(sheet, node, "cpu_rerank_flops", "gpu_rerank_share")
    sheet.line("seconds_alone", f"work_per_list / {devices}" if load.kind == "cross_encoder" else
               "work_per_list / device_flops", "s")  # fmt: skip
    # Windows wait for one another, so a list has one device; pairs may be spread over a node's.
    nodes = sheet.line("nodes", f"ceil(lists_per_s * work_per_list / busy_share / {devices})", "nodes")
    bytes_per_weight = 2 if isinstance(node, GpuNodeShape) else 4
    sheet.let(bytes_per_weight=bytes_per_weight, all_weights=load.network.all_weights)
    memory = sheet.line("weights_bytes", "all_weights * bytes_per_weight", "bytes")
    hours = config.search.hours
    warnings = []
    if isinstance(node, GpuNodeShape) and _over(memory, 0.9 * node.gpu_memory_gib * GIB):
        warnings.append("the weights alone do not fit a GPU: set engine.tensor_parallel in the reranker's engine")
    seconds = sheet["seconds_alone"]
    if seconds is not None and _over(seconds * 1000, config.search.p99_ms):
        warnings.append(
            f"a list takes {readable(seconds, 's')} alone, more than search.p99_ms: lower rerank.depth, or take a "
            "smaller reranker"
        )
    return _batch("rerank", sheet, node, nodes, hours, memory, None, warnings)


def plan_training(config: PlanConfig, figures: Mapping[str, Figure]) -> StagePlan:
    """One training on Ray Train and DeepSpeed."""
    load = config.train
    if load is None:
        raise ValueError("train: nothing is trained in this plan")
    network, node = load.network or config.encoder, config.gpu_node or config.node
    sheet = Sheet(
        values(config, figures)
        | _network(network)
        | load.model_dump(include={"queries", "epochs", "batch_size", "passages_per_query"})
    )
    sheet.line("steps", "ceil(queries * epochs / batch_size)", "steps")
    sheet.line("step_tokens", "batch_size * (query_tokens + passages_per_query * tokens_per_passage)", "tokens")
    # Backward costs twice forward.
    sheet.line("flops_per_token", "3 * (2 * weights + 4 * layers * hidden * tokens_per_passage)", "FLOP")
    sheet.line("work", "steps * step_tokens * flops_per_token", "FLOP")
    nodes, hours = _batch_nodes(sheet, node, "cpu_train_flops", "gpu_train_share")
    per_node = node.gpus if isinstance(node, GpuNodeShape) else 1
    workers = None if nodes is None else nodes * per_node
    sheet.let(workers=workers, all_weights=network.all_weights)
    # Weights and gradients in 2 bytes, Adam's state in 12 (Rajbhandari et al., ZeRO, section 3.1); ZeRO n splits them.
    split = {0: "16", 1: "(4 + 12 / workers)", 2: "(2 + 14 / workers)", 3: "16 / workers"}[load.zero_stage]
    memory = sheet.line("state_per_worker", f"all_weights * {split}", "bytes")
    warnings = ["activations come on top of the state; train.chunk_tokens bounds them for dual encoders"]
    if isinstance(node, GpuNodeShape) and _over(memory, node.gpu_memory_gib * GIB):
        warnings.append("train.zero_stage: the state alone does not fit a GPU; raise it, or set train.offload")
    if _over(nodes, 1):
        warnings.append("how training speeds up over nodes has not been measured; two workers on one machine had 1.6x")
    disk = sheet.line("checkpoint", "all_weights * 16", "bytes")
    return _batch("train", sheet, node, nodes, hours, memory, disk, warnings)


def _network(network: Network) -> dict[str, Number]:
    return {"weights": network.weights, "layers": network.layers, "hidden": network.hidden}


def _rate(sheet: Sheet, node: NodeShape, cpu: str, gpu: str) -> str:
    """The formula of a node's FLOP/s, and the line of one device's."""
    if isinstance(node, GpuNodeShape):
        sheet.let(gpus=node.gpus, peak_flops=node.peak_flops)
        sheet.line("device_flops", f"peak_flops * {gpu}", "FLOP/s of a GPU")
        return "(gpus * device_flops)"
    sheet.let(cores=node.cores)
    sheet.line("device_flops", f"cores * {cpu}", "FLOP/s of a node")
    return "device_flops"


def _batch_nodes(sheet: Sheet, node: NodeShape, cpu: str, gpu: str, at_least: str = "") -> tuple[Number, Number]:
    """Nodes that end the sheet's `work` within the hours, and the hours they then take.

    `at_least` is the formula of the seconds that a node takes for something else meanwhile.
    """
    seconds = f"work / {_rate(sheet, node, cpu, gpu)}"
    if at_least:
        sheet.let(cores=node.cores)
        sheet.line("reading_s", at_least, "s of a node")
        seconds = f"max({seconds}, reading_s)"
    sheet.line("node_hours", f"{seconds} / working_share / 3600", "h")
    nodes = sheet.line("nodes", "ceil(node_hours / within_hours)", "nodes")
    return nodes, sheet.line("work_hours", "node_hours / nodes", "h")


def _batch(
    name: str, sheet: Sheet, node: NodeShape, nodes: Number, hours: Number, memory: Number, disk: Number,
    warnings: list[str],
) -> StagePlan:  # fmt: skip
    return billed(StagePlan(name, sheet.lines, sheet.used, nodes, memory, disk, hours, warnings=warnings), node)


def billed(stage: StagePlan, node: NodeShape) -> StagePlan:
    """The stage with its core-hours, GPU-hours and cost."""
    room = None if stage.nodes is None else stage.nodes * node.disk_gib * GIB
    warnings = list(stage.warnings)
    if stage.disk_bytes is not None and room is not None and stage.disk_bytes > room:
        warnings.append(
            f"{readable(stage.disk_bytes, 'bytes')} of disk, and its nodes have {readable(room, 'bytes')} together: "
            "shared storage of that size is needed, which every node sees under one path"
        )
    paid = None if stage.nodes is None or stage.hours is None else stage.nodes * stage.hours
    gpu = isinstance(node, GpuNodeShape)
    return replace(
        stage,
        warnings=warnings,
        core_hours=None if paid is None or gpu else paid * node.cores,
        gpu_hours=(None if paid is None else paid * node.gpus) if isinstance(node, GpuNodeShape) else 0.0,
        cost=None if paid is None or node.price_per_hour is None else paid * node.price_per_hour,
    )


def _fits(node: NodeShape, memory: Number, config: PlanConfig, way_out: str = "") -> list[str]:
    bound = config.memory_share * node.memory_gib * GIB
    if not _over(memory, bound):
        return []
    return [
        f"{readable(memory, 'bytes')} of memory on a node that has {readable(node.memory_gib * GIB, 'bytes')}: take "
        f"larger nodes{way_out}"
    ]


def _over(value: Number, bound: int | float) -> bool:
    return value is not None and value > bound
