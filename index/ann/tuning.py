"""Builds the kinds of index that are worth it, and takes the cheapest that reaches a recall.

Rules:
    Queries are vectors that the index does not have: where nobody gives others, some of its own
    rows are held back while it is built and tried out, and added before it is written. A copy
    of a stored vector, or one a little off, would find its way by the stored one's links.
    One half of the queries chooses, the other confirms: `index.ann.sweep`.
    One index is in memory at a time; those that reach the target wait on the disk.
    Exact search reaches any recall: where there are too few rows to hold some back, it is taken.
    Where none reaches it nothing is chosen, and the error says what the best one reached.

Shapes: Q queries, N rows, D dimensions, K neighbours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.ann.ann_index import AnnIndex
from index.ann.candidates import Candidate, choose_candidates
from index.ann.kinds import EXACTLY, FLAT
from index.ann.making import SEED, Builder, write_index
from index.ann.memory import as_size
from index.ann.peak import PeakMemory, held_bytes
from index.ann.sweep import (
    BATCH,
    CONFIRMING_DEVIATIONS,
    LIST_FACTORS,
    Point,
    Queries,
    Search,
    Sweep,
    exact_truth,
    margin,
    recalls,
    search_all,
    time_singles,
    worst,
)
from index.errors import CollectionError
from index.knn import COSINE, knn_search
from models.cpu import cpu_budget
from models.errors import UsageError

MAX_QUERIES, QUERY_SHARE, MIN_QUERIES = 2000, 0.1, 20
"""Rows that are held back: enough to tell .99 from .995, and never more than a tenth."""

RECALL_KS = (1, 10, 100)
SINGLES = 256

ALLOCATOR_BYTES = 32 << 20
"""What threads' heaps and buffers of BLAS came to, beside what is counted."""

CONFIRMATIONS = 3

log = logging.getLogger("horace.index")


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is asked for.

    Attributes:
        recall: mean share of the k nearest that are found, above 0 and up to 1.
        k: neighbours.
        memory_bytes: most that this process may hold, mapped files aside; unbounded where None.
        n_queries: rows to hold back; a tenth of all, up to 2,000, where None.
        factories: kinds to try, by name; those of the rule where empty.
        threads: CPU threads of builds and batches.
        seed: draws the rows that are held back.
    """

    recall: float = 0.99
    k: int = 10
    memory_bytes: int | None = None
    n_queries: int | None = None
    factories: Sequence[str] = ()
    threads: int | None = None
    seed: int = SEED

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 < self.recall <= 1:
            raise UsageError("recall", expected="above 0 and up to 1", found=str(self.recall))
        if not 1 <= self.k <= 1000:
            raise UsageError("k", expected="1 to 1000", found=str(self.k))
        if self.n_queries is not None and self.n_queries < MIN_QUERIES:
            raise UsageError(
                "queries", expected=f"at least {MIN_QUERIES}", found=str(self.n_queries)
            )


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a setting gives on the queries that had no part in choosing it.

    Attributes:
        recall: at each of 1, 10 and 100 neighbours, and at the goal's.
        worst: mean over the worst twentieth of the queries, at the goal's k.
        p50_s: median seconds of a single query on one thread.
        p99_s: of a hundred such queries one takes longer.
        single_qps: single queries a second, on one thread.
        batch_qps: queries a second in batches, on all threads.
    """

    recall: Mapping[int, float]
    worst: float
    p50_s: float
    p99_s: float
    single_qps: float
    batch_qps: float


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A kind that was built and tried out.

    Attributes:
        candidate: the kind, and what it was thought to weigh.
        points: the settings that were measured.
        parameters: the chosen ones; None where the target was not reached.
        figures: of those, or of the best setting.
        build_s: seconds of building it.
        file_bytes: of its file; 0 where there is none.
        grown_bytes: memory that building it took.
        file: where it waits; None where it has none.
    """

    candidate: Candidate
    points: Sequence[Point]
    parameters: Mapping[str, int] | None
    figures: Figures
    build_s: float
    file_bytes: int
    grown_bytes: int
    file: Path | None


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was tried and what was taken.

    Attributes:
        goal: what was asked for.
        metric: how vectors are compared.
        count: of the vectors.
        dim: their length.
        queries: where they are from.
        n_queries: of them; half chose, half confirmed. None where exact search was taken
            unmeasured.
        candidates: all kinds, those that did not fit among them.
        trials: those that were built.
        chosen: the cheapest that reached the target.
        peak_bytes: memory that the process held at most, mapped files aside.
        resident_bytes: with those; the kernel's mark since the process began.
        seconds: of all of it.
    """

    goal: Goal
    metric: str
    count: int
    dim: int
    queries: str
    n_queries: int
    candidates: Sequence[Candidate]
    trials: Sequence[Trial]
    chosen: Trial
    peak_bytes: int
    resident_bytes: int
    seconds: float


def tune(
    vectors_ND: NDArray[np.float32],
    goal: Goal,
    folder: Path,
    *,
    metric: str = COSINE,
    queries_QD: NDArray[np.float32] | None = None,
    queries_from: str = "",
) -> Tuned:
    """Build, try out and choose.

    Args:
        vectors_ND: (N, D) float32, a memory map, of unit length where `metric` is `cosine`.
        goal: what is asked for.
        folder: where indexes wait; empty, and the caller's to remove.
        metric: `cosine` or `euclidean`.
        queries_QD: (Q, D) queries of the user's own; rows are held back where None.
        queries_from: says where they are from.

    Raises:
        UsageError: no kind fits the memory, or there are too few vectors or queries for one that
            is not exact.
        CollectionError: none reaches the target.
    """
    start_s = time.monotonic()
    count, dim = vectors_ND.shape
    with PeakMemory() as memory:
        candidates = plan(count, dim, goal)
        held_back = np.empty(0, np.int64)
        exact = [one for one in candidates if one.factory == FLAT]
        is_unmeasured = queries_QD is None and not can_hold_back(count, goal) and bool(exact)
        if is_unmeasured:
            log.info("%d rows: too few to hold any back; exact search needs none", count)
            candidates = exact
            queries_QD = np.ascontiguousarray(vectors_ND[np.resize(np.arange(count), SINGLES)])
            queries_from = "stored rows: too few to hold any back"
        elif queries_QD is None:
            held_back = hold_back(count, goal)
            queries_QD = np.ascontiguousarray(vectors_ND[held_back])
            queries_from = "rows held back"
        elif len(queries_QD) < MIN_QUERIES:
            raise UsageError(
                "queries", expected=f"at least {MIN_QUERIES}", found=str(len(queries_QD))
            )
        bench = _Bench(vectors_ND, goal, folder, metric, queries_QD, held_back)
        trials = [bench.try_out(c, number) for number, c in enumerate(candidates) if c.fits]
    reached = [trial for trial in trials if trial.parameters is not None]
    if not reached:
        raise _not_reached(goal, trials)
    return Tuned(
        goal=goal,
        metric=metric,
        count=count,
        dim=dim,
        queries=queries_from,
        n_queries=0 if is_unmeasured else len(queries_QD),
        candidates=candidates,
        trials=trials,
        chosen=min(reached, key=lambda trial: trial.figures.p50_s),
        peak_bytes=memory.peak_bytes,
        resident_bytes=held_bytes("VmHWM"),
        seconds=time.monotonic() - start_s,
    )


def plan(count: int, dim: int, goal: Goal) -> list[Candidate]:
    """Give the kinds that would be built, within what the process does not hold already."""
    left = None
    if goal.memory_bytes is not None:
        taken = held_bytes() + tuning_bytes(count, dim, goal)
        left = goal.memory_bytes - taken
        if left <= 0:
            raise UsageError(
                "memory",
                expected=f"more than the {as_size(taken)} that this process and its queries take",
                found=as_size(goal.memory_bytes),
            )
    return choose_candidates(
        count, dim, memory_bytes=left, factories=goal.factories, recall=goal.recall
    )


def tuning_bytes(count: int, dim: int, goal: Goal) -> int:
    """Give what queries, their truth and a batch of searches take, beside the index."""
    n = min(count, goal.n_queries or MAX_QUERIES)
    widest = max(*RECALL_KS, goal.k)
    queries = 3 * n * 4 * dim + 4 * n * 12 * widest
    search = 2 * min(n, BATCH) * 12 * widest * max(LIST_FACTORS)
    return queries + search + ALLOCATOR_BYTES


def can_hold_back(count: int, goal: Goal) -> bool:
    """Tell whether there are rows enough for queries to be taken of them."""
    return _held_back_count(count, goal) >= MIN_QUERIES


def _held_back_count(count: int, goal: Goal) -> int:
    """Say how many rows are held back."""
    wanted = MAX_QUERIES if goal.n_queries is None else goal.n_queries
    return min(int(QUERY_SHARE * count), wanted)


def hold_back(count: int, goal: Goal) -> NDArray[np.int64]:
    """Draw the rows that no index has while it is tried out, ascending."""
    n = _held_back_count(count, goal)
    if n < MIN_QUERIES:
        raise UsageError(
            "vectors",
            expected=f"at least {round(MIN_QUERIES / QUERY_SHARE)}, so that some can be held back",
            found=str(count),
            mend=f"give queries of your own, or {EXACTLY}",
        )
    drawn = np.random.default_rng(goal.seed).choice(count, n, replace=False)
    return np.sort(drawn)


class _Bench:
    """Tries kinds out over the same vectors with the same queries."""

    def __init__(
        self,
        vectors_ND: NDArray[np.float32],
        goal: Goal,
        folder: Path,
        metric: str,
        queries_QD: NDArray[np.float32],
        held_back: NDArray[np.int64],
    ) -> None:
        """Find the truth, once for all."""
        self._vectors_ND, self._goal, self._folder, self._metric = vectors_ND, goal, folder, metric
        self._held_back = held_back
        self._threads = goal.threads or cpu_budget()
        rows_M = np.delete(np.arange(len(vectors_ND)), held_back)
        shuffled = np.random.default_rng(goal.seed).permutation(len(queries_QD))
        log.info("exact neighbours of %d queries", len(queries_QD))
        truth = exact_truth(
            np.ascontiguousarray(queries_QD[shuffled]),
            vectors_ND,
            min(len(rows_M), max(*RECALL_KS, goal.k)),
            rows_M=rows_M,
            metric=metric,
            threads=self._threads,
        )
        self._choosing, self._confirming = truth.half(0), truth.half(1)

    def try_out(self, candidate: Candidate, number: int) -> Trial:
        """Build a kind, measure it, and let it wait on the disk if it reaches the target."""
        if candidate.factory == FLAT:
            return self._try_flat(candidate)
        goal, before = self._goal, held_bytes()
        builder = Builder(
            self._vectors_ND,
            candidate.factory,
            metric=self._metric,
            threads=self._threads,
            held_back=self._held_back,
        )
        start_s = time.monotonic()
        with PeakMemory() as memory:
            base = builder.start()
        build_s = time.monotonic() - start_s
        index = AnnIndex(
            builder.kind,
            base,
            self._vectors_ND,
            metric=self._metric,
            rows_M=builder.rows_M if builder.kind.family == "graph" else None,
        )
        search = _searcher(index)
        sweep = Sweep(
            builder.kind, search, self._choosing, k=goal.k, target=goal.recall,
            threads=self._threads,
        )  # fmt: skip
        chosen = self._confirm(search, sweep)
        best = chosen or sweep.best
        assert best is not None
        figures = self._figures(search, best.parameters)
        log.info("%s", _says(candidate, build_s, chosen, best, figures, goal))
        file = None
        if chosen is not None:
            del index, search, sweep.search
            start_s = time.monotonic()
            file = self._folder / f"{number}.faiss"
            write_index(builder.finish(), file, candidate.factory)
            build_s += time.monotonic() - start_s
        return Trial(
            candidate=candidate,
            points=sweep.points,
            parameters=None if chosen is None else chosen.parameters,
            figures=figures,
            build_s=build_s,
            file_bytes=0 if file is None else file.stat().st_size,
            grown_bytes=max(0, memory.peak_bytes - before),
            file=file,
        )

    def _try_flat(self, candidate: Candidate) -> Trial:
        """Time exact search, whose recall nobody need measure."""
        search = self._exact
        figures = self._figures(search, {})
        point = Point(parameters={}, recall=1.0, margin=0.0, query_s=figures.p50_s)
        log.info("Flat: exact, %.2f ms a query", 1e3 * figures.p50_s)
        return Trial(
            candidate=candidate, points=[point], parameters={}, figures=figures, build_s=0.0,
            file_bytes=0, grown_bytes=0, file=None,
        )  # fmt: skip

    def _exact(
        self, queries_QD: NDArray[np.float32], k: int, _: Mapping[str, int], threads: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Compare every vector."""
        return knn_search(queries_QD, self._vectors_ND, k, metric=self._metric, threads=threads)

    def _confirm(self, search: Search, sweep: Sweep) -> Point | None:
        """Give the cheapest setting that holds on the other half of the queries, too.

        One that does not makes room for the next of the same factor of re-ranking.
        """
        for reached in sweep.run():
            point: Point | None = reached
            for _ in range(CONFIRMATIONS):
                if point is not None and self._holds(search, point):
                    return point
                point = None if point is None else sweep.stronger(point)
        return None

    def _holds(self, search: Search, point: Point) -> bool:
        """Tell whether a setting reaches the target on the queries that confirm."""
        queries, k = self._confirming, self._goal.k
        scores = search_all(search, queries.vectors_QD, k, point.parameters, self._threads)
        found_Q = recalls(scores, queries, k)
        error = margin(found_Q, CONFIRMING_DEVIATIONS)
        return bool(found_Q.mean() - error >= self._goal.recall)

    def _figures(self, search: Search, parameters: Mapping[str, int]) -> Figures:
        """Measure a setting on the queries that confirm."""
        queries, k = self._confirming, self._goal.k
        found: dict[int, NDArray[np.float64]] = {}
        for wanted in sorted({*RECALL_KS, k}):
            if wanted <= queries.truth_QK.shape[1] or wanted == k:
                scores = search_all(search, queries.vectors_QD, wanted, parameters, self._threads)
                found[wanted] = recalls(scores, queries, wanted)
        singles = time_singles(search, queries.vectors_QD[:SINGLES], k, parameters)
        return Figures(
            recall={wanted: float(found_Q.mean()) for wanted, found_Q in found.items()},
            worst=worst(found[k]),
            p50_s=float(np.median(singles)),
            p99_s=float(np.quantile(singles, 0.99)),
            single_qps=len(singles) / float(singles.sum()),
            batch_qps=self._batch_qps(search, queries, parameters),
        )

    def _batch_qps(self, search: Search, queries: Queries, parameters: Mapping[str, int]) -> float:
        """Search in batches on all threads; the median of the batches."""
        rates = []
        for start in range(0, len(queries.vectors_QD), BATCH):
            block_QD = queries.vectors_QD[start : start + BATCH]
            start_s = time.perf_counter()
            search(block_QD, self._goal.k, parameters, self._threads)
            rates.append(len(block_QD) / (time.perf_counter() - start_s))
        return float(np.median(rates))


def _searcher(index: AnnIndex) -> Search:
    """Search an index as a segment does."""

    def search(
        queries_QD: NDArray[np.float32], k: int, parameters: Mapping[str, int], threads: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        return index.search(queries_QD, k, parameters=parameters, threads=threads)

    return search


def _says(
    candidate: Candidate,
    build_s: float,
    chosen: Point | None,
    best: Point,
    figures: Figures,
    goal: Goal,
) -> str:
    """Say in one line what came of a kind."""
    parameters = ", ".join(f"{name} {value}" for name, value in best.parameters.items())
    verdict = "reaches it" if chosen is not None else "does not reach it"
    return (
        f"{candidate.factory}: built in {build_s:.1f} s; with {parameters} recall@{goal.k} "
        f"{figures.recall[goal.k]:.4f}, {1e3 * figures.p50_s:.2f} ms a query: {verdict}"
    )


def _not_reached(goal: Goal, trials: Sequence[Trial]) -> CollectionError:
    """Say what the best kind reached."""
    best = max(trials, key=lambda trial: trial.figures.recall[goal.k])
    parameters = ", ".join(
        f"{name} {value}"
        for name, value in max(best.points, key=lambda point: point.recall).parameters.items()
    )
    return CollectionError(
        "tuning",
        expected=f"recall@{goal.k} of at least {goal.recall:g}, with a margin for the sample",
        found=f"{best.figures.recall[goal.k]:.4f} at best, by {best.candidate.factory} with "
        f"{parameters}",
        mend=f"ask for less, give more memory, or {EXACTLY}",
    )
