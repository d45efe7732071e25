import logging

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from index.curation.choosing import METHODS, Pool, choose_k_centre, choose_typical
from index.curation.smoothing import neighbours_for, smooth
from index.curation.softmax_probe import fit_probe
from models.errors import UsageError


def crowds(unit_rows, sizes, *, spread=0.3):
    """Crowds of unit vectors of these sizes, each around an axis of its own."""
    crowd = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.eye(16, dtype=np.float32)[crowd] + spread * unit_rows(len(crowd), 16)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), crowd


def pool_of(vectors, classes=None, taken=()):
    """A pool whose ids are 1000 and up; what has a class is taken, and `taken` beside it."""
    classes = np.full(len(vectors), -1) if classes is None else np.array(classes)
    is_taken = classes >= 0
    is_taken[list(taken)] = True
    ids = 1000 + np.arange(len(vectors))
    return Pool(vectors_ND=vectors, is_taken_N=is_taken, classes_N=classes, ids_N=ids)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_chosen_twice_or_again(unit_rows, method):
    """And a seed chooses the same; a budget beyond the pool takes all of it."""
    vectors, crowd = crowds(unit_rows, [30, 30])
    classes = np.where(np.arange(60) % 5 == 0, crowd, -1)
    pool = pool_of(vectors, classes, taken=[1, 2])
    free = set((1000 + np.flatnonzero(~pool.is_taken_N)).tolist())
    chosen = METHODS[method](pool, 20, 3).ids_B.tolist()
    assert len(chosen) == len(set(chosen)) == 20
    assert set(chosen) <= free
    assert METHODS[method](pool, 20, 3).ids_B.tolist() == chosen
    assert set(METHODS[method](pool, 500, 0).ids_B.tolist()) == free


@pytest.mark.parametrize("method", ["kcentre", "typicality"])
def test_progress_comes_to_an_end(unit_rows, caplog, method):
    """Also of a budget beyond the pool."""
    with caplog.at_level(logging.INFO, "horace"):
        METHODS[method](pool_of(unit_rows(9, 8)), 500, 0)
    assert "choosing 9/9 images" in caplog.text


def test_k_centre_goes_to_the_farthest(unit_rows):
    """Against the definition, step by step; distances only fall."""
    vectors = unit_rows(50, 8)
    choice = choose_k_centre(pool_of(vectors, taken=[4, 9]), 10, 0)
    centres = [4, 9]
    for id_, score in zip(choice.ids_B, choice.scores_B, strict=True):
        distances = np.linalg.norm(vectors[:, None] - vectors[centres], axis=2).min(axis=1)
        assert distances[id_ - 1000] == pytest.approx(distances.max(), abs=1e-5)
        assert score == pytest.approx(distances.max(), abs=1e-3)
        centres.append(id_ - 1000)
    assert (np.diff(choice.scores_B) <= 1e-6).all()


def test_k_centre_far_from_the_origin(unit_rows):
    """Chooses what it chooses near it, though float32 has no room for squares there."""
    vectors = unit_rows(50, 8)
    far = vectors + np.float32(3000)
    near, moved = (choose_k_centre(pool_of(x, taken=[4, 9]), 10, 0) for x in (far - 3000, far))
    assert moved.ids_B.tolist() == near.ids_B.tolist()
    np.testing.assert_allclose(moved.scores_B, near.scores_B, atol=1e-3)


def test_any_seed_is_one_for_clusters(unit_rows):
    """Also one that is no int of C."""
    choice = choose_typical(pool_of(unit_rows(30, 8)), 3, 3_000_000_000)
    assert len(set(choice.ids_B.tolist())) == 3


def test_typicality_covers_every_crowd_and_shuns_the_stray(unit_rows):
    """One of each crowd, from its middle; what is covered already comes last."""
    vectors, crowd = crowds(unit_rows, [60, 40, 20, 1])
    choice = choose_typical(pool_of(vectors), 3, 0)
    assert sorted(crowd[choice.ids_B - 1000]) == [0, 1, 2]
    nearness = (vectors * np.eye(16)[crowd]).sum(axis=1)
    for id_ in choice.ids_B:
        own = nearness[crowd == crowd[id_ - 1000]]
        assert nearness[id_ - 1000] > np.median(own)
    covered = pool_of(vectors, np.where(np.arange(121) < 3, 0, -1))
    assert crowd[choose_typical(covered, 1, 0).ids_B[0] - 1000] != 0


@pytest.mark.parametrize("method", ["margin", "entropy"])
def test_a_probe_asks_for_what_lies_between(unit_rows, method):
    """Halfway between two labelled crowds."""
    vectors, crowd = crowds(unit_rows, [20, 20], spread=0.1)
    halfway = np.zeros((1, 16), np.float32)
    halfway[0, :2] = np.sqrt(0.5)
    classes = np.append(np.where(np.arange(40) % 2, crowd, -1), -1)
    choice = METHODS[method](pool_of(np.concatenate([vectors, halfway]), classes), 1, 0)
    assert choice.ids_B.tolist() == [1040]
    with pytest.raises(UsageError, match=r"of at least 2 classes, found 1; begin with --method"):
        METHODS[method](pool_of(vectors, np.where(np.arange(40) == 0, 0, -1)), 1, 0)


@pytest.mark.parametrize("strength", [1.0, 100.0])
def test_the_probe_is_logistic_regression(unit_rows, strength):
    """The probabilities of scikit-learn's, with as many images as dimensions and with more."""
    vectors, crowd = crowds(unit_rows, [30, 20, 10], spread=1.5)
    for rows in (np.arange(0, 60, 4), np.arange(60)):
        probe = fit_probe(vectors[rows], crowd[rows], 3, strength=strength)
        peer = LogisticRegression(C=strength, tol=1e-8, max_iter=5000)
        peer.fit(vectors[rows].astype(float), crowd[rows])
        np.testing.assert_allclose(
            probe.probabilities(vectors), peer.predict_proba(vectors), atol=0.01
        )


def test_smoothing_is_the_mean_of_a_neighbourhood():
    """Round after round; what is nobody's neighbour changes nobody."""
    vectors = np.array([[0, 0], [3, 0], [0, 6], [9, 9]], np.float32)
    places = np.array([[1, 2], [0, -1], [0, -1], [1, -1]])
    once = smooth(vectors, places, 1, unit=False)
    np.testing.assert_allclose(once, [[1, 2], [1.5, 0], [0, 3], [6, 4.5]])
    np.testing.assert_allclose(
        smooth(once, places, 2, unit=False), smooth(vectors, places, 3, unit=False)
    )
    alone = smooth(vectors[:3], places[:3], 5, unit=False)
    np.testing.assert_allclose(smooth(vectors, places, 5, unit=False)[:3], alone)
    lengths = np.linalg.norm(smooth(vectors, places, 2, unit=True), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)
    np.testing.assert_array_equal(smooth(vectors, places, 0, unit=True), vectors)


def test_of_few_images_few_are_neighbours():
    """Were everybody a neighbour, all averages would be one."""
    assert [neighbours_for(count) for count in (2, 13, 100, 60_000)] == [2, 2, 5, 15]
