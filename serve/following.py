"""Keeps a served collection up with whoever writes to it, in whatever process.

Rules:
    A search sees every write that was acknowledged before the search came: it asks, which costs
    two looks at a file's status, and where something was written it waits until that is read, and
    where a read was under way, which may have looked before that, for another.
    It does not wait once the read has taken `WAIT_S`: what takes longer, such as opening the
    large segment of a compaction, goes on behind, and searches are answered at once from the
    snapshot at hand.
    No search fails because of a writer. What cannot be read, or was made by another encoder,
    is not taken: it is told once, tried again after `RETRY_S`, and what was served is served.
    One search, one snapshot: whoever has it keeps it to the end.

Files are read on a thread that is given; the rest belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeAlias

from models.errors import FingerprintMismatchError, HoraceError

if TYPE_CHECKING:
    from index.collection import Collection

log = logging.getLogger("horace.serve")

WAIT_S = 0.1
"""A journal of thousands of images is read in some milliseconds, a segment of a million hashed
and opened in seconds."""

RETRY_S = 1.0


RunOnThread: TypeAlias = "Callable[[Callable[[], Collection]], Awaitable[Collection]]"
"""The signature of `serve.pool.ThreadPool.run`."""


class Following:
    """The snapshot of a collection that is searched, and what replaces it by later ones."""

    def __init__(
        self, name: str, collection: Collection, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin with a snapshot, whose owner closes it; see `close` for the later ones.

        Args:
            name: the collection's, for the log.
            collection: the first snapshot.
            clock: monotonic seconds.
        """
        self.current = collection
        self._name = name
        self._first = collection
        self._clock = clock
        self._reading: asyncio.Task[None] | None = None
        self._slow_at_s = float("-inf")
        self._one_at_a_time = asyncio.Lock()
        self._retry_at_s = float("-inf")
        self._told = ""

    def __repr__(self) -> str:
        return f"<Following of {self._name}{', reading' if self._reading else ''}>"

    def close(self) -> None:
        """Let go of the snapshot that was read last."""
        if self.current is not self._first:
            self.current.close()

    async def snapshot(self, run: RunOnThread) -> Collection:
        """Give the snapshot to search now: the latest, where that can be had in time.

        Never raises because of what is on the disk.

        Args:
            run: runs what reads files on a thread.
        """
        looks = 1 if self._reading is None else 2  # one that runs may have looked too soon
        for _ in range(looks):
            if self.current.is_current() or self._clock() < self._retry_at_s:
                break
            reading = self._read(run)
            left_s = max(0.0, self._slow_at_s - self._clock())
            done, _ = await asyncio.wait([reading], timeout=left_s)
            if not done:
                break
        return self.current

    async def catch_up(self, run: RunOnThread) -> None:
        """Read what is on the disk now, however long it takes.

        Raises:
            FingerprintMismatchError: another encoder made what is there now.
            CollectionError: it cannot be read.
        """
        async with self._one_at_a_time:
            self._take(await run(self.current.latest))

    def _read(self, run: RunOnThread) -> asyncio.Task[None]:
        """Give what reads the latest snapshot for all who wait for it."""
        if self._reading is None:
            self._slow_at_s = self._clock() + WAIT_S
            self._reading = asyncio.create_task(self._try(run))
        return self._reading

    async def _try(self, run: RunOnThread) -> None:
        """Read the latest snapshot, or tell why not."""
        try:
            await self.catch_up(run)
        except HoraceError as error:
            self._retry_at_s = self._clock() + RETRY_S
            if str(error) != self._told:
                self._told = str(error)
                log.error(
                    "collection %s has changed and is not followed, what was served is served: %s",
                    self._name,
                    error,
                )
        except Exception:
            self._retry_at_s = self._clock() + RETRY_S
            log.exception("following collection %s failed in our own code", self._name)
        finally:
            self._reading = None

    def _take(self, latest: Collection) -> None:
        """Search a later snapshot from now on.

        Raises:
            FingerprintMismatchError: another encoder made it.
        """
        if latest.fingerprint != self.current.fingerprint:
            raise FingerprintMismatchError(
                f"collection {self._name}",
                expected=self.current.fingerprint,
                found=latest.fingerprint,
                mend="serve the bundle that made it, and have the server read both again, by "
                "SIGHUP (kill -HUP) or by --watch-s",
            )
        self.current = latest
        self._told = ""
