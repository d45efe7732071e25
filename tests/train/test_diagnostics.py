"""The diagnostics: what is known on paper comes out, and what should not matter does not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from index.evaluation import space_measures
from index.evaluation.space_measures import Moments, entropy_rank
from train.diagnostics import (
    MAX_ROWS,
    alignment,
    alpha_req,
    correlation_summary,
    dead_share,
    embedding_diagnostics,
    rankme,
    singular_values,
    spread,
    standardise,
    uniformity,
)

MEASURES: list[Callable[[Tensor], float]] = [rankme, alpha_req, spread, dead_share, uniformity]


def noise(n: int, dim: int, seed: int = 0) -> Tensor:
    """Independent normal numbers, (n, dim) float32."""
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def with_spectrum(sigma_K: Tensor, n: int, dim: int, *, centred: bool = False) -> Tensor:
    """Embeddings with exactly these singular values, float64; centred where asked."""
    left = noise(n, len(sigma_K)).double()
    left_NK = torch.linalg.qr(left - left.mean(dim=0) if centred else left).Q
    right_DK = torch.linalg.qr(noise(dim, len(sigma_K), seed=1).double()).Q
    return left_NK * sigma_K.double() @ right_DK.T


@pytest.mark.parametrize(("n", "dim"), [(50, 20), (20, 50)])
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_rankme_is_the_rank_of_directions_used_alike(n: int, dim: int, rank: int) -> None:
    """Rank-r embeddings with equal singular values have RankMe r, tall or wide."""
    z = with_spectrum(torch.full((rank,), 2.5), n, dim)
    assert rankme(z) == pytest.approx(rank, rel=1e-6)


def test_rankme_is_the_paper_s_formula() -> None:
    """It agrees with exp of the entropy of torch's own singular values."""
    z = noise(40, 30).double()
    sigma = torch.linalg.svdvals(z)
    p = sigma / sigma.sum()
    assert rankme(z) == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-9)
    torch.testing.assert_close(singular_values(z), sigma)


def test_rankme_of_noise_constants_and_nothing() -> None:
    """Isotropic noise fills its dimensions, a constant one, and zero none."""
    assert rankme(noise(20_000, 16)) == pytest.approx(16, rel=0.001)
    assert rankme(torch.ones(30, 8)) == pytest.approx(1)
    assert rankme(torch.zeros(30, 8)) == 0


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_alpha_is_the_slope_of_a_power_law(alpha: float) -> None:
    """Eigenvalues j^-alpha of the covariance give alpha."""
    ranks = torch.arange(1, 21, dtype=torch.float64)
    z = with_spectrum(ranks ** (-alpha / 2), 60, 40, centred=True) + 7
    assert alpha_req(z) == pytest.approx(alpha, abs=1e-6)


def test_alpha_of_less_than_two_directions_is_no_number() -> None:
    """A constant has no eigenvalue and one direction has no slope."""
    assert math.isnan(alpha_req(torch.ones(9, 4)))
    assert math.isnan(alpha_req(with_spectrum(torch.ones(1), 20, 5)))


def test_spread_tells_noise_from_collapse() -> None:
    """Isotropic features have 1, equal ones 0."""
    assert spread(noise(4096, 64)) == pytest.approx(1, abs=0.02)
    assert spread(torch.ones(64, 8)) == pytest.approx(0, abs=1e-6)


def test_dead_dimensions_are_counted() -> None:
    """Constant dimensions are dead, whatever their height; noise is alive."""
    z = noise(100, 10)
    z[:, 2], z[:, 5], z[:, 6] = 0, 3, -1
    assert dead_share(z) == pytest.approx(0.3)
    assert dead_share(noise(100, 10)) == 0
    assert dead_share(torch.full((5, 4), 2.0)) == dead_share(torch.zeros(5, 4)) == 1


def test_alignment_of_equal_opposite_and_unrelated_views() -> None:
    """The squared distances on the sphere are 0, 4 and, on average, 2."""
    z = noise(2000, 16)
    assert alignment(z, 3 * z) == pytest.approx(0, abs=1e-6)
    assert alignment(z, -z) == pytest.approx(4, rel=1e-5)
    assert alignment(z, noise(2000, 16, seed=5)) == pytest.approx(2, abs=0.05)


def test_uniformity_of_known_pairs() -> None:
    """Equal points have 0, two opposite ones -8, and noise in many dimensions -4 + 8/D."""
    assert uniformity(torch.ones(6, 3)) == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(-8, rel=1e-5)
    assert uniformity(noise(1500, 512)) == pytest.approx(-4 + 8 / 512, abs=0.002)


def test_one_embedding_has_neither_spread_nor_uniformity() -> None:
    """A rank may have one row of a batch: its record says NaN there, and the rest."""
    found = embedding_diagnostics(noise(1, 8), noise(1, 4), noise(1, 4, seed=1))
    assert {name for name, value in found.items() if math.isnan(value)} == {
        "spread", "alpha_req", "z_uniformity",
    }  # fmt: skip
    assert math.isnan(uniformity(noise(0, 4)))


@pytest.mark.parametrize(("n", "dim"), [(12, 30), (40, 6)])
def test_correlations_are_those_of_the_whole_matrix(n: int, dim: int) -> None:
    """Mean of the diagonal and RMS of the rest agree with C written out in float64."""
    z1 = noise(n, dim)
    z2 = z1 + noise(n, dim, seed=1)
    a, b = ((z.double() - z.double().mean(0)) / z.double().std(0, correction=0) for z in (z1, z2))
    c = a.T @ b / n
    rest = c[~torch.eye(dim, dtype=torch.bool)]
    diagonal, rms = correlation_summary(z1, z2)
    assert diagonal == pytest.approx(float(c.diagonal().mean()), rel=1e-5)
    assert rms == pytest.approx(float(rest.square().mean().sqrt()), rel=1e-4)


def test_independent_dimensions_reach_the_floor_and_no_less() -> None:
    """The RMS of chance correlations is 1 / sqrt(N)."""
    z = noise(200, 400)
    assert correlation_summary(z, z)[0] == pytest.approx(1, rel=1e-5)
    assert correlation_summary(z, z)[1] == pytest.approx(200**-0.5, rel=0.02)


def test_constant_dimensions_correlate_with_nothing() -> None:
    """They are zero and not infinite; the mean of the diagonal falls by their share."""
    z = noise(30, 4)
    z[:, 0] = 1e4
    assert standardise(z)[:, 0].abs().max() == 0
    assert correlation_summary(z, z)[0] == pytest.approx(0.75, rel=1e-5)
    assert correlation_summary(z[:, :1], z[:, :1]) == (0, 0)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(4, 40),
    dim=st.integers(2, 40),
    log_scale=st.floats(-6, 6),
    seed=st.integers(0, 1000),
)
def test_scale_and_order_do_not_matter(n: int, dim: int, log_scale: float, seed: int) -> None:
    """Every measure is the same for scaled embeddings in another order; RankMe is bounded."""
    z = noise(n, dim, seed) + 0.3
    other = 10**log_scale * z[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    for measure in MEASURES:
        assert measure(other) == pytest.approx(measure(z), rel=1e-3, abs=1e-4)
    assert 1 - 1e-9 <= rankme(z) <= min(n, dim) * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(4, 40), dim=st.integers(2, 40), seed=st.integers(0, 1000))
def test_a_rotation_changes_no_rank_nor_distance(n: int, dim: int, seed: int) -> None:
    """RankMe, alpha, alignment and uniformity are those of any rotation of the space."""
    z1, z2 = noise(n, dim, seed).double(), noise(n, dim, seed + 1).double()
    turn_DD = torch.linalg.qr(noise(dim, dim, seed + 2).double()).Q
    for measure in (rankme, alpha_req, uniformity):
        expected = pytest.approx(measure(z1), rel=1e-4, abs=1e-4, nan_ok=True)
        assert measure(z1 @ turn_DD) == expected
    assert alignment(z1 @ turn_DD, z2 @ turn_DD) == pytest.approx(alignment(z1, z2), rel=1e-4)


def test_a_batch_is_measured_without_a_trace() -> None:
    """All names are there, only the first rows count, and nothing is changed or drawn."""
    features, z1, z2 = noise(MAX_ROWS + 9, 6), noise(MAX_ROWS + 9, 12), noise(MAX_ROWS + 9, 12, 3)
    features.requires_grad_()
    before, generator = (features.clone(), z1.clone(), z2.clone()), torch.get_rng_state()
    values = embedding_diagnostics(features.bfloat16(), z1, z2)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(before, (features, z1, z2), strict=True))
    assert list(values) == [
        "spread", "rankme", "rankme_limit", "alpha_req", "dead_share",
        "z_rankme", "z_rankme_limit", "z_dead_share", "z_alignment", "z_uniformity",
    ]  # fmt: skip
    assert values["z_rankme"] == rankme(z1[:MAX_ROWS])
    assert values["rankme_limit"] == 6


def test_what_is_not_finite_gives_no_number_and_no_error() -> None:
    """A training that overflows is still logged."""
    z = noise(16, 4)
    z[3, 1] = math.inf
    values = embedding_diagnostics(z, z, z)
    bounds = {"rankme_limit", "z_rankme_limit"}
    assert all(math.isnan(value) for name, value in values.items() if name not in bounds)


def test_a_collections_space_is_measured_alike():
    """What `index.evaluate space` says of stored vectors is what a training's log says of them."""
    z = noise(200, 12)
    z[:, 3] = 0.5
    moments = Moments.none(12)
    moments.add(z.numpy())
    assert entropy_rank(moments.singular_values()) == pytest.approx(rankme(z))
    assert len(moments.dead()) / 12 == pytest.approx(dead_share(z))
    unit = torch.nn.functional.normalize(z)
    assert space_measures.uniformity(unit.numpy()) == pytest.approx(uniformity(z), abs=1e-5)
    other = torch.nn.functional.normalize(noise(200, 12, seed=1))
    assert space_measures.alignment(unit.numpy(), other.numpy()) == pytest.approx(
        alignment(unit, other), rel=1e-5
    )
