"""Keeps a bounded number of requests of one iterable under way, and gives what comes of them.

Rules:
    The iterable is asked for more only while there is room: of an endless one, no more than
    what is under way is in memory.
    Ordered, results come in the order of the requests, otherwise as they are complete.
    What is complete is given before the iterable is asked again.
    An error of the iterable is raised after the results of what it gave before.
    Whoever stops early cancels what is under way.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterator,
    Sequence,
)
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import grpc

Batch = TypeVar("Batch")
Result = TypeVar("Result")


class StoppedError(Exception):
    """Ends a worker whose results nobody takes any more."""


class Stop:
    """Ends the blocking calls and pauses of several threads at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: set[grpc.Future[Any]] = set()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Cancel what is under way, and whatever would begin."""
        with self._lock:
            self._stopped.set()
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def call(self, start: Callable[[], Any]) -> object:
        """Start a call and wait for its reply.

        Raises:
            StoppedError: it was stopped.
            grpc.RpcError: how it ended otherwise.
        """
        with self._lock:
            if self._stopped.is_set():
                raise StoppedError
            call = start()
            self._calls.add(call)
        try:
            return call.result()
        except grpc.FutureCancelledError as error:
            raise StoppedError from error
        finally:
            with self._lock:
                self._calls.discard(call)

    def pause(self, seconds: float) -> None:
        """Wait.

        Raises:
            StoppedError: it was stopped.
        """
        if self._stopped.wait(seconds):
            raise StoppedError


def run_window(
    batches: Iterator[Batch],
    work: Callable[[Batch, Stop], Result],
    *,
    in_flight: int,
    ordered: bool,
) -> Generator[Result, None, None]:
    """Do `work` for each batch on threads; the batches are read on the caller's own."""
    stop = Stop()
    waiting: deque[Future[Result]] = deque()
    failure: Exception | None = None
    pool = ThreadPoolExecutor(in_flight, thread_name_prefix="horace-client")
    try:
        while failure is None:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except Exception as error:
                failure = error
                break
            waiting.append(pool.submit(work, batch, stop))
            while done := _take(waiting, ordered=ordered, block=len(waiting) >= in_flight):
                yield done.result()
        while waiting:
            done = _take(waiting, ordered=ordered, block=True)
            assert done is not None
            yield done.result()
    finally:
        stop.stop()
        pool.shutdown(cancel_futures=True)
    if failure is not None:
        raise failure


def _take(waiting: deque[Future[Result]], *, ordered: bool, block: bool) -> Future[Result] | None:
    """Take what is complete, and the next in order where that matters; None where nothing is."""
    if not waiting:
        return None
    candidates = [waiting[0]] if ordered else list(waiting)
    done, _ = wait(candidates, timeout=None if block else 0, return_when=FIRST_COMPLETED)
    if not done:
        return None
    first = next(future for future in candidates if future in done)
    waiting.remove(first)
    return first


async def run_async_window(
    batches: AsyncIterator[Batch],
    work: Callable[[Batch], Coroutine[Any, Any, Result]],
    *,
    in_flight: int,
    ordered: bool,
) -> AsyncGenerator[Result, None]:
    """Do `work` for each batch as tasks, and read the batches meanwhile."""

    async def pull() -> Batch | None:
        return await anext(batches, None)

    waiting: deque[asyncio.Task[Result]] = deque()
    pulling: asyncio.Task[Batch | None] | None = None
    is_exhausted = False
    failure: Exception | None = None
    try:
        while True:
            if pulling is None and not is_exhausted and len(waiting) < in_flight:
                pulling = asyncio.create_task(pull())
            candidates = [*waiting][:1] if ordered else [*waiting]
            awaited = candidates if pulling is None else [*candidates, pulling]
            if not awaited:
                break
            done, _ = await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            for task in candidates:
                if task in done:
                    waiting.remove(task)
                    yield task.result()
            if pulling is not None and pulling in done:
                try:
                    batch = pulling.result()
                except Exception as error:
                    failure, batch = error, None
                is_exhausted, pulling = batch is None, None
                if batch is not None:
                    waiting.append(asyncio.create_task(work(batch)))
    finally:
        await _cancel([*waiting, *([pulling] if pulling is not None else [])])
    if failure is not None:
        raise failure


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
