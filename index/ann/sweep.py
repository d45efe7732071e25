"""Finds the cheapest search parameters of one index that reach a recall, by measuring.

Rules:
    Recall is measured against exact truth. A row counts where its score is that of the k-th true
    neighbour or better, so that of equal rows any will do.
    Parameters are chosen on one half of the queries, with a margin for what a sample of that
    size may err, and must hold on the other half, too: of a factor of re-ranking up to three are
    tried there, so that what it says of the one that held is a little flattered.
    What a search costs is the measured time of single queries on one thread, not a count of
    distances; the machine's noise is met by the median of rounds that take turns.

Shapes: Q queries, N rows, D dimensions, K neighbours.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from index.ann.kinds import Kind
from index.ann.memory import BUILD_BLOCK, release_pages
from index.knn import knn_search, merge_neighbours, rounding

Search = Callable[
    [NDArray[np.float32], int, Mapping[str, int], int],
    tuple[NDArray[np.float32], NDArray[np.int64]],
]
"""Searches queries for k neighbours by parameters on threads."""

CHOOSING_DEVIATIONS, CONFIRMING_DEVIATIONS = 2.0, 1.0
"""Of the mean's own error, by which it must lie above the target. Misses come in clusters: with
1.6 and none a setting of .986 has passed for .99 on twice 125 queries."""

SWEEP_TIMED, FINAL_TIMED, ROUNDS = 64, 128, 3
"""Queries that are timed one by one: of every setting, and of those that are compared."""

EFFORTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
LIST_FACTORS = (2, 3, 5, 8, 12, 20, 32)
GRAPH_FACTORS = (1, 2, 4)
WORST_SHARE = 0.05
BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Queries:
    """Queries and the scores of their true neighbours.

    Attributes:
        vectors_QD: (Q, D) float32.
        truth_QK: (Q, K) float32, the scores of the K nearest, best first; padded with -inf.
        metric: `cosine` or `euclidean`.
    """

    vectors_QD: NDArray[np.float32]
    truth_QK: NDArray[np.float32]
    metric: str

    def half(self, number: int) -> Queries:
        """Give every other query, from the first or the second on."""
        return Queries(
            vectors_QD=np.ascontiguousarray(self.vectors_QD[number::2]),
            truth_QK=self.truth_QK[number::2],
            metric=self.metric,
        )


@dataclass(frozen=True, kw_only=True)
class Point:
    """A setting and what it gave.

    Attributes:
        parameters: by FAISS's names.
        recall: mean share of the k nearest that were found, over the queries that choose.
        margin: what was asked for beyond the target.
        query_s: median seconds of a single query on one thread.
    """

    parameters: Mapping[str, int]
    recall: float
    margin: float
    query_s: float


def exact_truth(
    queries_QD: NDArray[np.float32],
    vectors_ND: NDArray[np.float32],
    k: int,
    *,
    rows_M: NDArray[np.int64],
    metric: str,
    threads: int,
) -> Queries:
    """Find the true neighbours among some rows of a memory map, a block at a time."""
    parts: list[tuple[NDArray[np.float32], NDArray[np.int64]]] = []
    for start in range(0, len(vectors_ND), BUILD_BLOCK):
        stop = min(len(vectors_ND), start + BUILD_BLOCK)
        first, last = np.searchsorted(rows_M, (start, stop))
        block_ND = vectors_ND[rows_M[first:last]]
        release_pages(vectors_ND, start, stop)
        found = knn_search(queries_QD, block_ND, k, metric=metric, threads=threads)
        parts = [merge_neighbours([*parts, found], k)]  # of scores: rows are those of a block
    return Queries(vectors_QD=queries_QD, truth_QK=parts[0][0], metric=metric)


def recalls(found_QK: NDArray[np.float32], queries: Queries, k: int) -> NDArray[np.float64]:
    """Give each query's share of its k nearest that were found, (Q,)."""
    truth_QK = queries.truth_QK[:, :k]
    n_true_Q = np.isfinite(truth_QK).sum(axis=1)
    last_Q = truth_QK[np.arange(len(truth_QK)), n_true_Q - 1]
    enough_Q = last_Q - rounding(queries.vectors_QD, last_Q, queries.metric)
    n_found_Q = (found_QK[:, :k] >= enough_Q[:, None]).sum(axis=1)
    shares_Q: NDArray[np.float64] = n_found_Q / n_true_Q
    return shares_Q


def margin(recalls_Q: NDArray[np.float64], deviations: float) -> float:
    """Give how far a mean of so many queries may lie above that of all queries."""
    return deviations * float(recalls_Q.std()) / float(np.sqrt(len(recalls_Q)))


def worst(recalls_Q: NDArray[np.float64]) -> float:
    """Give the mean over the worst twentieth of the queries."""
    n = max(1, round(WORST_SHARE * len(recalls_Q)))
    return float(np.sort(recalls_Q)[:n].mean())


def search_all(
    search: Search, queries_QD: NDArray[np.float32], k: int, parameters: Mapping[str, int],
    threads: int,
) -> NDArray[np.float32]:  # fmt: skip
    """Give the scores of what queries find, (Q, k).

    A batch at a time: FAISS holds for every query as many candidates as are ranked again.
    """
    batches = range(0, len(queries_QD), BATCH)
    return np.concatenate(
        [search(queries_QD[n : n + BATCH], k, parameters, threads)[0] for n in batches]
    )


def time_singles(
    search: Search, queries_QD: NDArray[np.float32], k: int, parameters: Mapping[str, int]
) -> NDArray[np.float64]:
    """Time each query alone, on one thread: seconds, (Q,)."""
    times = []
    for number in range(len(queries_QD)):
        query_QD = queries_QD[number : number + 1]
        start_s = time.perf_counter()
        search(query_QD, k, parameters, 1)
        times.append(time.perf_counter() - start_s)
    return np.array(times)


class Sweep:
    """Measures settings of one index on the queries that choose; each once."""

    def __init__(
        self, kind: Kind, search: Search, queries: Queries, *, k: int, target: float, threads: int
    ) -> None:
        """Set out to measure."""
        self._kind, self.search, self._queries = kind, search, queries
        self._k, self._target, self._threads = k, target, threads
        self.points: list[Point] = []

    def run(self) -> list[Point]:
        """Give the settings that reach the target, the cheapest first.

        For each factor of re-ranking the least effort that reaches it: recall grows with effort,
        so that halving finds it, and with the factor, so that a smaller one needs no less effort,
        and none reaches it where a larger one does not.
        """
        reached: list[Point] = []
        low = 0
        for column in reversed(list(self._columns())):
            point = self._least(column, low)
            if point is None:
                break
            reached.append(point)
            low = column.index(dict(point.parameters))
        if not reached:
            return []
        timed_QD = self._queries.vectors_QD[:FINAL_TIMED]
        times: dict[int, list[float]] = {n: [] for n in range(len(reached))}
        for _ in range(ROUNDS):
            for n, point in enumerate(reached):
                spent = time_singles(self.search, timed_QD, self._k, point.parameters)
                times[n].append(float(np.median(spent)))
        order = sorted(times, key=lambda n: statistics.median(times[n]))
        return [reached[n] for n in order]

    @property
    def best(self) -> Point | None:
        """The setting of the highest recall."""
        return max(self.points, key=lambda point: point.recall, default=None)

    def stronger(self, point: Point) -> Point | None:
        """Measure the next setting of the same column; None where there is none."""
        column = next(column for column in self._columns() if point.parameters in column)
        place = column.index(dict(point.parameters)) + 1
        return self.measure(column[place]) if place < len(column) else None

    def _columns(self) -> Iterator[Sequence[dict[str, int]]]:
        """Give settings of growing effort, for each factor of re-ranking."""
        kind = self._kind
        if kind.family == "graph":
            efforts = [{"efSearch": effort} for effort in EFFORTS if effort >= self._k]
        else:
            probes = [e for e in EFFORTS if e < kind.lists]
            efforts = [{"nprobe": e} for e in [*probes, kind.lists]]
        if not kind.refines:
            yield efforts
            return
        for factor in GRAPH_FACTORS if kind.family == "graph" else LIST_FACTORS:
            yield [effort | {"k_factor": factor} for effort in efforts]

    def _least(self, column: Sequence[dict[str, int]], low: int) -> Point | None:
        """Halve a column from a place on until its least setting that reaches it is found."""
        high = len(column)
        found = None
        while low < high:
            middle = (low + high) // 2 if found or high < len(column) else self._guess(low, high)
            point = self.measure(column[middle])
            if point.recall - point.margin >= self._target:
                found, high = point, middle
            else:
                low = middle + 1
        return found

    def _guess(self, low: int, high: int) -> int:
        """Begin nearer to the cheap end: what is dear to measure is seldom needed."""
        return low + (high - low) // 3

    def measure(self, parameters: Mapping[str, int]) -> Point:
        """Measure a setting."""
        scores = search_all(
            self.search, self._queries.vectors_QD, self._k, parameters, self._threads
        )
        found_Q = recalls(scores, self._queries, self._k)
        timed_QD = self._queries.vectors_QD[:SWEEP_TIMED]
        times = time_singles(self.search, timed_QD, self._k, parameters)
        point = Point(
            parameters=dict(parameters),
            recall=float(found_Q.mean()),
            margin=margin(found_Q, CHOOSING_DEVIATIONS),
            query_s=float(np.median(times)),
        )
        self.points.append(point)
        return point
