"""Pictures of what an index finds: neighbours of queries, and a confusion matrix.

Figures are drawn without pyplot, so that no global state, no window and no back end
setting is involved. Import this module where a picture is drawn: matplotlib takes half a
second to load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from index.figures import save_figure
from models.errors import ImageError
from models.image_source import ImageData
from models.preprocess import PreprocessSpec, preprocess

INK, MUTED, PAPER, FAINT = "#1f2328", "#656d76", "#ffffff", "#d0d7de"
RIGHT, WRONG = "#1a7f37", "#cf222e"

THUMBNAIL = PreprocessSpec(height=160, width=160, channels=3, resize=160)
MAX_GRID_ROWS = 24
"""A taller picture is read by nobody."""

MAX_GRID_COLUMNS = 24
"""Neighbours of a query, for who draws them: within a range there may be thousands."""

MAX_ANNOTATED_CLASSES = 20
DPI = 130


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One picture of a grid.

    Attributes:
        image: as a source gives it; None where it cannot be read.
        caption: one or two lines below it.
        is_match: whether its label is the query's; None where that cannot be said.
    """

    image: ImageData | None
    caption: str
    is_match: bool | None = None


def draw_grid(path: Path, rows: Sequence[tuple[Tile, Sequence[Tile]]], *, title: str) -> None:
    """Draw a row for each query: the query at the left, its neighbours beside it, as PNG.

    Neighbours with the query's label have a green frame, others a red one, and a plain one
    where the query has no label.

    Args:
        path: the file to write.
        rows: (query, neighbours, best first); at most `MAX_GRID_ROWS` are drawn.
        title: a line above.
    """
    rows = rows[:MAX_GRID_ROWS]
    columns = max((len(neighbours) for _, neighbours in rows), default=0)
    cell, gap, text, head, edge = 1.15, 0.12, 0.36, 0.72, 0.22  # inches
    width = 2 * edge + cell + 2.5 * gap + columns * (cell + gap)
    height = head + len(rows) * (cell + text + gap) + edge
    figure = Figure(figsize=(max(width, 4.5), height), dpi=DPI, facecolor=PAPER)
    figure_width = max(width, 4.5)

    def place(left: float, top: float, tile: Tile, frame: str, line: float) -> None:
        bottom = height - top - cell
        box = (left / figure_width, bottom / height, cell / figure_width, cell / height)
        _draw_tile(figure.add_axes(box), tile, frame, line)

    header = 1 - 0.26 / height
    figure.text(
        edge / figure_width, header, title, color=INK, fontsize=10, weight="bold", va="center"
    )
    labelled = any(tile.is_match is not None for _, tiles in rows for tile in tiles)
    legend = "   (green: the query's label, red: another)" if labelled else ""
    first = edge + cell + 2.5 * gap
    for left, name in ((edge, "query"), (first, f"nearest first{legend}")):
        figure.text(
            left / figure_width, 1 - 0.56 / height, name, color=MUTED, fontsize=8, va="center"
        )
    for n, (query, neighbours) in enumerate(rows):
        top = head + n * (cell + text + gap)
        place(edge, top, query, INK, 1.6)
        for column, tile in enumerate(neighbours):
            frame = {True: RIGHT, False: WRONG, None: FAINT}[tile.is_match]
            line = 1.0 if tile.is_match is None else 2.0
            place(first + column * (cell + gap), top, tile, frame, line)
    save_figure(figure, path)


def draw_confusion(
    path: Path,
    confusion_CC: NDArray[np.int64],
    classes: Sequence[str],
    *,
    counts_C: NDArray[np.int64],
    title: str,
) -> None:
    """Draw a confusion matrix as PNG: rows are true classes, columns predicted ones.

    Colours are shares of the `counts_C` queries of the class; numbers are counts, where the classes
    are few.
    """
    n_classes = len(classes)
    shares = confusion_CC / np.maximum(counts_C, 1)[:, None]
    side = min(14.0, max(4.2, 1.8 + 0.52 * n_classes))
    figure = Figure(
        figsize=(side + 1.1, side + 0.5),
        dpi=DPI,
        facecolor=PAPER,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12),
    )
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label("share of the true class", color=MUTED, fontsize=8)
    bar.ax.tick_params(labelsize=7, colors=MUTED)
    bar.outline.set_visible(False)
    axes.set_title(title, fontsize=10, weight="bold", color=INK, loc="left", pad=10)
    axes.set_xlabel("predicted", color=MUTED, fontsize=9)
    axes.set_ylabel("true", color=MUTED, fontsize=9)
    step = max(1, n_classes // 40)
    ticks = range(0, n_classes, step)
    names = [shorten(classes[tick], 14) for tick in ticks]
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(ticks, names, fontsize=8)
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    if n_classes <= MAX_ANNOTATED_CLASSES:
        _annotate(axes, confusion_CC, shares)
    save_figure(figure, path)


def _annotate(axes: Axes, counts: NDArray[np.int64], shares: NDArray[np.float64]) -> None:
    """Write the counts into the cells, white on dark; zeros stay empty."""
    for row, column in np.argwhere(counts):
        axes.text(
            column,
            row,
            str(counts[row, column]),
            ha="center",
            va="center",
            fontsize=7,
            color=PAPER if shares[row, column] > 0.5 else INK,
        )


def _draw_tile(axes: Axes, tile: Tile, frame: str, line: float) -> None:
    """Draw one picture with its frame and caption."""
    pixels = None if tile.image is None else _thumbnail(tile.image)
    if pixels is None:
        axes.set_facecolor("#f6f8fa")
        axes.text(0.5, 0.5, "cannot\nbe read", ha="center", va="center", fontsize=7, color=MUTED)
    else:
        small = max(pixels.shape[:2]) < 96
        axes.imshow(
            pixels,
            cmap="gray",
            vmin=0,
            vmax=255,
            aspect="auto",
            interpolation="nearest" if small else "antialiased",
        )
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(frame)
        spine.set_linewidth(line)
    caption = "\n".join(shorten(line_, 17) for line_ in tile.caption.split("\n"))
    axes.set_xlabel(caption, fontsize=7, color=INK, labelpad=3, linespacing=1.25)


def _thumbnail(image: ImageData) -> NDArray[np.uint8] | None:
    """Give what to show of an image: small arrays as they are, the rest as a square."""
    if not isinstance(image, bytes) and max(image.shape[:2]) < 96:
        return image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    try:
        return preprocess(image, THUMBNAIL)
    except ImageError:
        return None


def shorten(text: str, length: int) -> str:
    """Cut a text in its middle, where keys say least."""
    if len(text) <= length:
        return text
    tail = length // 2
    return f"{text[: length - tail - 1]}…{text[-tail:]}"
