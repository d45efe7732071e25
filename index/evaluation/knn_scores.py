"""From neighbours and labels to accuracies, a per-class table and a confusion matrix.

Rules:
    A class without a vote is no prediction: at k = 1 there is one guess, and top-5 is top-1.
    Of classes with equal scores the first in the list of classes wins.
    A query whose class the collection does not have is wrong, whatever is predicted.

Shapes: Q queries, K neighbours, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from index.knn import weighted_knn_vote

BLOCK_BYTES = 64 << 20
"""Of the votes for every class of as many queries as are counted at once."""

UNKNOWN = -1
"""Class number of what has no label, or a label that the collection does not have."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Shares of the queries, 0 to 1.

    Attributes:
        top1: whose true class has the most votes.
        top5: whose true class is among the five with the most votes.
    """

    top1: float
    top5: float


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """How the queries of one class fared.

    Attributes:
        label: the class.
        n: its queries.
        accuracy: share of them predicted right, 0 to 1; None where there are none.
        confused_with: the class that most of the others were taken for; None if none was.
        n_confused: how many.
    """

    label: str
    n: int
    accuracy: float | None
    confused_with: str | None
    n_confused: int


def number_labels(labels: Sequence[str | None], classes: Sequence[str]) -> NDArray[np.int64]:
    """Turn labels into class numbers; `UNKNOWN` for None and for what is no class."""
    numbers = {label: number for number, label in enumerate(classes)}
    found = [UNKNOWN if label is None else numbers.get(label, UNKNOWN) for label in labels]
    return np.array(found, dtype=np.int64)


def truth_ranks(scores_QC: NDArray[np.float32], truth_Q: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give the place of each query's true class, 0 for the best; C where it has no vote."""
    n_classes = scores_QC.shape[1]
    true_scores = scores_QC[np.arange(len(truth_Q)), np.maximum(truth_Q, 0)][:, None]
    before = scores_QC > true_scores
    before |= (scores_QC == true_scores) & (np.arange(n_classes) < truth_Q[:, None])
    ranks: NDArray[np.int64] = before.sum(axis=1)
    ranks[(truth_Q < 0) | (true_scores[:, 0] <= 0)] = n_classes
    return ranks


def vote(
    similarities_QK: NDArray[np.float32],
    labels_QK: NDArray[np.int64],
    *,
    k: int,
    temperature: float,
    n_classes: int,
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Give the weighted votes, (B, C), of a block of queries at a time: Q x C need not fit."""
    step = max(1, BLOCK_BYTES // (8 * n_classes))
    for start in range(0, len(labels_QK), step):
        rows = slice(start, start + step)
        yield rows, weighted_knn_vote(
            similarities_QK[rows], labels_QK[rows], k=k, temperature=temperature,
            n_classes=n_classes,
        )  # fmt: skip


def accuracies(
    similarities_QK: NDArray[np.float32],
    labels_QK: NDArray[np.int64],
    truth_Q: NDArray[np.int64],
    *,
    ks: Sequence[int],
    temperature: float,
    n_classes: int,
) -> dict[int, Accuracy]:
    """Score the weighted vote for each k."""
    found = {}
    for k in ks:
        blocks = vote(similarities_QK, labels_QK, k=k, temperature=temperature, n_classes=n_classes)
        ranks_Q = np.concatenate(
            [truth_ranks(votes_BC, truth_Q[rows]) for rows, votes_BC in blocks]
        )
        found[k] = Accuracy(
            top1=float(((ranks_Q < 1) & (ranks_Q < n_classes)).mean()),
            top5=float(((ranks_Q < 5) & (ranks_Q < n_classes)).mean()),
        )
    return found


def confusion_matrix(
    truth_Q: NDArray[np.int64], predicted_Q: NDArray[np.int64], n_classes: int
) -> NDArray[np.int64]:
    """Count (true class, predicted class) pairs: (C, C).

    Queries of no class are left out, and so are those that no class was predicted for.
    """
    known = (truth_Q >= 0) & (predicted_Q >= 0)
    cells = truth_Q[known] * n_classes + predicted_Q[known]
    return np.bincount(cells, minlength=n_classes**2).reshape(n_classes, n_classes)


def class_scores(
    truth_Q: NDArray[np.int64], predicted_Q: NDArray[np.int64], classes: Sequence[str]
) -> list[ClassScore]:
    """Give each class's accuracy and worst confusion, the first of those that are as bad.

    Args:
        truth_Q: class number of each query; below 0 for those of no class, which are left out.
        predicted_Q: what was predicted; below 0 for nothing, which is wrong.
        classes: labels, by their numbers.
    """
    n_classes = len(classes)
    is_right_Q = truth_Q == predicted_Q
    counts_C = np.bincount(truth_Q[truth_Q >= 0], minlength=n_classes)
    right_C = np.bincount(truth_Q[is_right_Q & (truth_Q >= 0)], minlength=n_classes)
    is_confused_Q = ~is_right_Q & (truth_Q >= 0) & (predicted_Q >= 0)
    cells = truth_Q[is_confused_Q] * n_classes + predicted_Q[is_confused_Q]
    worst: dict[int, tuple[int, str | None]] = {}
    for cell, n_confused in zip(*np.unique(cells, return_counts=True), strict=True):
        true, predicted = divmod(int(cell), n_classes)
        if n_confused > worst.get(true, (0, None))[0]:
            worst[true] = int(n_confused), classes[predicted]
    scores = []
    for number, label in enumerate(classes):
        n, (n_confused, confused_with) = int(counts_C[number]), worst.get(number, (0, None))
        scores.append(
            ClassScore(
                label=label,
                n=n,
                accuracy=float(right_C[number] / n) if n else None,
                confused_with=confused_with,
                n_confused=n_confused,
            )
        )
    return scores
