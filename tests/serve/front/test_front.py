"""Both front ends, side by side: what a servicer sees and what a caller gets is the same."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import struct
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pygrpc_native import EVENT_CALL, EVENT_CANCEL

from models.wire import image_to_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc
from serve.client.connection import CHANNEL_OPTIONS
from serve.errors import StartError
from serve.front import grpcio, make_front, native
from serve.front.grpcio import GrpcioFront
from serve.front.native import GATHER_MOST_S, GATHER_S, NativeFront, how_long_to_gather
from serve.front.native_call import NativeCall
from serve.port import is_loopback

MAX_BYTES = 1 << 16
MIB = 1 << 20


@dataclass
class Heard:
    """What a servicer was told of its last call."""

    calls: int = 0
    metadata: dict[str, str | bytes] = field(default_factory=dict)
    peer: str = ""
    remaining_s: float | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    gate: asyncio.Event = field(default_factory=asyncio.Event)


class Parrot:
    """A service of bytes: it does what its requests say."""

    def __init__(self) -> None:
        self.heard = Heard()
        self.port = 0

    async def say(self, request, context):
        """Answer, fail or wait."""
        heard = self.heard
        heard.calls += 1
        heard.metadata = dict(context.invocation_metadata())
        heard.peer, heard.remaining_s = context.peer(), context.time_remaining()
        context.add_done_callback(lambda _: heard.over.set())
        heard.entered.set()
        match request:
            case b"wait":
                await heard.gate.wait()
            case b"trailers":
                await context.send_initial_metadata([("first", "1")])
                context.set_trailing_metadata([("last", "2"), ("last-bin", b"\x00\xff")])
            case b"abort":
                code = grpc.StatusCode.RESOURCE_EXHAUSTED
                await context.abort(code, "no room: \N{SNOWMAN}", (("retry-after-ms", "7"),))
            case b"later":
                times = (("grpc-retry-pushback-ms", "7"), ("retry-after-ms", "7"))
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "later", times)
            case b"late" | b"late refusal":
                time.sleep(heard.remaining_s + 0.02)  # nothing of this loop runs meanwhile
                if request != b"late":
                    await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "too late")
            case b"bad reply":
                context.set_trailing_metadata([("no name", "1")])
            case b"bad abort":
                await context.abort(grpc.StatusCode.NOT_FOUND, "no", (("no name", "1"),))
            case b"code":
                context.set_code(grpc.StatusCode.NOT_FOUND)
                context.set_details("not here")
        return request

    async def count(self, request, context):
        """Stream three replies."""
        for n in range(3):
            yield request + bytes([n])

    def add_to(self, server):
        """Register as generated code does."""
        handlers = {
            "Say": grpc.unary_unary_rpc_method_handler(self.say),
            "Count": grpc.unary_stream_rpc_method_handler(self.count),
        }
        generic = grpc.method_handlers_generic_handler("Parrot", handlers)
        server.add_generic_rpc_handlers((generic,))
        server.add_registered_method_handlers("Parrot", handlers)


class Doorman(grpc.aio.ServerInterceptor):
    """Notes every call, and lets in who knows the word."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def intercept_service(self, continuation, handler_call_details):
        """Note a call, and refuse it without the word."""
        self.seen.append(handler_call_details.method)
        if dict(handler_call_details.invocation_metadata).get("word") == "please":
            return await continuation(handler_call_details)

        async def refuse(request, context):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "say the word")

        return grpc.unary_unary_rpc_method_handler(refuse)


@pytest.fixture
def parrot(frontend):
    """An async context manager: a parrot on this front end, and a channel to it."""

    @asynccontextmanager
    async def run(**options):
        bird = Parrot()
        front = make_front(frontend, max_message_bytes=MAX_BYTES, max_calls=4, **options)
        bird.port = front.listen("127.0.0.1", 0)
        bird.add_to(front.server)
        await front.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{bird.port}") as channel:
                yield bird, front, channel
        finally:
            await front.stop(None)

    return run


async def failure(call) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


@pytest.mark.parametrize(
    ("kind", "tls", "host", "front_end"),
    [
        ("auto", False, "127.0.0.1", NativeFront),
        ("auto", False, "::1", NativeFront),
        ("auto", False, "localhost", NativeFront),
        ("auto", False, "0.0.0.0", GrpcioFront),
        ("auto", False, "some.host", GrpcioFront),
        ("auto", True, "127.0.0.1", GrpcioFront),
        ("native", False, "0.0.0.0", NativeFront),
        ("grpcio", False, "127.0.0.1", GrpcioFront),
    ],
)
def test_auto_is_native_where_only_this_machine_can_call(kind, tls, host, front_end):
    """A message of any size is read before it is refused: nothing for the open network."""

    async def main():
        front = make_front(kind, max_message_bytes=1, max_calls=1, tls=tls, host=host)
        assert type(front) is front_end
        await front.stop(None)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("host", "alone"), [("[::1]", True), ("127.8.9.1", True), ("[::]", False), ("10.0.0.1", False)]
)
def test_a_loopback_address_is_known_as_one(host, alone):
    """With brackets or without."""
    assert is_loopback(host) is alone


def test_native_with_tls_is_refused_in_one_line():
    """What it cannot do it does not do without."""

    async def main():
        front = make_front("native", max_message_bytes=1, max_calls=1, tls=True)
        with pytest.raises(
            StartError,
            match=r"^--frontend native: expected no TLS, found TLS; take --frontend grpcio$",
        ):
            front.listen("127.0.0.1", 0, grpc.ssl_server_credentials([(b"k", b"c")]))
        await front.stop(None)

    asyncio.run(main())


def test_a_servicer_sees_who_calls_with_what_and_how_long(parrot):
    """Metadata, binary ones too, the caller's address and its deadline."""

    async def main():
        async with parrot() as (bird, _, channel):
            say = channel.unary_unary("/Parrot/Say")
            metadata = [("colour", "green"), ("seed-bin", b"\x00\x01\xff")]
            assert await say(b"hello", metadata=metadata, timeout=30) == b"hello"
            assert bird.heard.metadata["colour"] == "green"
            assert bird.heard.metadata["seed-bin"] == b"\x00\x01\xff"
            assert bird.heard.peer.startswith("ipv4:127.0.0.1:")
            assert 20 < bird.heard.remaining_s < 31  # a client may round up
            await say(b"hello")
            assert bird.heard.remaining_s is None
            await asyncio.wait_for(bird.heard.over.wait(), 30)

    asyncio.run(main())


def test_metadata_and_statuses_reach_the_caller(parrot):
    """Before and after the reply, with an abort, and of a code that was set."""

    async def main():
        async with parrot() as (_, _, channel):
            say = channel.unary_unary("/Parrot/Say")
            call = say(b"trailers")
            assert await call == b"trailers"
            assert ("first", "1") in list(await call.initial_metadata())
            trailers = list(await call.trailing_metadata())
            assert {("last", "2"), ("last-bin", b"\x00\xff")} <= set(trailers)
            error = await failure(say(b"abort"))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error.details() == "no room: \N{SNOWMAN}"
            assert ("retry-after-ms", "7") in list(error.trailing_metadata())
            error = await failure(say(b"code"))
            assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "not here")

    asyncio.run(main())


def test_streams_and_methods_that_are_not_there(parrot):
    """A stream is answered, and what nobody registered is UNIMPLEMENTED."""

    async def main():
        async with parrot() as (_, _, channel):
            replies = [reply async for reply in channel.unary_stream("/Parrot/Count")(b"a")]
            assert replies == [b"a\x00", b"a\x01", b"a\x02"]
            for path in ("/Parrot/Sing", "/Crow/Say"):
                error = await failure(channel.unary_unary(path)(b""))
                assert error.code() is grpc.StatusCode.UNIMPLEMENTED
                assert error.details() == "Method not found!"

    asyncio.run(main())


def test_a_message_above_the_limit_is_refused(parrot):
    """In the same words; the connection and its other calls go on."""

    async def main():
        async with parrot() as (bird, _, channel):
            say = channel.unary_unary("/Parrot/Say")
            waiting = say(b"wait")
            await bird.heard.entered.wait()
            assert await say(bytes(MAX_BYTES)) == bytes(MAX_BYTES)
            error = await failure(say(bytes(MAX_BYTES + 1)))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert f"({MAX_BYTES + 1} vs. {MAX_BYTES})" in error.details()
            bird.heard.gate.set()
            assert await waiting == b"wait"

    asyncio.run(main())


def test_interceptors_see_every_call(parrot):
    """Unary ones, streams and those to methods that are not there, in the same way."""

    async def main():
        doorman = Doorman()
        async with parrot(interceptors=[doorman]) as (_, _, channel):
            say = channel.unary_unary("/Parrot/Say")
            assert await say(b"hi", metadata=[("word", "please")]) == b"hi"
            for path in ("/Parrot/Say", "/Parrot/Sing"):
                error = await failure(channel.unary_unary(path)(b"hi"))
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
                assert error.details() == "say the word"
            count = channel.unary_stream("/Parrot/Count")
            polite = count(b"a", metadata=[("word", "please")])
            assert len([reply async for reply in polite]) == 3
            assert doorman.seen == ["/Parrot/Say", "/Parrot/Say", "/Parrot/Sing", "/Parrot/Count"]

    asyncio.run(main())


def test_a_handler_that_fails_tells_no_internals(serving, fake, image, caplog):
    """Whatever is raised, the caller gets a number to ask by."""

    async def main():
        async with (
            serving(fake) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            request = pb.EmbedRequest(images=[image_to_wire(image(1))])
            fake.failures.append(RuntimeError("the secret path"))
            error = await failure(stub.Embed(request))
            assert error.code() is grpc.StatusCode.INTERNAL
            assert "secret" not in error.details()
            assert (await stub.Embed(request)).vectors.rows == 1

    asyncio.run(main())


def test_the_bound_on_calls_holds_and_lets_go(parrot, eventually):
    """Four are open, the fifth is refused; a caller that hangs up makes room."""

    async def main():
        async with parrot() as (bird, _, channel):
            say = channel.unary_unary("/Parrot/Say")
            held = [say(b"wait") for _ in range(4)]
            await eventually(lambda: bird.heard.calls == 4)
            error = await failure(say(b"hello"))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            held.pop().cancel()
            await asyncio.wait_for(bird.heard.over.wait(), 30)
            assert await say(b"hello") == b"hello"
            bird.heard.gate.set()
            assert await asyncio.gather(*held) == [b"wait"] * 3

    asyncio.run(main())


def test_a_refusal_with_a_trailer_of_grpc_is_a_refusal(parrot):
    """pygrpc-native takes no name that begins with `grpc-`; the call ends all the same."""

    async def main():
        async with parrot() as (_, _, channel):
            error = await failure(channel.unary_unary("/Parrot/Say")(b"later", timeout=30))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert dict(error.trailing_metadata())["retry-after-ms"] == "7"

    asyncio.run(main())


@pytest.mark.parametrize("frontend", ["native"])
@pytest.mark.parametrize("word", [b"bad reply", b"bad abort"])
def test_metadata_that_cannot_be_sent_leaves_nobody_waiting(parrot, word, caplog):
    """It is a fault of ours, which the caller hears of."""

    async def main():
        async with parrot() as (_, _, channel):
            say = channel.unary_unary("/Parrot/Say")
            error = await failure(say(word, timeout=30))
            assert error.code() is grpc.StatusCode.INTERNAL
            assert await say(b"hello", timeout=30) == b"hello"

    asyncio.run(main())


@pytest.mark.parametrize("frontend", ["native"])
def test_a_fault_at_one_call_leaves_the_others_of_its_burst(parrot, caplog):
    """It is answered as INTERNAL, and they are answered as ever."""
    left = iter([ValueError("a fault of ours")])

    def refuses(_):
        for error in left:
            raise error

    async def main():
        async with parrot(refuses=refuses) as (_, front, channel):
            say = channel.unary_unary("/Parrot/Say")
            taken, take = asyncio.Event(), front._take

            def hold(native, loop, events, received_s):
                held.extend(events)
                if len(held) == 3:
                    taken.set()

            held = []
            front._take = hold
            calls = [say(b"hello", timeout=30) for _ in range(3)]
            await asyncio.wait_for(taken.wait(), 30)
            front._take = take
            take(front._native, asyncio.get_running_loop(), held, time.monotonic())
            replies = await asyncio.gather(*calls, return_exceptions=True)
            faults = [reply for reply in replies if reply != b"hello"]
            assert [fault.code() for fault in faults] == [grpc.StatusCode.INTERNAL]

    asyncio.run(main())


@pytest.mark.parametrize("frontend", ["native"])
@pytest.mark.usefixtures("no_collector")
def test_a_call_that_is_gone_before_it_begins_leaves_no_trace(parrot, eventually):
    """Its task is cancelled before its first step, in which it would clear up after itself.

    Nor does it wait for the garbage collector, which would keep its message until then.
    """

    async def main():
        async with parrot() as (bird, front, channel):
            native, loop = front._native, asyncio.get_running_loop()
            for call_id in range(1 << 40, (1 << 40) + 10):
                come = (EVENT_CALL, call_id, 0, b"hello", None, ((), "ipv4:192.0.2.1:1", None))
                gone = (EVENT_CANCEL, call_id, 0, None, None, None)
                front._take(native, loop, [come, gone], time.monotonic())
                await eventually(lambda: "calls=0/" in repr(front))
            calls = [left for left in gc.get_objects() if type(left) is NativeCall]
            assert not calls  # `isinstance` would ask proxies of other libraries, which warn
            assert bird.heard.calls == 0
            assert await channel.unary_unary("/Parrot/Say")(b"hello", timeout=30) == b"hello"

    asyncio.run(main())


def test_a_caller_whose_time_is_up_hears_it_and_holds_no_place(parrot):
    """Whether the handler ends with a reply or with a refusal."""

    async def main():
        async with parrot() as (bird, _, channel):
            say = channel.unary_unary("/Parrot/Say")
            await channel.channel_ready()
            for request in [b"late", b"late refusal"] * 4:
                error = await failure(say(request, timeout=0.3))
                assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert bird.heard.calls > 4  # as many as there are places
            assert await say(b"hello", timeout=30) == b"hello"

    asyncio.run(main())


@pytest.mark.parametrize("asked", [b"abort", b"hello"])
@pytest.mark.parametrize("left_s", [0, 0.5, None])
def test_grpcio_sends_a_late_caller_nothing(asked, left_s):
    """It would keep for ever what it allocates for what cannot be sent."""
    said = []

    class Call:
        """A call that has so much time left."""

        async def abort(self, *status):
            said.append(status)
            raise grpc.aio.AbortError

        def time_remaining(self):
            return left_s

        def cancelled(self):
            return False

    async def behaviour(request, context):
        assert not context.cancelled()  # all else is the call's own
        if request == b"abort":
            await context.abort(grpc.StatusCode.NOT_FOUND, "no")
        return request

    async def find(_):
        return grpc.unary_unary_rpc_method_handler(behaviour)

    async def main():
        handler = await grpcio.Punctual().intercept_service(find, None)
        try:
            said.append(await handler.unary_unary(asked, Call()))
        except asyncio.CancelledError:
            said.append("nothing")
        except grpc.aio.AbortError:
            pass

    asyncio.run(main())
    if left_s == 0:
        assert said == ["nothing"]
    else:
        assert said == [b"hello" if asked == b"hello" else (grpc.StatusCode.NOT_FOUND, "no")]


def test_grpcio_reads_a_message_to_its_end_though_its_caller_has_gone():
    """It would keep for ever what it allocates for a message that nobody takes."""
    read, come = [], asyncio.Event()

    class Call:
        """A call whose message is on its way."""

        async def read(self):
            await come.wait()
            read.append(b"hello")
            return b"hello"

    async def find(details):
        return grpc.unary_unary_rpc_method_handler(Parrot().say)

    async def main():
        handler = await grpcio.Whole().intercept_service(find, None)
        task = asyncio.create_task(handler.stream_unary(None, Call()))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        come.set()
        await asyncio.sleep(0)
        assert read == [b"hello"]

    asyncio.run(main())


def test_grpcio_sends_nothing_to_a_caller_who_has_gone_without_a_message():
    """That none comes may be known before that nobody is there: what is sent then is kept."""
    sent = []

    class Call:
        """A call that is over."""

        async def read(self):
            return grpc.aio.EOF

        async def abort(self, *status):
            sent.append(status)

    async def find(details):
        return grpc.unary_unary_rpc_method_handler(Parrot().say)

    async def main():
        handler = await grpcio.Whole().intercept_service(find, None)
        task = asyncio.create_task(handler.stream_unary(None, Call()))
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert sent == []

    asyncio.run(main())


def test_a_call_without_its_message_is_told_so(parrot):
    """At once, and not when its time is up."""

    async def main():
        async with parrot() as (_, _, channel):
            error = await failure(channel.stream_unary("/Parrot/Say")(iter(()), timeout=30))
            assert error.code() is grpc.StatusCode.INTERNAL

    asyncio.run(main())


def test_a_stop_answers_what_is_under_way(parrot):
    """Within its grace; afterwards nobody answers."""

    async def main():
        async with parrot() as (bird, front, channel):
            say = channel.unary_unary("/Parrot/Say")
            waiting = asyncio.ensure_future(say(b"wait"))
            await bird.heard.entered.wait()
            stopping = asyncio.ensure_future(front.stop(30))
            await asyncio.wait([stopping], timeout=0.05)
            assert not stopping.done()
            bird.heard.gate.set()
            assert await waiting == b"wait"
            await stopping
            error = await failure(say(b"hello", timeout=5))
            assert error.code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(main())


def test_a_stop_without_grace_cuts_off(parrot):
    """The caller hears of it, and the handler is cancelled."""

    async def main():
        async with parrot() as (bird, front, channel):
            waiting = asyncio.ensure_future(channel.unary_unary("/Parrot/Say")(b"wait"))
            await bird.heard.entered.wait()
            await front.stop(None)
            error = await failure(waiting)
            assert error.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
            await asyncio.wait_for(bird.heard.over.wait(), 30)

    asyncio.run(main())


def test_a_stop_that_is_given_up_is_ended_by_another(parrot):
    """A second order to stop: what the first waits for is cut off, and nothing is left behind."""

    async def main():
        async with parrot() as (bird, front, channel):
            waiting = asyncio.ensure_future(channel.unary_unary("/Parrot/Say")(b"wait"))
            await bird.heard.entered.wait()
            stopping = asyncio.ensure_future(front.stop(30))
            await asyncio.wait([stopping], timeout=0.05)
            stopping.cancel()
            await asyncio.wait_for(front.stop(None), 10)
            error = await failure(waiting)
            assert error.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", bird.port)
            assert not Path(getattr(front, "_folder", "none")).exists()

    asyncio.run(main())


def test_every_reply_that_was_given_leaves_before_the_port_closes(parrot, eventually):
    """Calls are answered and the server stops in the same breath: nothing is lost."""

    async def main():
        async with parrot() as (bird, front, channel):
            say = channel.unary_unary("/Parrot/Say")
            waiting = [say(b"wait") for _ in range(4)]
            await eventually(lambda: bird.heard.calls == 4)
            bird.heard.gate.set()
            await front.stop(30)
            assert await asyncio.gather(*waiting) == [b"wait"] * 4

    asyncio.run(main())


def frame(kind, flags, stream, payload):
    """A frame of HTTP/2."""
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return head + payload


PING, ACK = 6, 1

HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(4, ACK, 0, b"")
"""What a client sends first, and its answer to what the server does."""


def hello_and_call(request):
    """All that a client sends that calls `Say`."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/Parrot/Say",
        ":authority": "here",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    literal = [text.encode() for pair in headers.items() for text in pair]
    block = b"".join(b"\0" * (n % 2 == 0) + bytes([len(t)]) + t for n, t in enumerate(literal))
    message = b"\0" + len(request).to_bytes(4, "big") + request
    call = frame(1, 4, 1, block) + frame(0, 1, 1, message)
    return HELLO + call


def test_a_caller_that_vanished_holds_no_place(parrot, frontend, monkeypatch):
    """It answers a ping, and then its machine is gone, and no word of that comes."""
    assert (grpcio.KEEPALIVE_MS, grpcio.KEEPALIVE_TIMEOUT_MS) == (60_000, 20_000)
    for name in ("KEEPALIVE_MS", "KEEPALIVE_TIMEOUT_MS"):
        monkeypatch.setattr(f"serve.front.{frontend}.{name}", 100)
    options = grpcio.server_options

    def hasty_options(*args, **kwargs):
        return [*options(*args, **kwargs), ("grpc.http2.ping_timeout_ms", 100)]

    monkeypatch.setattr("serve.front.grpcio.server_options", hasty_options)

    async def answer_a_ping(reader, writer):
        kind = None
        while kind != PING:
            head = await reader.readexactly(9)
            payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
            kind = head[3]
        writer.write(frame(PING, ACK, 0, payload))

    async def main():
        async with parrot() as (bird, _, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", bird.port)
            writer.write(hello_and_call(b"wait"))
            async with asyncio.timeout(30):
                await answer_a_ping(reader, writer)
                await bird.heard.entered.wait()
                await bird.heard.over.wait()
            writer.close()

    asyncio.run(main())


def test_a_caller_may_ask_whether_the_server_lives(parrot, monkeypatch):
    """Without a call, as our own client does every 30 s; grpcio ends who asks too often for it."""
    ping_ms = dict(CHANNEL_OPTIONS)["grpc.keepalive_time_ms"]
    assert ping_ms >= 2 * grpcio.MIN_CLIENT_PING_MS
    monkeypatch.setattr("serve.front.grpcio.MIN_CLIENT_PING_MS", 0)

    async def main():
        async with parrot() as (bird, _, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", bird.port)
            writer.write(HELLO)
            for n in range(9):
                writer.write(frame(PING, 0, 0, bytes([n] * 8)))
                async with asyncio.timeout(30):
                    await reader.readuntil(frame(PING, ACK, 0, bytes([n] * 8)))
            writer.close()

    asyncio.run(main())


def test_connections_that_come_and_go_leave_nothing(serving, fake, image, eventually):
    """Two hundred, half of them reset: a call beside them is served, and all is given back."""

    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    async def main():
        async with (
            serving(fake) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            request = pb.EmbedRequest(images=[image_to_wire(image(1))])
            await stub.Embed(request)
            before = open_files()
            others = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
            for other in others:
                other.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
            assert (await stub.Embed(request)).vectors.rows == 1
            for n, other in enumerate(others):
                if n % 2:
                    reset = struct.pack("ii", 1, 0)
                    other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                other.close()
            await eventually(lambda: open_files() <= before + 8)
            assert (await stub.Embed(request)).vectors.rows == 1

    asyncio.run(main())


def test_reflection_lists_the_services(serving, fake):
    """Also where it is answered by the server behind."""

    async def main():
        async with (
            serving(fake) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            ask = reflection_pb2.ServerReflectionRequest(list_services="")
            replies = [reply async for reply in stub.ServerReflectionInfo(iter([ask]))]
            names = {service.name for service in replies[0].list_services_response.service}
            assert "horace.v1.Horace" in names

    asyncio.run(main())


def test_both_give_the_same_reply_to_the_bit(serving, make_bundle, frontend):
    """Vectors, statuses and fingerprint do not depend on who reads gRPC."""
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
    request = pb.EmbedRequest(images=map(image_to_wire, images))

    async def main():
        async with serving(bundle=(str(make_bundle().path),)) as server:
            assert isinstance(server._front, NativeFront) == (frontend == "native")
            model = server.catalog.model("")
            async with grpc.aio.insecure_channel(server.address) as channel:
                reply = await pb_grpc.HoraceStub(channel).Embed(request)
            assert reply.fingerprint == model.encoder.fingerprint
            return reply.vectors.data, model.encoder.encode(images)

    data, rows = asyncio.run(main())
    from models.vectors import finish_vectors

    assert data == finish_vectors(rows).tobytes()


def test_the_folder_of_the_socket_behind_goes_with_the_server(parrot, frontend):
    """It is this user's alone while it is there."""

    async def main():
        async with parrot() as (_, front, _):
            folder = getattr(front, "_folder", None)
            if frontend == "native":
                assert os.stat(folder).st_mode & 0o077 == 0
        assert folder is None or not folder.exists()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("refused", "least_left_s", "gather_s"),
    [
        (0, 0.5, 0.0),
        (1, 0.5, 0.0),
        (2, 0.5, 0.025),
        (200, 0.5, 0.025),
        (2, 0.01, GATHER_S),
        (2, -1.0, GATHER_S),
        (2, 60.0, GATHER_MOST_S),
        (2, float("inf"), GATHER_S),
    ],
)
def test_calls_gather_while_some_are_refused_by_the_most_hurried(refused, least_left_s, gather_s):
    """A twentieth of what it has left, between 10 and 40 ms; 10 where nobody says."""
    assert how_long_to_gather(refused, least_left_s) == pytest.approx(gather_s)


class Ends:
    """A native server that only notes which calls end."""

    def __init__(self):
        self.ended = []

    def fail(self, call_id, *_):
        """Note one."""
        self.ended.append(call_id)


class Full:
    """A screen that refuses whoever has so much time, and keeps what each has."""

    def __init__(self):
        self.left_s = []

    def begin_burst(self):
        """Keep nothing."""
        return lambda: None

    def refuses(self, path, payload, metadata, peer, left_s):
        """Refuse everybody."""
        self.left_s.append(left_s)
        return grpc.StatusCode.DEADLINE_EXCEEDED, "late", ()


def test_a_caller_in_a_hurry_is_thought_of_when_bursts_gather(monkeypatch):
    """Beside callers with seconds; not for good, and not once all have gone."""

    async def main():
        screen, ends = Full(), Ends()
        front = make_front("native", max_message_bytes=MAX_BYTES, max_calls=4, screen=screen)
        front._methods = [("/Parrot/Say", None)]
        loop, now_s = asyncio.get_running_loop(), 100.0
        monkeypatch.setattr(native, "time", SimpleNamespace(monotonic=lambda: now_s))
        ids = iter(range(1 << 20))

        def take(after_s, *left_s):
            """Bring a burst that comes so long after the last; for how long the next gathers."""
            nonlocal now_s
            now_s += after_s
            calls = [
                (EVENT_CALL, next(ids), 0, b"", None, ((), "ipv4:192.0.2.1:1", one))
                for one in left_s
            ]
            front._take(ends, loop, calls, now_s)
            return front._gather_s

        assert take(0.0, 2.0) == 0.0, "one alone holds nobody up"
        assert take(0.01, 2.0, 2.0) == GATHER_MOST_S
        assert take(0.04, 2.0, 0.08, 2.0) == pytest.approx(GATHER_S)
        assert screen.left_s[-2:] == pytest.approx([0.08 - GATHER_S, 2.0 - GATHER_MOST_S])
        assert GATHER_S < take(0.01, 2.0, 2.0) < 0.012
        for _ in range(30):
            take(0.04, 2.0, 2.0)
        assert take(0.04, 2.0, 2.0) == GATHER_MOST_S
        assert take(60.0, 0.08) == 0.0
        assert screen.left_s[-1] == pytest.approx(0.08), "nobody else is about"
        assert len(ends.ended) == next(ids)

    asyncio.run(main())
