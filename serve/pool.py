"""A few threads that do short tasks in the order in which they were given.

Rules:
    The number of threads never changes; the queue has no bound of its own, because what is
    put into it was admitted before.
    A task that raises is a fault of ours: it is logged, and its thread goes on.
    Threads are daemons: nothing stuck here keeps the process from ending.

The standard library's ThreadPoolExecutor is not used: it makes a future and takes two locks
a task, and joins its threads at exit, stuck or not.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

log = logging.getLogger("horace.serve")


class ThreadPool:
    """Runs tasks on a fixed number of threads, first come, first served."""

    def __init__(self, *, threads: int, name: str) -> None:
        """Start `threads` threads, called `name`-0, `name`-1 and so on."""
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def __repr__(self) -> str:
        return f"<ThreadPool {self._threads[0].name} {self.size} threads, {self.waiting} waiting>"

    @property
    def size(self) -> int:
        """How many threads there are."""
        return len(self._threads)

    @property
    def waiting(self) -> int:
        """How many tasks no thread has taken yet."""
        return self._tasks.qsize()

    def submit(self, task: Callable[[], None]) -> None:
        """Run `task` when its turn comes; it reports its result, and its errors, itself."""
        self._tasks.put(task)

    async def run(self, work: Callable[[], Result]) -> Result:
        """Run `work` when its turn comes, and give what it returns or raises.

        On cancellation before its turn it never runs; after that it runs on unseen.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def task() -> None:
            if future.cancelled():
                return
            try:
                result = work()
            except Exception as error:
                loop.call_soon_threadsafe(_fail, future, error)
            else:
                loop.call_soon_threadsafe(_succeed, future, result)

        self.submit(task)
        return await future

    def close(self, *, timeout_s: float | None = None) -> bool:
        """End the threads after the tasks that wait; whether all ended in time."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(timeout_s)
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        """Do tasks until told to stop."""
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception:
                log.exception("a task of %s failed", threading.current_thread().name)
            del task  # its images go now, not when the next task comes


def _succeed(future: asyncio.Future[Result], result: Result) -> None:
    """Give a result to whom it may concern."""
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Result], error: Exception) -> None:
    """Give an error to whom it may concern."""
    if not future.done():
        future.set_exception(error)
