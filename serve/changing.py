"""Holds an engine's lock for a change of its batcher, and lets in whoever that made room for.

Rules:
    Whatever has changed, those in line who may come in now are admitted before the lock is
    let go, and told after: no waiting request depends on another being answered.
    A change that fails admits nobody.

A class and not a generator: it is entered twice a request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from serve.batching import Batcher
from serve.job import Job


class Changing:
    """A context that any thread may enter, one at a time."""

    __slots__ = ("_batcher", "_lock", "_tell")

    def __init__(
        self,
        lock: threading.Condition,
        batcher: Batcher[Job],
        tell: Callable[[Sequence[Job]], None],
    ) -> None:
        """Take the lock around a batcher, and who tells those who are admitted."""
        self._lock = lock
        self._batcher = batcher
        self._tell = tell

    def __enter__(self) -> None:
        """Wait for the lock."""
        self._lock.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let go of it, and tell those for whom the change has made room."""
        try:
            admitted = self._batcher.admit_line() if kind is None else ()
        finally:
            self._lock.release()
        if admitted:
            self._tell(admitted)
