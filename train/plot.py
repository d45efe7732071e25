"""The curves of a run: one panel for each thing to watch, as a PNG or one by one for a page.

Rules:
    A panel is there where its values were measured, and nowhere else.
    What a value should be compared with is drawn beside it, dashed: floors, limits, baselines.
    An axis is logarithmic only where every value is above 0: none is left out.
    Every record has a marker where they are few, so that a single one shows.
    Colours come from `PALETTE` alone, so that a page can put others in their place.

Figures are drawn without pyplot: no global state, no window, no back end setting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from models.files import atomic_file

Records = Sequence[dict[str, float]]

INK, MUTED, GRID, PAPER = "#1f2328", "#656d76", "#d8dee4", "#ffffff"
BLUE, ORANGE, GREEN = "#0969da", "#bc4c00", "#1a7f37"
PALETTE = {
    "ink": INK, "muted": MUTED, "grid": GRID, "paper": PAPER,
    "blue": BLUE, "orange": ORANGE, "green": GREEN,
}  # fmt: skip

MANY_RECORDS = 40
"""From here on a curve is a line without markers."""

COLUMNS = 3
PANEL_INCHES = (3.9, 2.7)
LEGEND_COLUMNS, LEGEND_LINE_POINTS = 2, 13


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A value over the epochs, and how it is called and drawn."""

    name: str
    label: str
    colour: str
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Level:
    """A height to compare with: `value`, or what the first record says of `name`."""

    label: str
    colour: str = MUTED
    value: float | None = None
    name: str = ""
    scale: float = 1.0

    def height(self, records: Records) -> float | None:
        """Give where the line is drawn; None where nothing is known."""
        if self.value is not None:
            return self.value
        known = [r[self.name] for r in records if r.get(self.name) is not None]
        return self.scale * known[0] if known else None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One diagram.

    Attributes:
        title: what it shows.
        unit: what the upright axis counts.
        note: how to read it, in a sentence.
        curves: at least one of them was measured.
        levels: what they are compared with.
        is_log: whether the upright axis is logarithmic, where the values allow it.
        from_zero: whether the upright axis begins at 0.
    """

    title: str
    unit: str
    note: str
    curves: tuple[Curve, ...]
    levels: tuple[Level, ...] = field(default=())
    is_log: bool = False
    from_zero: bool = False

    def points(self, curve: Curve, records: Records) -> tuple[list[float], list[float]]:
        """Give the epochs and heights at which a value was measured."""
        measured = [r for r in records if r.get(curve.name) is not None and "epoch" in r]
        return [r["epoch"] for r in measured], [curve.scale * r[curve.name] for r in measured]

    def has_log_axis(self, records: Records) -> bool:
        """Say whether the upright axis is logarithmic: there is no place on it for 0 and less."""
        heights = [height for curve in self.curves for height in self.points(curve, records)[1]]
        levels = [level.height(records) for level in self.levels]
        known = heights + [height for height in levels if height is not None]
        return self.is_log and all(height > 0 for height in known)

    def drawn(self, records: Records) -> bool:
        """Say whether there is anything to draw."""
        return any(self.points(curve, records)[0] for curve in self.curves)

    def in_words(self, records: Records) -> str:
        """Say what the panel shows to those who do not see it."""
        texts = []
        for curve in self.curves:
            epochs, heights = self.points(curve, records)
            if epochs:
                texts.append(
                    f"{curve.label} {heights[0]:.4g} at epoch {epochs[0]:.3g}, "
                    f"{heights[-1]:.4g} at epoch {epochs[-1]:.3g}"
                )
        for level in self.levels:
            height = level.height(records)
            if height is not None:
                texts.append(f"{level.label} {height:.4g}")
        return f"{self.title}, {self.unit}: {'; '.join(texts)}"


LOSS = Panel(
    title="Loss",
    unit="loss",
    note="The floor is what chance correlations of one batch cost.",
    curves=(
        Curve(name="loss", label="loss", colour=INK),
        Curve(name="loss_invariance", label="invariance", colour=BLUE),
        Curve(name="loss_redundancy", label="redundancy", colour=ORANGE),
    ),
    is_log=True,
)

ACCURACY = Panel(
    title="kNN accuracy",
    unit="top-1, %",
    note="Held-out training images, classified by their 20 nearest.",
    curves=(Curve(name="knn_top1", label="this encoder", colour=BLUE, scale=100),),
    levels=(
        Level(label="raw pixels", name="knn_pixels", scale=100),
        Level(label="untrained encoder", name="knn_random", scale=100, colour=ORANGE),
        Level(label="weights it starts from", name="knn_start", scale=100, colour=ORANGE),
    ),
)

RANK = Panel(
    title="Rank",
    unit="directions filled (RankMe)",
    note="Of one batch, so at most its size. A low one is dimensional collapse.",
    curves=(
        Curve(name="rankme", label="features", colour=BLUE),
        Curve(name="z_rankme", label="embeddings", colour=ORANGE),
    ),
    levels=(
        Level(label="most features", name="rankme_limit", colour=BLUE),
        Level(label="most embeddings", name="z_rankme_limit", colour=ORANGE),
    ),
    from_zero=True,
)

CORRELATION = Panel(
    title="Correlation matrix C",
    unit="correlation",
    note="The diagonal should reach 1, the rest the floor of 1/√N.",
    curves=(
        Curve(name="loss_invariance_per_dim", label="invariance / D", colour=INK),
        Curve(name="c_diagonal", label="diagonal, mean", colour=BLUE),
        Curve(name="c_off_diagonal_rms", label="off-diagonal, RMS", colour=ORANGE),
    ),
    levels=(Level(label="floor", name="c_off_diagonal_floor", colour=ORANGE),),
    from_zero=True,
)

ALIGNMENT = Panel(
    title="Alignment",
    unit="squared distance",
    note="Of two views of one image, on the unit sphere: 0 alike, 2 unrelated.",
    curves=(Curve(name="z_alignment", label="embeddings", colour=ORANGE),),
    from_zero=True,
)

UNIFORMITY = Panel(
    title="Uniformity",
    unit="log mean exp(-2 distance²)",
    note="Lower is more evenly spread over the sphere: -4 is even, 0 collapsed.",
    curves=(Curve(name="z_uniformity", label="embeddings", colour=ORANGE),),
)

SPREAD = Panel(
    title="Spread and dead dimensions",
    unit="share",
    note="Spread is 1 for noise and 0 when collapsed; no dimension should be dead.",
    curves=(
        Curve(name="spread", label="spread", colour=BLUE),
        Curve(name="dead_share", label="dead features", colour=INK),
        Curve(name="z_dead_share", label="dead embeddings", colour=ORANGE),
    ),
    from_zero=True,
)

SPECTRUM = Panel(
    title="Slope of the spectrum",
    unit="alpha (alpha-ReQ)",
    note="Eigenvalues of the features fall as rank^-alpha; about 1 generalises best.",
    curves=(Curve(name="alpha_req", label="features", colour=BLUE),),
    levels=(Level(label="1", value=1.0),),
)

LEARNING_RATE = Panel(
    title="Learning rate",
    unit="learning rate",
    note="Warm-up, then a cosine.",
    curves=(Curve(name="lr", label="learning rate", colour=BLUE),),
    from_zero=True,
)

SPEED = Panel(
    title="Speed",
    unit="images/s",
    note="Of the steps since the record before.",
    curves=(Curve(name="images_per_s", label="images/s", colour=GREEN),),
    from_zero=True,
)


def panels(*, redundancy_floor: float | None = None) -> list[Panel]:
    """List what there is to draw of a run's log, most important first.

    Args:
        redundancy_floor: what the redundancy term costs by chance, where that is known.
    """
    floor = Level(label="floor of redundancy", colour=ORANGE, value=redundancy_floor)
    loss = LOSS if redundancy_floor is None else replace(LOSS, levels=(floor,))
    return [
        loss,
        ACCURACY,
        RANK,
        CORRELATION,
        ALIGNMENT,
        UNIFORMITY,
        SPREAD,
        SPECTRUM,
        LEARNING_RATE,
        SPEED,
    ]


def plot_curves(records: Records, path: Path, *, title: str) -> None:
    """Draw a run's log as one PNG.

    Args:
        records: of `train.log.read_log`.
        path: the picture; replaced whole.
        title: what stands above it, as it is.
    """
    figure = draw_curves(records, title=title)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, facecolor=PAPER)


def draw_curves(records: Records, *, title: str) -> Figure:
    """Draw every panel that has something to show; the loss alone where none has."""
    shown = [panel for panel in panels() if panel.drawn(records)] or panels()[:1]
    columns = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(columns * width, rows * height + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    # A path may hold two dollar signs, between which matplotlib would read a formula.
    figure.suptitle(title, color=INK, fontsize=11, weight="bold", parse_math=False)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, axes in zip(shown, grid[: len(shown)], strict=True):
        draw_panel(axes, panel, records)
        legend = axes.get_legend()
        lines = 0 if legend is None else math.ceil(len(legend.get_texts()) / LEGEND_COLUMNS)
        axes.set_title(panel.title, loc="left", fontsize=10, weight="bold", color=INK,
                       pad=6 + LEGEND_LINE_POINTS * lines)  # fmt: skip
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    return figure


def draw_panel(axes: Axes, panel: Panel, records: Records) -> None:
    """Draw one panel, but for its title."""
    for curve in panel.curves:
        epochs, heights = panel.points(curve, records)
        if epochs:
            marker = "." if len(epochs) < MANY_RECORDS else ""
            axes.plot(epochs, heights, color=curve.colour, label=curve.label, linewidth=1.6,
                      marker=marker, solid_joinstyle="round")  # fmt: skip
    for level in panel.levels:
        height = level.height(records)
        if height is not None:
            axes.axhline(height, color=level.colour, label=level.label, linewidth=1.1,
                         linestyle=(0, (4, 3)))  # fmt: skip
    if panel.has_log_axis(records):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.set_xlim(left=0)
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    style_axes(axes, x="epoch", y=panel.unit)
    if len(panel.curves) + len(panel.levels) > 1 and axes.lines:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=LEGEND_COLUMNS,
                    borderaxespad=0.2, frameon=False, fontsize=8, labelcolor=INK,
                    handlelength=1.6)  # fmt: skip


def style_axes(axes: Axes, *, x: str, y: str) -> None:
    """Give axes the plain look that all diagrams share."""
    axes.set_xlabel(x, color=MUTED, fontsize=9)
    axes.set_ylabel(y, color=MUTED, fontsize=9)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
