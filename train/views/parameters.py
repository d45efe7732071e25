"""What is random about a view: the recipe, the draws, and the parameters they become.

Rules:
    Every image has parameters of its own: N rows of uniform numbers in, N rows out.
    A row of numbers has one column a purpose, whatever the recipe: no option moves the
    draws of another.
    Parameters lie on the host, where choosing the images that an operation is for costs
    an accelerator no synchronisation.
    This module needs no torch itself: the threads that decode draw by the same functions.

Source: arXiv 2103.03230, section 2.2; the crop's geometry and the ranges of the colour
operations are those of torchvision's `RandomResizedCrop` and `ColorJitter`.

Shapes: N images, T tries, J operations of the jitter, K taps on one side of a kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Interpolation = Literal["bilinear", "bicubic"]

CROP_LOG_RATIO = math.log(4 / 3)
"""A crop's width / height lies between 3/4 and 4/3, uniform in the logarithm."""

CROP_TRIES = 10
"""Draws of a crop before the largest one that fits is taken."""

JITTERS = ("brightness", "contrast", "saturation", "hue")
"""The operations of the colour jitter; an order is a permutation of their numbers."""

BOX_UNITS = 2 * CROP_TRIES + 2
"""Uniform numbers that a crop is drawn from."""

UNITS = BOX_UNITS + 5 + 2 * len(JITTERS) + 1
"""Uniform numbers that all of one view is drawn from."""

BLUR_DEVIATIONS = 3.0
"""A blur's kernel ends so many of the recipe's largest deviations from its middle."""


@dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """What one view may do: fields as in `train.option_groups.ViewOptions`, of one view."""

    crop_area: tuple[float, float] = (1.0, 1.0)
    interpolation: Interpolation = "bilinear"
    flip_probability: float = 0.0
    jitter_probability: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey_probability: float = 0.0
    blur_probability: float = 0.0
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    solarise_probability: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CropBoxes:
    """Where each image is cropped, in pixels and fractions of them; each (N,) float64."""

    top: NDArray[np.float64]
    left: NDArray[np.float64]
    height: NDArray[np.float64]
    width: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ViewParameters:
    """All that is random about one view of N images.

    Attributes:
        boxes: the crops, in pixels of the images they were drawn for.
        recipe: what the parameters were drawn for.
        is_mirrored: (N,) bool.
        is_jittered: (N,) bool.
        jitter: (N, J) factors of brightness, contrast and saturation, and the hue's turn
            as a share of the circle.
        order: (N, J), the numbers of the operations in the order they come.
        is_grey: (N,) bool.
        is_blurred: (N,) bool.
        sigma_px: (N,) deviations of the blur.
        blur_weights: (N, K + 1) float32, half of each image's Gaussian kernel from the
            middle outwards; the whole of it sums to 1.
        is_solarised: (N,) bool.
    """

    boxes: CropBoxes
    recipe: ViewRecipe
    is_mirrored: NDArray[np.bool_]
    is_jittered: NDArray[np.bool_]
    jitter: NDArray[np.float64]
    order: NDArray[np.int64]
    is_grey: NDArray[np.bool_]
    is_blurred: NDArray[np.bool_]
    sigma_px: NDArray[np.float64]
    blur_weights: NDArray[np.float32]
    is_solarised: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.is_mirrored)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> ViewParameters:
        """Give the parameters of some of the images."""
        return ViewParameters(
            boxes=CropBoxes(
                top=self.boxes.top[rows],
                left=self.boxes.left[rows],
                height=self.boxes.height[rows],
                width=self.boxes.width[rows],
            ),
            recipe=self.recipe,
            is_mirrored=self.is_mirrored[rows],
            is_jittered=self.is_jittered[rows],
            jitter=self.jitter[rows],
            order=self.order[rows],
            is_grey=self.is_grey[rows],
            is_blurred=self.is_blurred[rows],
            sigma_px=self.sigma_px[rows],
            blur_weights=self.blur_weights[rows],
            is_solarised=self.is_solarised[rows],
        )


def crop_box(
    rng: np.random.Generator, height: int, width: int, area: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Draw one crop as (top, left, height, width), in pixels and fractions of them.

    Its distribution is that of a batch's crops. Fractions of pixels are given; where
    whole pixels are needed the caller rounds.

    Args:
        rng: the source of randomness; `BOX_UNITS` numbers are taken.
        height: of the image, in pixels.
        width: the same.
        area: smallest and largest share of the image that the crop covers.
    """
    box = crop_boxes(rng.random((1, BOX_UNITS)), height, width, area)
    return float(box.top[0]), float(box.left[0]), float(box.height[0]), float(box.width[0])


def crop_boxes(
    units_NT: NDArray[np.float64], height: int, width: int, area: tuple[float, float]
) -> CropBoxes:
    """Turn (N, `BOX_UNITS`) uniform numbers to crops of a share of the area, a shape and a place.

    Of `CROP_TRIES` draws of area and ratio the first that fits the image is taken; where
    none fits, the largest crop of an allowed ratio in the middle: the whole image, unless
    it is longer.
    """
    area_NT = _within(units_NT[:, :CROP_TRIES], *area) * (height * width)
    log_ratio_NT = _within(
        units_NT[:, CROP_TRIES : 2 * CROP_TRIES], -CROP_LOG_RATIO, CROP_LOG_RATIO
    )
    ratio_NT = np.exp(log_ratio_NT)
    width_NT, height_NT = np.sqrt(area_NT * ratio_NT), np.sqrt(area_NT / ratio_NT)
    fits_NT = (width_NT <= width) & (height_NT <= height)
    first_N1, fits_N = fits_NT.argmax(axis=1)[:, None], np.any(fits_NT, axis=1)
    longest = math.exp(CROP_LOG_RATIO)
    first_width, first_height = (
        np.take_along_axis(sides_NT, first_N1, axis=1)[:, 0] for sides_NT in (width_NT, height_NT)
    )
    box_width = np.where(fits_N, first_width, min(width, height * longest))
    box_height = np.where(fits_N, first_height, min(height, width * longest))
    place_N2 = np.where(fits_N[:, None], units_NT[:, 2 * CROP_TRIES : BOX_UNITS], 0.5)
    return CropBoxes(
        top=place_N2[:, 0] * (height - box_height),
        left=place_N2[:, 1] * (width - box_width),
        height=box_height,
        width=box_width,
    )


def view_parameters(
    units_NU: NDArray[np.float64], recipe: ViewRecipe, *, height: int, width: int
) -> ViewParameters:
    """Turn (N, `UNITS`) numbers, uniform in [0, 1), to the parameters of N views.

    Args:
        units_NU: one row an image.
        recipe: what may happen, how often and how much.
        height: of the images and of their views, in pixels.
        width: the same.
    """
    box_NU, often_N5, amount_NJ, key_NJ, sigma_N1 = np.split(
        units_NU, np.cumsum([BOX_UNITS, 5, len(JITTERS), len(JITTERS)]), axis=1
    )
    strength_J = np.array([getattr(recipe, name) for name in JITTERS])
    middle_J = np.array([0.0 if name == "hue" else 1.0 for name in JITTERS])
    sigma_N = _within(sigma_N1[:, 0], *recipe.blur_sigma_px)
    # A kernel cannot be reflected further than the image is long.
    radius = min(math.ceil(BLUR_DEVIATIONS * recipe.blur_sigma_px[1]), height - 1, width - 1)
    return ViewParameters(
        boxes=crop_boxes(box_NU, height, width, recipe.crop_area),
        recipe=recipe,
        is_mirrored=often_N5[:, 0] < recipe.flip_probability,
        is_jittered=often_N5[:, 1] < recipe.jitter_probability,
        jitter=middle_J + _within(amount_NJ, -1.0, 1.0) * strength_J,
        order=key_NJ.argsort(axis=1),
        is_grey=often_N5[:, 2] < recipe.grey_probability,
        is_blurred=often_N5[:, 3] < recipe.blur_probability,
        sigma_px=sigma_N,
        blur_weights=gaussian_weights(sigma_N, radius),
        is_solarised=often_N5[:, 4] < recipe.solarise_probability,
    )


def gaussian_weights(sigma_N: NDArray[np.float64], radius: int) -> NDArray[np.float32]:
    """Give half of each Gaussian kernel, (N, radius + 1), the middle first."""
    weights_NK = np.exp(-0.5 * np.square(np.arange(radius + 1) / sigma_N[:, None]))
    total_N1 = 2 * weights_NK.sum(axis=1, keepdims=True) - weights_NK[:, :1]
    half_NK: NDArray[np.float32] = (weights_NK / total_N1).astype(np.float32)
    return half_NK


def _within(units: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """Spread uniform numbers of [0, 1) over [low, high)."""
    return low + (high - low) * units
