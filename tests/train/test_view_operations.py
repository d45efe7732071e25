"""What is done to pixels, held to torchvision's operations and to plain definitions."""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from train.views.operations import (
    blur_,
    brighten_,
    crop_and_resize,
    grey,
    mirror_,
    saturate_,
    solarise_,
    stretch_contrast_,
    taps,
    to_grey_,
    turn_hue_,
)
from train.views.parameters import CropBoxes, Interpolation, gaussian_weights


def noise(n: int, channels: int, size: int = 24) -> Tensor:
    """Images without any symmetry."""
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(99))


def amounts(*values: float) -> Tensor:
    """One amount for each image."""
    return torch.tensor(values).view(-1, 1, 1, 1)


def boxes(top: float, left: float, height: float, width: float) -> CropBoxes:
    """One box."""
    arrays = (np.array([value]) for value in (top, left, height, width))
    return CropBoxes(**dict(zip(("top", "left", "height", "width"), arrays, strict=True)))


UNMIRRORED, MIRRORED = np.array([False]), np.array([True])


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (brighten_, functional.adjust_brightness),
        (stretch_contrast_, functional.adjust_contrast),
        (saturate_, functional.adjust_saturation),
    ],
    ids=["brightness", "contrast", "saturation"],
)
def test_factors_do_what_torchvision_does(
    ours: Callable[[Tensor, Tensor], None],
    theirs: Callable[[Tensor, float], Tensor],
    factor: float,
) -> None:
    """Equal within 3e-4: torchvision's weight of red is .2989 where BT.601 has .299."""
    images = noise(2, 3)
    expected = theirs(images, factor)
    ours(images, amounts(factor, factor))
    torch.testing.assert_close(images, expected, rtol=0, atol=3e-4)


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.04, 0.1, 0.5])
def test_hue_turns_as_in_torchvision(turn: float) -> None:
    """Equal within 2e-5."""
    images = noise(2, 3)
    expected = functional.adjust_hue(images, turn)
    turn_hue_(images, amounts(turn, turn))
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("turn", [0.0, 0.1, -0.25, 0.5])
def test_hue_is_that_of_hsv(turn: float) -> None:
    """Turning the hue agrees with colorsys, for greys, primaries and ties, too."""
    colours = torch.cat([noise(1, 3, 6), torch.zeros(1, 3, 6, 6)])
    colours[1, :, 0, :3] = torch.eye(3)
    colours[1, :, 0, 3:] = 1 - torch.eye(3)
    colours[1, :, 1, 0] = 0.4
    turned = colours.clone()
    turn_hue_(turned, amounts(turn, turn))
    for before, after in zip(
        colours.permute(0, 2, 3, 1).reshape(-1, 3).tolist(),
        turned.permute(0, 2, 3, 1).reshape(-1, 3).tolist(),
        strict=True,
    ):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        assert after == pytest.approx(expected, abs=1e-5)


def test_grey_solarise_and_mirror_are_those_of_torchvision() -> None:
    """Grey within 1e-4 (the weight of red), the others exactly."""
    images = noise(2, 3)
    colourless, inverted, turned = images.clone(), images.clone(), images.clone()
    to_grey_(colourless)
    solarise_(inverted)
    mirror_(turned)
    torch.testing.assert_close(
        colourless, functional.rgb_to_grayscale(images, 3), rtol=0, atol=1.1e-4
    )
    assert torch.equal(inverted, functional.solarize(images, 0.5))
    assert torch.equal(turned, functional.horizontal_flip(images))


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_that_of_torchvision(sigma: float) -> None:
    """Equal within 1e-6, for a kernel of the same length."""
    images = noise(2, 3)
    expected = functional.gaussian_blur(images, [13, 13], [sigma, sigma])
    blur_(images, torch.from_numpy(gaussian_weights(np.array([sigma, sigma]), 6)))
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


def test_each_image_has_a_kernel_of_its_own() -> None:
    """A point becomes a bump of variance sigma^2; a flat image stays flat."""
    sigma = np.array([1.0, 3.0])
    weights = torch.from_numpy(gaussian_weights(sigma, 12))
    point = torch.zeros(2, 1, 41, 41)
    point[:, :, 20, 20] = 1
    blur_(point, weights)
    columns = point.sum(dim=(1, 2))
    variance = (columns * (torch.arange(41.0) - 20).square()).sum(dim=1)
    torch.testing.assert_close(columns.sum(dim=1), torch.ones(2))
    torch.testing.assert_close(variance.double(), torch.from_numpy(sigma**2), rtol=0.01, atol=0)
    flat = torch.full((2, 3, 16, 16), 0.3)
    blur_(flat, weights)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.3))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_a_crop_is_resized_as_in_torchvision(mode: Interpolation) -> None:
    """Equal within 1e-5 where torchvision's crop knows its pixels' neighbours, too."""
    images = noise(1, 3, 24)
    views = crop_and_resize(images, boxes(5, 3, 12, 16), UNMIRRORED, mode)
    expected = functional.resized_crop(
        images, 5, 3, 12, 16, [24, 24], InterpolationMode(mode), antialias=False
    ).clamp(0, 1)
    inner = (slice(None), slice(None), slice(4, 20), slice(4, 20))
    torch.testing.assert_close(views[inner], expected[inner], rtol=0, atol=1e-5)
    whole = crop_and_resize(images, boxes(0, 0, 24, 24), UNMIRRORED, mode)
    torch.testing.assert_close(whole, images, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_a_crop_is_what_grid_sample_gives(mode: Interpolation) -> None:
    """Equal within 1e-5 to torch's own sampling of a fractional box, borders included."""
    images = noise(1, 2, 20)
    top, left, height, width = 3.3, 0.2, 11.7, 19.5
    views = crop_and_resize(images, boxes(top, left, height, width), UNMIRRORED, mode)
    across = [width / 20, 0, (2 * left + width) / 20 - 1]
    down = [0, height / 20, (2 * top + height) / 20 - 1]
    theta = torch.tensor([[across, down]])
    grid = torch.nn.functional.affine_grid(theta, [1, 2, 20, 20], align_corners=False)
    expected = torch.nn.functional.grid_sample(
        images, grid, mode=mode, padding_mode="border", align_corners=False
    ).clamp(0, 1)
    torch.testing.assert_close(views, expected, rtol=0, atol=1e-5)


def test_crop_and_mirror_are_where_they_say() -> None:
    """A crop of the right half, mirrored, shows that half's columns in reverse order."""
    columns = torch.arange(8.0).expand(1, 1, 8, 8) / 8
    row = crop_and_resize(columns, boxes(0, 4, 8, 4), MIRRORED)[0, 0, 3]
    # Centres of 8 output pixels over columns 4 to 8, read from the right; borders clamp.
    expected = torch.tensor([7.0, 6.75, 6.25, 5.75, 5.25, 4.75, 4.25, 3.75]) / 8
    torch.testing.assert_close(row, expected)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_weights_of_a_pixel_sum_to_one(mode: Interpolation) -> None:
    """So a flat image stays flat, and no pixel outside the image is read."""
    index, weights = taps(np.array([0.0, 2.3]), np.array([9.0, 4.1]), 9, mode)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    assert index.min() == 0
    assert index.max() == 8


def test_without_red_green_and_blue_contrast_keeps_each_channels_mean() -> None:
    """There is no grey that two or four channels share."""
    images = noise(2, 4)
    means = images.mean(dim=(2, 3))
    assert grey(images) is images
    stretch_contrast_(images, amounts(0.5, 0.0))
    torch.testing.assert_close(images.mean(dim=(2, 3)), means)
    assert images[1].std(dim=(1, 2)).max() < 1e-6
