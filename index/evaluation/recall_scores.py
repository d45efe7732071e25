"""How much of what an exact search finds an index finds: recall by score, query by query.

Rules:
    What is found counts by its exact score: as good as the exact k-th one is found, whichever
    of several equals it is. Scores that an index made of compressed vectors count for nothing.
    Higher scores are better, whatever the metric.
    An id that comes twice counts once. Where fewer than k exist, those are all that is asked;
    of nothing, nothing is missed.

Source: recall by distance threshold as ann-benchmarks has it (Aumueller, Bernhardsson and
Faithfull, arXiv 1807.05614), with a tolerance of rounding only.

Shapes: Q queries, K neighbours, D dimensions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from index.interface import AnyCollection
from index.knn import rounding
from index.neighbours import Neighbours

BLOCK_BYTES = 64 << 20
"""Of the vectors that are read to score what was found."""

WORST_SHARE = 0.05


def recall_by_score(
    collection: AnyCollection,
    queries_QD: NDArray[np.float32],
    found: Neighbours,
    exact: Neighbours,
    k: int,
) -> NDArray[np.float64]:
    """Give the share of each query's exact k nearest that were found, ties allowed.

    Args:
        collection: that both were found in.
        queries_QD: (Q, D) float32.
        found: by the index; the first k count.
        exact: by comparing every vector; at least k wide, or as wide as the collection.
        k: neighbours.

    Returns:
        (Q,) float64, 0 to 1.
    """
    ids_QK = _once(found.ids[:, :k])
    scores_QK = exact_scores(collection, queries_QD, ids_QK)
    exact_QK = exact.scores[:, :k]
    n_exist_Q = (exact.ids[:, :k] >= 0).sum(axis=1)
    last_Q = exact_QK[np.arange(len(exact_QK)), np.maximum(n_exist_Q - 1, 0)]
    slack_Q = rounding(queries_QD, last_Q, collection.metric)
    n_found_Q = (scores_QK >= (last_Q - slack_Q)[:, None]).sum(axis=1)
    recall_Q: NDArray[np.float64] = np.minimum(n_found_Q, n_exist_Q) / np.maximum(n_exist_Q, 1)
    return np.where(n_exist_Q == 0, 1.0, recall_Q)


def exact_scores(
    collection: AnyCollection, queries_QD: NDArray[np.float32], ids_QK: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Compare queries with stored vectors: (Q, K) scores, -inf where the id is -1."""
    scores_QK = np.full(ids_QK.shape, -np.inf, np.float32)
    n_queries, k = ids_QK.shape
    step = max(1, BLOCK_BYTES // (4 * max(1, k) * collection.dim))
    for start in range(0, n_queries, step):
        block = slice(start, start + step)
        is_there = ids_QK[block] >= 0
        vectors = collection.vectors(ids_QK[block][is_there])
        queries = queries_QD[block][np.nonzero(is_there)[0]]
        if collection.metric == "cosine":
            scores = np.einsum("nd,nd->n", queries, vectors)
        else:
            scores = -np.square(queries - vectors).sum(axis=1)
        scores_QK[block][is_there] = scores
    return scores_QK


def worst_mean(recall_Q: NDArray[np.float64]) -> float:
    """Give the mean over the worst twentieth of the queries, at least one."""
    worst = np.sort(recall_Q)[: max(1, int(len(recall_Q) * WORST_SHARE))]
    return float(worst.mean())


def _once(ids_QK: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sort the ids of each query, and put -1 for those that were there before."""
    sorted_QK = np.sort(ids_QK, axis=1)
    is_again_QK = np.zeros(ids_QK.shape, np.bool_)
    is_again_QK[:, 1:] = sorted_QK[:, 1:] == sorted_QK[:, :-1]
    return np.where(is_again_QK, -1, sorted_QK)
