"""The diagrams of a report: curves, the matrix C, the spectrum.

Rules:
    Colours are those of `train.plot.PALETTE` or, for C, blue and red whose opacity is the
    value: so a zero is the page's own colour, in light and in dark.
    Every diagram has its numbers in words.

Shapes: D dimensions, K singular values.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from models.html import Html
from train.plot import (
    BLUE,
    GRID,
    INK,
    MUTED,
    ORANGE,
    PANEL_INCHES,
    Panel,
    Records,
    draw_panel,
    style_axes,
)
from train.report.page import card, figure_svg

POSITIVE_RGB, NEGATIVE_RGB = (47, 129, 247), (229, 83, 75)
"""Seen on white and on black."""

MATRIX_INCHES = (3.9, 3.6)

SPECTRUM_COLOURS = {"features": BLUE, "embeddings": ORANGE, "untrained features": MUTED}
LEAST_SHOWN = 1e-4
"""Of the largest singular value: what lies below is rounding."""


def curve_card(panel: Panel, records: Records) -> Html:
    """Draw one panel of the log."""
    figure = Figure(figsize=PANEL_INCHES, layout="constrained")
    draw_panel(figure.add_subplot(), panel, records)
    return card(panel.title, figure_svg(figure, panel.in_words(records)), panel.note)


def matrix_svg(matrix: NDArray[np.float32], dims: int, alt: str) -> Html:
    """Draw a matrix of correlations, the sign as colour and the size as opacity.

    Args:
        matrix: square, in [-1, 1].
        dims: how many dimensions its side stands for.
        alt: what it shows, in words.
    """
    figure = Figure(figsize=MATRIX_INCHES, layout="constrained")
    axes, scale = figure.subplots(1, 2, width_ratios=(24, 1))
    axes.imshow(correlation_colours(matrix), interpolation="none", extent=(0, dims, dims, 0))
    style_axes(axes, x="dimension of view 2", y="dimension of view 1")
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(True)
    low = -1.0 if matrix.min() < 0 else 0.0
    shades = np.linspace(1, low, 101, dtype=np.float32)[:, None]
    scale.imshow(
        correlation_colours(shades), interpolation="none", aspect="auto", extent=(0, 1, low, 1)
    )
    style_axes(scale, x="", y="")
    scale.set_xticks([])
    scale.yaxis.tick_right()
    scale.set_yticks([-1, 0, 1] if low else [0, 1], ["-1", "0", "1"] if low else ["0", "1"])
    scale.spines[:].set(visible=True, color=GRID)
    return figure_svg(figure, alt)


def correlation_colours(matrix: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Colour correlations: (H, W, 4) uint8, blue above zero, red below, clear at zero and NaN."""
    matrix = np.nan_to_num(matrix)
    is_positive = (matrix >= 0)[..., None]
    rgb = np.where(is_positive, np.array(POSITIVE_RGB), np.array(NEGATIVE_RGB))
    alpha = np.rint(255 * np.abs(matrix))[..., None]
    return np.concatenate([rgb, alpha], axis=2).astype(np.uint8)


def spectrum_svg(spectra: Mapping[str, NDArray[np.float64]], ranks: Mapping[str, float]) -> Html:
    """Draw singular values over their rank, both logarithmic.

    Args:
        spectra: by what they are of, each largest first.
        ranks: RankMe of each.
    """
    figure = Figure(figsize=MATRIX_INCHES, layout="constrained")
    axes = figure.add_subplot()
    for name, sigma_K in spectra.items():
        shown = sigma_K[sigma_K > LEAST_SHOWN * max(sigma_K[0], np.finfo(float).tiny)]
        if len(shown):
            axes.plot(np.arange(1, len(shown) + 1), shown / shown[0], linewidth=1.8,
                      color=SPECTRUM_COLOURS[name], label=f"{name}: RankMe {ranks[name]:.0f}",
                      linestyle="--" if name.startswith("untrained") else "-")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    style_axes(axes, x="rank", y="singular value / the largest")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower left")
    words = "; ".join(f"{name}: RankMe {rank:.1f} of {len(spectra[name])}" for name, rank in
                      ranks.items())  # fmt: skip
    return figure_svg(figure, f"Singular values by rank. {words}")
