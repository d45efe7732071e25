"""The front end on pygrpc-native: HTTP/2 in Rust, and calls by bursts.

Rules:
    Unary methods are read here; streams, reflection and methods that do not exist go to a
    grpcio server behind it, over a socket of this machine that nobody else can open. The places
    of calls are those of both together.
    A burst of calls crosses from Rust to Python, and from its thread to the event loop, at
    once. A call that its engine would refuse ends there (`serve.screen`); while some do, bursts
    are let grow. Each other is a task of its own, with grpc.aio's context, so that services and
    interceptors are the same ones as on grpcio, and so are limits, statuses and trailers.
    Whatever goes wrong with one call, it is answered, and so are the others of its burst.
    A call whose caller has gone is cancelled. No exception text leaves.
    Stopping answers what it took: new calls are refused, those under way get their grace,
    and the port closes last.

It has no TLS, and it reads and inflates a message of any size before anything can refuse it: see
docs/decisions/0012-front-ends.md for where that makes `auto` choose grpcio.

Source: https://github.com/pygrpc/pygrpc-native, its low-level API, which is promised to stay.
"""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import grpc
from pygrpc_native import EVENT_CANCEL, NativeGrpcFront

from serve.errors import (
    STOPPING,
    QueueFullError,
    ServeError,
    StartError,
    UnavailableError,
    retry_metadata,
    to_status,
)
from serve.front.chain import Ask, CallDetails, chain
from serve.front.grpcio import KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS, GrpcioFront
from serve.front.limit import PROBES, OnTurnedAway, too_many_calls
from serve.front.native_call import NativeCall
from serve.front.registry import Handler, Registry
from serve.front.threads import unhurried_threads
from serve.port import check_address, join_address, refuse_address
from serve.screen import Screens, Status
from serve.security.guard import HEALTH
from serve.valve import Refuses

log = logging.getLogger("horace.serve")

BURST = 256
"""Calls that cross into Python at once, at most."""

GATHER_S, GATHER_MOST_S = 0.01, 0.04
"""How long calls gather while some of them are refused: the least and the most. A burst costs more
than a refusal: the encoder's thread is stopped for it, two others change places, and each finds
its caches cold."""

GATHER_SHARE = 0.05
"""Of the time that the most hurried caller has left; between the two they gather for so long."""

LEAST_LEFT_S = GATHER_S / GATHER_SHARE
"""Who has less is in no more of a hurry."""

HURRY_GROWS = 1.1
"""As many times as long as before the most hurried has left after each burst: one that calls now
and then is thought of for some fifteen bursts."""

GATHER_FORGOTTEN_S = 0.25
"""After so long without a burst nobody waits for another."""

GATHERING = 2
"""Refusals in one burst from which on they gather: one caller in a hurry holds nobody up."""

IO_THREADS = 1
"""Threads of Rust; one reads and writes more than two cores compute."""

NOT_FOUND = "Method not found!"
"""grpcio's own words."""

RESERVED = "grpc-"
"""How names of metadata begin that pygrpc-native refuses with an exception, such as
`grpc-retry-pushback-ms`, which grpcio sends."""

Event: TypeAlias = tuple[int, int, int, Any, Any, Any]


LEAVING_S = 0.2
"""How long replies that were handed over may take to leave before the port closes: the library
closes at once, what it has not written yet is lost, and it says of nothing when it was written."""


class NativeFront:
    """Serves on `NativeGrpcFront`. Belongs to one event loop."""

    def __init__(
        self,
        *,
        max_message_bytes: int,
        max_calls: int,
        max_calls_a_connection: int,
        interceptors: Sequence[grpc.aio.ServerInterceptor],
        reuse_port: bool,
        refuses: Refuses,
        screen: Screens,
        on_turned_away: OnTurnedAway,
    ) -> None:
        """Make the server; see `make_front`."""
        self._refuses = refuses
        self._screen = screen
        self._on_turned_away = on_turned_away
        self._max_message_bytes = max_message_bytes
        self._max_calls = max_calls
        self._max_calls_a_connection = max_calls_a_connection
        self._reuse_port = reuse_port
        self._behind = GrpcioFront(
            max_message_bytes=max_message_bytes,
            max_calls=max_calls,
            interceptors=interceptors,
            on_turned_away=on_turned_away,
            elsewhere=lambda: len(self._calls),
        )
        self._registry = Registry(self._behind.server)
        self._ask = chain(interceptors, self._registry.unary)
        self._methods: list[tuple[str, Handler]] = []
        self._native: NativeGrpcFront | None = None
        self._folder: Path | None = None
        self._calls: dict[int, NativeCall] = {}
        self._stopping = False
        self._refused = 0
        self._least_left_s = self._taken_s = math.inf
        self._gather_s = 0.0
        self._receiver: threading.Thread | None = None

    def __repr__(self) -> str:
        state = "stopping" if self._stopping else "open"
        return f"<NativeFront {state} calls={len(self._calls)}/{self._max_calls}>"

    @property
    def server(self) -> grpc.aio.Server:
        """What `add_XServicer_to_server` and reflection take."""
        return self._registry

    @property
    def alive(self) -> bool:
        """Whether the thread that reads calls lives, or is not needed."""
        return self._stopping or self._receiver is None or self._receiver.is_alive()

    def listen(
        self, host: str, port: int, credentials: grpc.ServerCredentials | None = None
    ) -> int:
        """Take a port; see `Front.listen`."""
        if credentials is not None:
            raise StartError(
                "--frontend native", expected="no TLS", found="TLS", mend="take --frontend grpcio"
            )
        host = check_address(host, port, shared=self._reuse_port)
        try:
            with unhurried_threads():
                self._native = NativeGrpcFront(
                    join_address(host, port),
                    [],
                    io_threads=IO_THREADS,
                    call_details=True,
                    keepalive_time_ms=KEEPALIVE_MS,
                    keepalive_timeout_ms=KEEPALIVE_TIMEOUT_MS,
                    max_concurrent_streams=self._max_calls_a_connection,
                    reuse_port=self._reuse_port,
                )
        except OSError as error:  # such as a race for the port
            raise refuse_address(host, port, "pygrpc-native's refusal to listen there") from error
        except RuntimeError as error:  # its threads got no descriptors
            raise StartError(
                "--frontend native",
                expected="descriptors and threads enough to serve",
                found=str(error),
                mend="allow this process more (ulimit -n, ulimit -u)",
            ) from error
        return self._native.bound_port

    async def start(self) -> None:
        """Answer calls from now on."""
        assert self._native is not None, "listen first"
        self._registry.hand_over()
        self._folder = Path(tempfile.mkdtemp(prefix="horace-"))  # for this user alone
        socket = self._folder / "behind.sock"
        try:
            self._behind.server.add_insecure_port(f"unix:{socket}")
        except RuntimeError as error:  # unix(7) has 108 bytes for it
            raise StartError(
                "--frontend native",
                expected="a temporary directory in which a socket can be, of a short path",
                found=str(self._folder.parent),
                mend="name another by TMPDIR, or take --frontend grpcio",
            ) from error
        await self._behind.start()
        self._native.set_fallback(str(socket))
        self._methods = list(self._registry.unary.items())
        self._native.add_methods([(path, False) for path, _ in self._methods])
        with unhurried_threads():
            self._native.start()
        self._receiver = threading.Thread(
            target=self._receive,
            args=(self._native, asyncio.get_running_loop()),
            name="grpc-receive",
            daemon=True,
        )
        self._receiver.start()

    async def stop(self, grace_s: float | None) -> None:
        """Take no more calls; cut off after `grace_s` those under way.

        Also where an earlier stop was given up: what that had begun is done again.
        """
        self._stopping = True
        behind = asyncio.ensure_future(self._behind.stop(grace_s))
        tasks = [call.task for call in self._calls.values() if call.task is not None]
        if tasks and grace_s:
            await asyncio.wait(tasks, timeout=grace_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await behind
        if self._native is not None:
            if grace_s:
                await asyncio.sleep(min(grace_s, LEAVING_S))
            await asyncio.to_thread(self._native.close)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    # The way of a call.

    def _receive(self, native: NativeGrpcFront, loop: asyncio.AbstractEventLoop) -> None:
        """Bring calls to the event loop, a burst at a time, until the server closes."""
        last_s = -math.inf
        try:
            while (events := native.recv_batch_details(BURST)) is not None:
                received_s = time.monotonic()  # what deadlines are left, is counted from now
                loop.call_soon_threadsafe(self._take, native, loop, events, received_s)
                is_fresh = received_s - last_s <= GATHER_FORGOTTEN_S
                if self._gather_s and is_fresh and len(events) < BURST:
                    time.sleep(self._gather_s)
                last_s = received_s
        except Exception:
            if not loop.is_closed():  # without `stop`
                log.exception("calls are read no more")  # and `alive` says so
            native.close()

    def _take(
        self,
        native: NativeGrpcFront,
        loop: asyncio.AbstractEventLoop,
        events: list[Event],
        received_s: float,
    ) -> None:
        """Begin to answer the calls of a burst, and stop where callers have gone.

        In the first step of its task each comes to its queue.
        """
        come_to_queues = self._screen.begin_burst()
        waited_s, self._refused = time.monotonic() - received_s, 0
        if received_s - self._taken_s > GATHER_FORGOTTEN_S:
            self._gather_s, self._least_left_s = 0.0, math.inf
        self._taken_s = received_s
        self._least_left_s *= HURRY_GROWS
        for event in events:
            self._begin(native, loop, event, waited_s)
        self._gather_s = how_long_to_gather(self._refused, self._least_left_s)
        loop.call_soon(come_to_queues)

    def _begin(
        self,
        native: NativeGrpcFront,
        loop: asyncio.AbstractEventLoop,
        event: Event,
        waited_s: float,
    ) -> None:
        """Begin to answer a call unless it is refused; or stop one."""
        kind, call_id, method_id, payload, _, details = event
        if kind == EVENT_CANCEL:
            if (gone := self._calls.get(call_id)) is not None:
                gone.leave()
            return
        try:
            metadata, peer, left_s = details
            if left_s is not None:
                self._least_left_s = min(self._least_left_s, max(left_s, LEAST_LEFT_S))
                # as long for the way back
                left_s -= waited_s + min(self._gather_s, max(GATHER_S, GATHER_SHARE * left_s))
            path = self._methods[method_id][0]
            if (refusal := self._refusal(path, left_s)) is not None:
                code, message = to_status(refusal)
                if not self._stopping:
                    self._on_turned_away(code)
                status: Status | None = (code, message, retry_metadata(refusal))
            else:
                status = self._screen.refuses(path, payload, metadata, peer, left_s)
            if status is not None:
                self._refused += 1
                _end(native, call_id, *status)
                return
            call = NativeCall(call_id, metadata, peer, left_s)
            call.task = loop.create_task(self._answer(native, call, method_id, payload))
        except Exception as error:  # a fault of ours; the others are answered
            _end(native, call_id, *to_status(error))
            return
        self._calls[call_id] = call
        call.task.add_done_callback(partial(self._forget, native, call))

    def _refusal(self, path: str, left_s: float | None) -> ServeError | None:
        """Say why a call is not begun; probes are, however busy this is."""
        if self._stopping:
            return UnavailableError(STOPPING)
        if path.startswith(HEALTH):
            return too_many_calls() if len(self._calls) >= self._max_calls + PROBES else None
        if len(self._calls) + self._behind.limit.calls >= self._max_calls:
            return too_many_calls()
        return self._refuses(left_s)

    async def _answer(
        self, native: NativeGrpcFront, call: NativeCall, method_id: int, payload: bytes
    ) -> None:
        """Answer one call."""
        path, handler = self._methods[method_id]
        try:
            if self._ask is not None:
                handler = await self._intercept(self._ask, path, call)
            behaviour: Any = handler.unary_unary
            reply: Any = await behaviour(self._parse(handler, payload), call)
            if handler.response_serializer is not None:
                reply = handler.response_serializer(reply)
            if call.status is not None and call.status[0] is not grpc.StatusCode.OK:
                _end(native, call.call_id, *call.status, call.trailing)
            else:
                native.respond(call.call_id, reply, call.initial, call.trailing or None)
        except asyncio.CancelledError:
            if not call.is_gone:  # cut off by a stop
                _end(native, call.call_id, grpc.StatusCode.CANCELLED, STOPPING)
        except grpc.aio.AbortError:
            code, message = call.status or (grpc.StatusCode.UNKNOWN, "")
            _end(native, call.call_id, code, message, call.trailing)
        except Exception as error:
            _end(native, call.call_id, *to_status(error))

    def _forget(self, native: NativeGrpcFront, call: NativeCall, task: asyncio.Task[None]) -> None:
        """Strike a call off; a task that is cancelled before its first step runs nothing of it."""
        del self._calls[call.call_id]
        call.task = None  # or a call, its task and the frame with its message keep one another
        if task.cancelled() and not call.is_gone:  # cut off by a stop
            _end(native, call.call_id, grpc.StatusCode.CANCELLED, STOPPING)
        call.finish()

    async def _intercept(self, ask: Ask, path: str, call: NativeCall) -> Handler:
        """Let the interceptors see a call, and give the handler that they agree on."""
        chosen = await ask(CallDetails(path, call.invocation_metadata()))
        if chosen is None:
            await call.abort(grpc.StatusCode.UNIMPLEMENTED, NOT_FOUND)
        assert not chosen.request_streaming, f"{path} answers one message"
        assert not chosen.response_streaming, f"{path} answers with one message"
        return chosen

    def _parse(self, handler: Handler, payload: bytes) -> Any:
        """Read a message.

        Raises:
            QueueFullError: it is larger than a message may be; in grpcio's own words.
        """
        if len(payload) > self._max_message_bytes:
            raise QueueFullError(
                "SERVER: Received message larger than max "
                f"({len(payload)} vs. {self._max_message_bytes})"
            )
        parse = handler.request_deserializer
        return payload if parse is None else parse(payload)


def how_long_to_gather(refused: int, least_left_s: float) -> float:
    """Say for how many seconds the calls of a burst gather.

    Args:
        refused: how many of the last burst were.
        least_left_s: what the most hurried of late had left; infinite where nobody had an end.
    """
    if refused < GATHERING:
        return 0.0
    if least_left_s == math.inf:
        return GATHER_S
    return max(GATHER_S, min(GATHER_MOST_S, GATHER_SHARE * least_left_s))


def _end(
    native: NativeGrpcFront,
    call_id: int,
    code: grpc.StatusCode,
    message: str,
    trailing: Sequence[tuple[str, str | bytes]] = (),
) -> None:
    """End a call with an error; what the caller waits for is never lost over its trailers."""
    try:
        kept = [(key, value) for key, value in trailing if not key.startswith(RESERVED)]
        native.fail(call_id, code.value[0], message, kept or None)
    except Exception as error:  # metadata that HTTP/2 does not carry
        code, message = to_status(error)
        native.fail(call_id, code.value[0], message, None)
