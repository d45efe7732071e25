"""Who uses a thing that may be replaced: it is closed when it is retired and nobody does.

Rules:
    Whoever uses a model or a collection across an `await` holds a lease on it. What is
    leased stays open until the lease ends, also where a newer version has taken its place.
    A thing is closed once: when it has been retired and its last lease has ended, or when
    its owner closes everything.
    Belongs to one event loop; closing, which may join threads, is handed to `dispose`.

Model: the connections of httpcore's pool, which are closed when they are both expired and
idle.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

Thing = TypeVar("Thing")
Dispose = Callable[[Callable[[], None]], None]


def at_once(close: Callable[[], None]) -> None:
    """Close here and now."""
    close()


def _closed() -> None:
    """Do nothing: it was closed."""


class Hold:
    """Counts the users of one thing, and closes it after the last."""

    def __init__(self, close: Callable[[], None], *, dispose: Dispose = at_once) -> None:
        """Take over the closing of a thing.

        Args:
            close: closes the thing; may block.
            dispose: runs `close`, such as on a thread; here and now by default.
        """
        self._close = close
        self._dispose = dispose
        self.users = 0
        self.retired = False
        self.closed = False

    def __repr__(self) -> str:
        state = "closed" if self.closed else "retired" if self.retired else "open"
        return f"<Hold {state} users={self.users}>"

    def take(self) -> None:
        """Count one more user."""
        assert not self.closed, "what was closed is leased no more"
        self.users += 1

    def give_back(self) -> None:
        """Count one user less; the last one of what was retired closes it."""
        self.users -= 1
        if self.retired and not self.users:
            self._end(self._dispose)

    def retire(self) -> None:
        """Close it as soon as nobody uses it."""
        self.retired = True
        if not self.users:
            self._end(self._dispose)

    def close(self) -> None:
        """Close it here and now, used or not."""
        self._end(at_once)

    def _end(self, dispose: Dispose) -> None:
        """Close it, unless that was done."""
        if not self.closed:
            self.closed = True
            close, self._close = self._close, _closed  # what was closed is not kept in memory
            dispose(close)


class Lease(Generic[Thing]):
    """A context manager: within it a thing stays open."""

    __slots__ = ("_hold", "_thing")

    def __init__(self, thing: Thing, hold: Hold) -> None:
        """Offer a lease; it begins when the context is entered."""
        self._thing = thing
        self._hold = hold

    def __enter__(self) -> Thing:
        self._hold.take()
        return self._thing

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hold.give_back()
