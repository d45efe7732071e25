"""The map as PNG: every image a point, and pictures where there is room for them.

Import this module where a picture is drawn: matplotlib takes half a second to load.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image

from index.curation.map_page import Legend, to_grid
from index.curation.sprites import Sprites
from index.figures import save_figure

SIDE_PX, DPI = 1500, 150
SQUARE_PX, FRAME_PX = 46, 2
MAX_NAME = 28


def draw_map(
    path: Path,
    places_N2: NDArray[np.float32],
    legend: Legend,
    sprites: Sprites,
    *,
    title: str,
) -> None:
    """Draw the map; of the images in a square the one that is nearest its middle is shown."""
    grid_N2 = to_grid(places_N2).astype(np.float64) / 65535 * (SIDE_PX - 1)
    colours_L3 = (np.array([to_rgb(colour) for colour in legend.colours]) * 255).astype(np.uint8)
    paper = np.full((SIDE_PX, SIDE_PX, 3), 255, np.uint8)
    x_N, y_N = np.round(grid_N2).astype(int).T
    for dx in (0, 1):
        for dy in (0, 1):
            rows, columns = np.minimum(y_N + dy, SIDE_PX - 1), np.minimum(x_N + dx, SIDE_PX - 1)
            paper[rows, columns] = colours_L3[legend.numbers_N]
    for square, number in _one_a_square(grid_N2, sprites).items():
        _paste(paper, square, sprites.tile(int(sprites.tiles_N[number])),
               colours_L3[legend.numbers_N[number]])  # fmt: skip
    _save(path, paper, legend, title)


def _one_a_square(grid_N2: NDArray[np.float64], sprites: Sprites) -> dict[tuple[int, int], int]:
    """Choose an image for each square that lies within the picture."""
    squares_N2 = (grid_N2 // SQUARE_PX).astype(int)
    off_N = np.abs(grid_N2 - (squares_N2 + 0.5) * SQUARE_PX).max(axis=1)
    most = SIDE_PX // SQUARE_PX
    chosen: dict[tuple[int, int], int] = {}
    for number in np.argsort(off_N, kind="stable"):
        column, row = (int(place) for place in squares_N2[number])
        if sprites.tiles_N[number] >= 0 and column < most and row < most:
            chosen.setdefault((row, column), int(number))
    return chosen


def _paste(
    paper: NDArray[np.uint8],
    square: tuple[int, int],
    tile: NDArray[np.uint8],
    colour_3: NDArray[np.uint8],
) -> None:
    """Put a thumbnail with a frame of its colour into a square."""
    side = SQUARE_PX - 2 * FRAME_PX - 2
    picture = Image.fromarray(tile).resize((side, side), Image.Resampling.BILINEAR)
    top, left = (place * SQUARE_PX + 1 for place in square)
    paper[top : top + side + 2 * FRAME_PX, left : left + side + 2 * FRAME_PX] = colour_3
    top, left = top + FRAME_PX, left + FRAME_PX
    paper[top : top + side, left : left + side] = np.asarray(picture)


def _save(path: Path, paper: NDArray[np.uint8], legend: Legend, title: str) -> None:
    """Write the picture with its title and legend, whole or not at all."""
    side = SIDE_PX / DPI
    figure = Figure(figsize=(side + 2.3, side + 0.5), dpi=DPI, facecolor="white")
    width, height = figure.get_size_inches()
    axes = figure.add_axes((0.02, 0.01, side / width, side / height))
    axes.imshow(paper, interpolation="nearest")
    axes.set_axis_off()
    figure.text(0.02, 1 - 0.28 / height, title, fontsize=12, weight="bold", va="center")
    handles = [
        Line2D([], [], marker="s", linestyle="", color=colour, label=f"{_short(name)}  {count:,}")
        for name, colour, count in zip(legend.names, legend.colours, legend.counts, strict=True)
    ]
    anchor = (0.03 + side / width, side / height)
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=anchor, frameon=False, fontsize=8
    )
    save_figure(figure, path)


def _short(name: str) -> str:
    """Cut a long label."""
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
