"""Recipes of views that several tests share."""

from __future__ import annotations

from train.views.parameters import ViewRecipe

PAPER = ViewRecipe(
    crop_area=(0.08, 1.0),
    interpolation="bicubic",
    flip_probability=0.5,
    jitter_probability=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grey_probability=0.2,
    blur_probability=0.1,
    solarise_probability=0.2,
)
"""Of the second view in arXiv 2103.03230."""

FULL = ViewRecipe(
    crop_area=(0.2, 1.0),
    flip_probability=0.5,
    jitter_probability=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grey_probability=0.2,
    blur_probability=0.5,
    solarise_probability=0.2,
)
"""Every operation, often enough to be seen in a few images."""
