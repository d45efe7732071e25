import tracemalloc

import numpy as np

from index.evaluation import knn_scores
from index.evaluation.knn_scores import (
    ClassScore,
    accuracies,
    class_scores,
    confusion_matrix,
    number_labels,
    truth_ranks,
)


def test_ranks_count_the_classes_before_the_true_one():
    """Equal scores go to the first class; no vote and no such class are last."""
    scores = np.array([[3, 1, 2], [2, 2, 1], [2, 2, 1], [1, 0, 0], [1, 1, 1]], np.float32)
    truth = np.array([2, 0, 1, 2, -1])
    assert truth_ranks(scores, truth).tolist() == [1, 0, 1, 3, 3]


def test_labels_become_numbers():
    """None and foreign labels are -1; an empty label is a label."""
    assert number_labels(["b", None, "", "z"], ["", "a", "b"]).tolist() == [2, -1, 0, -1]


def test_confusion_and_its_reading():
    """Rows are true classes; the worst confusion of each is named; without a vote is wrong."""
    truth, predicted = np.array([0, 0, 0, 1, -1, 1]), np.array([0, 1, 1, 1, 0, -1])
    confusion = confusion_matrix(truth, predicted, 3)
    assert confusion.tolist() == [[1, 2, 0], [0, 1, 0], [0, 0, 0]]
    assert class_scores(truth, predicted, ["a", "b", "c"]) == [
        ClassScore(label="a", n=3, accuracy=1 / 3, confused_with="b", n_confused=2),
        ClassScore(label="b", n=2, accuracy=0.5, confused_with=None, n_confused=0),
        ClassScore(label="c", n=0, accuracy=None, confused_with=None, n_confused=0),
    ]


def test_classes_are_scored_as_a_confusion_matrix_is_read():
    """The first of the classes that are confused as often is named."""
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(-1, 7, 90), rng.integers(-1, 7, 90)
    confusion = confusion_matrix(truth, predicted, 7)
    right = np.diag(confusion).copy()
    np.fill_diagonal(confusion, 0)
    found = class_scores(truth, predicted, [*"abcdefg"])
    assert [one.n_confused for one in found] == confusion.max(axis=1).tolist()
    assert [one.confused_with for one in found] == ["abcdefg"[n] for n in confusion.argmax(axis=1)]
    counts = [(truth == n).sum() for n in range(7)]
    assert [one.accuracy for one in found] == (right / counts).tolist()


def test_scores_of_many_classes_take_no_square_of_memory():
    """Which would be 128 MB of 4,000."""
    classes = [str(n) for n in range(4000)]
    truth = np.arange(4000)
    tracemalloc.start()
    found = class_scores(truth, np.roll(truth, 1), classes)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found[0].confused_with, found[0].n_confused) == ("3999", 1)
    assert peak_bytes < 8 << 20


def test_votes_of_many_queries_and_classes_take_no_product_of_memory(monkeypatch):
    """They are counted a block of queries at a time, to the same accuracies."""
    rng = np.random.default_rng(0)
    labels, truth = rng.integers(-1, 2000, (500, 8)), rng.integers(0, 2000, 500)
    truth[::3] = labels[::3, 3]
    similarities = -np.sort(rng.random((500, 8), np.float32), axis=1)

    def measure():
        tracemalloc.start()
        found = accuracies(similarities, labels, truth, ks=(1, 8), temperature=0.07, n_classes=2000)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return found, peak_bytes

    whole, whole_bytes = measure()
    monkeypatch.setattr(knn_scores, "BLOCK_BYTES", 8 * 2000 * 30)
    found, peak_bytes = measure()
    assert found == whole
    assert found[8].top5 > found[1].top5
    assert peak_bytes < whole_bytes / 8
