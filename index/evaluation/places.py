"""Where the ids that a search gives stand in a collection, and of which class they are.

Ids come back from searches by the million, so that they are looked up in arrays, once sorted.

Shapes: N images of the collection.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from index.knn import MISSING


class Places:
    """The places of a collection's ids within `collection.ids`."""

    def __init__(self, ids_N: NDArray[np.int64]) -> None:
        """Sort the ids of one snapshot."""
        self._order_N = np.argsort(ids_N, kind="stable")
        self._sorted_N = ids_N[self._order_N]

    def of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the place of each id, in an array of the same shape; -1 where there is none."""
        if not len(self._sorted_N):
            return np.full(ids.shape, MISSING, np.int64)
        ranks = np.minimum(np.searchsorted(self._sorted_N, ids), len(self._sorted_N) - 1)
        return np.where(self._sorted_N[ranks] == ids, self._order_N[ranks], MISSING)
