"""The ids of images: hashes of their keys, which outlive a rebuild and fit an int64."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

from index.knn import MISSING
from models.errors import UsageError


def id_of(key: str) -> int:
    """Give the id of an image: the first 63 bits of the BLAKE2b hash of its key."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def as_ids(ids: ArrayLike) -> NDArray[np.int64]:
    """Give ids as int64, in the shape in which they come.

    Raises:
        UsageError: one is no whole number, or needs more than 63 bits.
    """
    try:
        given = np.asarray(ids)
    except (TypeError, ValueError):  # as lists of several lengths
        raise _no_ids(ids) from None
    if given.size == 0:
        return np.empty(given.shape, np.int64)
    if given.dtype.kind not in "iu":  # a float would be cut, and be the id of another image
        raise _no_ids(given.reshape(-1).tolist()[0])
    if given.dtype.kind == "u" and given.max() > np.iinfo(np.int64).max:
        raise _no_ids(given.max())
    return given.astype(np.int64, copy=False)


class Places:
    """Where ids stand in an array of them, which is sorted once. Any number of threads may use it.

    Ids come back from searches by the million, so that they are looked up in arrays.
    """

    def __init__(self, ids_N: NDArray[np.int64]) -> None:
        """Sort the ids; the array is kept, and nobody may write to it."""
        self._ids_N = ids_N
        self._by_id = np.argsort(ids_N, kind="stable")

    def of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the place of each id, in an array of the same shape.

        The last place where an id stands more than once, -1 where it does not.
        """
        if not len(self._ids_N):
            return np.full(ids.shape, MISSING, np.int64)
        order = np.argsort(ids, axis=None)
        asked = ids.reshape(-1)[order]  # ascending: the next is near in memory
        ranks = np.searchsorted(self._ids_N, asked, side="right", sorter=self._by_id) - 1
        places = self._by_id[ranks]  # of rank -1 the last, which has another id
        found = np.empty(ids.shape, np.int64)
        found.reshape(-1)[order] = np.where(self._ids_N[places] == asked, places, MISSING)
        return found


def _no_ids(found: object) -> UsageError:
    """Make the error for what is no id."""
    return UsageError(
        "ids",
        expected="whole numbers below 2^63",
        found=f"{found!r:.60}" if isinstance(found, str) else f"{found!s:.60}",
        mend="take them from a search, or by `find_key`",
    )
