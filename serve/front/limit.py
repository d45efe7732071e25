"""How many calls may be open at once, on either front end; probes have places of their own.

Rules:
    A call above the limit is refused unread, in grpcio's own words, with the time after which
    to try again, and is counted.
    Probes (`grpc.health.v1`) take no place of a call, and find one when all calls are taken.
    They need no key, so their places are bounded, too; and where all are taken, a probe that
    has not sent its message gives way to one that comes, the oldest first.

Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn, TypeAlias

import grpc

from serve.errors import RETRY_AFTER_S, QueueFullError, retry_metadata, to_status
from serve.front.message import Context, read_message
from serve.security.guard import HEALTH

TOO_MANY = "Concurrent RPC limit exceeded!"
"""grpcio's own words."""

PROBES = 128
"""Probes that may be open at once; more than `serve.health.MAX_WATCHES` that stay open."""

OnTurnedAway: TypeAlias = Callable[[grpc.StatusCode], None]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


def too_many_calls() -> QueueFullError:
    """Say that all places are taken, and when to come back."""
    return QueueFullError(TOO_MANY, retry_after_s=RETRY_AFTER_S)


class CallLimit(grpc.aio.ServerInterceptor):
    """Counts the calls of a grpcio server, before anything of them is read."""

    def __init__(
        self,
        *,
        max_calls: int,
        on_turned_away: OnTurnedAway,
        elsewhere: Callable[[], int],
    ) -> None:
        """Count nothing yet.

        Args:
            max_calls: that are open at once, probes apart.
            on_turned_away: hears of every call that is refused.
            elsewhere: gives how many of those places another front end has taken.
        """
        self._max_calls = max_calls
        self._places = {False: max_calls, True: PROBES}
        self._elsewhere = elsewhere
        self._silent: dict[asyncio.Task[Any], None] = {}
        self._on_turned_away = on_turned_away

    def __repr__(self) -> str:
        return f"<CallLimit room for {self._places[False]} calls, {self._places[True]} probes>"

    @property
    def calls(self) -> int:
        """How many calls are open here."""
        return self._max_calls - self._places[False]

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Let a call pass while there is a place for it; the task that answers it holds it."""
        is_probe = handler_call_details.method.startswith(HEALTH)
        places = self._places[is_probe] - (0 if is_probe else self._elsewhere())
        if places <= 0 and not (is_probe and self._end_silent_probe()):
            # As a stream, of which grpcio reads no message that it is not asked for.
            return grpc.stream_stream_rpc_method_handler(self._refuse, None, None)
        task = asyncio.current_task()
        assert task is not None, "grpc.aio answers every call in a task"
        self._places[is_probe] -= 1
        if not is_probe:
            task.add_done_callback(self._leave_call)
            return await continuation(handler_call_details)
        self._silent[task] = None
        task.add_done_callback(self._leave_probe)
        return self._listen_to(await continuation(handler_call_details), task)

    def _end_silent_probe(self) -> bool:
        """End the oldest probe whose message has not come; whether there was one."""
        for task in self._silent:
            del self._silent[task]
            return task.cancel()
        return False

    def _listen_to(self, handler: Handler | None, task: asyncio.Task[Any]) -> Handler | None:
        """Note when the message of a probe has come; that of a refused one is not waited for."""
        if handler is None or handler.request_streaming:
            return handler
        name = "unary_stream" if handler.response_streaming else "unary_unary"
        behaviour: Callable[..., Any] = getattr(handler, name)

        async def answer(_: Any, context: Context) -> Any:
            return await behaviour(await self._hear(task, context), context)

        async def stream(_: Any, context: Context) -> AsyncIterator[Any]:
            message = await self._hear(task, context)
            async with aclosing(behaviour(message, context)) as replies:
                async for reply in replies:
                    yield reply

        is_generator = inspect.isasyncgenfunction(behaviour)  # as grpc.aio tells them apart
        make = getattr(grpc, f"stream_{name.removeprefix('unary_')}_rpc_method_handler")
        listening: Handler = make(
            stream if is_generator else answer,
            handler.request_deserializer,
            handler.response_serializer,
        )
        return listening

    async def _hear(self, task: asyncio.Task[Any], context: Context) -> Any:
        """Read the message of a probe; one that gives way is refused meanwhile.

        To end its task alone would not do: grpcio counts the call until it has a status.
        """
        try:
            message = await read_message(context)
        except asyncio.CancelledError:
            if task in self._silent:  # its caller has gone
                raise
            await self._refuse(None, context)
        self._silent.pop(task, None)
        return message

    def _leave_call(self, _: object) -> None:
        """Give a place back."""
        self._places[False] += 1

    def _leave_probe(self, task: asyncio.Task[Any]) -> None:
        """Give a place back."""
        self._silent.pop(task, None)
        self._places[True] += 1

    async def _refuse(self, _: object, context: Context) -> NoReturn:
        """End a call for which there is no place."""
        error = too_many_calls()
        code, message = to_status(error)
        self._on_turned_away(code)
        await context.abort(code, message, retry_metadata(error))
        raise AssertionError("abort raises")
