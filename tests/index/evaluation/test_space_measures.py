import math

import numpy as np
import pytest

from index.evaluation import space_measures
from index.evaluation.space_measures import (
    ClassSums,
    Moments,
    alignment,
    entropy_rank,
    uniformity,
)


def moments_of(vectors, n_blocks=3):
    """Add vectors up in blocks."""
    moments = Moments.none(vectors.shape[1])
    for block in np.array_split(vectors, n_blocks):
        moments.add(block)
    return moments


@pytest.mark.parametrize("shape", [(200, 12), (7, 12)])
def test_singular_values_are_those_of_the_matrix(shape):
    """Summed in blocks; min(N, D) of them, more dimensions than vectors or not."""
    vectors = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = np.linalg.svd(vectors.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(moments_of(vectors).singular_values(), expected, rtol=1e-6)


def test_rankme_counts_directions():
    """K orthogonal directions of equal weight are k; a constant is one; nothing is none."""
    eye = np.repeat(np.eye(5, 9, dtype=np.float32), 4, axis=0)
    assert entropy_rank(moments_of(eye).singular_values()) == pytest.approx(5)
    constant = np.ones((6, 9), np.float32)
    assert entropy_rank(moments_of(constant).singular_values()) == pytest.approx(1)
    assert entropy_rank(np.zeros(3)) == 0.0
    assert math.isnan(entropy_rank(np.array([1.0, np.nan])))


def test_rankme_is_the_formula_of_its_paper():
    """Exp of the entropy of the normalised singular values, term by term."""
    sigma = np.array([3.0, 2.0, 1.0, 0.5])
    shares = [value / 6.5 for value in sigma]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert entropy_rank(sigma) == pytest.approx(expected)


def test_dead_dimensions_are_named():
    """A constant one is dead, whatever its value; one that varies a little is not."""
    vectors = np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32)
    vectors[:, 1], vectors[:, 4] = 0.0, 0.7
    vectors[:, 2] *= 0.01
    moments = moments_of(vectors)
    assert moments.dead().tolist() == [1, 4]
    np.testing.assert_allclose(
        moments.deviations(), vectors.std(axis=0, dtype=np.float64), atol=1e-6
    )


def test_alignment_by_class_is_the_mean_over_pairs():
    """Against every pair by itself; what has no label is in no pair, nor is a class of one."""
    vectors = np.random.default_rng(1).standard_normal((40, 5))
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    classes = np.random.default_rng(2).integers(-1, 3, 40)
    classes[7] = 3
    sums = ClassSums.none(5, 5)
    for rows in np.array_split(np.arange(40), 4):
        sums.add(unit[rows], classes[rows])
    pairs = [
        float(((unit[a] - unit[b]) ** 2).sum())
        for a in range(40)
        for b in range(a)
        if classes[a] == classes[b] >= 0
    ]
    assert sums.alignment() == pytest.approx(np.mean(pairs))
    none = ClassSums.none(2, 5)
    none.add(unit, np.full(40, -1))
    assert none.alignment() is None


def test_uniformity_is_the_formula_of_its_paper(monkeypatch):
    """Log of the mean of exp(-2 d^2) over all pairs, in blocks that do not divide them."""
    monkeypatch.setattr(space_measures, "UNIFORMITY_BLOCK", 7)
    vectors = np.random.default_rng(3).standard_normal((25, 4))
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    kernel = [
        math.exp(-2 * float(((unit[a] - unit[b]) ** 2).sum())) for a in range(25) for b in range(a)
    ]
    assert uniformity(unit) == pytest.approx(math.log(np.mean(kernel)), abs=1e-6)
    assert uniformity(np.repeat(unit[:1], 9, axis=0)) == pytest.approx(0, abs=1e-5)
    assert uniformity(unit[:1]) is None
    zeros = np.zeros((9, 4), np.float32)
    assert uniformity(zeros) is None
    assert uniformity(np.concatenate([unit, zeros])) == pytest.approx(uniformity(unit))


def test_alignment_of_views():
    """0 for the same, 2 for orthogonal ones, 4 for opposites."""
    eye = np.eye(3, dtype=np.float32)
    assert [alignment(eye, other) for other in (eye, eye[[1, 2, 0]], -eye)] == [0, 2, 4]
