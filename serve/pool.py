"""A few threads that do short tasks in the order in which they were given.

Rules:
    The number of threads never changes; the queue has no bound of its own, because what is
    put into it was admitted before.
    A task that raises is a fault of ours: it is logged, and its thread goes on. A thread that
    dies or hangs is replaced, and who gave the task is told: `serve.crew`.
    Work in pieces may take long: it hangs where one piece does, and it stops after a piece where
    nobody waits any more.
    Threads are daemons: nothing stuck here keeps the process from ending.

The standard library's ThreadPoolExecutor is not used: it makes a future and takes two locks
a task, and joins its threads at exit, stuck or not.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeAlias, TypeVar

from serve.crew import Crew, Member
from serve.errors import InternalError

Result = TypeVar("Result")
Call: TypeAlias = Callable[[], None]
Task: TypeAlias = Callable[[Member], None]

log = logging.getLogger("horace.serve")


def _ignore() -> None:
    """Tell nobody."""


class ThreadPool:
    """Runs tasks on a fixed number of threads, first come, first served."""

    def __init__(self, *, threads: int, name: str, on_trouble: Call = _ignore) -> None:
        """Start `threads` threads, called `name`-0, `name`-1 and so on.

        `on_trouble` is called on some thread once one has died or hangs and is replaced.
        """
        self._tasks: queue.SimpleQueue[tuple[Task, Call] | None] = queue.SimpleQueue()
        self._task_s = 0.0  # smoothed; several threads may write it, and one is lost then
        self._crew = Crew(
            self._work, size=threads, name=name, on_lost=_tell_lost, on_trouble=on_trouble
        )

    def __repr__(self) -> str:
        return f"<ThreadPool {self._crew!r}, {self.waiting} waiting>"

    @property
    def size(self) -> int:
        """How many threads there are."""
        return self._crew.size

    @property
    def alive(self) -> bool:
        """Whether it has a thread that does not hang, or may have one in a moment."""
        return self._crew.present > 0

    @property
    def wait_s(self) -> float | None:
        """How long a task given now would wait, going by those of late; None without any."""
        return self.waiting * self._task_s / self.size or None

    @property
    def waiting(self) -> int:
        """How many tasks no thread has taken yet."""
        return self._tasks.qsize()

    def submit(self, task: Call, on_lost: Call = _ignore) -> None:
        """Run `task` when its turn comes; it reports its result, and its errors, itself.

        `on_lost` is called, on another thread, if its thread dies or hangs on the way; a task
        that hangs may still end afterwards.
        """
        self._tasks.put((lambda _: task(), on_lost))

    async def run(self, work: Callable[[], Result]) -> Result:
        """Run `work` when its turn comes, and give what it returns or raises.

        On cancellation before its turn it never runs; after that it runs on unseen.

        Raises:
            InternalError: its thread died, or hangs.
        """
        return await self.run_in_pieces(lambda _: work())

    async def run_in_pieces(self, work: Callable[[Call], Result]) -> Result:
        """Run `work` when its turn comes, and give what it returns or raises.

        On cancellation before its turn it never runs; after that it ends with the piece that it
        is at.

        Args:
            work: is given what it is to call after each piece, which raises where the rest is
                not wanted.

        Raises:
            InternalError: its thread died, or hangs at one piece.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def task(member: Member) -> None:
            if future.cancelled():
                return

            def on_piece() -> None:
                member.go_on()
                if member.given_up or future.done():
                    raise _lost()

            try:
                result = work(on_piece)
            except Exception as error:
                loop.call_soon_threadsafe(_fail, future, error)
            else:
                loop.call_soon_threadsafe(_succeed, future, result)

        def on_lost() -> None:
            loop.call_soon_threadsafe(_fail, future, _lost())

        self._tasks.put((task, on_lost))
        return await future

    def look(self, *, elapsed_s: float, limit_s: float) -> None:
        """Replace threads that have died or hang; see `serve.watchdog`."""
        self._crew.look(elapsed_s=elapsed_s, limit_s=limit_s)

    def close(self, *, timeout_s: float | None = None) -> bool:
        """End the threads after the tasks that wait; whether all ended in time."""
        self._crew.dismiss()
        for _ in range(self._crew.size):
            self._tasks.put(None)
        return self._crew.join(timeout_s)

    def _work(self, member: Member) -> None:
        """Do tasks until told to stop."""
        while not member.given_up and (item := self._tasks.get()) is not None:
            task, on_lost = item
            member.begin(on_lost)
            started_s = time.monotonic()
            try:
                task(member)
            except Exception:
                log.exception("a task of %s failed", threading.current_thread().name)
            self._task_s += (time.monotonic() - started_s - self._task_s) / 8
            member.end()
            del item, task, on_lost  # its images go now, not when the next task comes


def _tell_lost(member: Member) -> None:
    """Tell who gave a task that it is lost."""
    if (on_lost := member.work) is not None:
        try:
            on_lost()
        except RuntimeError:  # the event loop is closed: nobody waits
            log.debug("a task was lost that nobody waits for")


def _lost() -> InternalError:
    """Make the error for who waits for a thread that is lost."""
    return InternalError("the server has lost a thread that was at this request")


def _succeed(future: asyncio.Future[Result], result: Result) -> None:
    """Give a result to whom it may concern."""
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Result], error: Exception) -> None:
    """Give an error to whom it may concern."""
    if not future.done():
        future.set_exception(error)
