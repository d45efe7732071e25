"""Which images to label next: random, k-centre, typicality, and a probe's margin or entropy.

Rules:
    Nothing that is labelled or was chosen before is chosen, and nothing twice.
    The same pool, method, budget and seed choose the same images.
    A method sees vectors and the labels that exist; nobody's answers but those.

Sources:
    k-centre: Sener and Savarese, Active Learning for Convolutional Neural Networks: A Core-Set
        Approach (arXiv 1708.00489), algorithm 1, the greedy one.
    typicality: Hacohen, Dekel and Weinshall, Active Learning on a Budget (arXiv 2202.02794),
        algorithm 1 (TypiClust), with the constants of its code.
    margin: Scheffer et al. (2001); entropy: Shannon's, Settles's survey (2009), section 3.1.

Shapes: N images, D dimensions, B chosen, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

from index.curation.softmax_probe import fit_probe
from index.knn import MISSING, faiss_threads
from models.command import progress
from models.cpu import cpu_budget
from models.errors import UsageError

MAX_CLUSTERS = 500
SMALLEST_CLUSTER = 5
"""Clusters of as few or fewer are noise."""

TYPICAL_NEIGHBOURS = 20
MAX_MEMBERS = 8192
"""Of a cluster that are compared with one another; of a larger one a random part is."""

KMEANS_ROUNDS = 20
BLOCK_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class Pool:
    """What there is to choose from.

    Attributes:
        vectors_ND: (N, D) float32.
        is_taken_N: (N,) bool, labelled or chosen before.
        classes_N: (N,) int64 class numbers of the labels that exist; -1 where there is none.
        ids_N: (N,) int64 by which what is chosen is named.
    """

    vectors_ND: NDArray[np.float32]
    is_taken_N: NDArray[np.bool_]
    classes_N: NDArray[np.int64]
    ids_N: NDArray[np.int64]

    @property
    def free(self) -> NDArray[np.int64]:
        """Places of the images that may be chosen, in order."""
        return np.flatnonzero(~self.is_taken_N)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen, the first first.

    Attributes:
        ids_B: (B,) int64 ids.
        scores_B: (B,) float64, by which; None of a random choice.
        meaning: what the score is.
    """

    ids_B: NDArray[np.int64]
    scores_B: NDArray[np.float64] | None
    meaning: str


def choose_random(pool: Pool, budget: int, seed: int) -> Choice:
    """Choose by lot: what every other method must beat."""
    places = np.random.default_rng(seed).permutation(pool.free)[:budget]
    return Choice(ids_B=pool.ids_N[places], scores_B=None, meaning="")


def choose_k_centre(pool: Pool, budget: int, seed: int) -> Choice:
    """Choose what is farthest from everything labelled or chosen, one after another.

    Where nothing is labelled the first is drawn.
    """
    # Far from the origin the difference of squares and products would be nothing but rounding.
    vectors_ND = pool.vectors_ND - pool.vectors_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
    squares_N = np.einsum("nd,nd->n", vectors_ND, vectors_ND)
    distances_N = np.full(len(vectors_ND), np.inf, np.float32)
    taken = np.flatnonzero(pool.is_taken_N)
    for start in range(0, len(taken), 64):
        block = taken[start : start + 64]
        products_NB = vectors_ND @ vectors_ND[block].T
        distances_NB = squares_N[:, None] + squares_N[block] - 2 * products_NB
        np.minimum(distances_N, distances_NB.min(axis=1), out=distances_N)
    distances_N[pool.is_taken_N] = -np.inf
    drawn = np.random.default_rng(seed).choice(pool.free)
    places: list[int] = []
    scores: list[float] = []
    wanted = min(budget, len(pool.free))
    for _ in progress(range(wanted), what="choosing", total=wanted):
        is_first = not taken.size and not places
        place = int(drawn if is_first else distances_N.argmax())
        places.append(place)
        scores.append(np.nan if is_first else float(np.sqrt(max(0.0, distances_N[place]))))
        new_N = squares_N + squares_N[place] - 2 * (vectors_ND @ vectors_ND[place])
        np.minimum(distances_N, new_N, out=distances_N)
        distances_N[place] = -np.inf
    return Choice(
        ids_B=pool.ids_N[np.array(places, np.int64)],
        scores_B=np.array(scores, np.float64),
        meaning="distance to the nearest that is labelled or was chosen before it",
    )


def choose_typical(pool: Pool, budget: int, seed: int) -> Choice:
    """Choose the most typical image of each cluster, those with the fewest labels first.

    There are as many clusters as there will be labels, up to `MAX_CLUSTERS`.
    """
    wanted = min(budget, len(pool.free))
    n_clusters = min(int(pool.is_taken_N.sum()) + wanted, MAX_CLUSTERS, len(pool.vectors_ND))
    clusters_N = find_clusters(pool.vectors_ND, n_clusters, seed)
    rng = np.random.default_rng(seed)
    queue = _Clusters(pool, clusters_N)
    places: list[int] = []
    scores: list[float] = []
    for _ in progress(range(wanted), what="choosing", total=wanted):
        members = queue.next_members()
        if len(members) > MAX_MEMBERS:
            members = np.sort(rng.choice(members, MAX_MEMBERS, replace=False))
        typicality_M = _typicality(pool.vectors_ND[members])
        best = int(typicality_M.argmax())
        places.append(int(members[best]))
        scores.append(float(typicality_M[best]))
        queue.take(places[-1])
    return Choice(
        ids_B=pool.ids_N[np.array(places, np.int64)],
        scores_B=np.array(scores, np.float64),
        meaning="typicality: 1 / mean distance to its neighbours in the cluster",
    )


class _Clusters:
    """Says which cluster is next: with the fewest labels, and of those the largest."""

    def __init__(self, pool: Pool, clusters_N: NDArray[np.int64]) -> None:
        self._free_N = ~pool.is_taken_N
        self._clusters_N = clusters_N
        n_clusters = int(clusters_N.max()) + 1
        self._sizes = np.bincount(clusters_N, minlength=n_clusters)
        self._taken = np.bincount(clusters_N[pool.is_taken_N], minlength=n_clusters)

    def next_members(self) -> NDArray[np.int64]:
        """Give the images of the next cluster that may be chosen; there is at least one."""
        left = self._sizes - self._taken
        is_open = (left > 0) & (self._sizes > SMALLEST_CLUSTER)
        if not is_open.any():
            is_open = left > 0
        order = np.lexsort((-self._sizes, self._taken, ~is_open))
        return np.flatnonzero(self._free_N & (self._clusters_N == order[0]))

    def take(self, place: int) -> None:
        """Count an image as chosen."""
        self._free_N[place] = False
        self._taken[self._clusters_N[place]] += 1


def find_clusters(vectors_ND: NDArray[np.float32], n_clusters: int, seed: int) -> NDArray[np.int64]:
    """Give each vector the number of its cluster, by k-means."""
    vectors_ND = np.ascontiguousarray(vectors_ND, np.float32)
    with faiss_threads(cpu_budget()):
        kmeans = faiss.Kmeans(
            vectors_ND.shape[1], n_clusters, niter=KMEANS_ROUNDS, min_points_per_centroid=1,
            seed=seed % (2**31 - 1) + 1,  # an int of C, and 0 is none
        )  # fmt: skip
        kmeans.train(vectors_ND)
        assert kmeans.index is not None, "it was trained"
        _, clusters_N1 = kmeans.index.search(vectors_ND, 1)
    return np.asarray(clusters_N1[:, 0], np.int64)


def _typicality(vectors_MD: NDArray[np.float32]) -> NDArray[np.float64]:
    """Give 1 / mean distance to the nearest of the same cluster, of each member."""
    k = min(TYPICAL_NEIGHBOURS, len(vectors_MD) // 2)
    if k == 0:
        return np.ones(len(vectors_MD))
    with faiss_threads(cpu_budget()):
        squared_MK, _ = faiss.knn(vectors_MD, vectors_MD, k + 1, metric=faiss.METRIC_L2)
    distances_M = np.sqrt(np.maximum(0, squared_MK[:, 1:])).mean(axis=1)
    return np.asarray(1 / (distances_M.astype(np.float64) + 1e-5))


def choose_by_margin(pool: Pool, budget: int, seed: int) -> Choice:
    """Choose where a probe's two likeliest classes are nearest to one another."""
    del seed  # nothing is drawn

    def margin(shares_BC: NDArray[np.float32]) -> NDArray[np.float32]:
        top_B2 = np.partition(shares_BC, -2, axis=1)[:, -2:]
        return np.asarray(top_B2[:, 1] - top_B2[:, 0])

    return _choose_by_probe(pool, budget, margin, "margin between a probe's two likeliest classes")


def choose_by_entropy(pool: Pool, budget: int, seed: int) -> Choice:
    """Choose where a probe is the least certain of all classes together."""
    del seed  # nothing is drawn

    def certainty(shares_BC: NDArray[np.float32]) -> NDArray[np.float32]:
        logs_BC = np.log(np.maximum(shares_BC, np.finfo(np.float32).tiny))
        return np.asarray((shares_BC * logs_BC).sum(axis=1))

    return _choose_by_probe(pool, budget, certainty, "minus the entropy of a probe, in nats")


def _choose_by_probe(
    pool: Pool,
    budget: int,
    certainty: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    meaning: str,
) -> Choice:
    """Choose what a probe that was fitted to the labels is least certain of."""
    labelled = np.flatnonzero(pool.classes_N != MISSING)
    present = np.unique(pool.classes_N[labelled])
    if len(present) < 2:
        raise UsageError(
            "labels for a probe",
            expected="those of at least 2 classes",
            found=str(len(present)),
            mend="begin with --method typicality, and give its labels with --labels",
        )
    classes = np.searchsorted(present, pool.classes_N[labelled])
    probe = fit_probe(pool.vectors_ND[labelled], classes, len(present))
    free = pool.free
    certain = np.concatenate(
        [
            certainty(probe.probabilities(pool.vectors_ND[free[start : start + BLOCK_ROWS]]))
            for start in range(0, len(free), BLOCK_ROWS)
        ]
    )
    order = np.argsort(certain, kind="stable")[:budget]
    return Choice(
        ids_B=pool.ids_N[free[order]], scores_B=certain[order].astype(np.float64), meaning=meaning
    )


Method = Callable[[Pool, int, int], Choice]
METHODS: Mapping[str, Method] = {
    "random": choose_random,
    "kcentre": choose_k_centre,
    "typicality": choose_typical,
    "margin": choose_by_margin,
    "entropy": choose_by_entropy,
}
