import tracemalloc

import numpy as np
import pytest
from scipy.spatial import procrustes
from scipy.stats import ortho_group

from index.evaluation.drift import PairMoments, neighbour_overlap


@pytest.fixture
def pair():
    """60 vectors in 7 dimensions, and what a noisy linear map makes of them in 5."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((60, 7)) + 3
    second = first @ rng.standard_normal((7, 5)) + 0.5 * rng.standard_normal((60, 5))
    return first.astype(np.float32), second.astype(np.float32)


def moments_of(first, second):
    """Add pairs up in blocks."""
    moments = PairMoments.none(first.shape[1], second.shape[1])
    for rows in np.array_split(np.arange(len(first)), 4):
        moments.add(first[rows], second[rows])
    return moments


def test_cka_is_the_formula_of_its_paper(pair):
    """By centred N x N Gram matrices: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))."""
    kernels = []
    for vectors in pair:
        centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
        kernels.append(centred @ centred.T)
    k, other = kernels
    expected = (k * other).sum() / np.sqrt((k * k).sum() * (other * other).sum())
    assert moments_of(*pair).linear_cka() == pytest.approx(expected)


def test_the_procrustes_residual_is_scipys(pair):
    """Its disparity, the shorter vectors padded with zeros."""
    first, second = pair
    padded = np.pad(second, ((0, 0), (0, 2)))
    expected = procrustes(first.astype(np.float64), padded.astype(np.float64))[2]
    assert moments_of(first, second).procrustes_residual() == pytest.approx(expected)


def test_turning_scaling_and_moving_change_nothing(pair):
    """A space beside itself, turned: alike in both measures, and in its neighbours' too."""
    first, _ = pair
    turned = (2.5 * first @ ortho_group.rvs(7, random_state=0) - 4).astype(np.float32)
    moments = moments_of(first, turned)
    assert moments.linear_cka() == pytest.approx(1, abs=1e-5)
    assert moments.procrustes_residual() == pytest.approx(0, abs=1e-5)


def test_unrelated_spaces_have_little_in_common():
    """2,000 independent vectors."""
    rng = np.random.default_rng(1)
    moments = moments_of(*rng.standard_normal((2, 2000, 6)).astype(np.float32))
    assert moments.linear_cka() < 0.01
    assert moments.procrustes_residual() > 0.9


def test_a_space_that_does_not_vary_has_no_measure(pair):
    """Nothing to compare with, also where one vector's sums are rounded."""
    for vector in (np.zeros(3), np.full(3, 0.1), np.array([0.3, -7.1, 1e-3])):
        moments = moments_of(pair[0], np.tile(vector, (60, 1)).astype(np.float32))
        assert (moments.linear_cka(), moments.procrustes_residual()) == (None, None)


def test_overlap_counts_shared_neighbours_in_any_order():
    """Of those that exist."""
    first = np.array([[1, 2, 3], [4, 5, -1], [7, 8, 9]])
    second = np.array([[3, 1, 6], [5, 4, -1], [1, 2, 3]])
    np.testing.assert_allclose(neighbour_overlap(first, second), [2 / 3, 1, 0])


def test_overlap_of_many_neighbours_takes_no_square_of_memory():
    """A hundred images with a thousand each: what the lists take, not a thousand times that."""
    lists = np.random.default_rng(0).permuted(np.tile(np.arange(2000), (100, 1)), axis=1)
    tracemalloc.start()
    shared = neighbour_overlap(lists[:, :1000], lists[:, 500:1500])
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_allclose(shared, 0.5)
    assert peak_bytes < 8 * lists.nbytes
