import numpy as np
import pytest
from scipy.stats import skew

from index.evaluation.hubness import hubness, neighbour_rows, occurrences


def unit(n, dim, seed=0):
    """Make random unit vectors."""
    vectors = np.random.default_rng(seed).standard_normal((n, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_neighbours_and_occurrences_equal_a_direct_count():
    """Every row's k nearest others by sorting; how often each row is one of them."""
    vectors = unit(60, 6)
    cosines = vectors.astype(np.float64) @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    expected = np.argsort(-cosines, axis=1)[:, :4]
    rows = neighbour_rows(vectors, 4)
    np.testing.assert_array_equal(rows, expected)
    direct = [sum(row in found for found in expected) for row in range(60)]
    assert occurrences(rows).tolist() == direct


def test_of_equal_vectors_none_is_its_own_neighbour():
    """More copies than neighbours: a row need not even be among its own first k + 1."""
    vectors = np.concatenate([np.repeat(unit(1, 5), 6, axis=0), unit(4, 5, seed=1)])
    rows = neighbour_rows(vectors, 2)
    assert rows.shape == (10, 2)
    assert (rows != np.arange(10)[:, None]).all()
    assert (rows[:6] < 6).all()


def test_neighbours_that_do_not_exist_are_nobodys():
    """Three images have two others each."""
    rows = neighbour_rows(unit(3, 4), 5)
    assert (rows >= 0).sum(axis=1).tolist() == [2, 2, 2]
    assert occurrences(rows).tolist() == [2, 2, 2]


def test_the_summary_is_that_of_its_source():
    """Skewness as scipy has it, anti-hubs and hubs by their definitions."""
    counts = np.array([0, 0, 1, 2, 2, 3, 3, 4, 5, 30])
    found = hubness(counts, 5)
    assert found.skewness == pytest.approx(skew(counts))
    assert (found.anti_hubs, found.hubs, found.largest) == (0.2, 0.1, 30)
    assert found.held_by_hubs == pytest.approx(30 / 50)
    assert hubness(np.full(8, 3), 3).skewness is None


def test_a_point_in_the_middle_is_a_hub():
    """Ten orthogonal directions and their mean, which is the nearest of them all."""
    vectors = np.concatenate([np.eye(10), np.full((1, 10), 10**-0.5)]).astype(np.float32)
    counts = occurrences(neighbour_rows(vectors, 1))
    assert counts[10] == 10
    assert hubness(counts, 1).skewness > 2
