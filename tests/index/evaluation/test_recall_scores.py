import numpy as np
import pytest

from index.collection import Collection, Neighbours
from index.evaluation import recall_scores
from index.evaluation.recall_scores import exact_scores, recall_by_score, worst_mean


@pytest.fixture
def collection(tmp_path, make_collection):
    """Six unit vectors in the plane; rows 2 and 3 are the same."""
    angles = np.deg2rad([0, 10, 20, 20, 40, 90])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    with Collection.open(make_collection(tmp_path / "c", vectors)) as opened:
        yield opened


QUERY = np.array([[1, 0]], np.float32)


def neighbours(collection, *places):
    """Give found images by their places; -1 for padding. Their scores are lies."""
    ids = np.append(collection.ids, -1)[list(places)]
    return Neighbours(ids=ids[None], scores=np.full((1, len(places)), 9.0, np.float32))


@pytest.mark.parametrize(
    ("places", "k", "recall"),
    [
        ((0, 1, 2), 3, 1.0),
        ((0, 1, 3), 3, 1.0),  # as near as row 2, which the exact search named
        ((3, 2, 0), 3, 1.0),  # in any order
        ((0, 1, 4), 3, 2 / 3),
        ((0, 0, 0), 3, 1 / 3),  # one image
        ((0, -1, -1), 3, 1 / 3),
        ((0, 1, 2, 3), 2, 1.0),
        ((5, 4, 3), 1, 0.0),
    ],
)
def test_what_is_as_near_is_found(collection, places, k, recall):
    """Ties at the last place count, repetitions and padding do not, reported scores neither."""
    exact = collection.search(QUERY, 5, fingerprint=collection.fingerprint, exact=True)
    found = recall_by_score(collection, QUERY, neighbours(collection, *places), exact, k)
    assert found.tolist() == pytest.approx([recall])


def test_only_what_exists_is_asked_for(collection):
    """Two that a filter left, of ten asked for; and nothing at all."""
    exact = neighbours(collection, 0, 1, -1, -1)
    exact.scores[0] = [1.0, np.cos(np.deg2rad(10)), -np.inf, -np.inf]
    assert recall_by_score(collection, QUERY, neighbours(collection, 1, 0), exact, 4)[0] == 1.0
    assert recall_by_score(collection, QUERY, neighbours(collection, 0, -1), exact, 4)[0] == 0.5
    nothing = Neighbours(ids=np.full((1, 2), -1), scores=np.full((1, 2), -np.inf, np.float32))
    assert recall_by_score(collection, QUERY, nothing, nothing, 2)[0] == 1.0


def test_scores_are_made_of_stored_vectors(collection, monkeypatch):
    """In blocks of one query; padding stays -inf."""
    monkeypatch.setattr(recall_scores, "BLOCK_BYTES", 1)
    queries = np.array([[1, 0], [0, 1]], np.float32)
    ids = np.append(collection.ids, -1)[[[0, 4, -1], [5, -1, 1]]]
    found = exact_scores(collection, queries, ids)
    expected = [[1, np.cos(np.deg2rad(40)), -np.inf], [1, -np.inf, np.sin(np.deg2rad(10))]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_worst_twentieth_is_at_least_one_query():
    """Of forty queries the worst two; of three the worst one."""
    assert worst_mean(np.array([0.0, 0.5, *[1.0] * 38])) == 0.25
    assert worst_mean(np.array([1.0, 0.5, 0.75])) == 0.5
