"""Builds the kinds of index that are worth it, and takes the cheapest that reaches a recall.

Rules:
    Queries are vectors that the index does not have: where nobody gives others, some of its own
    rows are held back while it is built and tried out, and added before it is written. A copy
    of a stored vector, or one a little off, would find its way by the stored one's links.
    Each kind is tried out by itself: `index.ann.trials`.
    Exact search reaches any recall: where there are too few rows to hold some back, it is taken.
    Where none reaches it nothing is chosen, and the error says what the best one reached.

Shapes: Q queries, N rows, D dimensions, K neighbours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.ann.candidates import Candidate, choose_candidates
from index.ann.kinds import EXACTLY, FLAT, settings_text
from index.ann.making import SEED
from index.ann.memory import as_size
from index.ann.peak import PeakMemory, held_bytes
from index.ann.sweep import BATCH, LIST_FACTORS
from index.ann.trials import MIN_QUERIES, RECALL_KS, SINGLES, Bench, Goal, Trial
from index.errors import CollectionError
from index.knn import COSINE
from models.errors import UsageError

MAX_QUERIES, QUERY_SHARE = 2000, 0.1
"""Rows that are held back: enough to tell .99 from .995, and never more than a tenth."""

ALLOCATOR_BYTES = 32 << 20
"""What threads' heaps and buffers of BLAS came to, beside what is counted."""

log = logging.getLogger("horace.index")


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was tried and what was taken.

    Attributes:
        goal: what was asked for.
        metric: how vectors are compared.
        count: of the vectors.
        dim: their length.
        queries: where they are from.
        n_queries: of them; half chose, half confirmed. 0 where exact search was taken
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
        bench = Bench(vectors_ND, goal, folder, metric, queries_QD, held_back)
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
    drawn = np.random.default_rng(SEED).choice(count, n, replace=False)
    return np.sort(drawn)


def _not_reached(goal: Goal, trials: Sequence[Trial]) -> CollectionError:
    """Say what the best kind reached."""
    best = max(trials, key=lambda trial: trial.figures.recall[goal.k])
    parameters = max(best.points, key=lambda point: point.recall).parameters
    return CollectionError(
        "tuning",
        expected=f"recall@{goal.k} of at least {goal.recall:g}, with a margin for the sample",
        found=f"{best.figures.recall[goal.k]:.4f} at best, by {best.candidate.factory} with "
        f"{settings_text(parameters)}",
        mend=f"ask for less, give more memory, or {EXACTLY}",
    )
