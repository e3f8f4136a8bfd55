"""The time series of jobs, and of what jobs and serving share: one place that names them all.

Notable: they are Ray's own metrics, published by the agent of each node in Prometheus form (docs/watching.md). A
process that is not part of a Ray cluster counts nothing and imports nothing. Counters, not rates: a rate over any
time is Prometheus' work. Labels take few values, all of them named here; Ray adds node and worker, and in a Serve
replica application, deployment and replica. What only serving has is in raydr/serve/metrics.py.

| series (Prometheus adds `ray_` in front) | labels | what |
| --- | --- | --- |
| raydr_embed_passages_total, _seconds_total | | passages embedded; seconds spent encoding, summed over actors |
| raydr_embed_tokens_total, _padding_tokens_total | | their tokens; what was computed beside them to fill batches up |
| raydr_train_steps_total | | steps, counted by the first worker |
| raydr_train_examples_total, _tokens_total, _padding_tokens_total | | queries with their groups; their tokens |
| raydr_train_seconds_total | phase | data (waiting for it), step, evaluate, checkpoint: seconds of each worker |
| raydr_train_loss | | loss of the last step, mean over workers |
| raydr_index_shards_total, _passages_total, _seconds_total | | shards built, their passages, summed seconds |
| raydr_search_queries_total, _seconds_total | mode | queries of batch searches, and the time they took |
| raydr_rerank_lists_total, _seconds_total | | lists reordered by batch jobs, and the time it took, summed over actors |
| raydr_rerank_window_seconds | | histogram: time of a window, waiting for the engine included |
| raydr_llm_prompts_total | | prompts a language model answered |
| raydr_llm_tokens_total | kind | prompt, cached (those of them that were in vLLM's prefix cache), generated |
| raydr_cache_files_total | result | files of buckets asked for here: hit (was here), miss (was brought) |
| raydr_bucket_bytes_total | direction | read, written |

    series.count("raydr_embed_passages_total", 512)
    with series.timed("raydr_index_seconds_total"): ...
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "raydr_embed_passages_total": ("Passages embedded.", ()),
    "raydr_embed_tokens_total": ("Tokens embedded, without padding.", ()),
    "raydr_embed_padding_tokens_total": ("Padding computed beside them.", ()),
    "raydr_embed_seconds_total": ("Seconds spent encoding, summed over actors.", ()),
    "raydr_train_steps_total": ("Training steps.", ()),
    "raydr_train_examples_total": ("Queries trained on.", ()),
    "raydr_train_tokens_total": ("Tokens trained on, without padding.", ()),
    "raydr_train_padding_tokens_total": ("Padding of the batches, before they are sorted by length.", ()),
    "raydr_train_seconds_total": ("Seconds of training workers.", ("phase",)),
    "raydr_index_shards_total": ("Index shards built.", ()),
    "raydr_index_passages_total": ("Passages put into shards.", ()),
    "raydr_index_seconds_total": ("Seconds spent building shards, summed over tasks.", ()),
    "raydr_search_queries_total": ("Queries of batch searches.", ("mode",)),
    "raydr_search_seconds_total": ("Seconds of batch searches.", ("mode",)),
    "raydr_rerank_lists_total": ("Lists reordered by batch jobs.", ()),
    "raydr_rerank_seconds_total": ("Seconds spent reordering, summed over actors.", ()),
    "raydr_llm_prompts_total": ("Prompts a language model answered.", ()),
    "raydr_llm_tokens_total": ("Tokens of a language model.", ("kind",)),
    "raydr_cache_files_total": ("Files of buckets asked for.", ("result",)),
    "raydr_bucket_bytes_total": ("Bytes to and from buckets.", ("direction",)),
}
_GAUGES = {"raydr_train_loss": "Loss of the last step, mean over workers."}
_HISTOGRAMS = {"raydr_rerank_window_seconds": "Time of a window."}
_SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60]


def count(name: str, value: float | int = 1, **labels: str) -> None:
    """Adds `value` to a counter; Ray refuses zero, so zero makes no series."""
    if value > 0 and _is_seen():
        _series(name).inc(value, tags=labels)


def set_to(name: str, value: float) -> None:
    """Sets a gauge."""
    if _is_seen():
        _series(name).set(value)


def observe(name: str, value: float) -> None:
    """Adds a value to a histogram."""
    if _is_seen():
        _series(name).observe(value)


@contextmanager
def timed(name: str, **labels: str) -> Generator[None]:
    """Adds the seconds of the block to a counter, also where it raises."""
    started = time.perf_counter()
    try:
        yield
    finally:
        count(name, time.perf_counter() - started, **labels)


def names() -> list[str]:
    """All series of this module."""
    return [*_COUNTERS, *_GAUGES, *_HISTOGRAMS]


def _is_seen() -> bool:
    """Whether this process is part of a Ray cluster."""
    is_initialized = getattr(sys.modules.get("ray"), "is_initialized", None)
    return is_initialized is not None and is_initialized()


@cache
def _series(name: str) -> Any:
    """A series, made once per process; in a Serve replica one of Serve's, which carry its labels."""
    if "ray.serve" in sys.modules:
        from ray.serve import metrics
    else:
        from ray.util import metrics
    # Ray annotates float bounds and one tag; its code and its documentation take several tags and any numbers.
    kinds: Any = metrics
    if name in _COUNTERS:
        description, labels = _COUNTERS[name]
        return kinds.Counter(name, description, tag_keys=labels)
    if name in _GAUGES:
        return kinds.Gauge(name, _GAUGES[name])
    return kinds.Histogram(name, _HISTOGRAMS[name], _SECONDS)
