"""How good a ranking is, where what has the query's label is relevant.

Rules:
    A query is no answer to itself; who ranks leaves it out.
    R is how many relevant images the collection has for a query. A query with R = 0 has no
    score: it is left out, and counted by who asks.
    A place that nothing was found for is not relevant.

Sources:
    Precision, R-precision, average precision: Manning, Raghavan and Schuetze, Introduction to
    Information Retrieval (2008), section 8.4.
    mAP@R: Musgrave, Belongie and Lim, A Metric Learning Reality Check (arXiv 2003.08505): the
    mean over the first R places of P(i) where place i is relevant, and of 0 elsewhere.
    nDCG: Jaervelin and Kekaelaeinen, Cumulated gain-based evaluation of IR techniques (ACM
    TOIS 20, 2002), with gains of 0 and 1 and the discount log2(i + 1).
    Recall@k as retrieval of images has it, the share of queries with something relevant among
    the first k: Oh Song et al., Deep Metric Learning via Lifted Structured Feature Embedding
    (arXiv 1511.06452).

Shapes: Q queries, K places, M measures.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CUTS = (1, 5, 10)
"""Places that precision and recall are cut at."""

NDCG_CUT = 10
MAP_AT_R = "mAP@R"
MEASURES = (
    *(f"P@{k}" for k in CUTS),
    MAP_AT_R,
    "R-precision",
    *(f"recall@{k}" for k in CUTS),
    f"nDCG@{NDCG_CUT}",
)
"""The columns of `retrieval_scores`; recall@1 is P@1 by definition."""

LEAST_PLACES = max(*CUTS, NDCG_CUT)
"""Places that are looked at even where R is smaller."""


def retrieval_scores(
    relevant_QK: NDArray[np.bool_], n_relevant_Q: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Score rankings.

    Args:
        relevant_QK: whether the image at each place is relevant, best first, the query itself
            left out; K at least the largest R and `LEAST_PLACES`.
        n_relevant_Q: R of each query, at least 1.

    Returns:
        (Q, M) float64, 0 to 1, a column a measure of `MEASURES`.
    """
    n_queries, n_places = relevant_QK.shape
    assert n_places >= max(LEAST_PLACES, int(n_relevant_Q.max(initial=0))), "too few places"
    assert (n_relevant_Q > 0).all(), "a query without relevant images has no score"
    places_K = np.arange(1, n_places + 1)
    hits_QK = relevant_QK.cumsum(axis=1, dtype=np.int32)
    is_counted_QK = relevant_QK & (places_K <= n_relevant_Q[:, None])
    precision_at_hits_QK = np.where(is_counted_QK, hits_QK / places_K, 0.0)
    at_r = hits_QK[np.arange(n_queries), n_relevant_Q - 1]
    discounts_K = 1 / np.log2(1 + np.arange(1, NDCG_CUT + 1))
    gain_Q = relevant_QK[:, :NDCG_CUT] @ discounts_K
    ideal_gain_Q = discounts_K.cumsum()[np.minimum(n_relevant_Q, NDCG_CUT) - 1]
    columns = [
        *(hits_QK[:, k - 1] / k for k in CUTS),
        precision_at_hits_QK.sum(axis=1) / n_relevant_Q,
        at_r / n_relevant_Q,
        *(hits_QK[:, k - 1] > 0 for k in CUTS),
        gain_Q / ideal_gain_Q,
    ]
    return np.stack(columns, axis=1).astype(np.float64)
