"""The guard in front of every gRPC call, on either front end.

Rules:
    A call is let in, counted and charged before anything is computed for it. One that is
    refused for its caller, its deadline or the bytes under way is never parsed; without a key
    grpcio does not even read it. Nor is a message parsed that holds more parts than a request
    may have (`serve.security.wire`). What is charged for its images is parsed to count them.
    Bytes that are no message of the method's kind are the caller's fault, INVALID_ARGUMENT,
    on both front ends alike, and never a traceback.
    A unary call above its rate is refused with the time to wait. A stream is held back: its
    next message is taken up when its turn comes, and nothing of it is lost; unless there is
    no room for it among the bytes under way.
    Whatever goes wrong leaves as a status of `serve.errors`.

It sees handlers, not services: whatever is added to the server is guarded.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from functools import partial
from typing import Any, NoReturn, TypeAlias

import grpc

from serve.errors import UnauthenticatedError, retry_metadata, to_status
from serve.in_flight import InFlight
from serve.security.buckets import Quota
from serve.security.caller import CURRENT
from serve.security.costs import count_images
from serve.security.guard import HEALTH, Guard, Pass
from serve.security.ring import ApiKey
from serve.security.wire import Parse, most_fields, reading
from serve.valve import Refuses, never

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Behaviour: TypeAlias = "Callable[[Any, Context], Any]"
Enter: TypeAlias = "Callable[[Context], Pass]"
TakeIn: TypeAlias = "Callable[[Pass, Any, Context], Any]"

_KEY: ContextVar[ApiKey | None] = ContextVar("horace_key", default=None)
"""The key that let this task's call in; interceptor and handler run in one task."""


class GuardInterceptor(grpc.aio.ServerInterceptor):
    """Has a `Guard` let calls in. Belongs to one event loop."""

    def __init__(
        self,
        guard: Guard,
        *,
        max_images: int = 1024,
        max_in_flight_bytes: int = 256 << 20,
        refuses: Refuses = never,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        on_turned_away: Callable[[grpc.StatusCode], None] = lambda _: None,
    ) -> None:
        """Stand in front of a server's handlers.

        Args:
            guard: decides.
            max_images: the most that a request is charged for: what asks for more is refused.
            max_in_flight_bytes: of all messages of calls that are under way.
            refuses: turns calls away unparsed, by the seconds that they have.
            sleep: waits until a stream's turn.
            on_turned_away: hears with which code a call ended that no service saw.
        """
        self._guard = guard
        self._max_images = max_images
        self._max_fields = most_fields(max_images)
        self._refuses = refuses
        self.in_flight = InFlight(max_bytes=max_in_flight_bytes)
        self._sleep = sleep
        self._on_turned_away = on_turned_away
        self._guarded: dict[str, tuple[Handler, Handler]] = {}

    def __repr__(self) -> str:
        return f"<GuardInterceptor {self._guard!r}>"

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Give the handler of a call, guarded; or one that refuses it."""
        details = handler_call_details
        handler = await continuation(details)
        try:
            key = self._guard.authorise(details.method, details.invocation_metadata or ())
        except UnauthenticatedError as error:
            return self._refusing(details.method, handler, error, unread=_is_grpcio(details))
        if handler is None:
            return None
        _KEY.set(key)
        return self._guard_handler(details.method, handler)

    def _guard_handler(self, method: str, handler: Handler) -> Handler:
        """Give the guarded form of a handler, made once."""
        known = self._guarded.get(method)
        if known is None or known[0] is not handler:
            known = self._guarded[method] = handler, self._wrap(method, handler)
        return known[1]

    def _wrap(self, method: str, handler: Handler) -> Handler:
        """Guard a handler; its messages come as bytes, and are parsed once they may be."""
        shape = bool(handler.request_streaming), bool(handler.response_streaming)
        name, make = _KINDS[shape]
        behaviour: Behaviour = getattr(handler, name)
        take = self._take_stream if handler.request_streaming else self._take_message
        take_in = partial(take, reading(handler.request_deserializer or bytes, self._max_fields))
        enter = _enter_free if method.startswith(HEALTH) else self._enter
        if inspect.isasyncgenfunction(behaviour):
            guarded = self._guard_generator(behaviour, enter, take_in)
        else:
            assert inspect.iscoroutinefunction(behaviour), f"{behaviour} blocks the event loop"
            guarded = self._guard_coroutine(behaviour, enter, take_in)
        return make(guarded, None, handler.response_serializer)

    def _guard_coroutine(self, behaviour: Behaviour, enter: Enter, take_in: TakeIn) -> Behaviour:
        """Guard a handler that returns its reply, or writes its replies."""

        async def answer(incoming: Any, context: Context) -> Any:
            try:
                entered = enter(context)
                with self._guard.under_way(entered), self.in_flight.hold(incoming):
                    return await behaviour(take_in(entered, incoming, context), context)
            except grpc.aio.BaseError:  # the call was ended, or its caller has gone
                raise
            except Exception as error:
                await self._end(context, error)

        return answer

    def _guard_generator(self, behaviour: Behaviour, enter: Enter, take_in: TakeIn) -> Behaviour:
        """Guard a handler that yields its replies."""

        async def answer(incoming: Any, context: Context) -> AsyncIterator[Any]:
            try:
                entered = enter(context)
                with self._guard.under_way(entered), self.in_flight.hold(incoming):
                    taken = take_in(entered, incoming, context)
                    async with aclosing(behaviour(taken, context)) as replies:
                        async for reply in replies:
                            yield reply
            except grpc.aio.BaseError:  # the call was ended, or its caller has gone
                raise
            except Exception as error:
                await self._end(context, error)

        return answer

    def _enter(self, context: Context) -> Pass:
        """Say who calls, here and to whoever answers this call.

        Raises:
            DeadlineError: this server is too busy to answer in time.
        """
        if (refusal := self._refuses(context.time_remaining())) is not None:
            raise refusal
        entered = self._guard.name(
            _KEY.get(), peer=context.peer(), auth_context=context.auth_context()
        )
        CURRENT.set(entered.client)  # this task answers nothing else
        return entered

    def _take_message(self, parse: Parse, entered: Pass, raw: bytes, _: Context) -> Any:
        """Read the one message of a call, and charge for it."""
        request = parse(raw)
        if entered.quota.is_rated:
            self._guard.charge(entered, images=self._count(request))
        return request

    async def _take_stream(
        self, parse: Parse, entered: Pass, _: object, context: Context
    ) -> AsyncIterator[Any]:
        """Read the messages of a stream, each when it is its turn; keep none that was given.

        grpcio's own iterator would keep the last one until the next has come.
        """
        while (raw := await context.read()) is not grpc.aio.EOF:
            entered = self._guard.renew(entered)
            requests = [parse(raw)]
            await self._wait_for_turn(entered, raw, self._count(requests[0]))
            del raw
            yield requests.pop()  # or this frame keeps it while the stream is held back

    async def _wait_for_turn(self, entered: Pass, raw: bytes, images: int) -> None:
        """Charge for a message of a stream, now or once that is allowed.

        Raises:
            QueueFullError: it has to wait, and there is no room for it meanwhile.
            UnauthenticatedError: its key is taken back while it waits.
        """
        if wait_s := self._guard.wait_s(entered, images=images):
            with self.in_flight.hold(raw):
                while wait_s:
                    await self._sleep(wait_s)
                    entered = self._guard.renew(entered)
                    wait_s = self._guard.wait_s(entered, images=images)

    def _count(self, request: Any) -> int:
        """Count the images that a message is charged for."""
        return min(count_images(request), self._max_images)

    def _refusing(
        self, method: str, handler: Handler | None, error: UnauthenticatedError, *, unread: bool
    ) -> Handler:
        """Make a handler that ends a stranger's call.

        Args:
            method: of the call.
            handler: the one in whose place it stands; None where there is no such method.
            error: why.
            unread: whether the front end may be given the handler of a stream for any method:
                it reads no message unless it is asked for one.
        """

        async def refuse(_: Any, context: Context) -> NoReturn:
            self._guard.count_stranger(method, peer=context.peer())
            await self._end(context, error)

        shape = (True, True)
        if handler is not None and not unread:
            shape = bool(handler.request_streaming), bool(handler.response_streaming)
        return _KINDS[shape][1](refuse, None, None)

    async def _end(self, context: Context, error: Exception) -> NoReturn:
        """End a call with the status of an error."""
        code, message = to_status(error)
        self._on_turned_away(code)
        await context.abort(code, message, retry_metadata(error))
        raise AssertionError("abort raises")


_FREE = Pass(client="probe", quota=Quota())


def _enter_free(_: Context) -> Pass:
    """Let a probe in, without account or limit."""
    return _FREE


_KINDS: dict[tuple[bool, bool], tuple[str, Callable[..., Handler]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}
"""By whether requests and replies are streams: a handler's function, and what makes one."""


def _is_grpcio(details: grpc.HandlerCallDetails) -> bool:
    """Whether grpcio asks, or another front end in its place."""
    return type(details).__module__.startswith("grpc.")
