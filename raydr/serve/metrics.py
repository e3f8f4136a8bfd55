"""The time series that only serving has, beside Ray Serve's own and those of raydr/series.py: one place for all names.

Notable: Serve adds application, deployment and replica to each; the node's agent publishes all in Prometheus form (see
docs/watching.md). What a caller sends never makes a series: routes are patterns, codes are those of the server. Queue
lengths of handles and replicas are Serve's own series
(`ray_serve_num_ongoing_requests_at_replicas`, `ray_serve_deployment_queued_queries`).

| series (Prometheus adds `ray_` in front) | tags | what |
| --- | --- | --- |
| raydr_requests_total | route, status | answers |
| raydr_errors_total | code | answers that are errors, by the code in their body |
| raydr_request_latency_ms | route | time in the ingress |
| raydr_requests_in_work | | requests that an ingress replica works on |
| raydr_stage_latency_ms | stage, mode | encode, prf, search, bm25, feedback, passages, rerank, total |
| raydr_shard_search_ms | shard | FAISS alone, inside a shard's replica |
| raydr_batch_texts, raydr_batch_tokens | side | what the encoder ran at once (tokens estimated from characters) |
| raydr_batch_wait_ms, raydr_encode_queue_length | side | how long a text waited for its batch; how many wait |
| raydr_index_info | index_version, encoder_version | 1 for the live version, 0 for one swapped out |
| raydr_index_swaps_total | outcome | swaps done and failed |
| raydr_shard_failures_total | shard, code | calls of a search that a Shard deployment (by number) did not answer |
| raydr_rerank_failures_total | reranker, code | searches whose reranker (or refiner: `prf`) did not answer |
"""

from __future__ import annotations

from functools import cache
from typing import Any

_MS = [0.5, 1, 2, 3, 5, 8, 13, 20, 35, 60, 100, 200, 400, 1000, 3000, 10_000, 30_000]
_COUNT = [1, 2, 4, 8, 16, 32, 64, 128, 256]
_TOKENS = [8, 32, 128, 512, 1024, 2048, 4096, 8192, 16_384]


@cache
def _metrics() -> dict[str, Any]:
    """Every series, made once per process and only where it is used: Serve's metrics want a Ray process."""
    from ray.serve import metrics

    # Ray annotates one tag and float bounds; its code and its documentation take several tags and any numbers.
    series: Any = metrics
    Counter, Gauge, Histogram = series.Counter, series.Gauge, series.Histogram  # noqa: N806

    return {
        "requests": Counter("raydr_requests_total", "Requests answered.", tag_keys=("route", "status")),
        "errors": Counter("raydr_errors_total", "Answers that are errors.", tag_keys=("code",)),
        "in_work": Gauge("raydr_requests_in_work", "Requests in work."),
        "latency": Histogram("raydr_request_latency_ms", "Time in the ingress.", _MS, tag_keys=("route",)),
        "stage": Histogram("raydr_stage_latency_ms", "Time of a stage.", _MS, tag_keys=("stage", "mode")),
        "shard": Histogram("raydr_shard_search_ms", "FAISS search of a shard.", _MS, tag_keys=("shard",)),
        "batch_texts": Histogram("raydr_batch_texts", "Texts encoded at once.", _COUNT, tag_keys=("side",)),
        "batch_tokens": Histogram("raydr_batch_tokens", "Tokens encoded at once.", _TOKENS, tag_keys=("side",)),
        "batch_wait": Histogram("raydr_batch_wait_ms", "Wait for a batch.", _MS, tag_keys=("side",)),
        "queue": Gauge("raydr_encode_queue_length", "Requests waiting for the encoder."),
        "index": Gauge("raydr_index_info", "1: live.", tag_keys=("index_version", "encoder_version")),
        "swaps": Counter("raydr_index_swaps_total", "Index swaps.", tag_keys=("outcome",)),
        "shard_failures": Counter(
            "raydr_shard_failures_total", "Calls that a shard did not answer.", tag_keys=("shard", "code")
        ),
        "rerank_failures": Counter(
            "raydr_rerank_failures_total", "Searches whose reranker did not answer.", tag_keys=("reranker", "code")
        ),
    }


class HttpMetrics:
    """Requests, how many are in work, and their latencies."""

    def record(self, route: str, status: int, duration_s: float) -> None:
        _metrics()["requests"].inc(tags={"route": route, "status": str(status)})
        _metrics()["latency"].observe(duration_s * 1000, tags={"route": route})

    def in_work(self, requests: int) -> None:
        _metrics()["in_work"].set(requests)


def record_error(code: str) -> None:
    _metrics()["errors"].inc(tags={"code": code})


def record_stages(timings_ms: dict[str, float], mode: str) -> None:
    for stage, value in timings_ms.items():
        _metrics()["stage"].observe(max(value, 1e-3), tags={"stage": stage, "mode": mode})


def record_shard_search(shard: int, duration_s: float) -> None:
    _metrics()["shard"].observe(max(duration_s * 1000, 1e-3), tags={"shard": str(shard)})


def record_batch(side: str, *, texts: int, tokens: int, waits_s: list[float], queue_length: int) -> None:
    _metrics()["batch_texts"].observe(texts, tags={"side": side})
    _metrics()["batch_tokens"].observe(max(tokens, 1), tags={"side": side})
    _metrics()["queue"].set(queue_length)
    for wait_s in waits_s:
        _metrics()["batch_wait"].observe(max(wait_s * 1000, 1e-3), tags={"side": side})


def record_live_index(index_version: str, encoder_version: str, *, live: bool) -> None:
    _metrics()["index"].set(int(live), tags={"index_version": index_version, "encoder_version": encoder_version})


def record_rerank_failure(reranker: str, code: str) -> None:
    _metrics()["rerank_failures"].inc(tags={"reranker": reranker, "code": code})


def record_shard_failure(shard: int, code: str) -> None:
    _metrics()["shard_failures"].inc(tags={"shard": str(shard), "code": code})


def record_swap(outcome: str) -> None:
    _metrics()["swaps"].inc(tags={"outcome": outcome})
