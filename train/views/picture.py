"""A picture of random views, to see before training what the recipes do to a data set.

A row an image: the image, some of its first views, some of its second; above them what the
recipes say, in words. Views of images that are held in memory are those of `train.views`, as
training would make them; those of a stream are given, cut out of the whole photographs.

Figures are drawn without pyplot: no global state, no window, no back end setting.

Shapes: N images, V views of each, H x W pixels, C channels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from models.files import atomic_file
from models.images import ImageData
from models.picture import Pixels
from train.errors import writing
from train.views import random_view
from train.views.parameters import ViewRecipe

MAX_IMAGES = 8
"""Rows of the picture."""

VIEWS_EACH = 4
"""Of each image, by each of the two recipes."""

TILE_INCHES, GAP_INCHES, EDGE_INCHES = 0.9, 0.25, 0.2
HEAD_INCHES, LINE_INCHES = 0.75, 0.15
DPI = 160
TILE_GAP_SHARE = 0.06
"""White between two tiles of a block, as a share of a tile."""

INK, MUTED = "#1f2328", "#656d76"

StreamViews: TypeAlias = tuple[Pixels, Pixels]
"""View 1 and view 2, (N, V, H, W, C) uint8 each."""


def write_views_picture(
    images_NHWC: NDArray[np.uint8],
    recipes: tuple[ViewRecipe, ViewRecipe],
    path: Path,
    seed: int,
    stream_views: StreamViews | None = None,
) -> None:
    """Write a PNG of some images and their random views.

    Args:
        images_NHWC: uint8; the first `MAX_IMAGES` are shown, of more than three channels
            the first three.
        recipes: of view 1 and view 2.
        path: the file to write.
        seed: decides the views.
        stream_views: of the same images, as `views_of_photographs` makes them; None where
            training cuts its crops out of the images themselves.

    Raises:
        RunError: the file cannot be written.
    """
    shown = images_NHWC[:MAX_IMAGES]
    channels = shown.shape[3]
    words = [f"view {i}: {describe_recipe(r, channels)}" for i, r in enumerate(recipes, start=1)]
    if stream_views is None:
        generator = torch.Generator().manual_seed(seed)
        views = [_views_of(shown, recipe, generator) for recipe in recipes]
    else:
        views = [view_NVHWC[:MAX_IMAGES] for view_NVHWC in stream_views]
        words.append("crops are of whole photographs, of which the images show the middle")
    many = "one image" if len(shown) == 1 else f"{len(shown)} images"
    title = f"Random views of {many}, {_size_of(shown)}; seed {seed}"
    figure = _draw([shown[:, None], *views], title=title, words=words)
    with writing(path, mend="choose another file for --show-views"), atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def views_of_photographs(
    photographs: Iterable[ImageData],
    make_views: Callable[[ImageData, np.random.Generator], tuple[Pixels, Pixels]],
    seed: int,
    *,
    each: int = VIEWS_EACH,
) -> StreamViews:
    """Make some views of each photograph as the threads of a stream do.

    Args:
        photographs: encoded images, or uint8 pixels.
        make_views: makes both views of one whole, as `train.views.workers.FinishedCrops` does.
        seed: decides the views.
        each: V, how many of either kind.

    Raises:
        ImageError: a photograph cannot be used.
    """
    views_NV2HWC = np.array([
        [make_views(data, np.random.default_rng((seed, row, v))) for v in range(each)]
        for row, data in enumerate(photographs)
    ])  # fmt: skip
    return views_NV2HWC[:, :, 0], views_NV2HWC[:, :, 1]


def describe_recipe(recipe: ViewRecipe, channels: int) -> str:
    """Say in words what happens to a view of images with so many channels."""
    low, high = recipe.crop_area
    parts = [f"crop of {100 * low:.3g}-{100 * high:.3g}% of the area, {recipe.interpolation}"]
    if recipe.flip_probability > 0:
        parts.append(f"mirrored {_percent(recipe.flip_probability)}")
    strengths = {"brightness": recipe.brightness, "contrast": recipe.contrast}
    if channels == 3:
        strengths |= {"saturation": recipe.saturation, "hue": recipe.hue}
    said = [f"{name} \N{PLUS-MINUS SIGN}{value:g}" for name, value in strengths.items() if value]
    if recipe.jitter_probability > 0 and said:
        parts.append(f"jittered {_percent(recipe.jitter_probability)} ({', '.join(said)})")
    if recipe.grey_probability > 0 and channels == 3:
        parts.append(f"grey {_percent(recipe.grey_probability)}")
    if recipe.blur_probability > 0:
        low, high = recipe.blur_sigma_px
        sigma = f"sigma {low:g}-{high:g} px"
        parts.append(f"blurred {_percent(recipe.blur_probability)} ({sigma})")
    if recipe.solarise_probability > 0:
        parts.append(f"solarised {_percent(recipe.solarise_probability)}")
    return "; ".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _size_of(images_NHWC: NDArray[np.uint8]) -> str:
    """Say how large the images are and which of their channels are shown."""
    _, height, width, channels = images_NHWC.shape
    size = f"{width} x {height} px"
    if channels in (1, 3):
        return size
    shown = "channel 1" if channels == 2 else "channels 1-3"
    return f"{size}, {shown} of {channels}"


def _views_of(
    images_NHWC: NDArray[np.uint8], recipe: ViewRecipe, generator: torch.Generator
) -> NDArray[np.uint8]:
    """Make some views of each image, (N, V, H, W, C) uint8."""
    repeated = np.repeat(images_NHWC, VIEWS_EACH, axis=0)
    unit_NCHW = torch.from_numpy(repeated).permute(0, 3, 1, 2).float() / 255
    views_NCHW = random_view(unit_NCHW, recipe, generator)
    views = (views_NCHW * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return views.reshape(len(images_NHWC), VIEWS_EACH, *images_NHWC.shape[1:])


def _mosaic(tiles_NVHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay tiles out in rows and columns with white between, (height, width, 3)."""
    n, columns, height, width, channels = tiles_NVHWC.shape
    colours = tiles_NVHWC[..., :3] if channels >= 3 else tiles_NVHWC[..., [0, 0, 0]]
    gap = max(1, round(TILE_GAP_SHARE * max(height, width)))
    size = (n, columns, height + gap, width + gap, 3)
    spaced = np.full(size, 255, np.uint8)
    spaced[:, :, :height, :width] = colours
    rows = spaced.transpose(0, 2, 1, 3, 4).reshape(n * (height + gap), columns * (width + gap), 3)
    return rows[:-gap, :-gap]


def _draw(blocks: list[NDArray[np.uint8]], *, title: str, words: list[str]) -> Figure:
    """Draw the blocks beside one another under the title and the words."""
    mosaics = [_mosaic(block) for block in blocks]
    tile_px = max(blocks[0].shape[2:4])
    inches = [(m.shape[1] / tile_px * TILE_INCHES, m.shape[0] / tile_px * TILE_INCHES)
              for m in mosaics]  # fmt: skip
    width = sum(w for w, _ in inches) + GAP_INCHES * (len(inches) - 1) + 2 * EDGE_INCHES
    lines = [line for text in words for line in textwrap.wrap(text, int(width * 17))]
    head = HEAD_INCHES + LINE_INCHES * len(lines)
    height = inches[0][1] + head + EDGE_INCHES
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)

    def write(left: float, down: float, text: str, size: float, colour: str, weight: str) -> None:
        place = (left / width, 1 - down / height)
        figure.text(*place, text, fontsize=size, color=colour, weight=weight, va="top")

    write(EDGE_INCHES, 0.15, title, 10, INK, "bold")
    for i, line in enumerate(lines):
        write(EDGE_INCHES, 0.38 + i * LINE_INCHES, line, 7.5, MUTED, "normal")
    left = EDGE_INCHES
    for mosaic, (w, h), name in zip(mosaics, inches, ("image", "view 1", "view 2"), strict=True):
        write(left, head - 0.2, name, 8, INK, "bold")
        box = (left / width, EDGE_INCHES / height, w / width, h / height)
        axes = figure.add_axes(box)
        axes.imshow(mosaic, aspect="auto")
        axes.axis("off")
        left += w + GAP_INCHES
    return figure
