import numpy as np
import pytest

from index.evaluation import baselines
from index.evaluation.baselines import (
    Whitening,
    pixel_neighbours,
    reduce_pixels,
    reduced_side,
    twin_note,
    unit_pixels,
)
from index.knn import knn_search


@pytest.fixture
def pixels():
    """300 images of 40 correlated pixels."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((300, 40)) @ rng.standard_normal((40, 40))
    return np.clip(mixed * 8 + 128, 0, 255).astype(np.uint8)


def test_whitening_is_pca_divided_by_the_deviations(pixels, monkeypatch):
    """Against the formula: (x - mean) v_i / sqrt(l_i + floor * l_1), then unit length."""
    monkeypatch.setattr(baselines, "COVARIANCE_ROWS", 64)
    x = pixels.astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    values, vectors = values[::-1][:8], vectors[:, ::-1][:, :8]
    expected = (x - x.mean(0)) @ vectors / np.sqrt(values + 1e-3 * values[0])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = Whitening.fit(pixels, dims=8)(pixels)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=2e-4)  # signs are free


def test_whitening_of_few_pixels_or_equal_images():
    """There are never more dimensions than pixels, or than images span; no division by zero."""
    several = np.arange(54, dtype=np.uint8).reshape(9, 6) ** 2
    assert Whitening.fit(several).weights_PD.shape == (6, 6)
    same = np.full((5, 6), 7, np.uint8)
    whitening = Whitening.fit(same)
    assert whitening.weights_PD.shape == (6, 4)
    np.testing.assert_array_equal(whitening(same), 0)


@pytest.mark.parametrize(("side", "reduced"), [(28, 28), (32, 32), (33, 16), (224, 32), (299, 29)])
def test_large_images_are_averaged_down(side, reduced):
    """By whole blocks, to at most 32 a side; a plain image stays as it is."""
    images = np.full((2, side, side, 3), 77, np.uint8)
    assert reduced_side(side) == reduced
    assert reduce_pixels(images).shape == (2, reduced * reduced * 3)
    assert (reduce_pixels(images) == 77).all()
    none = reduce_pixels(images[:0])  # of a batch in which no image can be read
    assert none.shape == (0, reduced * reduced * 3)


def test_averages_are_those_of_the_blocks():
    """The mean of each block, rounded."""
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 40, 1)).astype(np.uint8)
    expected = np.rint(images.reshape(3, 32, 2, 20, 2).mean(axis=(2, 4)))
    np.testing.assert_array_equal(reduce_pixels(images), expected.reshape(3, -1))


def test_a_bank_in_blocks_is_one_bank(pixels, monkeypatch):
    """Memory is bounded by blocks of the bank, which do not show in the result."""
    monkeypatch.setattr(baselines, "BANK_BYTES", 4 * 40 * 70)
    scores, rows = pixel_neighbours(pixels[:9], pixels, 20, unit_pixels)
    expected_scores, expected_rows = knn_search(unit_pixels(pixels[:9]), unit_pixels(pixels), 20)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
    assert (rows[:, 0] == np.arange(9)).all()


def test_the_untrained_twin_is_described_by_what_export_kept():
    """The same readout, its own whitening, and what it does without either."""
    validation = {
        "k": 20,
        "queries": 5000,
        "readouts": {"untrained": {"plain": 0.7133, "pooled": 0.76, "whitened": 0.7967}},
    }
    assert twin_note({"readout": {"whitening": {"images": 9}}, "validation": validation}) == (
        "the same network and readout, untrained, whitened by a fit of its own; its last stage "
        "pooled plainly had 71.33% when it was exported (k = 20, 5,000 held-out training images)"
    )
    unscored = {"readout": {"whitening": None}, "validation": None}
    assert twin_note(unscored) == "the same network and readout, untrained"
