import numpy as np

from index.evaluation.knn_scores import (
    ClassScore,
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
    assert class_scores(confusion, ["a", "b", "c"], np.array([3, 2, 0])) == [
        ClassScore(label="a", n=3, accuracy=1 / 3, confused_with="b", n_confused=2),
        ClassScore(label="b", n=2, accuracy=0.5, confused_with=None, n_confused=0),
        ClassScore(label="c", n=0, accuracy=None, confused_with=None, n_confused=0),
    ]
