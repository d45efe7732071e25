"""Hubs: images that are among the nearest of far more others than is their share.

In many dimensions some points come up in the neighbour lists of everybody, and others in
nobody's, whatever is searched for: a skewed k-occurrence says so.

Source: Radovanovic, Nanopoulos and Ivanovic, Hubs in Space (JMLR 11, 2010): N_k is in how many
lists of the k nearest a point is, the skewness of N_k measures hubness, a point with N_k = 0 is
an anti-hub, and a hub is one whose N_k is above the mean by two deviations.

Shapes: N images, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from index.knn import COSINE, MISSING, knn_search

HUB_DEVIATIONS = 2.0


@dataclass(frozen=True, kw_only=True)
class Hubness:
    """How unevenly images are found.

    Attributes:
        k: neighbours a list.
        n: images that were compared with one another.
        skewness: of N_k: 0 where all are found alike, 1 and more where there are hubs; None
            where N_k is the same for all.
        anti_hubs: share of images that are in nobody's list.
        hubs: share of images with N_k above the mean by two deviations.
        held_by_hubs: share of all places of the lists that hubs take.
        largest: the largest N_k.
    """

    k: int
    n: int
    skewness: float | None
    anti_hubs: float
    hubs: float
    held_by_hubs: float
    largest: int


def neighbour_rows(
    vectors_ND: NDArray[np.float32], k: int, *, metric: str = COSINE
) -> NDArray[np.int64]:
    """Give the k nearest other rows of every row, exactly: (N, k); -1 where there are fewer."""
    _, rows = knn_search(vectors_ND, vectors_ND, k + 1, metric=metric)
    # Of several equal vectors, a row need not be its own first neighbour, nor among the first.
    is_own = rows == np.arange(len(rows))[:, None]
    is_own[~is_own.any(axis=1), -1] = True
    others: NDArray[np.int64] = rows[~is_own].reshape(len(rows), k)
    assert (others != np.arange(len(rows))[:, None]).all(), "a row is no neighbour of itself"
    return others


def occurrences(rows_NK: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count N_k: in how many lists each row is."""
    return np.bincount(rows_NK[rows_NK != MISSING], minlength=len(rows_NK))


def hubness(counts_N: NDArray[np.int64], k: int) -> Hubness:
    """Summarise N_k."""
    mean, deviation = counts_N.mean(), counts_N.std()
    is_hub_N = counts_N > mean + HUB_DEVIATIONS * deviation
    cubes = np.power(counts_N - mean, 3).mean()
    return Hubness(
        k=k,
        n=len(counts_N),
        skewness=float(cubes / deviation**3) if deviation > 0 else None,
        anti_hubs=float((counts_N == 0).mean()),
        hubs=float(is_hub_N.mean()),
        held_by_hubs=float(counts_N[is_hub_N].sum() / max(1, counts_N.sum())),
        largest=int(counts_N.max(initial=0)),
    )
