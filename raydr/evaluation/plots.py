"""The picture of an evaluation: values with intervals, per-query differences, ROC curves.

Notable: one drawing, two colour themes: the PNG is light, the HTML report carries a light and a dark SVG and shows
the one the reader's system asks for. Colours are Okabe and Ito's, which colour-blind readers can tell apart. Drawn
without pyplot, so no display and no global state.

    save_plot(comparison, curves, path)    # path.suffix decides: .png or .svg
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from raydr.evaluation.comparison import Comparison
from raydr.evaluation.curves import RocCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Theme: TypeAlias = Literal["light", "dark"]

_COLOURS = ["#7F8C9A", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"]
"""The reference is grey, since the question is how the others differ from it."""
_LABELLED_BARS = 24
"""Up to this many bars carry their value above them."""


@dataclass(frozen=True)
class _Ink:
    paper: str
    text: str
    faint: str


_INKS = {"light": _Ink("#FFFFFF", "#1F2933", "#D9DEE4"), "dark": _Ink("#14181D", "#E4E8EC", "#39424D")}


def save_plot(
    comparison: Comparison, curves: Mapping[str, RocCurve | None], path: Path, *, theme: Theme = "light"
) -> None:
    """Draws the three panels into a PNG or SVG file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ink = _INKS[theme]
    settings = {
        "font.size": 10,
        "text.color": ink.text,
        "axes.labelcolor": ink.text,
        "axes.edgecolor": ink.faint,
        "axes.facecolor": ink.paper,
        "xtick.color": ink.text,
        "ytick.color": ink.text,
        "grid.color": ink.faint,
        "axes.grid": True,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "svg.hashsalt": "raydr",  # equal evaluations give equal files
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(15, 4.6), layout="constrained", facecolor=ink.paper)
        values, queries, roc = figure.subplots(1, 3, width_ratios=[1.35, 1, 0.9])
        _draw_values(values, comparison, ink)
        if len(comparison.names) > 1:
            _draw_differences(queries, comparison, ink)
        else:
            _draw_per_query(queries, comparison)
        _draw_curves(roc, comparison, curves, ink)
        for axes in (values, queries, roc):
            axes.tick_params(length=0)
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=144, metadata=metadata)


def _draw_values(axes: Axes, c: Comparison, ink: _Ink) -> None:
    num_runs = len(c.names)
    width = 0.8 / num_runs
    for r, name in enumerate(c.names):
        x = np.arange(len(c.measures)) + (r - (num_runs - 1) / 2) * width
        errors = np.stack([c.values[r] - c.low[r], c.high[r] - c.values[r]]).clip(min=0)
        axes.bar(x, c.values[r], width * 0.92, color=_colour(r if num_runs > 1 else 1), label=name)
        axes.errorbar(x, c.values[r], errors, fmt="none", ecolor=ink.text, elinewidth=1, capsize=2.5, alpha=0.75)
        if num_runs * len(c.measures) <= _LABELLED_BARS:
            for m, place in enumerate(x):
                star = "*" if r and c.is_significant(r, m) else ""
                label = f"{c.values[r, m]:.3f}{star}"
                axes.annotate(label, (place, c.high[r, m]), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xticks(range(len(c.measures)), c.measures)
    axes.grid(visible=False, axis="x")
    axes.set_ylim(0, max(1.0, float(c.high.max()) * 1.08))
    axes.set_title(f"Means over {c.counts[0].queries:,} queries, {c.config.confidence:.0%} intervals")
    if num_runs > 1:
        # Below the axis, where no bar can stand.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=min(num_runs, 4))


def _draw_differences(axes: Axes, c: Comparison, ink: _Ink) -> None:
    measure = c.measures[0]
    share = np.linspace(0, 100, len(c.query_ids))
    for r, name in enumerate(c.names[1:], start=1):
        sorted_differences = np.sort(c.per_query[r, :, 0] - c.per_query[0, :, 0])[::-1]
        better, worse = (sorted_differences > 0).sum(), (sorted_differences < 0).sum()
        axes.fill_between(share, sorted_differences, step="mid", color=_colour(r), alpha=0.12, linewidth=0)
        axes.step(share, sorted_differences, where="mid", color=_colour(r), linewidth=1.6,
                  label=f"{name}: {better} better, {worse} worse")  # fmt: skip
    axes.axhline(0, color=ink.text, linewidth=0.8)
    axes.set_title(f"{measure} of each query, minus {c.names[0]}'s")
    axes.set_xlabel("queries, sorted by difference (%)")
    axes.legend(loc="upper right", fontsize=9)


def _draw_per_query(axes: Axes, c: Comparison) -> None:
    share = np.linspace(0, 100, len(c.query_ids))
    for m, measure in enumerate(c.measures):
        axes.step(share, np.sort(c.per_query[0, :, m])[::-1], where="mid", color=_colour(m + 1), label=measure)
    axes.set_title("Value of each query")
    axes.set_xlabel("queries, sorted by value (%)")
    axes.legend(loc="lower left", fontsize=9)


def _draw_curves(axes: Axes, c: Comparison, curves: Mapping[str, RocCurve | None], ink: _Ink) -> None:
    axes.plot([0, 1], [0, 1], color=ink.faint, linewidth=1)
    for r, name in enumerate(c.names):
        curve = curves[name]
        if curve is not None:
            thin = curve.thinned(400)
            axes.plot(thin.false_positive_rate, thin.true_positive_rate, color=_colour(r), linewidth=1.8,
                      label=f"{name}: area {curve.area:.3f}")  # fmt: skip
    axes.set_title("ROC over all queries, one threshold")
    axes.set_xlabel("other passages accepted")
    axes.set_ylabel("relevant passages accepted")
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)
    axes.set_aspect("equal", adjustable="box")
    if any(curve is not None for curve in curves.values()):
        axes.legend(loc="lower right", fontsize=9)


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]
