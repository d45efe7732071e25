"""Exact nearest neighbours by cosine or distance, and the weighted vote over their labels.

Rules:
    Scores are better when higher: inner products, which are the cosines of unit vectors, or
    minus the squared Euclidean distance.
    Exact means exact, ties included: of similarities that are equal in float32 the lower
    row of the bank comes first, whichever of them faiss happens to keep.
    What does not exist is row -1 with similarity -inf, and it has no vote.
    faiss is told on every call how many threads to use, since its own guess is the host's
    cores; the count that stood before stands again after it.

It trains nothing and approximates nothing; `index.collection` does the latter.

Source of the vote: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance
Discrimination (arXiv 1805.01978), section 3.4: weights exp(s / T).

Shapes: Q queries, N rows of the bank, D dimensions, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.cpu import cpu_budget
from models.errors import UsageError
from models.providers import INSTALL_AN_ENGINE

try:
    import faiss
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error.msg}; {INSTALL_AN_ENGINE}", name="faiss") from None

COSINE, EUCLIDEAN = "cosine", "euclidean"
"""How vectors are compared: unit vectors by their inner product, or any by their distance."""

MISSING = -1
"""Stands for a neighbour that does not exist."""

BLOCK_BYTES = 64 << 20
"""Most memory that one block of similarities, or of copied rows, takes."""

ROUNDING = 1e-6
"""By which float32 may round a cosine, or an inner product relative to the squared lengths."""

DISTANCE_ROUNDING = 1e-5
"""The same of squared distances, relative to themselves: they are made of differences, wherever the
vectors lie."""

EVERY_ROW = faiss.IDSelectorAll()
"""With a selector FAISS makes distances of differences. Without one, by numbers of queries,
dimensions and threads, of lengths and products, which far from the origin leave nothing."""

COPY_MIN_QUERIES = 16
"""From here rows are copied together before they are searched: `benchmarks.filters`."""


def knn_search(
    queries_QD: NDArray[np.float32],
    bank_ND: NDArray[np.float32],
    k: int,
    *,
    rows_M: NDArray[np.int64] | None = None,
    metric: str = COSINE,
    threads: int | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Find each query's k rows of largest inner product, or of least distance, best first.

    Args:
        queries_QD: (Q, D) float32.
        bank_ND: (N, D) float32, C-contiguous; may be a memory map.
        k: how many, at least 1; beyond N the result is padded.
        rows_M: (M,) the only rows that may be found, each once and ascending; all where None.
        metric: `cosine` or `euclidean`.
        threads: CPU threads; the CPU budget where None.

    Returns:
        (Q, k) float32 scores and (Q, k) int64 rows of the bank; padded with -inf, -1.

    Raises:
        UsageError: k is below 1, the dimensions differ, or there is no such metric.
    """
    if k < 1:
        raise UsageError("k", expected="at least 1", found=str(k))
    if queries_QD.ndim != 2 or queries_QD.shape[1] != bank_ND.shape[1]:
        raise UsageError(
            "queries", expected=f"(Q, {bank_ND.shape[1]})", found=str(queries_QD.shape)
        )
    n_rows = len(bank_ND) if rows_M is None else len(rows_M)
    n_found = min(k, n_rows)
    if len(queries_QD) == 0 or n_found == 0:
        return padding(len(queries_QD), k)
    n_asked = min(n_found + 1, n_rows)  # one more shows whether the last place is tied
    queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
    with faiss_threads(search_threads(threads or cpu_budget(), len(queries_QD))):
        if rows_M is None:
            scores, rows = _knn(queries_QD, bank_ND, n_asked, metric)
        else:
            scores, rows = _knn_among(queries_QD, bank_ND, rows_M, n_asked, metric)
        slack_Q: NDArray[np.float64] | float = 0.0
        if len(queries_QD) > 1 and metric == COSINE:
            slack_Q = _slack(queries_QD, scores[:, 0], metric)
            scores = _score_each(queries_QD, bank_ND, rows, metric)
        _lower_row_first(scores, rows)
        if n_asked > n_found:
            tied_Q = scores[:, n_found - 1] - scores[:, n_found] <= slack_Q
            scores, rows = scores[:, :n_found].copy(), rows[:, :n_found].copy()
            _settle_ties(queries_QD, bank_ND, rows_M, np.flatnonzero(tied_Q), metric, scores, rows)
    return pad_neighbours(scores, rows, k)


def faiss_metric(metric: str) -> int:
    """Give FAISS's number of a metric.

    Raises:
        UsageError: it is neither `cosine` nor `euclidean`.
    """
    if metric not in (COSINE, EUCLIDEAN):
        raise UsageError("metric", expected=f"{COSINE} or {EUCLIDEAN}", found=str(metric))
    return int(faiss.METRIC_L2 if metric == EUCLIDEAN else faiss.METRIC_INNER_PRODUCT)


class faiss_threads:  # read as a verb, `with faiss_threads(2):`
    """Let faiss use so many threads in this block, and give the count back after it.

    OpenMP's count belongs to the calling thread, and everything there shares it: where torch
    is loaded, a search that left its own count behind changed torch's sums in the last bit.
    """

    __slots__ = ("_before", "_threads")

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def __enter__(self) -> None:
        self._before = faiss.omp_get_max_threads()
        if self._before != self._threads:
            faiss.omp_set_num_threads(self._threads)

    def __exit__(self, *_: object) -> None:
        if self._before != self._threads:
            faiss.omp_set_num_threads(self._before)


def search_threads(threads: int, n_queries: int) -> int:
    """Say how many threads a search pays with: one a query at most.

    faiss works on queries side by side, so that more threads than queries only wait for
    one another: on two busy cores one query took 24 ms with two threads and 1 ms with one
    (60,000 x 128, exact).
    """
    return max(1, min(threads, n_queries))


def rounding(
    queries_QD: NDArray[np.float32], scores_Q: NDArray[np.float32], metric: str
) -> NDArray[np.float64]:
    """Say by how much a score of each query may differ from an equal one, (Q,) float64."""
    size_Q: NDArray[np.float64] = np.where(np.isfinite(scores_Q), np.abs(scores_Q), 0.0)
    if metric == EUCLIDEAN:
        return size_Q * DISTANCE_ROUNDING
    size_Q = np.maximum(size_Q, np.square(queries_QD, dtype=np.float64).sum(axis=1))
    return size_Q * ROUNDING


def padding(n_queries: int, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Give neighbour lists of queries that found nothing: (Q, k) of -inf and of -1."""
    scores_QK = np.full((n_queries, k), -np.inf, np.float32)
    return scores_QK, np.full((n_queries, k), MISSING, np.int64)


def pad_neighbours(
    scores_QK: NDArray[np.float32], rows_QK: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Widen or cut neighbour lists to k columns; new places are -inf and -1."""
    n_queries, width = scores_QK.shape
    if width == k:  # nearly always: np.pad would take 50 us of a search's 200 for nothing
        return scores_QK, rows_QK
    if width > k:
        return scores_QK[:, :k], rows_QK[:, :k]
    scores, rows = padding(n_queries, k)
    scores[:, :width], rows[:, :width] = scores_QK, rows_QK
    return scores, rows


def merge_neighbours(
    parts: Sequence[tuple[NDArray[np.float32], NDArray[np.int64]]], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Merge neighbour lists from disjoint banks into the k best, best first.

    Args:
        parts: (scores (Q, any), rows (Q, any)) of each bank, best first; rows are numbered
            across the banks, and those of a later bank are larger.
        k: how many to keep; padded where there are fewer.
    """
    if len(parts) == 1:
        return pad_neighbours(*parts[0], k)
    scores = np.concatenate([part[0] for part in parts], axis=1)
    rows = np.concatenate([part[1] for part in parts], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return pad_neighbours(
        np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1), k
    )


def weighted_knn_vote(
    similarities_QK: NDArray[np.float32],
    labels_QK: NDArray[np.int64],
    *,
    k: int,
    temperature: float,
    n_classes: int,
) -> NDArray[np.float32]:
    """Sum exp(s / T) of the first k neighbours by their class.

    The common factor exp(max s / T) is divided out, so that a small T does not overflow.

    Args:
        similarities_QK: (Q, K) float32, best first; -inf where there is no neighbour.
        labels_QK: (Q, K) class numbers of the neighbours; -1 has no vote.
        k: neighbours that vote; all K where there are fewer.
        temperature: T, above 0.
        n_classes: number of classes C.

    Returns:
        (Q, C) float32 scores.
    """
    similarities, labels = similarities_QK[:, :k], labels_QK[:, :k]
    scores_QC = np.zeros((len(similarities), n_classes), np.float64)
    if similarities.shape[1] == 0:
        return scores_QC.astype(np.float32)
    best = similarities.max(axis=1, keepdims=True).astype(np.float64)
    best[~np.isfinite(best)] = 0.0
    weights = np.exp((similarities - best) / temperature)
    weights[labels < 0] = 0.0
    query_rows = np.broadcast_to(np.arange(len(labels))[:, None], labels.shape)
    np.add.at(scores_QC, (query_rows, np.maximum(labels, 0)), weights)
    return scores_QC.astype(np.float32)


def _knn(
    queries_QD: NDArray[np.float32], bank_ND: NDArray[np.float32], k: int, metric: str
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Search a whole bank, of at least k rows."""
    if faiss_metric(metric) == faiss.METRIC_INNER_PRODUCT:
        scores, rows = faiss.knn(queries_QD, bank_ND, k, metric=faiss.METRIC_INNER_PRODUCT)
        return scores, rows
    scores = np.empty((len(queries_QD), k), np.float32)
    rows = np.empty((len(queries_QD), k), np.int64)
    pointers = [faiss.swig_ptr(a) for a in (queries_QD, bank_ND, scores, rows)]
    sizes = (queries_QD.shape[1], len(queries_QD), len(bank_ND), k)
    faiss.knn_L2sqr(*pointers[:2], *sizes, *pointers[2:], None, EVERY_ROW)
    return np.negative(scores, out=scores), rows


def _knn_among(
    queries_QD: NDArray[np.float32],
    bank_ND: NDArray[np.float32],
    rows_M: NDArray[np.int64],
    k: int,
    metric: str,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Search some rows of a bank, at least k.

    A few queries read the rows where they lie; many are worth a copy of a block of them, which
    BLAS then multiplies with all queries at once.
    """
    rows_M = np.ascontiguousarray(rows_M, dtype=np.int64)
    n_queries, dim = queries_QD.shape
    if n_queries < COPY_MIN_QUERIES:
        scores = np.empty((n_queries, k), np.float32)
        rows = np.empty((n_queries, k), np.int64)
        pointers = [faiss.swig_ptr(a) for a in (queries_QD, bank_ND, rows_M, scores, rows)]
        is_euclidean = faiss_metric(metric) == faiss.METRIC_L2
        name = "knn_L2sqr_by_idx" if is_euclidean else "knn_inner_products_by_idx"
        # The last 0: all queries share the rows. Its default is wrong in faiss 1.15: it steps
        # from one query's rows to the next by the bank's size.
        getattr(faiss, name)(
            *pointers[:3], dim, n_queries, len(bank_ND), len(rows_M), k, *pointers[3:], 0
        )
        if is_euclidean:
            np.negative(scores, out=scores)
        return scores, rows
    step = max(k, BLOCK_BYTES // (4 * dim))
    parts: list[tuple[NDArray[np.float32], NDArray[np.int64]]] = []
    for start in range(0, len(rows_M), step):
        block_M = rows_M[start : start + step]
        scores, places = _knn(queries_QD, bank_ND[block_M], min(k, len(block_M)), metric)
        parts = [merge_neighbours([*parts, (scores, block_M[places])], k)]
    return parts[0]


def _lower_row_first(scores_QK: NDArray[np.float32], rows_QK: NDArray[np.int64]) -> None:
    """Sort lists, in place, of which nearly all are sorted: by score, and equal ones by row."""
    is_off_Q = (scores_QK[:, 1:] >= scores_QK[:, :-1]).any(axis=1)
    if is_off_Q.any():
        order = np.lexsort((rows_QK[is_off_Q], -scores_QK[is_off_Q]))
        scores_QK[is_off_Q] = np.take_along_axis(scores_QK[is_off_Q], order, 1)
        rows_QK[is_off_Q] = np.take_along_axis(rows_QK[is_off_Q], order, 1)


def _slack(
    queries_QD: NDArray[np.float32], scores_Q: NDArray[np.float32], metric: str
) -> NDArray[np.float64]:
    """Say by how much a product of matrices may miss the score of a row, (Q,) float64.

    FAISS makes one for many queries, and it rounds by where in the bank a row lies, so that
    copies differ. A single query is compared row by row, and so are distances.
    """
    if metric == EUCLIDEAN:
        return np.zeros(len(queries_QD))
    slack_Q = rounding(queries_QD, scores_Q, metric)
    slack_Q *= 2 * max(1.0, queries_QD.shape[1] / 2048)
    return slack_Q


def _settle_ties(
    queries_QD: NDArray[np.float32],
    bank_ND: NDArray[np.float32],
    rows_M: NDArray[np.int64] | None,
    tied: NDArray[np.int64],
    metric: str,
    scores_QK: NDArray[np.float32],
    rows_QK: NDArray[np.int64],
) -> None:
    """Redo, in place, the queries whose last place may be tied: faiss keeps any of the equals."""
    k = scores_QK.shape[1]
    step = max(1, BLOCK_BYTES // (4 * len(bank_ND if rows_M is None else rows_M)))
    for start in range(0, len(tied), step):
        block = tied[start : start + step]
        about_BM = _all_scores(queries_QD[block], bank_ND, rows_M, metric)
        for query, about_M in zip(block, about_BM, strict=True):
            query_D, last = queries_QD[query : query + 1], np.partition(about_M, -k)[-k]
            places = np.flatnonzero(about_M >= last - _slack(query_D, last[None], metric))
            chosen = places if rows_M is None else rows_M[places]
            found = _score_each(query_D, bank_ND, chosen[None], metric)[0]
            order = np.lexsort((chosen, -found))[:k]
            rows_QK[query], scores_QK[query] = chosen[order], found[order]


def _all_scores(
    queries_QD: NDArray[np.float32],
    bank_ND: NDArray[np.float32],
    rows_M: NDArray[np.int64] | None,
    metric: str,
) -> NDArray[np.float32]:
    """Score every row that may be found, (Q, M); no other is read.

    Inner products are made to the rounding of a product of matrices.
    """
    if metric == COSINE and rows_M is None:
        return queries_QD @ bank_ND.T
    rows_M = np.arange(len(bank_ND)) if rows_M is None else rows_M
    if metric == EUCLIDEAN or len(queries_QD) < COPY_MIN_QUERIES:
        all_QM = np.broadcast_to(rows_M, (len(queries_QD), len(rows_M)))
        return _score_each(queries_QD, bank_ND, all_QM, metric)
    step = max(1, BLOCK_BYTES // (4 * bank_ND.shape[1]))
    blocks = (rows_M[start : start + step] for start in range(0, len(rows_M), step))
    return np.concatenate([queries_QD @ bank_ND[block_M].T for block_M in blocks], axis=1)


def _score_each(
    queries_QD: NDArray[np.float32],
    bank_ND: NDArray[np.float32],
    rows_QK: NDArray[np.int64],
    metric: str,
) -> NDArray[np.float32]:
    """Compare each query with some rows one by one, (Q, K): equal rows get equal scores."""
    scores_QK = np.empty(rows_QK.shape, np.float32)
    rows = np.ascontiguousarray(rows_QK, dtype=np.int64)
    query_of = np.repeat(np.arange(len(rows_QK)), rows_QK.shape[1])
    is_euclidean = metric == EUCLIDEAN
    name = "pairwise_indexed_L2sqr" if is_euclidean else "pairwise_indexed_inner_product"
    pointers = [faiss.swig_ptr(a) for a in (queries_QD, query_of, bank_ND, rows, scores_QK)]
    getattr(faiss, name)(queries_QD.shape[1], rows.size, *pointers)
    return np.negative(scores_QK, out=scores_QK) if is_euclidean else scores_QK
