"""The random views: what each operation does, how often, and between which bounds."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch
from torch import Tensor

from train.views import (
    Crops,
    Draw,
    Normaliser,
    ViewRecipe,
    blur,
    brighten,
    crop_and_resize,
    draw_crops,
    grey,
    jitter,
    random_view,
    saturate,
    stretch_contrast,
    turn_hue,
)

N_DRAWS = 4000


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def noise(n: int, channels: int, size: int = 8) -> Tensor:
    """Images without any symmetry."""
    return torch.rand(n, channels, size, size, generator=seeded(99))


def assert_share(hits: Tensor, probability: float) -> None:
    """Hold a share of independent events to its probability, within 4.5 deviations."""
    deviation = math.sqrt(probability * (1 - probability) / len(hits))
    assert abs(hits.float().mean().item() - probability) <= 4.5 * deviation


def changed(views: Tensor, images: Tensor) -> Tensor:
    """Which images differ by more than rounding."""
    return (views - images).abs().amax(dim=(1, 2, 3)) > 1e-4


def test_a_recipe_of_nothing_leaves_images_alone() -> None:
    """Without crop, flip and the rest a view is its image."""
    images = noise(5, 3)
    views = random_view(images, ViewRecipe(), seeded())
    torch.testing.assert_close(views, images, rtol=0, atol=1e-5)


FULL_RECIPE = ViewRecipe(
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


@pytest.mark.parametrize("channels", [1, 3])
def test_equal_seeds_give_equal_views_within_bounds(channels: int) -> None:
    """Views are a function of the seed, unlike for unlike seeds, and stay in [0, 1]."""
    images = noise(16, channels, 24)
    first, again, other = (random_view(images, FULL_RECIPE, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert changed(first, other).all()
    assert first.min() >= 0
    assert first.max() <= 1


def test_every_image_has_parameters_of_its_own() -> None:
    """Equal images in one batch become unlike views."""
    images = noise(1, 1).repeat(8, 1, 1, 1)
    views = random_view(images, ViewRecipe(crop_area=(0.2, 0.9)), seeded())
    assert all(changed(views[i : i + 1], views[j : j + 1]) for i in range(8) for j in range(i))


@pytest.mark.parametrize(
    ("recipe", "probability"),
    [
        (ViewRecipe(flip_probability=0.3), 0.3),
        (ViewRecipe(jitter_probability=0.8, brightness=0.4), 0.8),
        (ViewRecipe(grey_probability=0.2), 0.2),
        (ViewRecipe(blur_probability=0.1, blur_sigma_px=(0.8, 2.0)), 0.1),
        (ViewRecipe(solarise_probability=0.2), 0.2),
    ],
    ids=["flip", "jitter", "grey", "blur", "solarise"],
)
def test_operations_happen_as_often_as_they_are_asked_to(
    recipe: ViewRecipe, probability: float
) -> None:
    """The share of changed images is the probability."""
    images = noise(N_DRAWS, 3)
    assert_share(changed(random_view(images, recipe, seeded()), images), probability)


def test_crops_cover_the_asked_areas_and_shapes() -> None:
    """Area is uniform over its range, width / height within 3/4 and 4/3, all inside."""
    crops = draw_crops(Draw(seeded(), N_DRAWS), 40, 40, (0.1, 0.5), 0.5)
    share = crops.height * crops.width / 1600
    ratio = crops.width / crops.height
    assert 0.1 - 1e-4 <= share.min() < 0.11
    assert 0.49 < share.max() <= 0.5 + 1e-4
    assert abs(share.mean() - 0.3) < 4.5 * (0.4 / math.sqrt(12 * N_DRAWS))
    assert 3 / 4 - 1e-4 <= ratio.min() < 0.76
    assert 1.31 < ratio.max() <= 4 / 3 + 1e-4
    assert abs(ratio.log().mean()) < 0.02
    for start, length in ((crops.top, crops.height), (crops.left, crops.width)):
        assert start.min() >= 0
        assert (start + length).max() <= 40 + 1e-3
    assert_share(crops.is_mirrored, 0.5)


def test_where_no_crop_fits_the_largest_of_an_allowed_shape_is_taken() -> None:
    """Of a tall image that is a crop of 3 : 4, inside it; of a square, all of it."""
    crops = draw_crops(Draw(seeded(), 64), 100, 6, (1.0, 1.0), 0.0)
    assert (crops.width == 6).all()
    assert (crops.height == 8).all()
    assert (crops.top + crops.height <= 100).all()
    whole = draw_crops(Draw(seeded(), 64), 9, 9, (1.0, 1.0), 0.0)
    assert (whole.width == 9).all()
    assert (whole.height == 9).all()


def test_crop_and_mirror_are_where_they_say() -> None:
    """A crop of the right half, mirrored, shows that half's columns in reverse order."""
    columns = torch.arange(8.0).expand(1, 1, 8, 8) / 8
    half = Crops(
        top=torch.tensor([0.0]),
        left=torch.tensor([4.0]),
        height=torch.tensor([8.0]),
        width=torch.tensor([4.0]),
        is_mirrored=torch.tensor([True]),
    )
    row = crop_and_resize(columns, half)[0, 0, 3]
    # Centres of 8 output pixels over columns 4 to 8, read from the right; borders clamp.
    expected = torch.tensor([7.0, 6.75, 6.25, 5.75, 5.25, 4.75, 4.25, 3.75]) / 8
    torch.testing.assert_close(row, expected)


def test_jitter_keeps_to_its_strength() -> None:
    """Brightness factors fill 1 - strength to 1 + strength evenly."""
    images = torch.full((N_DRAWS, 1, 2, 2), 0.5)
    recipe = ViewRecipe(jitter_probability=1.0, brightness=0.4)
    factors = jitter(images, recipe, Draw(seeded(), N_DRAWS))[:, 0, 0, 0] / 0.5
    assert 0.6 <= factors.min() < 0.61
    assert 1.39 < factors.max() <= 1.4
    assert abs(factors.mean() - 1) < 4.5 * (0.8 / math.sqrt(12 * N_DRAWS))


def test_jitter_comes_in_random_order() -> None:
    """Brightness before contrast and contrast before brightness both occur."""
    images = torch.tensor([0.0, 0.9]).view(1, 1, 1, 2).repeat(200, 1, 1, 1)
    recipe = ViewRecipe(jitter_probability=1.0, brightness=0.8, contrast=0.8)
    views = jitter(images, recipe, Draw(seeded(), 200))
    draw = Draw(seeded(), 200)
    draw.chosen(1.0)
    light, contrast = (draw.uniform(0.2, 1.8).view(-1, 1, 1, 1) for _ in range(2))
    one = stretch_contrast(brighten(images, light), contrast)
    other = brighten(stretch_contrast(images, contrast), light)
    is_one, is_other = (~changed(views, either) for either in (one, other))
    assert (is_one | is_other).all()
    assert_share(is_one[is_one != is_other], 0.5)


def test_colour_operations_fall_away_for_one_channel() -> None:
    """Saturation, hue and grey leave grey images alone."""
    images = noise(8, 1)
    recipe = ViewRecipe(jitter_probability=1.0, saturation=1.0, hue=0.5, grey_probability=1.0)
    torch.testing.assert_close(random_view(images, recipe, seeded()), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("turn", [0.0, 0.1, -0.25, 0.5])
def test_hue_is_that_of_hsv(turn: float) -> None:
    """Turning the hue agrees with colorsys, for greys and primaries, too."""
    colours = torch.cat([noise(1, 3, 6), torch.zeros(1, 3, 6, 6)])
    colours[1, :, 0, :3] = torch.eye(3)
    colours[1, :, 1, 0] = 0.4
    turned = turn_hue(colours, torch.full((2, 1, 1, 1), turn))
    for before, after in zip(
        colours.permute(0, 2, 3, 1).reshape(-1, 3).tolist(),
        turned.permute(0, 2, 3, 1).reshape(-1, 3).tolist(),
        strict=True,
    ):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        assert after == pytest.approx(expected, abs=1e-5)


def test_factors_of_nothing_and_of_zero() -> None:
    """A factor of 1 changes nothing; 0 gives black, mean grey, and colourless."""
    images, one, zero = noise(2, 3), torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)
    for operation in (brighten, stretch_contrast, saturate):
        torch.testing.assert_close(operation(images, one), images)
    assert (brighten(images, zero) == 0).all()
    assert stretch_contrast(images, zero).std(dim=(1, 2, 3)).max() < 1e-6
    torch.testing.assert_close(saturate(images, zero), grey(images).expand_as(images))


def test_blur_is_a_gaussian_of_the_given_deviation() -> None:
    """A point becomes a bump of variance sigma^2; a flat image stays flat."""
    point = torch.zeros(2, 1, 41, 41)
    point[:, :, 20, 20] = 1
    sigma = torch.tensor([1.0, 3.0])
    columns = blur(point, sigma).sum(dim=(1, 2))
    variance = (columns * (torch.arange(41.0) - 20).square()).sum(dim=1)
    torch.testing.assert_close(columns.sum(dim=1), torch.ones(2))
    torch.testing.assert_close(variance, sigma.square(), rtol=0.05, atol=0)
    flat = torch.full((2, 3, 9, 9), 0.3)
    torch.testing.assert_close(blur(flat, sigma), flat)


def test_solarise_inverts_from_the_middle() -> None:
    """Values below a half stay, others are taken from one."""
    images = torch.tensor([0.2, 0.5, 0.9, 0.0]).view(1, 1, 2, 2)
    views = random_view(images, ViewRecipe(solarise_probability=1.0), seeded())
    torch.testing.assert_close(views.flatten(), torch.tensor([0.2, 0.5, 0.1, 0.0]))


def test_normaliser_takes_uint8_nhwc_to_channels_last_floats() -> None:
    """Pixels become (value / 255 - mean) / std of their channel."""
    images = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.25]).view(-1, 1, 1), torch.tensor([0.5, 0.75]).view(-1, 1, 1)
    normalised = Normaliser(mean=mean, std=std).to_input(images)
    assert normalised.shape == (1, 2, 1, 1)
    torch.testing.assert_close(normalised.flatten(), torch.tensor([-1.0, 1.0]))
