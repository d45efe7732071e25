"""Opens a thing on a thread for who waits for it, and closes what nobody waits for any more.

And says of a thread that is lost what it was at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol, TypeVar

from serve.errors import InternalError, StartError
from serve.leases import Dispose
from serve.pool import ThreadPool


class Closable(Protocol):
    """Something with an end."""

    def close(self) -> None:
        """End it."""


Thing = TypeVar("Thing", bound=Closable)


async def open_on(
    pool: ThreadPool, opening: Callable[[], Thing], dispose: Dispose, *, what: str
) -> Thing:
    """Open something on a thread.

    On cancellation before its turn it is never opened; after that it is closed once it is open.

    Args:
        pool: has the thread.
        opening: opens it; may block.
        dispose: runs what closes it; see `serve.leases`.
        what: its name in an error.

    Raises:
        StartError: the thread died, or hangs.
    """
    is_wanted = True
    work = asyncio.ensure_future(pool.run(lambda: opening() if is_wanted else None))
    try:
        with naming(what):
            opened = await asyncio.shield(work)
    except asyncio.CancelledError:
        is_wanted = False
        work.add_done_callback(partial(_close, dispose))
        raise
    assert opened is not None, "it was wanted"
    return opened


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Wait for a thread that looks at something or opens it.

    Raises:
        StartError: the thread died, or hangs.
    """
    try:
        yield
    except InternalError as error:
        raise StartError(
            what,
            expected="one that is opened within --watchdog.opening-s",
            found="a thread that hangs, or has died",
            mend="see what it waits for, or allow more time",
        ) from error


def _close(dispose: Dispose, work: asyncio.Future[Thing | None]) -> None:
    """Close what was opened, if it was."""
    if work.cancelled() or work.exception() is not None:
        return
    if (opened := work.result()) is not None:
        dispose(opened.close)
