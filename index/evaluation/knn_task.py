"""What a kNN evaluation is measured on: classes, the labels that vote, and the truth.

It brings the labels of two sources together and says, in words for people, what was left
out and what cannot be right.

Shapes: N rows of the collection, Q queries, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from index.collection import Collection
from index.errors import EvaluationError
from index.evaluation.baselines import Seen
from index.evaluation.knn_scores import Accuracy, accuracies, number_labels
from index.evaluation.queries import require_readable, unread_notes
from index.knn import MISSING
from models.command import counted, shown


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every row of the report is measured on.

    Attributes:
        classes: labels of the collection, sorted.
        bank_N: class number of every row of the collection.
        truth_Q: class number of every query.
        ks: numbers of neighbours, rising.
        temperature: of the vote.
    """

    classes: list[str]
    bank_N: NDArray[np.int64]
    truth_Q: NDArray[np.int64]
    ks: tuple[int, ...]
    temperature: float

    def score(
        self,
        similarities_QK: NDArray[np.float32],
        rows_QK: NDArray[np.int64],
        ks: tuple[int, ...] | None = None,
    ) -> dict[int, Accuracy]:
        """Score neighbours, given as rows of the collection, for some k or for all."""
        return accuracies(
            similarities_QK,
            self.labels_of(rows_QK),
            self.truth_Q,
            ks=ks or self.ks,
            temperature=self.temperature,
            n_classes=len(self.classes),
        )

    def labels_of(self, rows_QK: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the class numbers of rows of the collection; -1 stays -1."""
        return np.append(self.bank_N, MISSING)[rows_QK]


def make_task(
    collection: Collection,
    queries: Seen,
    *,
    images: str,
    ks: tuple[int, ...],
    temperature: float,
) -> tuple[Task, Seen, list[str]]:
    """Bring labels together.

    Args:
        collection: whose labels vote.
        queries: every image that was seen.
        images: the queries' source, as people named it.
        ks: numbers of neighbours, rising.
        temperature: of the vote.

    Returns:
        The task, the queries that count, and notes for people.

    Raises:
        EvaluationError: no query can be read, there are no labels, or none in common.
    """
    require_readable(f"--images {images}", queries)
    bank_labels = collection.labels()
    classes = sorted({label for label in bank_labels if label is not None})
    labels = sorted({label for label in queries.labels if label is not None})
    _require_labels(f"collection {collection.name}", classes, "build it of labelled images")
    _require_labels(f"--images {images}", labels, "name a labelled source")
    known = set(classes)
    unseen = [label for label in labels if label not in known]
    if len(unseen) == len(labels):
        raise EvaluationError(
            f"labels of --images {images}",
            expected=f"some of the collection's: {_some(classes)}",
            found=_some(labels),
            mend="evaluate with images of the same classes",
        )
    labelled_Q = np.array([label is not None for label in queries.labels])
    bank_N = number_labels(bank_labels, classes)
    query_labels = [label for label in queries.labels if label is not None]
    truth_Q = number_labels(query_labels, classes)
    notes = _label_notes(queries, labelled_Q, bank_N, truth_Q, classes, unseen)
    if ks[-1] > collection.count:
        notes.append(f"k above {collection.count} takes all {collection.count} images")
    task = Task(classes=classes, bank_N=bank_N, truth_Q=truth_Q, ks=ks, temperature=temperature)
    return task, queries.pick(np.flatnonzero(labelled_Q)), notes


def _label_notes(
    queries: Seen,
    labelled_Q: NDArray[np.bool_],
    bank_N: NDArray[np.int64],
    truth_Q: NDArray[np.int64],
    classes: list[str],
    unseen: list[str],
) -> list[str]:
    """Say what was left out, and what cannot be right."""
    notes = unread_notes(queries.rejects)
    if n_unlabelled := int((~labelled_Q).sum()):
        one, many = "query has no label and is left out", "queries have no label and are left out"
        notes.append(counted(n_unlabelled, one, plural=many))
    if n_without := int((bank_N < 0).sum()):
        one, many = "image of the collection has", "images of the collection have"
        notes.append(f"{counted(n_without, one, plural=many)} no label or vote")
    if unseen:
        lacks = f"of classes that the collection lacks ({_some(unseen)}) and"
        one, many = f"query is {lacks} counts as wrong", f"queries are {lacks} count as wrong"
        notes.append(counted(int((truth_Q < 0).sum()), one, plural=many))
    asked = set(truth_Q.tolist())
    missing = [label for n, label in enumerate(classes) if n not in asked]
    if missing:
        classes_text = counted(len(missing), "class", plural="classes")
        notes.append(f"no query is of {classes_text}: {_some(missing)}")
    if len(classes) <= 5:
        there = "is 1 class" if len(classes) == 1 else f"are {len(classes)} classes"
        notes.append(f"top-5 is left out: there {there}")
    return notes


def _require_labels(what: str, labels: list[str], mend: str) -> None:
    """Refuse an evaluation without labels."""
    if not labels:
        raise EvaluationError(what, expected="labels", found="none", mend=mend)


def _some(labels: list[str]) -> str:
    """List the first few labels."""
    more = f" and {len(labels) - 5} more" if len(labels) > 5 else ""
    return shown(", ".join(labels[:5])) + more
