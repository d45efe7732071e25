"""Charts of what an evaluation measured, drawn as the pictures of `index.evaluation.plots` are.

Import this module where a chart is drawn: matplotlib takes half a second to load.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullLocator

from index.evaluation.plots import DPI, FAINT, INK, MUTED, PAPER, WRONG, shorten
from index.evaluation.recall_report import RecallReport
from index.evaluation.retrieval_report import RetrievalReport
from index.evaluation.retrieval_scores import MAP_AT_R
from index.evaluation.space_report import Drift, SpaceReport
from index.figures import save_figure
from models.command import counted

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
    axes.barh(places, maps, height=0.62, color=BLUE, label=MAP_AT_R)
    axes.barh(places[:1], maps[:1], height=0.62, color=WRONG, label="worst class")
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
        x="%",
    )
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center", ncols=4, frameon=False, fontsize=8,
    )  # fmt: skip
    save_figure(figure, path)


def draw_space(path: Path, report: SpaceReport) -> None:
    """Draw the spectrum, how often images are found, and the shared neighbours, as PNG."""
    drift = report.drift
    figure = new_figure(9.6 if drift is None else 13.6, 4.0)
    panels = figure.subplots(1, 2 if drift is None else 3)
    _draw_spectrum(panels[0], report)
    _draw_occurrences(panels[1], report)
    if drift is not None:
        _draw_overlap(panels[2], drift)
    save_figure(figure, path)


def _draw_spectrum(axes: Axes, report: SpaceReport) -> None:
    """Draw singular values by rank, both logarithmic; what is 0 cannot be."""
    values = np.array(report.singular_values)
    values = values[values > 0]  # the largest come first
    if len(values):
        axes.plot(np.arange(1, 1 + len(values)), values / values[0], color=BLUE, lw=1.6)
        axes.axvline(report.rankme, color=ORANGE, lw=1.2, label=f"RankMe {report.rankme:.0f}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(0.1, 10 ** np.floor(np.log10(values[-1] / values[0]))))
        quiet_logarithms(axes.xaxis, axes.yaxis)
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    finish_axes(
        axes,
        title=f"{report.collection}: {report.rankme:.0f} of {report.rankme_limit} directions",
        x="rank",
        y="singular value, share of the largest",
    )


def _draw_occurrences(axes: Axes, report: SpaceReport) -> None:
    """Draw how many images are in so many neighbour lists."""
    k, counts = report.hubness.k, np.array(report.occurrence_histogram)
    shown = counts > 0
    axes.scatter(np.flatnonzero(shown), counts[shown], s=9, color=BLUE, label="images")
    axes.axvline(k, color=ORANGE, lw=1.2, label=f"mean {k}")
    axes.set_yscale("log")
    quiet_logarithms(axes.yaxis)
    skewness = report.hubness.skewness
    title = "nobody stands out" if skewness is None else f"skewness {skewness:.2f}"
    finish_axes(
        axes,
        title=f"hubs: {title}, {report.hubness.anti_hubs:.1%} in no list",
        x=f"lists of the {k} nearest that an image is in",
        y=f"images, of {report.hubness.n:,}",
    )
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def _draw_overlap(axes: Axes, drift: Drift) -> None:
    """Draw how many images share so many of their neighbours in both spaces."""
    counts = np.array(drift.overlap_histogram)
    axes.bar(np.arange(len(counts)), counts, width=0.7, color=BLUE)
    k = len(counts) - 1
    axes.axvline(k * drift.neighbour_overlap, color=ORANGE, lw=1.2, label="mean")
    cka = "" if drift.linear_cka is None else f", CKA {drift.linear_cka:.3f}"
    finish_axes(
        axes,
        title=f"drift: {drift.neighbour_overlap:.1%} the same{cka}",
        x=f"of the {k} nearest also nearest in {shorten(drift.collection, 24)}",
        y=f"images, of {drift.n_overlap:,}",
    )
    axes.legend(frameon=False, fontsize=8)


def draw_recall(path: Path, report: RecallReport) -> None:
    """Draw recall of every condition, and how long single queries take, as PNG."""
    figure = new_figure(12.4, 1.9 + 0.42 * len(report.conditions))
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    _draw_conditions(left, report)
    _draw_latencies(right, report)
    save_figure(figure, path)


def _draw_conditions(axes: Axes, report: RecallReport) -> None:
    """Draw a row a condition: mean recall, and that of the worst twentieth of the queries."""
    ks = list(report.conditions[0].by_k)
    k = report.exact.k if report.exact.k in ks else ks[len(ks) // 2]
    places = np.arange(len(report.conditions))
    means = 100 * np.array([one.by_k[k].mean for one in report.conditions])
    worst = 100 * np.array([one.by_k[k].worst_5_percent for one in report.conditions])
    axes.hlines(places, worst, means, color=FAINT, lw=2)
    axes.scatter(worst, places, s=34, color=PAPER, edgecolors=WRONG, zorder=3, label="worst 5%")
    axes.scatter(means, places, s=34, color=BLUE, zorder=4, label="all queries")
    for place, mean in zip(places, means, strict=True):
        axes.annotate(
            f"{mean:.2f}", (mean, place), xytext=(0, 6), textcoords="offset points",
            ha="center", fontsize=7, color=MUTED,
        )  # fmt: skip
    axes.set_yticks(places, [one.name for one in report.conditions])
    axes.set_ylim(len(places) - 0.4, -0.7)
    low = min(98.0, float(worst.min()))
    axes.set_xlim(low - 0.06 * (100 - low), 100 + 0.06 * (100 - low))
    finish_axes(axes, title=f"{report.collection}, {report.factory}: recall@{k}", x="%")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))


def _draw_latencies(axes: Axes, report: RecallReport) -> None:
    """Draw which share of single queries took how long at most."""
    for name, timing, colour in (
        ("through the index", report.conditions[0].timing, BLUE),
        ("exact", report.exact, ORANGE),
    ):
        latencies = np.array(timing.latencies_ms)
        shares = 100 * np.arange(1, 1 + len(latencies)) / len(latencies)
        axes.plot(latencies, shares, color=colour, lw=1.6, drawstyle="steps-post", label=name)
        axes.scatter([timing.p99_ms], [99], s=22, color=colour, zorder=3)
        axes.annotate(
            f"p99 {timing.p99_ms:.2g} ms", (timing.p99_ms, 99), xytext=(5, -11),
            textcoords="offset points", ha="left", fontsize=7, color=colour,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.12)
    quiet_logarithms(axes.xaxis)
    axes.set_ylim(0, 103)
    finish_axes(
        axes,
        title=f"one query a call, k = {report.exact.k}, {counted(report.threads, 'thread')}",
        x="ms",
        y="% of queries took no longer",
    )
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure; inches."""
    return Figure(
        figsize=(width, height),
        dpi=DPI,
        facecolor=PAPER,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1),
    )


def quiet_logarithms(*sides: Axis) -> None:
    """Write 1, 10, 100 at a logarithmic side and nothing in between."""
    for side in sides:
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        side.set_minor_locator(NullLocator())


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
