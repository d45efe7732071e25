"""The random views of a batch: whole, for ranks, for streams, and of any channels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.train.recipes import FULL
from train import views as views_module
from train.views import (
    Normaliser,
    ViewParameters,
    ViewRecipe,
    apply_view,
    draw_parameters,
    finish_view,
    random_view,
)
from train.views.operations import brighten_, stretch_contrast_
from train.views.whole import apply_whole, whole_parameters


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def noise(n: int, channels: int, size: int = 8) -> Tensor:
    """Images without any symmetry."""
    return torch.rand(n, channels, size, size, generator=seeded(99))


def drawn(images: Tensor, recipe: ViewRecipe, seed: int = 0) -> ViewParameters:
    """Parameters for these images."""
    n, _, height, width = images.shape
    return draw_parameters(n, recipe, seeded(seed), height=height, width=width)


def changed(views: Tensor, images: Tensor) -> Tensor:
    """Which images differ by more than rounding."""
    return (views - images).abs().amax(dim=(1, 2, 3)) > 1e-4


def test_a_recipe_of_nothing_leaves_images_alone() -> None:
    """Without crop, flip and the rest a view is its image."""
    images = noise(5, 3)
    views = random_view(images, ViewRecipe(), seeded())
    torch.testing.assert_close(views, images, rtol=0, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_equal_seeds_give_equal_views_within_bounds(channels: int, interpolation: str) -> None:
    """Views are a function of the seed, unlike for unlike seeds, and stay in [0, 1]."""
    images = noise(16, channels, 24)
    recipe = dataclasses.replace(FULL, interpolation=interpolation)
    kept = images.clone()
    first, again, other = (random_view(images, recipe, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert torch.equal(images, kept)
    assert changed(first, other).all()
    assert first.min() >= 0
    assert first.max() <= 1


def test_every_image_has_parameters_of_its_own() -> None:
    """Equal images in one batch become unlike views."""
    images = noise(1, 1).repeat(8, 1, 1, 1)
    views = random_view(images, ViewRecipe(crop_area=(0.2, 0.9)), seeded())
    assert all(changed(views[i : i + 1], views[j : j + 1]) for i in range(8) for j in range(i))


@settings(max_examples=30, deadline=None)
@given(
    data=st.data(),
    shape=st.sampled_from([(1, 28, 28), (3, 17, 23), (3, 32, 32), (4, 9, 9), (13, 12, 20)]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    seed=st.integers(0, 2**32),
)
def test_ranks_get_the_very_views_of_one_process(
    data: st.DataObject, shape: tuple[int, int, int], interpolation: str, seed: int
) -> None:
    """Parameters of the whole batch, applied to any of its rows, give those rows to the bit."""
    n = data.draw(st.integers(1, 24))
    start = data.draw(st.integers(0, n - 1))
    rows = slice(start, data.draw(st.integers(start + 1, n)))
    images = torch.rand(n, *shape, generator=seeded(seed))
    parameters = drawn(images, dataclasses.replace(FULL, interpolation=interpolation), seed)
    for make in (apply_view, finish_view):
        whole = make(images, parameters)
        assert torch.equal(make(images[rows], parameters[rows]), whole[rows])
        picked = np.array([start, 0, n - 1])
        assert torch.equal(make(images[picked], parameters[picked]), whole[picked])


def test_ranks_get_the_views_of_one_process_in_large_pictures_and_many_threads() -> None:
    """Where torch divides the work among threads, the bits stay the same."""
    images = noise(2, 3, 192)
    recipe = dataclasses.replace(FULL, jitter_probability=1.0, blur_probability=1.0)
    parameters = drawn(images, recipe)
    whole = apply_view(images, parameters)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for i in range(2):
                row = apply_view(images[i : i + 1], parameters[i : i + 1])
                assert torch.equal(row, whole[i : i + 1])
    finally:
        torch.set_num_threads(threads)


def test_bits_do_not_depend_on_the_pieces_a_batch_is_worked_on_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One image at a time gives what all at once give."""
    images = noise(9, 3, 20)
    parameters = drawn(images, FULL)
    whole = apply_view(images, parameters)
    monkeypatch.setattr(views_module, "CACHE_BYTES", 1)
    assert torch.equal(apply_view(images, parameters), whole)


def test_nothing_comes_of_no_images() -> None:
    """An empty batch has an empty view."""
    assert random_view(noise(0, 3), FULL, seeded()).shape == (0, 3, 8, 8)


def test_a_cropped_image_is_only_finished() -> None:
    """For a stream all but the crop is done, by the same parameters."""
    images = noise(32, 3, 16)
    parameters = drawn(images, dataclasses.replace(FULL, crop_area=(1.0, 1.0)))
    torch.testing.assert_close(finish_view(images, parameters), apply_view(images, parameters))
    mirrored = drawn(images, ViewRecipe(flip_probability=0.5))
    finished = finish_view(images, mirrored)
    for i, is_mirrored in enumerate(mirrored.is_mirrored):
        assert torch.equal(finished[i], images[i].flip(2) if is_mirrored else images[i])


def test_memory_formats_make_no_difference() -> None:
    """Images with the channels last in memory, as they come from uint8 NHWC, are as good."""
    images = noise(7, 3, 16)
    last = images.contiguous(memory_format=torch.channels_last)
    parameters = drawn(images, FULL)
    for make in (apply_view, finish_view):
        assert torch.equal(make(last, parameters), make(images, parameters))
        assert make(last, parameters).is_contiguous()


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (ViewRecipe(flip_probability=0.3), "is_mirrored"),
        (ViewRecipe(jitter_probability=0.8, brightness=0.4), "is_jittered"),
        (ViewRecipe(jitter_probability=0.8, hue=0.1), "is_jittered"),
        (ViewRecipe(grey_probability=0.2), "is_grey"),
        (ViewRecipe(blur_probability=0.1, blur_sigma_px=(0.8, 2.0)), "is_blurred"),
        (ViewRecipe(solarise_probability=0.2), "is_solarised"),
    ],
)
def test_what_was_drawn_is_what_happens(recipe: ViewRecipe, name: str) -> None:
    """The chosen images are changed and no others."""
    images = noise(300, 3)
    parameters = drawn(images, recipe)
    hits = changed(apply_view(images, parameters), images)
    np.testing.assert_array_equal(hits.numpy(), getattr(parameters, name))


def test_jitter_comes_in_the_order_that_was_drawn() -> None:
    """Brightness before contrast and contrast before brightness both occur."""
    images = torch.tensor([0.0, 0.9, 0.1, 0.7]).view(1, 1, 2, 2).repeat(200, 1, 1, 1)
    parameters = drawn(images, ViewRecipe(jitter_probability=1.0, brightness=0.8, contrast=0.8))
    views = apply_view(images, parameters)
    light, contrast = (
        torch.from_numpy(parameters.jitter[:, j]).float().view(-1, 1, 1, 1) for j in (0, 1)
    )
    light_first, contrast_first = images.clone(), images.clone()
    brighten_(light_first, light)
    stretch_contrast_(light_first, contrast)
    stretch_contrast_(contrast_first, contrast)
    brighten_(contrast_first, light)
    is_light_first = torch.from_numpy(
        (parameters.order == 0).argmax(axis=1) < (parameters.order == 1).argmax(axis=1)
    )
    assert 60 < is_light_first.sum() < 140
    expected = torch.where(is_light_first.view(-1, 1, 1, 1), light_first, contrast_first)
    torch.testing.assert_close(views, expected, rtol=0, atol=1e-6)
    assert changed(light_first, contrast_first).any()


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_colour_operations_fall_away_without_three_channels(channels: int) -> None:
    """Saturation, hue and grey leave such images alone."""
    images = noise(8, channels)
    recipe = ViewRecipe(jitter_probability=1.0, saturation=1.0, hue=0.5, grey_probability=1.0)
    torch.testing.assert_close(random_view(images, recipe, seeded()), images, rtol=0, atol=1e-6)


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


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_without_a_choice_of_images_views_are_the_same(channels: int, interpolation: str) -> None:
    """What a CUDA graph does to all images changes only those that it was drawn for."""
    images = noise(64, channels, 20)
    recipe = dataclasses.replace(FULL, interpolation=interpolation)
    parameters = drawn(images, recipe)
    given = whole_parameters(parameters, images.shape, images)
    kept = images.clone()
    views = apply_whole(images, given, recipe)
    torch.testing.assert_close(views, apply_view(images, parameters), rtol=0, atol=1e-5)
    assert torch.equal(images, kept)


@pytest.mark.gpu
def test_a_gpu_makes_the_views_of_a_cpu() -> None:
    """The same draws give the same views, up to rounding."""
    images = noise(32, 3, 64)
    parameters = drawn(images, dataclasses.replace(FULL, interpolation="bicubic"))
    for make in (apply_view, finish_view):
        on_gpu = make(images.cuda(), parameters).cpu()
        torch.testing.assert_close(on_gpu, make(images, parameters), rtol=0, atol=1e-4)
