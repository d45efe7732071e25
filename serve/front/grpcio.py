"""The front end on grpcio's asyncio server: it can do everything, and costs the most a call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn

import grpc

from serve.front.limit import PROBES, CallLimit, Handler, OnTurnedAway
from serve.front.message import Context, read_message
from serve.port import check_address, join_address, refuse_address

MIN_CLIENT_PING_MS = 10_000
"""A client may ask this often whether we live; gRPC's default calls 5 minutes too often."""

KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS = 60_000, 20_000
"""How long a connection may say nothing before it is asked whether its client lives, and how long
the answer may take: the calls of a machine that is gone would hold their places for hours. grpcio
1.85 closes by `grpc.http2.ping_timeout_ms` alone, a minute, which a slow upload may need."""

LEAST_PENDING = 64
"""Calls that may wait inside gRPC for the event loop before it ends some unseen, and at twice
as many all that come. grpc.aio takes in one a turn: called too often, it would come to each
when nearly all of its deadline is gone, and answer hardly any in time."""


class GrpcioFront:
    """Serves on `grpc.aio.server`. Belongs to one event loop."""

    def __init__(
        self,
        *,
        max_message_bytes: int,
        max_calls: int,
        max_calls_a_connection: int | None = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor],
        reuse_port: bool = False,
        on_turned_away: OnTurnedAway,
        elsewhere: Callable[[], int] = lambda: 0,
    ) -> None:
        """Make the server; see `make_front`, and for `elsewhere` `CallLimit`."""
        self._reuse_port = reuse_port
        pending = max(2 * LEAST_PENDING, max_calls // 2)
        self.limit = CallLimit(
            max_calls=max_calls, on_turned_away=on_turned_away, elsewhere=elsewhere
        )
        self._server = grpc.aio.server(
            interceptors=(Whole(), self.limit, Punctual(), *interceptors),
            maximum_concurrent_rpcs=max_calls + 2 * PROBES,  # and those that are being refused
            options=[
                *server_options(
                    max_message_bytes,
                    max_calls_a_connection=max_calls_a_connection,
                    reuse_port=reuse_port,
                ),
                ("grpc.server.max_pending_requests", max(LEAST_PENDING, max_calls // 4)),
                ("grpc.server.max_pending_requests_hard_limit", pending),
            ],
        )

    def __repr__(self) -> str:
        return f"<GrpcioFront{' shares its port' if self._reuse_port else ''}>"

    @property
    def server(self) -> grpc.aio.Server:
        """What `add_XServicer_to_server` and reflection take."""
        return self._server

    @property
    def alive(self) -> bool:
        """Whether calls are read, as far as can be told: gRPC's own threads read them."""
        return True

    def listen(
        self, host: str, port: int, credentials: grpc.ServerCredentials | None = None
    ) -> int:
        """Take a port; see `Front.listen`."""
        host = check_address(host, port, shared=self._reuse_port)
        address = join_address(host, port)
        try:
            if credentials is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, credentials)
        except RuntimeError as error:  # gRPC's own refusal, such as a race for the port
            raise refuse_address(host, port, "gRPC's refusal to listen there") from error

    async def start(self) -> None:
        """Answer calls from now on."""
        await self._server.start()

    async def stop(self, grace_s: float | None) -> None:
        """Take no more calls; cut off after `grace_s` those under way."""
        await self._server.stop(grace_s)


class _OfUnary(grpc.aio.ServerInterceptor):
    """Changes how unary calls are answered, and lets others pass."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Give the handler of a call; of streams each message would have to be looked at."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.response_streaming:
            return handler
        make, answer = self._change(handler.unary_unary)
        return make(answer, handler.request_deserializer, handler.response_serializer)

    def _change(self, behaviour: Any) -> tuple[Callable[..., Handler], Any]:
        """Give what makes the handler, and what it is to do with a call."""
        raise NotImplementedError


class Whole(_OfUnary):
    """Has the message of a call read to its end, whatever becomes of the caller meanwhile."""

    def _change(self, behaviour: Any) -> tuple[Callable[..., Handler], Any]:
        """Answer it as a stream of one message; on the wire they are the same."""

        async def answer(_: Any, context: Context) -> Any:
            try:
                return await behaviour(await read_message(context), context)
            except grpc.aio.AbortError as error:  # which grpcio keeps, and that its frames
                error.with_traceback(None)
                raise

        return grpc.stream_unary_rpc_method_handler, answer


class Punctual(_OfUnary):
    """Says nothing to a caller whose time is up.

    His own gRPC has told him, and what grpcio 1.85 allocates for a status or a reply that cannot
    be sent any more it never frees (grpc/grpc#43360).
    """

    def _change(self, behaviour: Any) -> tuple[Callable[..., Handler], Any]:
        """Answer who still waits."""

        async def answer(request: Any, context: Context) -> Any:
            reply = await behaviour(request, _Waiting(context))
            _leave_late(context)
            return reply

        return grpc.unary_unary_rpc_method_handler, answer


class _Waiting:
    """The context of a call, but that a late one is not ended with a status."""

    __slots__ = ("_context",)

    def __init__(self, context: Context) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def abort(self, *status: Any, **more: Any) -> NoReturn:
        """End the call, with a status where somebody waits for it."""
        _leave_late(self._context)
        await self._context.abort(*status, **more)
        raise AssertionError("abort raises")


def _leave_late(context: Context) -> None:
    """End this task where the call's time is up: gRPC ends the call itself."""
    if context.time_remaining() == 0:  # None where it has for ever, and never below 0
        raise asyncio.CancelledError


def server_options(
    max_message_bytes: int, *, max_calls_a_connection: int | None, reuse_port: bool
) -> list[tuple[str, int]]:
    """Give gRPC's options of a server; they hold for a connection, whoever reads it."""
    options = [
        ("grpc.so_reuseport", int(reuse_port)),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_CLIENT_PING_MS),
    ]
    if max_calls_a_connection is not None:
        options.append(("grpc.max_concurrent_streams", max_calls_a_connection))
        # Or gRPC counts calls that have ended, too, until they are freed, and resets a stream
        # of a client that keeps to the limit: chttp2's parsing.cc.
        options.append(("grpc.http.overload_protection", 0))
    return options
