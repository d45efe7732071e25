"""Charts of what an evaluation measured, drawn as the pictures of `index.evaluation.plots` are.

Import this module where a chart is drawn: matplotlib takes half a second to load.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from index.evaluation.plots import DPI, FAINT, INK, MUTED, PAPER, WRONG, save_figure, shorten
from index.evaluation.retrieval_report import RetrievalReport
from index.evaluation.retrieval_scores import MAP_AT_R

BLUE, ORANGE = "#0969da", "#bc4c00"
MAX_CLASSES = 40
"""More bars are read by nobody; the worst are drawn."""


def draw_retrieval(path: Path, report: RetrievalReport) -> None:
    """Draw mAP@R and P@1 of every class, the worst at the top, as PNG."""
    scored = [one for one in report.per_class if one.means is not None]
    scored.sort(key=lambda one: (one.means or {})[MAP_AT_R])
    shown = scored[:MAX_CLASSES]
    figure = new_figure(7.2, 1.9 + 0.3 * len(shown))
    axes = figure.add_subplot()
    places = np.arange(len(shown))
    maps = [100 * (one.means or {})[MAP_AT_R] for one in shown]
    firsts = [100 * (one.means or {})["P@1"] for one in shown]
    overall = report.measures[MAP_AT_R]
    axes.barh(places, maps, height=0.62, color=[WRONG, *[BLUE] * (len(shown) - 1)], label=MAP_AT_R)
    axes.scatter(firsts, places, s=26, color=INK, zorder=3, label="P@1")
    axes.axvspan(100 * overall.low, 100 * overall.high, color=ORANGE, alpha=0.25, lw=0)
    axes.axvline(100 * overall.mean, color=ORANGE, lw=1.4, label=f"{MAP_AT_R} of all queries")
    axes.set_yticks(places, [shorten(one.label, 20) for one in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 101)
    more = "" if len(shown) == len(scored) else f", the worst {len(shown)} of {len(scored)} classes"
    finish_axes(
        axes,
        title=f"{report.collection}: {overall.mean:.2%} {MAP_AT_R}{more}",
        x="% of the queries' own ideal",
    )
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center", ncols=3, frameon=False, fontsize=8,
    )  # fmt: skip
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure; inches."""
    return Figure(
        figsize=(width, height),
        dpi=DPI,
        facecolor=PAPER,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1),
    )


def finish_axes(axes: Axes, *, title: str, x: str = "", y: str = "") -> None:
    """Give axes their title, names and quiet lines."""
    axes.set_title(title, fontsize=10, weight="bold", color=INK, loc="left", pad=8)
    axes.set_xlabel(x, color=MUTED, fontsize=9)
    axes.set_ylabel(y, color=MUTED, fontsize=9)
    axes.tick_params(labelsize=8, colors=INK, length=0)
    axes.grid(axis="x", color=FAINT, lw=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
