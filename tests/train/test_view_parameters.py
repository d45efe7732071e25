"""What is drawn for a view: how often, between which bounds, and for whom."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2 import RandomResizedCrop

from tests.train.recipes import PAPER
from train.views.parameters import (
    BOX_UNITS,
    JITTERS,
    UNITS,
    ViewParameters,
    ViewRecipe,
    crop_box,
    crop_boxes,
    gaussian_weights,
    view_parameters,
)

N_DRAWS = 4000
KS_1_IN_10000 = 2.23
"""sqrt(n m / (n + m)) times the Kolmogorov-Smirnov distance stays below this but once in
10,000 times, for equal distributions."""


def drawn(recipe: ViewRecipe = PAPER, *, height: int = 224, width: int = 224) -> ViewParameters:
    """Parameters of many views."""
    units = np.random.default_rng(0).random((N_DRAWS, UNITS))
    return view_parameters(units, recipe, height=height, width=width)


def assert_share(hits: NDArray[np.bool_], probability: float) -> None:
    """Hold a share of independent events to its probability, within 4.5 deviations."""
    deviation = math.sqrt(probability * (1 - probability) / len(hits))
    assert abs(hits.mean() - probability) <= 4.5 * deviation


def assert_uniform(values: NDArray[np.float64], low: float, high: float) -> None:
    """Hold values to a uniform distribution by the Kolmogorov-Smirnov test."""
    ranks = (np.sort(values) - low) / (high - low)
    assert ranks[0] >= -1e-9
    assert ranks[-1] <= 1 + 1e-9
    distance = np.abs(ranks - (np.arange(len(ranks)) + 0.5) / len(ranks)).max()
    assert math.sqrt(len(ranks)) * distance < KS_1_IN_10000


def assert_alike(some: NDArray[np.float64], others: NDArray[np.float64]) -> None:
    """Hold two samples to one distribution by the Kolmogorov-Smirnov test."""
    grid = np.sort(np.concatenate([some, others]))
    shares = [np.searchsorted(np.sort(v), grid, "right") / len(v) for v in (some, others)]
    n, m = len(some), len(others)
    assert math.sqrt(n * m / (n + m)) * np.abs(shares[0] - shares[1]).max() < KS_1_IN_10000


@pytest.mark.parametrize(
    ("name", "probability"),
    [
        ("is_mirrored", 0.5),
        ("is_jittered", 0.8),
        ("is_grey", 0.2),
        ("is_blurred", 0.1),
        ("is_solarised", 0.2),
    ],
)
def test_operations_are_chosen_as_often_as_they_are_asked_for(
    name: str, probability: float
) -> None:
    """The share of chosen images is the probability."""
    assert_share(getattr(drawn(), name), probability)


def test_probabilities_of_nothing_and_of_one_are_kept_exactly() -> None:
    """What never happens never does, and what always happens always does."""
    never, always = drawn(ViewRecipe()), drawn(ViewRecipe(blur_probability=1.0))
    names = ("is_mirrored", "is_jittered", "is_grey", "is_blurred", "is_solarised")
    assert not any(getattr(never, name).any() for name in names)
    assert always.is_blurred.all()


def test_choices_of_one_image_are_independent() -> None:
    """Solarised images are as often grey as others are, and so for every pair of choices."""
    parameters = drawn()
    names = ("is_mirrored", "is_jittered", "is_grey", "is_blurred", "is_solarised")
    hits = np.stack([getattr(parameters, name) for name in names]).astype(float)
    correlations = np.corrcoef(hits)[np.triu_indices(len(names), 1)]
    assert np.abs(correlations).max() < 4.5 / math.sqrt(N_DRAWS)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ],
)
def test_jitter_fills_its_range_evenly(name: str, low: float, high: float) -> None:
    """Factors lie within 1 - strength and 1 + strength, the hue within its turn."""
    assert_uniform(drawn().jitter[:, JITTERS.index(name)], low, high)


def test_every_order_of_the_jitter_is_as_likely() -> None:
    """The 24 permutations come equally often."""
    orders, counts = np.unique(drawn().order, axis=0, return_counts=True)
    assert len(orders) == 24
    expected = N_DRAWS / 24
    assert ((counts - expected) ** 2 / expected).sum() < 60  # chi square, 23 degrees: 1 in 30,000


def test_blur_fills_its_range_evenly() -> None:
    """The deviation is uniform, as in the authors' code."""
    assert_uniform(drawn().sigma_px, 0.1, 2.0)


def test_kernels_are_half_gaussians_of_one_length() -> None:
    """The radius is the recipe's; each kernel sums to 1 and falls off by its own deviation."""
    weights = gaussian_weights(np.array([0.1, 1.0, 2.0]), 6)
    assert weights.shape == (3, 7)
    np.testing.assert_allclose(2 * weights.sum(axis=1) - weights[:, 0], 1, rtol=1e-6)
    np.testing.assert_allclose(weights[1, 1] / weights[1, 0], math.exp(-0.5), rtol=1e-6)
    assert drawn().blur_weights.shape == (N_DRAWS, 7)
    assert drawn(height=4, width=9).blur_weights.shape == (N_DRAWS, 4)  # reflects 3 px at most


def test_crops_cover_the_asked_areas_and_shapes() -> None:
    """Where every try fits: area and logarithm of width / height are uniform, all inside."""
    units = np.random.default_rng(0).random((N_DRAWS, BOX_UNITS))
    boxes = crop_boxes(units, 40, 40, (0.1, 0.5))
    assert_uniform(boxes.height * boxes.width / 1600, 0.1, 0.5)
    assert_uniform(np.log(boxes.width / boxes.height), -math.log(4 / 3), math.log(4 / 3))
    assert_uniform(boxes.top / (40 - boxes.height), 0, 1)
    assert_uniform(boxes.left / (40 - boxes.width), 0, 1)


@pytest.mark.parametrize(("height", "width"), [(500, 500), (375, 500), (900, 300)])
def test_crops_are_those_of_torchvision(height: int, width: int) -> None:
    """Area, shape and place have torchvision's distribution, up to its whole pixels."""
    rng = np.random.default_rng(1)
    ours = np.array([crop_box(rng, height, width, (0.08, 1.0)) for _ in range(2000)])
    image = np.zeros((1, height, width), np.uint8)
    transform = RandomResizedCrop(8, scale=(0.08, 1.0))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        query = [torch.from_numpy(image)]
        drawn_by = [transform.make_params(query) for _ in range(2000)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in drawn_by], float)
    for column in range(4):
        assert_alike(np.round(ours[:, column]), theirs[:, column])


def test_one_crop_is_a_row_of_a_batch() -> None:
    """A stream's crop comes from the numbers and the geometry of a batch's."""
    top, left, height, width = crop_box(np.random.default_rng(3), 300, 200, (0.2, 0.9))
    boxes = crop_boxes(np.random.default_rng(3).random((1, BOX_UNITS)), 300, 200, (0.2, 0.9))
    assert (top, left) == (boxes.top[0], boxes.left[0])
    assert (height, width) == (boxes.height[0], boxes.width[0])


def test_where_no_crop_fits_the_largest_of_an_allowed_shape_is_taken() -> None:
    """Of a tall image that is a crop of 3 : 4 in the middle; of a square, all of it."""
    units = np.random.default_rng(0).random((64, BOX_UNITS))
    tall = crop_boxes(units, 100, 6, (1.0, 1.0))
    np.testing.assert_allclose(tall.width, 6)
    np.testing.assert_allclose(tall.height, 8)
    np.testing.assert_allclose(tall.top, 46)
    whole = crop_boxes(units, 9, 9, (1.0, 1.0))
    assert (whole.width == 9).all()
    assert (whole.height == 9).all()


def test_rows_are_taken_from_everything() -> None:
    """A slice and an array of rows give the same parameters of the same images."""
    parameters = drawn()
    by_slice, by_array = parameters[4:7], parameters[np.array([4, 5, 6])]
    assert len(by_slice) == len(by_array) == 3
    for some in (by_slice, by_array):
        assert some.recipe == parameters.recipe
        np.testing.assert_array_equal(some.boxes.left, parameters.boxes.left[4:7])
        for name, values in vars(parameters).items():
            if isinstance(values, np.ndarray):
                np.testing.assert_array_equal(getattr(some, name), values[4:7])


def test_no_option_moves_the_draws_of_another() -> None:
    """With blur and jitter left out, crops, flips and the rest stay what they were."""
    plain = ViewRecipe(crop_area=(0.08, 1.0), flip_probability=0.5, solarise_probability=0.2)
    some, all_ = drawn(plain), drawn(PAPER)
    np.testing.assert_array_equal(some.boxes.top, all_.boxes.top)
    np.testing.assert_array_equal(some.is_mirrored, all_.is_mirrored)
    np.testing.assert_array_equal(some.is_solarised, all_.is_solarised)
