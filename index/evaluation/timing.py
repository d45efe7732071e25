"""How long searches of a collection take: one query a call, and many.

Rules:
    The first calls are not timed: they fault in what is mapped.
    One call at a time: what a server makes of several at once is another measurement.
    The clock is given, so that what is made of times can be tested without waiting.

Shapes: Q queries, D dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from index.evaluation.recall_report import Timing

TIMED_K = 10
SINGLE_QUERIES = 300
"""Queries that are timed one a call, at most: p99 needs a hundred."""

WARM_UP = 10
BATCH_QUERIES = 1000
"""Queries of the call that is timed for many, at most."""

BATCHES = 3

Search = Callable[[NDArray[np.int64], int], object]
"""Searches for the queries with these numbers, for so many neighbours."""


def time_searches(
    search: Search,
    n_queries: int,
    *,
    k: int = TIMED_K,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time searches.

    Args:
        search: what is timed.
        n_queries: how many there are, at least 1.
        k: neighbours a query.
        clock: gives seconds.
    """
    singles = [np.array([n]) for n in range(min(n_queries, SINGLE_QUERIES))]
    batch = np.arange(min(n_queries, BATCH_QUERIES))
    for query in singles[:WARM_UP]:
        search(query, k)
    latencies_s = np.sort([_time(search, query, k, clock) for query in singles])
    batches_s = [_time(search, batch, k, clock) for _ in range(BATCHES)]
    p50, p95, p99 = np.quantile(latencies_s, [0.5, 0.95, 0.99])
    return Timing(
        k=k,
        n_single=len(singles),
        p50_ms=1e3 * float(p50),
        p95_ms=1e3 * float(p95),
        p99_ms=1e3 * float(p99),
        single_qps=len(singles) / float(latencies_s.sum()),
        n_batch=len(batch),
        batched_qps=len(batch) / float(np.median(batches_s)),
        latencies_ms=(1e3 * latencies_s).tolist(),
    )


def _time(search: Search, queries: NDArray[np.int64], k: int, clock: Callable[[], float]) -> float:
    """Time one call."""
    start_s = clock()
    search(queries, k)
    return clock() - start_s
