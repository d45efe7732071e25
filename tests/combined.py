"""Searches with combined queries as a program does that has the collection before it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from index.combine import Combination, pad_ids, query_vector
from index.interface import AnyCollection
from index.neighbours import Neighbours


def search_combined(
    collection: AnyCollection,
    combinations: Sequence[Combination],
    k: int,
    *,
    fingerprint: str,
    filter: str | None = None,
) -> Neighbours:
    """Find the k nearest images of each combination, its own stored examples left out."""
    queries = [query_vector(collection, one) for one in combinations]
    queries_QD = np.stack(queries) if queries else np.empty((0, collection.dim), np.float32)
    without_QW = pad_ids([one.ids for one in combinations])
    return collection.search(
        queries_QD, k, fingerprint=fingerprint, filter=filter, without_QW=without_QW
    )
