"""Parity: what is measured, and that each shortfall is an error that says so."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from train.errors import ExportError
from train.export.parity import (
    Parity,
    measure_parity,
    require_batch_invariance,
    require_finite_network,
    require_parity,
)


def vectors(seed: int) -> NDArray[np.float32]:
    """A hundred random vectors."""
    return np.random.default_rng(seed).normal(size=(100, 8)).astype(np.float32)


def test_equal_encoders_have_full_parity() -> None:
    """Scale does not count: what is compared are directions."""
    parity = measure_parity(vectors(0), 3 * vectors(0))
    assert parity.images == 100
    assert parity.min_cosine == pytest.approx(1)
    assert parity.overlap == 1
    require_parity(parity)


def test_unlike_encoders_share_neighbours_by_chance_alone() -> None:
    """Random vectors agree on about k / N of the neighbours."""
    parity = measure_parity(vectors(0), vectors(1))
    assert parity.min_cosine < 0.5
    assert 0.05 < parity.overlap < 0.2


def test_a_set_smaller_than_the_neighbourhood_is_compared_whole() -> None:
    """Four images have three neighbours each."""
    assert measure_parity(vectors(0)[:4], vectors(1)[:4]).overlap == 1


def test_one_image_has_no_neighbours() -> None:
    """As of a stream of two whose other one is damaged."""
    require_parity(measure_parity(vectors(0)[:1], vectors(0)[:1]))


def test_vectors_of_zeros_are_equal() -> None:
    """They have no angle: a dead network's graph is the network all the same."""
    dead = vectors(0)
    dead[3] = 0
    assert measure_parity(dead, dead).min_cosine == pytest.approx(1)
    require_parity(measure_parity(0 * dead, 0 * dead))
    assert measure_parity(dead, vectors(0)).min_cosine == 0


def test_images_that_are_alike_have_no_order() -> None:
    """Equal images, such as blank ones, tie: which ten of 400 come first says nothing."""
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(512, 32)).astype(np.float32) + 2
    reference[rng.permutation(512)[:400]] = reference[0]
    scale_D = 1 + 1e-6 * rng.normal(size=32)
    parity = measure_parity(reference, (reference * scale_D).astype(np.float32))
    assert parity.overlap == 1
    require_parity(parity)


@pytest.mark.parametrize(
    ("min_cosine", "overlap", "message"),
    [
        (0.99, 1.0, "least cosine to torch, over 9 images: expected at least 0.9999, found 0.99"),
        (1.0, 0.9, "nearest neighbours with torch's, over 9 images: expected at least 0.99"),
        (float("nan"), 1.0, "expected at least 0.9999, found nan"),
    ],
)
def test_each_figure_that_falls_short_is_named(
    min_cosine: float, overlap: float, message: str
) -> None:
    """The error has the figure, its threshold and what was found; NaN falls short, too."""
    with pytest.raises(ExportError) as error:
        require_parity(Parity(images=9, min_cosine=min_cosine, mean_cosine=1.0, overlap=overlap))
    assert message in str(error.value)


def test_a_graph_that_mixes_images_is_refused() -> None:
    """A vector that depends on its batchmates is found at the first batch of two."""
    images = np.random.default_rng(0).integers(0, 256, (8, 2, 2, 1), dtype=np.uint8)

    def centred(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        flat = batch.reshape(len(batch), -1).astype(np.float32)
        return flat - flat.mean(axis=0) if len(batch) > 1 else flat

    with pytest.raises(ExportError, match="vectors in batches of 2: expected those that each"):
        require_batch_invariance(centred, images)


def test_a_graph_that_minds_its_own_image_passes() -> None:
    """Equal bits alone and in batches are accepted."""
    images = np.random.default_rng(0).integers(0, 256, (70, 2, 2, 1), dtype=np.uint8)

    def encode(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        return batch.reshape(len(batch), -1).astype(np.float32)

    assert require_batch_invariance(encode, images) == 0


def test_rounding_that_depends_on_the_batch_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """A transformer's last bits change with the batch: accepted, with a word."""
    images = np.random.default_rng(0).integers(1, 256, (70, 2, 2, 1), dtype=np.uint8)

    def rounded(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        vectors = batch.reshape(len(batch), -1).astype(np.float32)
        vectors[:, 0] *= 1 + 1e-6 * (len(batch) > 1)
        return vectors

    assert 0 < require_batch_invariance(rounded, images) < 1e-5
    assert "differs by up to" in caplog.text


def test_half_precision_may_round_by_its_own_step() -> None:
    """A last bit of float16 is far more than one of float32, and far less than a mixed image."""
    images = np.random.default_rng(0).integers(1, 256, (70, 2, 2, 1), dtype=np.uint8)

    def rounded(share: float) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
        def encode(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
            vectors = batch.reshape(len(batch), -1).astype(np.float32)
            vectors[:, 0] *= 1 + share * (len(batch) > 1)
            return vectors

        return encode

    assert 1e-5 < require_batch_invariance(rounded(1e-3), images, precision="fp16") < 2e-3
    with pytest.raises(ExportError, match=r"that each image has alone, to 0\.002, found"):
        require_batch_invariance(rounded(1e-2), images, precision="fp16")
    with pytest.raises(ExportError, match="that each image has alone, to 1e-05, found"):
        require_batch_invariance(rounded(1e-3), images, precision="int8")


def test_vectors_that_are_no_numbers_are_the_networks_fault() -> None:
    """A run that diverged is told from a graph that is not the network."""
    good = vectors(0)
    require_finite_network(good)
    good[3, 1], good[7] = np.nan, np.inf
    with pytest.raises(ExportError) as error:
        require_finite_network(good)
    assert str(error.value) == (
        "the network's vectors of the training images: expected finite numbers, found NaN or "
        "infinity in 2 of 100; look at the run's curves, and train it again with other options"
    )
