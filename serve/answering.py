"""How every call of every service is answered: counted, observed, refused, in its order.

Rules:
    An exception leaves as the status code of `serve.errors`, never as itself.
    Whatever becomes of a request, the observer hears of it once.
    A stream answers in the order of its requests, with a bounded number under way. Where a
    request has to wait for room, nothing more is read: that is what holds a caller back.
    Who takes no reply meanwhile is not held back for ever. What is not read any more, for this
    or for a drain, is passed over: the native front end does not see that a caller has gone
    while it can hand on neither what he sends nor what he is sent.

It uses plain servicer features only, so that another server than grpcio's can run it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, TypeAlias, TypeVar

import grpc

from serve.calls import AcceptedEarly, Calls
from serve.errors import (
    STOPPING,
    DeadlineError,
    QueueFullError,
    ServeError,
    UnavailableError,
    retry_metadata,
    to_status,
)
from serve.operation.observer import NO_OBSERVER, Call, Observer
from serve.security.caller import caller_of

REFUSING_S = 1.0
"""How long a refusal makes others likely."""

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Metadata: TypeAlias = tuple[tuple[str, str], ...]
Request = TypeVar("Request")
Reply = TypeVar("Reply")


WAY_S, WAY_SHARE = 0.05, 0.1
"""Of the time that a caller waits, what is kept for the way, at most: bytes wait unread on either
side where the machine is busy, and nobody can tell from here for how long."""


LATE_SHARE = 0.02
"""Who goes in so much of its time that is left has run out of time: grpcio writes the time down in
three digits and rounds up, so that callers give up to a hundredth before it is over here."""


UNREAD_S = 300.0
"""How long the caller of a stream may not take the next reply before it is read no further."""


def time_to_answer(left_s: float | None) -> float:
    """Give the seconds in which to answer a caller who waits for so many; None is for ever."""
    return math.inf if left_s is None else left_s - min(WAY_S, WAY_SHARE * left_s)


class Answering:
    """What the services of one server share. Belongs to one event loop."""

    def __init__(
        self,
        *,
        calls: Calls | None = None,
        clock: Callable[[], float] = time.monotonic,
        observer: Observer = NO_OBSERVER,
    ) -> None:
        """Answer calls from now on.

        Args:
            calls: the server's account of calls; one of its own where None.
            clock: monotonic seconds, the engines' clock.
            observer: hears of every request that is over.
        """
        self.calls = calls or Calls()
        self.clock = clock
        self._observer = observer
        self._refused_s = -math.inf

    def __repr__(self) -> str:
        return f"<Answering {self.calls!r}>"

    @property
    def is_refusing(self) -> bool:
        """Whether a request was refused of late for want of time or room, and calls begin."""
        return self.clock() - self._refused_s < REFUSING_S and not self.calls.draining

    def refused(self, call: Call) -> None:
        """Hear of a call that ended before it was begun."""
        self.calls.check_open()
        self._refused_s = self.clock()
        self._observer.answered(call, self._refused_s - call.arrived_s)

    def deadline_s(self, context: Context) -> float:
        """Give the moment, on our clock, by which the caller is to be answered."""
        return self.clock() + time_to_answer(context.time_remaining())

    def late_s(self, context: Context) -> float:
        """Give the moment, on our clock, from which a caller who goes counts as late."""
        left_s = context.time_remaining()
        return math.inf if left_s is None else self.clock() + (1 - LATE_SHARE) * left_s

    def new_call(self, method: str, request_id: str, context: Context) -> Call:
        """Start to keep account of a request."""
        return Call(
            method=method,
            arrived_s=self.clock(),
            metadata=context.invocation_metadata,
            request_id=request_id,
            client=caller_of(context),
        )

    async def answer(self, call: Call, work: Coroutine[Any, Any, Reply], context: Context) -> Reply:
        """Await `work`; what it raises becomes the status of the call."""
        metadata: Metadata = ()
        is_new = not isinstance(context, AcceptedEarly)
        late_s = self.late_s(context)
        with self.calls.counted() if is_new else nullcontext():
            try:
                if is_new:
                    self.calls.check_open()
                reply = await work
            except Exception as error:
                call.code, call.message = to_status(error)
                metadata = retry_metadata(error)
                if isinstance(error, QueueFullError | DeadlineError):
                    self._refused_s = self.clock()
                error.with_traceback(None)  # see `answer_in_stream`
            except asyncio.CancelledError:
                call.code = self._code_of_gone(late_s)
                raise
            else:
                call.code = grpc.StatusCode.OK
                if is_new:
                    self.calls.send_reply()
                return reply
            finally:
                work.close()
                self._observer.answered(call, self.clock() - call.arrived_s)
        await context.abort(call.code, call.message, metadata)
        raise AssertionError("abort raises")

    async def answer_in_stream(
        self,
        call: Call,
        work: Coroutine[Any, Any, Reply],
        refuse: Callable[[Call, Exception], Reply],
        *,
        late_s: float,
    ) -> Reply:
        """Await `work`; what it raises becomes the reply that `refuse` gives.

        Args:
            call: the account of the request.
            work: answers it.
            refuse: says why it cannot be answered.
            late_s: of the stream; see there.
        """
        try:
            reply = await work
        except Exception as error:
            call.code, call.message = to_status(error)
            error.with_traceback(None)  # its frames hold the message, and one of them this
            return refuse(call, error)
        except asyncio.CancelledError:
            call.code = self._code_of_gone(late_s)
            raise
        else:
            call.code = grpc.StatusCode.OK
            return reply
        finally:
            self._observer.answered(call, self.clock() - call.arrived_s)

    def _code_of_gone(self, late_s: float) -> grpc.StatusCode:
        """Tell a call whose time is up from one whose caller has hung up."""
        is_late = self.clock() >= late_s
        return grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED

    async def stream(
        self,
        requests: AsyncIterator[Request],
        context: Context,
        answer: Callable[[Request, Callable[[], None]], Coroutine[Any, Any, Reply]],
        *,
        window: int,
    ) -> None:
        """Answer the requests of a stream in their order, at most `window` under way.

        Args:
            requests: read one by one, the next once the last has been admitted.
            context: where the replies go.
            answer: gives the reply to a request, never an error; it is to call what it is
                given with it once the request is admitted.
            window: requests that are read and not answered yet.
        """
        room = asyncio.Semaphore(window)
        replies: asyncio.Queue[asyncio.Task[Reply] | None] = asyncio.Queue()
        started: set[asyncio.Task[Reply]] = set()
        admitted = asyncio.Event()
        is_cut_short = False

        async def read() -> None:
            nonlocal admitted
            await room.acquire()
            async for request in requests:
                if is_cut_short:
                    del request  # as below
                    await _pass_over(context)
                    raise self._why_cut_short()
                admitted = asyncio.Event()
                task = asyncio.create_task(answer(request, admitted.set))
                task.add_done_callback(partial(_set, admitted))  # or refused
                started.add(task)
                replies.put_nowait(task)
                del request, task  # or this frame keeps them while it waits for the next
                await admitted.wait()
                await room.acquire()

        def end(reader: asyncio.Task[None]) -> None:
            replies.put_nowait(None)
            if not reader.cancelled():
                reader.exception()  # asked for here, since nobody else may

        def cut_short() -> None:
            nonlocal is_cut_short
            if not reader.done():
                is_cut_short = True
                admitted.set()
                room.release()
                replies.put_nowait(None)

        with self.calls.counted():
            reader = asyncio.create_task(read())
            reader.add_done_callback(end)
            try:
                with self.calls.reading(cut_short):
                    while (task := await replies.get()) is not None:
                        await _write(context, await task, cut_short)
                        started.discard(task)
                        del task
                        room.release()
                error = reader.exception() if reader.done() else self._why_cut_short()
                if error is not None:
                    await context.abort(*to_status(error), retry_metadata(error))
            finally:
                for unfinished in (reader, *started):
                    unfinished.cancel()

    def _why_cut_short(self) -> ServeError:
        """Say why a stream was not read to its end."""
        if self.calls.draining:
            return UnavailableError(f"{STOPPING}, and has not read the rest of this stream")
        return QueueFullError(
            "replies of a stream",
            expected=f"a caller who takes the next within {UNREAD_S:g} s",
            found="one who did not",
            mend="read replies while requests are sent; the rest of these was not read",
        )


async def _write(context: Context, reply: object, cut_short: Callable[[], None]) -> None:
    """Write a reply of a stream, and cut that short where the reply is not taken in time."""
    unread = asyncio.get_running_loop().call_later(UNREAD_S, cut_short)
    try:
        await context.write(reply)
    finally:
        unread.cancel()


async def _pass_over(context: Context) -> None:
    """Read what is left of a stream, and keep nothing."""
    with suppress(grpc.aio.BaseError):  # it is over
        while await context.read() is not grpc.aio.EOF:
            pass


def _set(event: asyncio.Event, _: object) -> None:
    """Set an event when a task is done."""
    event.set()
