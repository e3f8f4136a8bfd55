"""The Grafana dashboard of raydr as Python: rows of charts, each a question and the PromQL that answers it.

Notable: it is built with Grafana's own typed builders, so what `cluster/render.py` writes has the shape that Grafana
reads. It stands beside the dashboards that Ray generates and repeats none of them: those show Ray, this one shows
passages, tokens, windows and searches. Names of series are checked against raydr/series.py and raydr/serve/metrics.py
by a test, queries by a real Prometheus.

    python cluster/render.py        writes cluster/grafana-dashboard.json; import it, or put it where Ray's lie
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import count
from typing import NamedTuple

from grafana_foundation_sdk.builders.common import VizLegendOptions
from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, QueryVariable, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.timeseries import Panel
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, VariableRefresh

UID = "raydr"
APPLICATION = 'application=~"$application"'
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_COLUMNS, _HEIGHT = 24, 7


class Chart(NamedTuple):
    """One panel: what it shows, in which of Grafana's units, and the query behind each legend."""

    title: str
    unit: str
    queries: Mapping[str, str]
    description: str = ""


def rate(series: str, *by: str, only: str = "") -> str:
    """How fast a counter grows, per second, summed over everything but `by`."""
    return f"{_sum(by)} (rate(ray_raydr_{series}{{{only}}}[$__rate_interval]))"


def share(part: str, whole: str) -> str:
    """One sum divided by another; 0 where nothing of the part has been counted yet."""
    return f"({part} or vector(0)) / {whole}"


def padding(verb: str) -> str:
    """What part of the tokens that a verb computes is padding."""
    filled, read = rate(f"{verb}_padding_tokens_total"), rate(f"{verb}_tokens_total")
    return share(filled, f"(({filled} or vector(0)) + {read})")


def quantile(q: float, histogram: str, *by: str, only: str = "") -> str:
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', 'le', *by, only=only)})"


def quantiles(histogram: str, only: str = "") -> dict[str, str]:
    return {f"p{100 * q:.0f}": quantile(q, histogram, only=only) for q in (0.5, 0.95, 0.99)}


def _sum(by: tuple[str, ...]) -> str:
    return f"sum by ({', '.join(by)})" if by else "sum"


_FAILED = f'{APPLICATION}, status=~"5.."'
_ASKED = f'{APPLICATION}, route=~"/v1/.*|/v2/.*|/rerank"'
ROWS: dict[str, list[Chart]] = {
    "Serving": [
        Chart(
            "Answers", "reqps", {"{{route}} {{status}}": rate("requests_total", "route", "status", only=APPLICATION)}
        ),
        Chart("Latency of requests", "ms", quantiles("request_latency_ms", only=_ASKED), "In the ingress."),
        Chart(
            "Latency of stages, p95",
            "ms",
            {"{{stage}}": quantile(0.95, "stage_latency_ms", "stage", only=APPLICATION)},
            "As `timings_ms` in an answer has them. Stages overlap: encode and bm25 run at the same time.",
        ),
        Chart(
            "FAISS search of a shard, p95",
            "ms",
            {"shard {{shard}}": quantile(0.95, "shard_search_ms", "shard", only=APPLICATION)},
        ),
        Chart(
            "Work and queues",
            "short",
            {
                "in work, {{replica}}": f"sum by (replica) (ray_raydr_requests_in_work{{{APPLICATION}}})",
                "waiting for the encoder": f"sum(ray_raydr_encode_queue_length{{{APPLICATION}}})",
                "ongoing, {{deployment}}": (
                    f"sum by (deployment) (ray_serve_num_ongoing_requests_at_replicas{{{APPLICATION}}})"
                ),
            },
            "At the door, before the encoder, and what Ray Serve counts in each deployment.",
        ),
        Chart(
            "Batches of the encoder",
            "short",
            {
                "texts, p50": quantile(0.5, "batch_texts", only=APPLICATION),
                "tokens, p50": quantile(0.5, "batch_tokens", only=APPLICATION),
                "wait in ms, p95": quantile(0.95, "batch_wait_ms", only=APPLICATION),
            },
        ),
        Chart(
            "Index that is live",
            "short",
            {"{{index_version}}": f"sum by (index_version) (ray_raydr_index_info{{{APPLICATION}}})"},
            "Ingress replicas that answer from this version.",
        ),
    ],
    "Reranking": [
        Chart("Windows", "ops", {"{{deployment}}": rate("rerank_window_seconds_count", "deployment")}),
        Chart("Time of a window", "s", quantiles("rerank_window_seconds"), "The wait for the engine included."),
        Chart("Tokens of language models", "short", {"{{kind}} per second": rate("llm_tokens_total", "kind")}),
        Chart("Prompts", "ops", {"prompts": rate("llm_prompts_total")}),
        Chart(
            "Prompt tokens found in the prefix cache",
            "percentunit",
            {
                "share": share(
                    rate("llm_tokens_total", only='kind="cached"'), rate("llm_tokens_total", only='kind="prompt"')
                )
            },
        ),
        Chart("Lists reordered by batch jobs", "ops", {"lists": rate("rerank_lists_total")}),
        Chart("Rerankers of batch jobs at work", "short", {"rerankers": rate("rerank_seconds_total")}, "Mean number."),
    ],
    "Embedding": [
        Chart("Passages", "ops", {"passages per second": rate("embed_passages_total")}),
        Chart("Tokens", "ops", {"tokens per second": rate("embed_tokens_total")}, "Without padding."),
        Chart(
            "Padding",
            "percentunit",
            {"share": padding("embed")},
            "Of what was computed.",
        ),
        Chart("Encoders at work", "short", {"encoders": rate("embed_seconds_total")}, "Mean number."),
    ],
    "Training": [
        Chart("Loss", "none", {"worker {{WorkerId}}": "ray_raydr_train_loss"}),
        Chart("Steps", "ops", {"steps per second": rate("train_steps_total")}),
        Chart("Tokens", "ops", {"tokens per second": rate("train_tokens_total")}, "Of all workers, without padding."),
        Chart("Queries", "ops", {"queries per second": rate("train_examples_total")}, "With their passages."),
        Chart(
            "Padding",
            "percentunit",
            {"share": padding("train")},
            "Of what goes through the network, once.",
        ),
        Chart(
            "What workers do",
            "short",
            {"{{phase}}": rate("train_seconds_total", "phase")},
            "Mean number of workers in each phase. Much of `data` means that tokenising does not keep up.",
        ),
    ],
    "Index and cache": [
        Chart("Passages indexed", "ops", {"passages per second": rate("index_passages_total")}),
        Chart("Shards in work", "short", {"shards": rate("index_seconds_total")}, "Mean number."),
        Chart("Shards built", "short", {"shards in an hour": "sum(increase(ray_raydr_index_shards_total[1h]))"}),
        Chart("Queries of batch searches", "ops", {"{{mode}}": rate("search_queries_total", "mode")}),
        Chart(
            "Time of a query of a batch search",
            "s",
            {"{{mode}}": f"{rate('search_seconds_total', 'mode')} / {rate('search_queries_total', 'mode')}"},
        ),
        Chart(
            "Files found in the cache",
            "percentunit",
            {"share": share(rate("cache_files_total", only='result="hit"'), rate("cache_files_total"))},
            "Of the files of a bucket's artifacts that were asked for.",
        ),
        Chart("Bytes to and from buckets", "Bps", {"{{direction}}": rate("bucket_bytes_total", "direction")}),
    ],
    "Errors": [
        Chart("Errors by code", "reqps", {"{{code}}": rate("errors_total", "code", only=APPLICATION)}),
        Chart(
            "Answers that are the server's fault",
            "percentunit",
            {"share": share(rate("requests_total", only=_FAILED), rate("requests_total", only=APPLICATION))},
        ),
        Chart(
            "Searches without their reranker",
            "reqps",
            {"{{reranker}} {{code}}": rate("rerank_failures_total", "reranker", "code", only=APPLICATION)},
        ),
        Chart(
            "Calls that a shard did not answer",
            "reqps",
            {"Shard{{shard}} {{code}}": rate("shard_failures_total", "shard", "code", only=APPLICATION)},
        ),
        Chart(
            "Index swaps in an hour",
            "short",
            {"{{outcome}}": f"sum by (outcome) (increase(ray_raydr_index_swaps_total{{{APPLICATION}}}[1h]))"},
        ),
    ],
}


def dashboard() -> Dashboard:
    """The builder of the whole, charts three in a line."""
    made = (
        Dashboard("raydr")
        .uid(UID)
        .description("Passages, tokens, windows and searches of raydr; Ray's own dashboards stand beside it.")
        .tags(["raydr", "ray"])
        .time("now-30m", "now")
        .refresh("10s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(
            QueryVariable("application")
            .label("Application")
            .datasource(_SOURCE)
            .query("label_values(ray_raydr_requests_total, application)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    )
    numbers = count(1)  # what a link to a panel names it by
    for title, charts in ROWS.items():
        made.with_row(Row(title).id(next(numbers)))
        for place, chart in enumerate(charts):
            in_line = min(3, len(charts) - place // 3 * 3)
            made.with_panel(_panel(chart).id(next(numbers)).height(_HEIGHT).span(_COLUMNS // in_line))
    return made


def _panel(chart: Chart) -> Panel:
    legend = VizLegendOptions().show_legend(True).placement(LegendPlacement.BOTTOM)
    panel = (
        Panel()
        .title(chart.title)
        .unit(chart.unit)
        .min(0)
        .datasource(_SOURCE)
        .fill_opacity(8)
        .legend(legend.display_mode(LegendDisplayMode.LIST))
    )
    if chart.description:
        panel.description(chart.description)
    for place, (legend_format, query) in enumerate(chart.queries.items()):
        target = Dataquery().expr(query).legend_format(legend_format).range().datasource(_SOURCE)
        panel.with_target(target.ref_id(chr(ord("A") + place)))
    return panel


def as_json() -> str:
    return json.dumps(dashboard().build(), cls=JSONEncoder, indent=2, ensure_ascii=False) + "\n"
