"""How sure a mean over queries is: percentile intervals of the bootstrap.

Rules:
    Queries are what is drawn: the interval says how much the mean would change with other
    queries of the same kind, and nothing of another collection or another training.
    The same seed gives the same interval.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.

Shapes: Q queries, M measures.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
LEVEL = 0.95
BLOCK_BYTES = 32 << 20
"""Of the counts that say how often each query was drawn."""


def bootstrap_interval(
    values_QM: NDArray[np.float64],
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give the ends of the interval that holds `LEVEL` of the resampled means.

    Args:
        values_QM: what each query reached; at least one query.
        seed: of the draws.
        resamples: how many times Q queries are drawn with replacement.

    Returns:
        (M,) the lower ends and (M,) the upper ones.
    """
    n = len(values_QM)
    assert n > 0, "there is no mean of no queries"
    rng = np.random.default_rng(seed)
    step = max(1, BLOCK_BYTES // (8 * n))
    means = []
    for start in range(0, resamples, step):
        drawn = rng.integers(0, n, (min(step, resamples - start), n))
        counts = np.stack([np.bincount(row, minlength=n) for row in drawn])
        means.append(counts.astype(np.float64) @ values_QM / n)
    tail = (1 - LEVEL) / 2
    low_M, high_M = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    return low_M, high_M
