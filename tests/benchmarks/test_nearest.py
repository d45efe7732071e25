import numpy as np
import pytest

from benchmarks.nearest.tasks import K, distances, make_task
from benchmarks.nearest.tuned import FINGERPRINT, path_costs, tune_collection, write_collection
from index.collection import Collection


@pytest.fixture(scope="module")
def task():
    """3,000 vectors of whole numbers as large as raw pixels, and queries among them."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (3050, 24)).astype(np.float32)
    return make_task("pixels", "euclidean", pixels[:3000], pixels[3000:])


def nearest(task, k=K):
    """Sort all distances in float64."""
    off = task.vectors_ND[None].astype(np.float64) - task.queries_QD[:, None]
    return np.argsort((off**2).sum(axis=2), axis=1, kind="stable")[:, :k]


def test_true_neighbours_have_a_recall_of_one_and_others_none(task):
    """Recall is the share of the true neighbours that were found; what is missing counts not."""
    rows = nearest(task, 2 * K)
    assert task.recall(rows[:, :K]) == 1.0
    assert task.recall(rows[:, K:]) == 0.0
    half = rows[:, :K].copy()
    half[:, K // 2 :] = -1
    assert task.recall(half) == 0.5


def test_any_of_equally_near_rows_will_do():
    """A copy of the k-th neighbour is as good as the k-th neighbour."""
    vectors = np.repeat(np.arange(12, dtype=np.float32), 2)[:, None]
    task = make_task("pixels", "euclidean", vectors, np.zeros((1, 1), np.float32))
    assert task.recall(np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])) == 1.0
    assert task.recall(np.array([[1, 0, 3, 2, 5, 4, 7, 6, 9, 8]])) == 1.0
    assert task.recall(np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 10]])) == 0.9


def test_distances_of_cosine_are_one_less_the_product():
    """Unit vectors: 0 where they are the same, 1 where they have nothing in common."""
    rows = np.array([[0, 1, -1]])
    found = distances("cosine", np.eye(2, dtype=np.float32)[:1], np.eye(2, dtype=np.float32), rows)
    assert found.tolist() == [[0.0, 1.0, np.inf]]


def test_a_tuned_collection_holds_on_queries_that_no_one_saw(task, tmp_path):
    """What index.tune took for .9 finds .9 of the test's neighbours; the rows keep their order."""
    write_collection(tmp_path / "c", task)
    tuned = tune_collection(tmp_path / "c", tmp_path / "t", 0.9, kinds=["IVF16,PQ12x4fs,RFlat"])
    assert tuned is not None
    with tuned.collection as collection:
        assert np.array_equal(collection.vectors(collection.ids), task.vectors_ND)
        found = collection.search(task.queries_QD, K, fingerprint=FINGERPRINT)
        assert task.recall(collection.row_numbers(found.ids)) >= 0.9
        costs = path_costs(collection, task.queries_QD, 1)
    assert list(costs["whole"])[-1] == list(costs["bare"])[-1] == "Collection.search"
    with Collection.open(tmp_path / "c") as untouched:
        assert untouched.factory == "Flat"
