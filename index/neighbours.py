"""Queries as they come, and neighbours as they go: what every kind of collection shares.

Shapes: Q queries, D dimensions, K neighbours, W ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from index.knn import COSINE, MISSING, padding
from models.errors import FingerprintMismatchError, UsageError

WHOLE = (int, np.integer)
"""Types of a whole number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbours:
    """What a search found, best first.

    Attributes:
        ids: (Q, K) int64; -1 where fewer than K were found.
        scores: (Q, K) float32 cosines, or minus squared distances; -inf where fewer than K
            were found.
    """

    ids: NDArray[np.int64]
    scores: NDArray[np.float32]


def check_fingerprint(name: str, *, expected: str, found: str) -> None:
    """Refuse another encoder's vectors.

    Raises:
        FingerprintMismatchError: `found` is not the collection's; names both.
    """
    if found != expected:
        raise FingerprintMismatchError(
            f"collection {name}",
            expected=expected,
            found=found,
            mend="query it with the encoder that built it, or build it again with this one",
        )


def check_queries(
    queries_QD: NDArray[np.float32],
    k: int,
    dim: int,
    without_QW: NDArray[np.int64] | None,
) -> tuple[NDArray[np.float32], int]:
    """Give queries as float32, in C order, and how many ids are left out of each one's answer.

    Raises:
        UsageError: they are not (Q, dim) numbers or not finite, k is no whole number of 1 or
            more, or `without_QW` is not (Q, W) whole numbers.
    """
    if not isinstance(queries_QD, np.ndarray):
        raise UsageError(
            "queries", expected=f"an array (Q, {dim})", found=type(queries_QD).__name__
        )
    if queries_QD.ndim != 2 or queries_QD.shape[1] != dim:
        raise UsageError("queries", expected=f"(Q, {dim})", found=str(queries_QD.shape))
    if not isinstance(k, WHOLE):
        raise UsageError("k", expected="a whole number", found=str(k))
    if k < 1:
        raise UsageError("k", expected="at least 1", found=str(k))
    try:
        queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise UsageError("queries", expected="numbers", found=str(queries_QD.dtype)) from error
    # A finite sum of squares has no NaN and no infinity, and costs a fifth of asking each number.
    if not math.isfinite(np.vdot(queries_QD, queries_QD)):
        wrong = np.flatnonzero(~np.isfinite(queries_QD).all(axis=1))
        if wrong.size:
            raise UsageError(
                f"query {wrong[0]}", expected="finite numbers", found="NaN or infinity"
            )
    return queries_QD, 0 if without_QW is None else _check_without(without_QW, len(queries_QD))


def _check_without(without_QW: NDArray[np.int64], n_queries: int) -> int:
    """Give W."""
    if not isinstance(without_QW, np.ndarray):
        raise UsageError(
            "without", expected=f"an array ({n_queries}, W)", found=type(without_QW).__name__
        )
    if without_QW.ndim != 2 or len(without_QW) != n_queries or without_QW.dtype.kind not in "iu":
        raise UsageError(
            "without",
            expected=f"({n_queries}, W) ids",
            found=f"{without_QW.shape} of {without_QW.dtype}",
        )
    n_without: int = without_QW.shape[1]
    return n_without


def no_neighbours(n_queries: int, k: int = 0) -> Neighbours:
    """Give what is found where there are no images, or no queries: (n_queries, k) padding."""
    scores_QK, ids_QK = padding(n_queries, k)
    return Neighbours(ids=ids_QK, scores=scores_QK)


def require_cosine(metric: str, what: str) -> None:
    """Refuse what has a meaning for cosines alone.

    Raises:
        UsageError: the collection's metric is another.
    """
    if metric != COSINE:
        raise UsageError(
            what, expected=f"a collection of {COSINE}s", found=f"one of {metric} distances"
        )


def leave_out(found: Neighbours, without_QW: NDArray[np.int64], k: int) -> Neighbours:
    """Drop from each query's neighbours those that are no answers to it, and those beyond k.

    Args:
        found: of k + W neighbours a query, or of all that there are.
        without_QW: (Q, W) ids that are no answers; -1 stands for none.
        k: how many are wanted.
    """
    is_out_QC = np.zeros(found.ids.shape, np.bool_)
    for without_Q in without_QW.T:  # all at once would be (Q, k + W, W)
        is_out_QC |= found.ids == without_Q[:, None]
    is_out_QC &= found.ids != MISSING
    n_found = found.ids.shape[1]
    width = min(k, n_found - int(is_out_QC.sum(axis=1).min(initial=n_found)))
    order_QK = np.argsort(is_out_QC, axis=1, kind="stable")[:, :width]
    is_out_QK = np.take_along_axis(is_out_QC, order_QK, 1)
    ids_QK = np.take_along_axis(found.ids, order_QK, 1)
    scores_QK = np.take_along_axis(found.scores, order_QK, 1)
    return Neighbours(
        ids=np.where(is_out_QK, MISSING, ids_QK),
        scores=np.where(is_out_QK, -np.inf, scores_QK).astype(np.float32),
    )
