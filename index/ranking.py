"""What is made of the nearest: those near enough, those that differ, all within a range.

    MMR: the next is argmax over candidates c of (1 - d) * cos(q, c) - d * max cos(c, chosen)

Rules:
    `min_score` drops what is farther than that: there may be fewer than k.
    `diversity` d, 0 to 1, picks k of `POOL` times as many candidates, one after the other: the
    nearest first, then whatever is near the query and unlike what was picked. Scores stay
    cosines with the query, so that with diversity they do not fall from one to the next.

Source: Carbonell and Goldstein, The Use of MMR, Diversity-Based Reranking (SIGIR 1998), with
lambda = 1 - d.

Shapes: Q queries, C candidates, K neighbours, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from index.knn import MISSING, ROUNDING
from index.neighbours import Neighbours, no_neighbours, require_cosine
from models.errors import UsageError

if TYPE_CHECKING:
    from index.interface import AnyCollection, AnySelection

POOL = 5
"""Candidates for each neighbour that diversity picks."""

RANGE_FIRST, RANGE_MORE = 64, 8
"""Neighbours that a range search asks for at first, and how many times more where the last of
them is still within the range."""

RANGE_WEIGHED = 4
"""Candidates for each neighbour of a range that an index weighs at least, whatever the effort."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """How neighbours are chosen among the nearest.

    Attributes:
        min_score: the least cosine; any where None.
        diversity: 0 for the nearest, up to 1.
    """

    min_score: float | None = None
    diversity: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: a value is out of bounds, or no number.
        """
        if self.min_score is not None:
            check_min_score(self.min_score)
        if not 0 <= self.diversity <= 1:
            raise UsageError("diversity", expected="0 to 1", found=f"{self.diversity:g}")

    def pool(self, k: int) -> int:
        """Say how many of the nearest to look at for k neighbours."""
        return POOL * k if self.diversity else k

    def rank(self, collection: AnyCollection, found: Neighbours, k: int) -> Neighbours:
        """Choose k of what was found, best first; padded where there are fewer.

        Args:
            collection: where the neighbours' vectors are.
            found: `pool(k)` neighbours a query.
            k: how many to choose.

        Raises:
            UsageError: a score is asked for, or diversity, of a collection without cosines.
        """
        if self.diversity or self.min_score is not None:
            require_cosine(collection.metric, "diversity and minimal score")
        ids_QC, scores_QC = found.ids, found.scores
        if self.min_score is not None:
            ids_QC, scores_QC = drop_below(ids_QC, scores_QC, self.min_score)
        if not self.diversity:
            return Neighbours(ids=ids_QC[:, :k], scores=scores_QC[:, :k])
        width = min(k, ids_QC.shape[1])
        chosen = no_neighbours(len(ids_QC), width)
        for query, (ids_C, scores_C) in enumerate(zip(ids_QC, scores_QC, strict=True)):
            there = ids_C >= 0
            ids_C, scores_C = ids_C[there], scores_C[there]
            order = pick_diverse(
                scores_C, collection.vectors(ids_C), width, diversity=self.diversity
            )
            chosen.ids[query, : len(order)] = ids_C[order]
            chosen.scores[query, : len(order)] = scores_C[order]
        return chosen


def check_min_score(min_score: float) -> None:
    """Refuse what is no cosine.

    Raises:
        UsageError: it is not -1 to 1.
    """
    if not -1 <= min_score <= 1:
        raise UsageError("minimal score", expected="-1 to 1", found=f"{min_score:g}")


def drop_below(
    ids_QC: NDArray[np.int64], scores_QC: NDArray[np.float32], min_score: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Make padding of neighbours that are not near enough."""
    is_near = scores_QC >= min_score - ROUNDING
    return (
        np.where(is_near, ids_QC, MISSING),
        np.where(is_near, scores_QC, -np.inf).astype(np.float32),
    )


def pick_diverse(
    scores_C: NDArray[np.float32], vectors_CD: NDArray[np.float32], k: int, *, diversity: float
) -> NDArray[np.int64]:
    """Pick k candidates by maximal marginal relevance; of equals the first.

    Args:
        scores_C: cosines of the candidates with the query.
        vectors_CD: the candidates, unit length.
        k: how many; all where there are fewer.
        diversity: d of the formula above.

    Returns:
        (min(k, C),) places of those picked, in the order of picking.
    """
    picked = np.empty(min(k, len(scores_C)), np.int64)
    relevance_C = (1 - diversity) * scores_C.astype(np.float64)
    likeness_C = np.full(len(scores_C), -np.inf)
    value_C = scores_C.astype(np.float64)  # the first has nothing to differ from
    is_left_C = np.ones(len(scores_C), np.bool_)
    for n in range(len(picked)):
        picked[n] = best = int(np.where(is_left_C, value_C, -np.inf).argmax())
        is_left_C[best] = False
        np.maximum(likeness_C, vectors_CD @ vectors_CD[best], out=likeness_C)
        value_C = relevance_C - diversity * likeness_C
    return picked


def search_range(
    collection: AnyCollection,
    queries_QD: NDArray[np.float32],
    min_score: float,
    *,
    fingerprint: str,
    limit: int | None = None,
    exact: bool = False,
    effort: int | None = None,
    filter: str | AnySelection | None = None,
    without_QW: NDArray[np.int64] | None = None,
) -> Neighbours:
    """Find all images within a cosine of each query, best first; through an index, nearly all.

    Queries that have more within it than an index gives are searched exactly.

    Args:
        collection: where to search.
        queries_QD: (Q, D) float32, unit length.
        min_score: the least cosine, -1 to 1.
        fingerprint: of the encoder that made the queries.
        limit: of the nearest a query that are given, however many there are; none where None.
        exact: as in `Collection.search`; so is what follows `effort`.
        effort: candidates that the index weighs for a query, and four at least for each neighbour
            that is asked for; its own parameters where None.
        filter: see there.
        without_QW: see there.

    Returns:
        (Q, K) neighbours, K being the most that a query has; the others are padded.

    Raises:
        UsageError: the score is no cosine, or the collection has none; and see `Collection.search`.
        FingerprintMismatchError: another encoder made the queries.
    """
    require_cosine(collection.metric, "range")
    check_min_score(min_score)
    if limit is not None and limit < 1:
        raise UsageError("limit", expected="at least 1", found=str(limit))
    most = max(1, min(collection.count, limit or collection.count))  # one of none finds none
    by_index = collection.max_neighbours
    n_without = 0 if without_QW is None else without_QW.shape[1]
    selection = collection.select(filter) if isinstance(filter, str) else filter
    ids = [np.empty(0, np.int64)] * len(queries_QD)
    scores = [np.empty(0, np.float32)] * len(queries_QD)
    left = np.arange(len(queries_QD))
    k = min(RANGE_FIRST, most)
    while left.size:
        exact = exact or (by_index is not None and k + n_without > by_index)
        parameters = None
        if effort is not None:
            parameters = collection.effort_parameters(max(effort, RANGE_WEIGHED * k), k)
        found = collection.search(
            queries_QD[left], k, fingerprint=fingerprint, exact=exact, parameters=parameters,
            filter=selection, without_QW=None if without_QW is None else without_QW[left],
        )  # fmt: skip
        is_near = found.scores >= min_score - ROUNDING
        for place, query in enumerate(left.tolist()):
            ids[query] = found.ids[place][is_near[place]]
            scores[query] = found.scores[place][is_near[place]]
        left = left[is_near[:, -1:].any(axis=1)] if k < most else left[:0]
        k = min(RANGE_MORE * k, most)
    all_near = no_neighbours(len(ids), max(map(len, ids), default=0))
    for row, (ids_K, scores_K) in enumerate(zip(ids, scores, strict=True)):
        all_near.ids[row, : len(ids_K)] = ids_K
        all_near.scores[row, : len(ids_K)] = scores_K
    return all_near
