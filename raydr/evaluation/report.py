"""The HTML report of an evaluation: one file, no script, no external assets, light or dark as the reader's system is.

Notable: every number in the picture is also in a table as text, and the queries that moved most are listed, since
those are what one looks at next.

    html = render_report(comparison, curves, title="scifact, test", queries=queries)
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from raydr.evaluation.comparison import Comparison, footnotes, format_p
from raydr.evaluation.curves import RocCurve
from raydr.evaluation.plots import Theme, save_plot
from raydr.evaluation.tasks import Tasks, WrongModality, modality_table, task_table
from raydr.types import Query
from raydr.version import __version__

_NUM_MOVED = 8
"""Queries listed on either side of the per-query table."""

_STYLE = """
:root { --paper: #fff; --text: #1f2933; --soft: #5f6b78; --line: #d9dee4; --shade: #f5f7f9;
  --good: #00714f; --bad: #b3470a; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181d; --text: #e4e8ec; --soft: #9aa5b1; --line: #39424d; --shade: #1c2229;
    --good: #4cc9a0; --bad: #f0975a; }
}
:root { color-scheme: light dark; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 75rem; background: var(--paper); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
.soft, footer { color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
.tile { background: var(--shade); border-radius: .5rem; padding: .6rem 1rem; min-width: 8rem; }
.tile b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
img { width: 100%; min-width: 56rem; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); } thead th { border-bottom-width: 2px; }
.left, .text { text-align: left; } td.text { white-space: normal; }
.good { color: var(--good); } .bad { color: var(--bad); }
ul { padding-left: 1.2rem; } footer { margin-top: 3rem; font-size: .85rem; }
"""


def render_report(
    comparison: Comparison,
    curves: Mapping[str, RocCurve | None],
    *,
    title: str = "Evaluation",
    queries: Sequence[Query] = (),
    tasks: Tasks | None = None,
    wrong: WrongModality | None = None,
) -> str:
    """The report as an HTML document; the texts of `queries` are shown beside their ids where given."""
    c = comparison
    texts = {query.query_id: query.text for query in queries}
    several = f"{c.names[-1]} beside {', '.join(c.names[:-1])}" if len(c.names) > 1 else c.names[0]
    tiles = [(f"{c.values[-1, m]:.4f}", measure) for m, measure in enumerate(c.measures)]
    last = curves[c.names[-1]]
    if last is not None:
        tiles.append((f"{last.area:.4f}", "area under pooled ROC"))
    if tasks is not None:
        tiles.insert(0, (f"{tasks.own_values[-1].mean():.4f}", f"mean of {len(tasks.names)} tasks"))
    parts = [
        f"<h1>{escape(title)}</h1><p class=soft>{escape(several)}: {c.counts[0].queries:,} judged queries</p>",
        "<div class=tiles>" + "".join(f"<div class=tile><b>{v}</b>{escape(n)}</div>" for v, n in tiles) + "</div>",
        _picture(c, curves),
        "<h2>Values</h2>" + _values_table(c),
        _tasks_section(c, tasks),
        _modality_section(c, wrong),
        "<h2>What the numbers rest on</h2><ul>" + "".join(f"<li>{escape(n)}</li>" for n in footnotes(c)) + "</ul>",
        _roc_section(c, curves),
        _moved_queries(c, texts) if len(c.names) > 1 else _weakest_queries(c, texts),
        f"<footer>raydr {__version__}. The same numbers for programs: metrics.json, summary.json, "
        "per_query.parquet, roc.parquet.</footer>",
    ]
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body></html>\n"
    )


def _picture(c: Comparison, curves: Mapping[str, RocCurve | None]) -> str:
    def as_uri(theme: Theme) -> str:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "plot.svg"
            save_plot(c, curves, file, theme=theme)
            return "data:image/svg+xml;base64," + base64.b64encode(file.read_bytes()).decode("ascii")

    what = "Bars of each measure with intervals; differences of each query; ROC curves. All numbers are in the tables."
    return (
        f'<div class=wide><picture><source media="(prefers-color-scheme: dark)" srcset="{as_uri("dark")}">'
        f'<img src="{as_uri("light")}" alt="{what}"></picture></div>'
    )


def _values_table(c: Comparison) -> str:
    several = len(c.names) > 1
    head = ["measure", "run", "value", f"{c.config.confidence:.0%} interval"]
    head += [f"difference to {c.names[0]}", "its interval", "p", "p corrected"] if several else []
    rows, styles = [], []
    for m, measure in enumerate(c.measures):
        for r, name in enumerate(c.names):
            row = [measure if r == 0 else "", name, f"{c.values[r, m]:.4f}", f"{c.low[r, m]:.3f} to {c.high[r, m]:.3f}"]
            if r:
                row += [
                    f"{c.differences[r, m]:+.4f}",
                    f"{c.difference_low[r, m]:+.3f} to {c.difference_high[r, m]:+.3f}",
                    format_p(c.p_values[r, m]),
                    format_p(c.p_corrected[r, m]) + (" *" if c.is_significant(r, m) else ""),
                ]
            rows.append(row)
            better = "good" if c.differences[r, m] > 0 else "bad"
            styles.append(better if c.is_significant(r, m) else "")
    return _table(head, rows, align="ll", styles=styles)


def _tasks_section(c: Comparison, tasks: Tasks | None) -> str:
    if tasks is None:
        return ""
    note = "Each task by a measure of its own; in the mean over the tasks, each counts once."
    return f"<h2>Tasks</h2><p class=soft>{note}</p>" + _table(*task_table(tasks, c), align="lll")


def _modality_section(c: Comparison, wrong: WrongModality | None) -> str:
    if wrong is None:
        return ""
    note = "Of the first k hits, the share that is of a modality which no relevant passage of the query has."
    return f"<h2>Hits of the wrong modality</h2><p class=soft>{note}</p>" + _table(*modality_table(wrong, c), align="l")


def _roc_section(c: Comparison, curves: Mapping[str, RocCurve | None]) -> str:
    rows = [
        [name, f"{curve.area:.4f}", f"{curve.num_positives:,}", f"{curve.num_missed:,}", f"{curve.num_negatives:,}"]
        for name in c.names
        if (curve := curves[name]) is not None
    ]
    if not rows:
        return ""
    note = (
        "One score threshold for all queries: each query gives its relevant passages and its "
        f"{c.config.roc_num_negatives:,} best-scoring others. Relevant passages not retrieved count as lowest."
    )
    head = ["run", "area under ROC", "relevant", "of them not retrieved", "others"]
    return f"<h2>ROC</h2><p class=soft>{note}</p>" + _table(head, rows, align="l")


def _moved_queries(c: Comparison, texts: Mapping[str, str]) -> str:
    """The queries that the last run changes most against the first, by the first measure."""
    differences = c.per_query[-1, :, 0] - c.per_query[0, :, 0]
    order = np.argsort(differences, kind="stable")
    gains = [i for i in order[::-1][:_NUM_MOVED] if differences[i] > 0]
    losses = [i for i in order[:_NUM_MOVED] if differences[i] < 0]
    sections = []
    for word, chosen in (("gain", gains), ("lose", losses)):
        rows = [
            [c.query_ids[i], texts.get(c.query_ids[i], ""), f"{differences[i]:+.3f}",
             f"{c.per_query[0, i, 0]:.3f}", f"{c.per_query[-1, i, 0]:.3f}"]
            for i in chosen
        ]  # fmt: skip
        head = ["query", "text" if texts else "", "difference", c.names[0], c.names[-1]]
        title = f"<h2>Queries that {word} most: {escape(c.measures[0])} of {escape(c.names[-1])}</h2>"
        sections.append(title + _table(head, rows, align="lt") if rows else "")
    return "".join(sections)


def _weakest_queries(c: Comparison, texts: Mapping[str, str]) -> str:
    order = np.argsort(c.per_query[0, :, 0], kind="stable")[:_NUM_MOVED]
    rows = [
        [c.query_ids[i], texts.get(c.query_ids[i], ""), *(f"{value:.3f}" for value in c.per_query[0, i])] for i in order
    ]
    head = ["query", "text" if texts else "", *c.measures]
    return f"<h2>Weakest queries by {escape(c.measures[0])}</h2>" + _table(head, rows, align="lt")


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, align: str, styles: Sequence[str] | None = None
) -> str:
    """`align`: one letter per column from the left, l(eft) or t(ext that may wrap); the rest are numbers."""
    kinds = [{"l": "left", "t": "text"}[letter] for letter in align] + [""] * (len(head) - len(align))

    def row(tag: str, cells: Sequence[str]) -> str:
        padded = [*cells, *[""] * (len(head) - len(cells))]
        return "".join(
            f'<{tag} class="{kind}">{escape(cell)}</{tag}>' for kind, cell in zip(kinds, padded, strict=True)
        )

    body = "".join(
        f'<tr class="{style}">{row("td", cells)}</tr>'
        for cells, style in zip(rows, styles or [""] * len(rows), strict=True)
    )
    return f"<div class=wide><table><thead><tr>{row('th', head)}</tr></thead><tbody>{body}</tbody></table></div>"
