"""Tries kinds of index out over the same vectors with the same queries, one after the other.

Rules:
    One half of the queries chooses a setting, the other confirms it: `index.ann.sweep`.
    Exact search is timed, and nothing else: it has every recall.
    One index is in memory at a time; those that reach the target wait on the disk.

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
from index.ann.candidates import Candidate
from index.ann.kinds import FLAT, NEIGHBOURS, settings_text
from index.ann.making import SEED, Builder, write_index
from index.ann.peak import PeakMemory
from index.ann.sweep import (
    BATCH,
    CONFIRMING_DEVIATIONS,
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
from index.knn import knn_search
from models.cpu import cpu_budget
from models.errors import UsageError

MIN_QUERIES = 20
"""Ten that choose and ten that confirm; with fewer no margin means anything."""

RECALL_KS = (1, 10, 100)
SINGLES = 256
CONFIRMATIONS = 3

log = logging.getLogger("horace.index")


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is asked for.

    Attributes:
        recall: mean share of the k nearest that are found, above 0 and up to 1.
        k: neighbours.
        memory_bytes: most that this process may hold, mapped files aside; unbounded where None.
        n_queries: rows to hold back, at most a tenth of all; up to 2,000 where None.
        factories: kinds to try, by name; those of the rule where empty.
        threads: CPU threads of builds and batches.
    """

    recall: float = 0.99
    k: int = 10
    memory_bytes: int | None = None
    n_queries: int | None = None
    factories: Sequence[str] = ()
    threads: int | None = None

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
        if self.threads is not None and self.threads < 1:
            raise UsageError("threads", expected="at least 1", found=str(self.threads))


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a setting gives on the queries that confirm.

    They had no part in finding it, but some in taking it: of the settings of a kind up to three a
    factor of re-ranking are held against them, until one holds, and of the kinds that do, the
    fastest with them is taken.

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
        file_bytes: of its file; 0 of exact search, None where the target was not reached and
            nothing was written.
        grown_bytes: memory that building it took.
        file: where it waits; None where it has none.
    """

    candidate: Candidate
    points: Sequence[Point]
    parameters: Mapping[str, int] | None
    figures: Figures
    build_s: float
    file_bytes: int | None
    grown_bytes: int
    file: Path | None


class Bench:
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
        shuffled = np.random.default_rng(SEED).permutation(len(queries_QD))
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
        goal, start_s = self._goal, time.monotonic()
        with PeakMemory() as memory:
            builder = Builder(
                self._vectors_ND,
                candidate.factory,
                metric=self._metric,
                threads=self._threads,
                held_back=self._held_back,
            )
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
            del base, index, search, sweep.search
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
            file_bytes=None if file is None else file.stat().st_size,
            grown_bytes=memory.peak_bytes - memory.before_bytes,
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
        scaled = index.scale(parameters, NEIGHBOURS, k)
        return index.search(queries_QD, k, parameters=scaled, threads=threads)

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
    verdict = "reaches it" if chosen is not None else "does not reach it"
    return (
        f"{candidate.factory}: built in {build_s:.1f} s; with {settings_text(best.parameters)} "
        f"recall@{goal.k} {figures.recall[goal.k]:.4f}, {1e3 * figures.p50_s:.2f} ms a query: "
        f"{verdict}"
    )
