"""Observations that cost the one who makes them almost nothing: noted now, counted later.

Rules:
    To note is to append to a deque: no lock, no look-up, no loop over buckets. What is noted
    is folded into the counts when some hundreds have gathered, and whenever somebody reads.
    Nothing noted is lost or counted twice, whatever threads note and fold at once.
    A histogram's memory is that of its buckets, whatever it sees.

Why not prometheus_client's own metrics: a request has five values to observe and eight counters,
12 us with them and 3 us with all that is done here (docs/decisions/0011-operation.md).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Note = TypeVar("Note")

FOLD_EVERY = 256
"""Notes that gather before they are folded: a millisecond's work or less."""

SECONDS = tuple(round(step * 2**power / 4000, 9) for power in range(-1, 17) for step in (1.0, 1.5))
"""Upper bounds of buckets of time: from 0.125 ms to 24.6 s, two to a factor of two: a
quantile read from them is at most half as much again as the true one."""

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
"""Upper bounds of buckets of batch sizes, in images."""


class Histogram:
    """Counts of values by bucket. Not safe for threads: its owner folds under a lock."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """Count into buckets whose upper bounds these are, and one for what is above them."""
        self._bounds = np.asarray(bounds, np.float64)
        self._counts = np.zeros(len(bounds) + 1, np.int64)
        self._sum = 0.0

    def __repr__(self) -> str:
        return f"<Histogram {self.count} values, sum {self._sum:g}>"

    @property
    def count(self) -> int:
        """How many values there were."""
        return int(self._counts.sum())

    @property
    def sum(self) -> float:
        """What they add up to."""
        return self._sum

    def add(self, values: ArrayLike) -> None:
        """Count values; one that equals a bound belongs below it."""
        values_N: NDArray[np.float64] = np.asarray(values, np.float64)
        places = np.searchsorted(self._bounds, values_N, side="left")
        self._counts += np.bincount(places, minlength=len(self._counts))
        self._sum += float(values_N.sum())

    def cumulative(self) -> list[tuple[str, float]]:
        """Give upper bounds as Prometheus writes them, with the values up to each."""
        bounds = [*map(repr, self._bounds.tolist()), "+Inf"]
        return list(zip(bounds, np.cumsum(self._counts).astype(float).tolist(), strict=True))


class Notes(Generic[Note]):
    """What was noted and not yet folded."""

    def __init__(self, fold: Callable[[list[Note]], None], lock: threading.Lock) -> None:
        """Gather notes.

        Args:
            fold: counts them; given each note once, in order, with `lock` held.
            lock: guards what `fold` changes. Who notes never waits for it.
        """
        self._fold = fold
        self._notes: deque[Note] = deque()
        self._lock = lock

    def __repr__(self) -> str:
        return f"<Notes {len(self._notes)} to fold>"

    def add(self, note: Note) -> None:
        """Note something; now and then this folds, where nobody else is at it."""
        self._notes.append(note)
        if len(self._notes) >= FOLD_EVERY and self._lock.acquire(blocking=False):
            try:
                self.fold()
            finally:
                self._lock.release()

    def fold(self) -> None:
        """Count what there is now; the lock is held."""
        if count := len(self._notes):
            self._fold([self._notes.popleft() for _ in range(count)])
