import math

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from index.evaluation.retrieval_scores import MEASURES, retrieval_scores


def direct(relevant, n_relevant):
    """Every measure of one ranking by the words of its source, a place at a time."""

    def precision(k):
        return sum(relevant[:k]) / k

    average = sum(precision(i) for i in range(1, n_relevant + 1) if relevant[i - 1]) / n_relevant
    gain = sum(1 / math.log2(i + 1) for i in range(1, 11) if relevant[i - 1])
    ideal = sum(1 / math.log2(i + 1) for i in range(1, min(n_relevant, 10) + 1))
    return {
        "P@1": precision(1),
        "P@5": precision(5),
        "P@10": precision(10),
        "mAP@R": average,
        "R-precision": precision(n_relevant),
        "recall@1": float(any(relevant[:1])),
        "recall@5": float(any(relevant[:5])),
        "recall@10": float(any(relevant[:10])),
        "nDCG@10": gain / ideal,
    }


@pytest.fixture(scope="module")
def rankings():
    """200 rankings of 60 places, with 1 to 40 relevant images, some of them beyond the 60."""
    rng = np.random.default_rng(0)
    n_relevant = rng.integers(1, 41, 200)
    relevant = np.zeros((200, 60), bool)
    for row, n in zip(relevant, n_relevant, strict=True):
        row[rng.choice(60, rng.integers(0, n + 1), replace=False)] = True
    return relevant, n_relevant


def test_every_measure_is_that_of_its_source(rankings):
    """All of them against a direct computation, ranking by ranking."""
    relevant, n_relevant = rankings
    found = retrieval_scores(relevant, n_relevant)
    for row, ranking, n in zip(found, relevant, n_relevant, strict=True):
        assert dict(zip(MEASURES, row, strict=True)) == pytest.approx(direct(ranking, n))


def test_ndcg_is_that_of_scikit_learn(rankings):
    """Where every relevant image is somewhere in the ranking, which theirs takes for granted."""
    relevant, _ = rankings
    relevant = relevant[relevant.any(axis=1)]
    ours = retrieval_scores(relevant, relevant.sum(axis=1))[:, MEASURES.index("nDCG@10")]
    falling = np.arange(60, 0, -1)[None]
    theirs = [ndcg_score(row[None].astype(float), falling, k=10) for row in relevant]
    np.testing.assert_allclose(ours, theirs)


def test_order_among_the_first_r_counts():
    """R-precision cannot tell two rankings apart, mAP@R does: what it is for."""
    relevant = np.zeros((3, 10), bool)
    relevant[0, 0] = True  # one right of ten, at the first place
    relevant[1, [0, 9]] = True
    relevant[2, :2] = True
    scores = retrieval_scores(relevant, np.array([10, 10, 10]))
    r_precision, map_at_r = (scores[:, MEASURES.index(name)] for name in ("R-precision", "mAP@R"))
    np.testing.assert_allclose(r_precision, [0.1, 0.2, 0.2])
    np.testing.assert_allclose(map_at_r, [0.1, 0.12, 0.2])


def test_ideal_rankings_and_empty_ones_are_the_ends():
    """1 everywhere but for P@5 and P@10 of three relevant images; 0 everywhere."""
    relevant = np.zeros((2, 10), bool)
    relevant[0, :3] = True
    best, worst = retrieval_scores(relevant, np.array([3, 3]))
    assert dict(zip(MEASURES, best, strict=True)) == pytest.approx(
        dict.fromkeys(MEASURES, 1.0) | {"P@5": 0.6, "P@10": 0.3}
    )
    assert worst.tolist() == [0.0] * len(MEASURES)
