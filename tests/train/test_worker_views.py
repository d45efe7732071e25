"""Views of single images, uint8 to uint8: a function of the seed, and like those of batches."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.images import ImageData
from train.views import apply_view
from train.views.parameters import UNITS, ViewRecipe, view_parameters
from train.views.workers import FinishedCrops, finish_sample, sample_views

RECIPE = ViewRecipe(
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


def picture(channels: int = 3, height: int = 40, width: int = 40) -> NDArray[np.uint8]:
    """A smooth picture, whose resizing does not depend on the filter's last digit."""
    y, x, c = np.mgrid[:height, :width, :channels]
    waves = np.sin(x / 6 + c) + np.cos(y / 7 + x / 11 - c)
    return (127 + 50 * waves).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_views_have_the_asked_size_and_the_images_channels(channels: int) -> None:
    """Whatever the image's size, both views are squares of uint8."""
    for view in sample_views(picture(channels, 50, 70), (RECIPE, RECIPE), 3, size_px=32):
        assert view.shape == (32, 32, channels)
        assert view.dtype == np.uint8


def test_views_are_a_function_of_the_seed_in_any_thread() -> None:
    """Threads draw from generators of their own."""
    alone = [sample_views(picture(), (RECIPE, RECIPE), seed, size_px=24) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        together = list(
            pool.map(lambda s: sample_views(picture(), (RECIPE, RECIPE), s, size_px=24), range(12))
        )
    np.testing.assert_array_equal(alone, together)
    assert not np.array_equal(alone[0], alone[1])
    assert not np.array_equal(alone[0][0], alone[0][1])


SINGLE = {
    "crop": ViewRecipe(crop_area=(0.3, 0.9), interpolation="bicubic"),
    "flip": ViewRecipe(flip_probability=1.0),
    "brightness": ViewRecipe(jitter_probability=1.0, brightness=0.4),
    "contrast": ViewRecipe(jitter_probability=1.0, contrast=0.4),
    "saturation": ViewRecipe(jitter_probability=1.0, saturation=0.4),
    "hue": ViewRecipe(jitter_probability=1.0, hue=0.1),
    "grey": ViewRecipe(grey_probability=1.0),
    "solarise": ViewRecipe(solarise_probability=1.0),
    "blur": ViewRecipe(blur_probability=1.0, blur_sigma_px=(1.0, 2.0)),
}


@pytest.mark.parametrize("recipe", SINGLE.values(), ids=SINGLE.keys())
def test_a_worker_makes_the_view_of_a_batch(recipe: ViewRecipe) -> None:
    """One seed, one view: on average within 1.2 of 255, and 4 at most, rounding at each step.

    Pillow's hue is worse than the others, for it has 256 steps of hue and of saturation: 8.
    """
    image = picture()
    for seed in range(5):
        view, _ = sample_views(image, (recipe, recipe), seed, size_px=40)
        units = np.random.default_rng(seed).random((1, UNITS))
        batch = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        expected = apply_view(batch, view_parameters(units, recipe, height=40, width=40))
        pixels = 255 * expected[0].permute(1, 2, 0).numpy()
        inner = np.abs(pixels - view)[3:-3, 3:-3]  # borders are reflected here, repeated there
        assert inner.mean() < 1.2
        assert inner.max() <= (8 if recipe.hue > 0 else 4)


def test_a_stream_finishes_crops_where_it_decodes() -> None:
    """The second half of a `MakeViews`: crops by another, all else by the image's generator."""
    crop = picture(3, 16, 16)

    def cut(data: ImageData, generator: np.random.Generator) -> tuple[NDArray[np.uint8], ...]:
        return crop, crop

    plain = ViewRecipe(crop_area=(0.1, 0.2))
    inverting = dataclasses.replace(plain, solarise_probability=1.0)
    make = FinishedCrops(cut, (plain, inverting))
    first, second = make(b"", np.random.default_rng(0))
    np.testing.assert_array_equal(first, crop)
    np.testing.assert_array_equal(second, np.where(crop < 128, crop, 255 - crop))
    finished = finish_sample(crop, inverting, np.random.default_rng(1))
    np.testing.assert_array_equal(finished, second)
