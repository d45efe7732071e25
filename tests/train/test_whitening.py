"""Whitening: what the fit is, that it is deterministic, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.errors import UsageError
from train.errors import ExportError
from train.export.whitening import MAX_FEATURE_DIMS, FeatureMoments, Whitening


def features(n: int = 500, dim: int = 12, seed: int = 0) -> NDArray[np.float32]:
    """Correlated features of falling variance, away from zero."""
    rng = np.random.default_rng(seed)
    scales_D = np.geomspace(10, 0.01, dim)
    mixed = (rng.normal(size=(n, dim)) * scales_D) @ np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    return (mixed + 5).astype(np.float32)


def moments_of(features_ND: NDArray[np.float32], batch: int = 100) -> FeatureMoments:
    """Add features batch by batch."""
    moments = FeatureMoments(features_ND.shape[1])
    for start in range(0, len(features_ND), batch):
        moments.add(torch.from_numpy(features_ND[start : start + batch]))
    return moments


def test_it_is_pca_whitening_with_a_floor() -> None:
    """Centred, uncorrelated, and of variance v / (v + shrinkage * largest), as numpy has it."""
    x_ND = features()
    whitening = Whitening.fit(moments_of(x_ND), dim=6, shrinkage=1e-2)
    variances_D = np.linalg.eigvalsh(np.cov(x_ND.T.astype(np.float64), bias=True))[::-1]
    z_NK = whitening(x_ND).astype(np.float64)
    expected_K = variances_D[:6] / (variances_D[:6] + 1e-2 * variances_D[0])
    np.testing.assert_allclose(np.cov(z_NK.T, bias=True), np.diag(expected_K), atol=1e-5)
    np.testing.assert_allclose(z_NK.mean(axis=0), 0, atol=1e-5)


@given(batch=st.integers(1, 500), dim=st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_neither_batches_nor_dim_change_what_is_kept(batch: int, dim: int) -> None:
    """Moments add up, and fewer dimensions are the first of more."""
    whole = Whitening.fit(moments_of(features()), dim=12, shrinkage=1e-3)
    part = Whitening.fit(moments_of(features(), batch), dim=dim, shrinkage=1e-3)
    np.testing.assert_allclose(part.weights_KD, whole.weights_KD[:dim], rtol=1e-5, atol=1e-7)


def test_an_axis_points_to_its_largest_component() -> None:
    """The sign, which eigenvectors leave open, is fixed."""
    weights_KD = Whitening.fit(moments_of(features()), dim=12, shrinkage=1e-3).weights_KD
    largest_K = np.abs(weights_KD).argmax(axis=1)
    assert (weights_KD[np.arange(12), largest_K] > 0).all()


def test_it_says_what_it_kept() -> None:
    """Images, dimensions and the spectrum in a few figures."""
    described = Whitening.fit(moments_of(features()), dim=6, shrinkage=1e-3).describe()
    counts = {name: described[name] for name in ("images", "dims_in", "dims_out", "shrinkage")}
    assert counts == {"images": 500, "dims_in": 12, "dims_out": 6, "shrinkage": 1e-3}
    assert 0.99 < described["variance_kept"] < 1
    assert 1 < described["effective_dims"] < 12
    assert described["largest_variance"] > described["last_kept_variance"] > 0


def test_more_dimensions_than_features_are_refused() -> None:
    """The message has how many there are, and how to have more."""
    with pytest.raises(UsageError, match=r"dim: expected at most 12, .* found 13; choose"):
        Whitening.fit(moments_of(features()), dim=13, shrinkage=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_features_that_do_not_vary_are_refused(value: float) -> None:
    """A collapsed network has no axes, and what rounding leaves of its variance is none."""
    rounding_ND = 1e-7 * np.random.default_rng(0).normal(size=(9, 3))
    features_ND = (value * (1 + rounding_ND)).astype(np.float32)
    with pytest.raises(ExportError, match="the same for every image: the network has collapsed"):
        Whitening.fit(moments_of(features_ND), dim=2, shrinkage=1e-3)


def test_features_that_are_no_numbers_are_refused() -> None:
    """Those of a network that diverged."""
    features_ND = np.full((9, 3), np.nan, np.float32)
    with pytest.raises(ExportError, match=r"expected finite numbers, found others; look at the"):
        Whitening.fit(moments_of(features_ND), dim=2, shrinkage=1e-3)


def test_features_whose_covariance_would_fill_the_memory_are_refused() -> None:
    """Before anything is computed."""
    with pytest.raises(UsageError, match=r"expected at most 8192, found 8193; choose a smaller"):
        FeatureMoments(MAX_FEATURE_DIMS + 1)
