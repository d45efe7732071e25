"""Views of single images, uint8 to uint8: a function of the seed, and like those of batches."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.images import ImageData
from tests.train.recipes import FULL
from train.views import apply_view, finish_view
from train.views.crops import Box, CutCrops, cut_crops
from train.views.parameters import UNITS, CropBoxes, ViewRecipe, crop_box, view_parameters
from train.views.workers import FinishedCrops, finish_sample


def picture(channels: int = 3, height: int = 40, width: int = 40) -> NDArray[np.uint8]:
    """A smooth picture, whose resizing does not depend on the filter's last digit."""
    y, x, c = np.mgrid[:height, :width, :channels]
    waves = np.sin(x / 6 + c) + np.cos(y / 7 + x / 11 - c)
    return (127 + 50 * waves).astype(np.uint8)


def make_views(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Make both views of the picture as a stream does, 24 x 24."""
    crops = CutCrops((FULL.crop_area, FULL.crop_area), height=24, width=24, channels=3)
    return FinishedCrops(crops, (FULL, FULL))(picture(), np.random.default_rng(seed))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_view_has_the_size_and_channels_of_its_crop(channels: int) -> None:
    """Whatever is done to it, and it stays uint8."""
    for seed in range(8):
        crop = picture(channels, 20, 30)
        view = finish_sample(crop, FULL, np.random.default_rng(seed))
        assert view.shape == (20, 30, channels)
        assert view.dtype == np.uint8


def test_views_are_a_function_of_the_seed_in_any_thread() -> None:
    """Threads draw from generators of their own."""
    alone = [make_views(seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(make_views, range(12)))
    np.testing.assert_array_equal(alone, together)
    assert not np.array_equal(alone[0], alone[1])
    assert not np.array_equal(alone[0][0], alone[0][1])


def as_batch(image: NDArray[np.uint8]) -> torch.Tensor:
    """A batch of one, (1, C, H, W) in [0, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


def difference(batch: torch.Tensor, view: NDArray[np.uint8]) -> NDArray[np.float32]:
    """How far a batch of one is from a view; not at borders: some reflect there, some repeat."""
    pixels = 255 * batch[0].permute(1, 2, 0).numpy()
    return np.abs(pixels - view)[3:-3, 3:-3]


SINGLE = {
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
        view = finish_sample(image, recipe, np.random.default_rng(seed))
        units = np.random.default_rng(seed).random((1, UNITS))
        expected = finish_view(as_batch(image), view_parameters(units, recipe, height=40, width=40))
        inner = difference(expected, view)
        assert inner.mean() < 1.2
        assert inner.max() <= (8 if recipe.hue > 0 else 4)


def test_a_worker_cuts_the_crop_of_a_batch() -> None:
    """The same numbers are the same part of the image, in whole pixels of it.

    Values are on average within 1.2 of 255, and 4 at most.
    """
    image, recipe = picture(), ViewRecipe(crop_area=(0.3, 0.9), interpolation="bicubic")
    for seed in range(5):
        units = np.random.default_rng(seed).random((1, UNITS))
        box = Box(*crop_box(np.random.default_rng(seed), 40, 40, recipe.crop_area))
        (crop,) = cut_crops(
            image,
            lambda *_, box=box: [box],
            height=40,
            width=40,
            channels=3,
            interpolation=recipe.interpolation,
        )
        drawn = view_parameters(units, recipe, height=40, width=40)
        top, left = np.round(drawn.boxes.top), np.round(drawn.boxes.left)
        whole = CropBoxes(
            top=top,
            left=left,
            height=np.round(drawn.boxes.top + drawn.boxes.height) - top,
            width=np.round(drawn.boxes.left + drawn.boxes.width) - left,
        )
        expected = apply_view(as_batch(image), dataclasses.replace(drawn, boxes=whole))
        inner = difference(expected, crop)
        assert inner.mean() < 1.2
        assert inner.max() <= 4


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
