"""What `benchmarks.ann` searches in, what it asks, and what the right answers are.

Rules:
    The truth is exact: neighbours that float32 brought near are measured again in float64,
    since |x|^2 - 2xy + |y|^2 of raw pixels errs in the digits that tell neighbours apart.
    A row counts where it is no farther than the k-th true neighbour and `EPSILON`, as
    ann-benchmarks counts: of equally near ones any will do.
    Distances of what was found are computed here, not taken from who found it.

Source: ann-benchmarks (Aumueller, Bernhardsson, Faithfull, arXiv 1807.05614), data set
fashion-mnist-784-euclidean: 60,000 training images as raw pixels, 10,000 test images as queries.

Shapes: N rows, Q queries, D dimensions, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.collection import Collection
from index.knn import COSINE, EUCLIDEAN, knn_search
from models.fashion_mnist import open_fashion_mnist

K = 10
EPSILON = {EUCLIDEAN: 1e-3, COSINE: 1e-6}
"""Added to the k-th distance. ann-benchmarks adds 1e-3 whatever the distance is; of cosines
that would let wrong neighbours pass."""

SPARE = 10
BLOCK = 500


@dataclass(frozen=True, kw_only=True)
class Task:
    """Vectors to search in, and queries.

    Attributes:
        name: `pixels` or `embeddings`.
        metric: `euclidean` or `cosine`.
        vectors_ND: (N, D) float32; of unit length where the metric is cosine.
        queries_QD: (Q, D) float32, none of which was seen by whoever chose a setting.
        farthest_Q: (Q,) float64, the distance of the k-th neighbour and epsilon.
    """

    name: str
    metric: str
    vectors_ND: NDArray[np.float32]
    queries_QD: NDArray[np.float32]
    farthest_Q: NDArray[np.float64]

    def recall(self, rows_QK: NDArray[np.int64]) -> float:
        """Give the mean share of the first queries' k nearest that these rows are."""
        n_found = 0
        for start in range(0, len(rows_QK), BLOCK):
            rows = rows_QK[start : start + BLOCK, :K]
            own = slice(start, start + len(rows))
            distances_QK = distances(self.metric, self.queries_QD[own], self.vectors_ND, rows)
            n_found += int((distances_QK <= self.farthest_Q[own, None]).sum())
        return n_found / (K * len(rows_QK))


def pixel_task(n_vectors: int, n_queries: int) -> Task:
    """Make ann-benchmarks' fashion-mnist-784-euclidean of the data set itself."""
    train_ND, test_QD = (_pixels(split) for split in ("train", "test"))
    return make_task("pixels", EUCLIDEAN, train_ND[:n_vectors], test_QD[:n_queries])


def embedding_task(train: Path, test: Path, n_vectors: int, n_queries: int) -> Task:
    """Search in the collection of the training images for what is like the test images."""
    with Collection.open(train) as bank, Collection.open(test) as asked:
        bank.require(asked.fingerprint)
        vectors_ND = bank.vectors(bank.ids[:n_vectors])
        queries_QD = asked.vectors(asked.ids[:n_queries])
    return make_task("embeddings", COSINE, vectors_ND, queries_QD)


def make_task(
    name: str, metric: str, vectors_ND: NDArray[np.float32], queries_QD: NDArray[np.float32]
) -> Task:
    """Find the truth."""
    _, rows_QK = knn_search(queries_QD, vectors_ND, K + SPARE, metric=metric)
    blocks = [
        distances(metric, queries_QD[s : s + BLOCK], vectors_ND, rows_QK[s : s + BLOCK])
        for s in range(0, len(queries_QD), BLOCK)
    ]
    farthest_Q = np.sort(np.concatenate(blocks), axis=1)[:, K - 1] + EPSILON[metric]
    return Task(
        name=name, metric=metric, vectors_ND=vectors_ND, queries_QD=queries_QD,
        farthest_Q=farthest_Q,
    )  # fmt: skip


def distances(
    metric: str,
    queries_QD: NDArray[np.float32],
    vectors_ND: NDArray[np.float32],
    rows_QK: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Measure, in float64, how far rows are from their query; infinitely where the row is -1."""
    found_QKD = vectors_ND[rows_QK].astype(np.float64)
    if metric == EUCLIDEAN:
        found_QKD -= queries_QD[:, None]
        far_QK = np.sqrt(np.einsum("qkd,qkd->qk", found_QKD, found_QKD))
    else:
        far_QK = 1 - np.einsum("qkd,qd->qk", found_QKD, queries_QD.astype(np.float64))
    return np.where(rows_QK < 0, np.inf, far_QK)


def _pixels(split: str) -> NDArray[np.float32]:
    """Give the images of a split as (N, 784) float32 from 0 to 255."""
    arrays = open_fashion_mnist(split)
    return np.ascontiguousarray(arrays.images.reshape(len(arrays.images), -1), np.float32)
