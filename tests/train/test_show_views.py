"""The picture of the views: of any data set, with what the recipes say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.train.recipes import PAPER
from train.errors import RunError
from train.views.parameters import ViewRecipe
from train.views.picture import describe_recipe, write_views_picture


def read(path: Path) -> NDArray[np.uint8]:
    """The pixels of a picture."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("shape", [(12, 28, 28, 1), (2, 20, 30, 3), (1, 16, 16, 13)])
def test_a_picture_is_drawn_of_any_images(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Grey, colour and many channels, few and many images, square and not."""
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    write_views_picture(images, (PAPER, ViewRecipe()), tmp_path / "views.png", 0)
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000


def test_the_picture_shows_the_images_beside_their_views(tmp_path: Path) -> None:
    """A red image without any operation fills its row with red; equal seeds, equal pictures."""
    red = np.zeros((1, 16, 16, 3), np.uint8)
    red[..., 0] = 255
    for name in ("one.png", "two.png"):
        write_views_picture(red, (ViewRecipe(), ViewRecipe()), tmp_path / name, 7)
    one, two = (read(tmp_path / name) for name in ("one.png", "two.png"))
    np.testing.assert_array_equal(one, two)
    is_red = (one == (255, 0, 0)).all(axis=2)
    assert is_red.any(axis=1).sum() > 100  # rows of a tile
    assert is_red.any(axis=0).sum() > 9 * 100  # columns of the image and eight views


def test_words_say_what_the_recipe_does() -> None:
    """Everything that can happen is named, with how often and how much."""
    assert describe_recipe(PAPER, 3) == (
        "crop of 8-100% of the area, bicubic; mirrored 50%; jittered 80% (brightness ±0.4, "
        "contrast ±0.4, saturation ±0.2, hue ±0.1); grey 20%; blurred 10% (sigma 0.1-2 px); "
        "solarised 20%"
    )
    assert describe_recipe(ViewRecipe(), 3) == "crop of 100-100% of the area, bilinear"


def test_words_leave_out_what_falls_away() -> None:
    """One channel has no saturation, hue or grey."""
    words = describe_recipe(PAPER, 1)
    assert "jittered 80% (brightness ±0.4, contrast ±0.4)" in words
    assert "grey" not in words


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """The file is named, and what to do."""
    images = np.zeros((1, 8, 8, 1), np.uint8)
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "views.png"
    with pytest.raises(RunError) as caught:
        write_views_picture(images, (PAPER, PAPER), path, 0)
    assert str(path) in str(caught.value)
    assert "choose another file for --show-views" in str(caught.value)
