"""A load generator's HTTP/2, against both front ends."""

from __future__ import annotations

import asyncio
import struct

import grpc
import pytest

from benchmarks.frames import (
    MAX_CONCURRENT_STREAMS,
    SETTINGS,
    connect,
    frame,
    huffman,
    read_status,
)
from protos import horace_pb2 as pb

EMBED = "/horace.v1.Horace/Embed"


@pytest.fixture(params=["native", "grpcio"])
def server_of(request):
    """A function that starts a server of the encoder that ships, on either front end."""
    from serve.config import ServeOptions
    from serve.server import Server

    async def start(**options):
        server = Server(ServeOptions(port=0, frontend=request.param, **options))
        await server.start()
        return server

    return start


def message(images: int, side: int = 28) -> bytes:
    """A request for black images."""
    raw = pb.RawImage(pixels=bytes(side * side), height=side, width=side, channels=1)
    return pb.EmbedRequest(images=[pb.Image(raw=raw)] * images).SerializeToString()


async def call(server, calls: int, request: bytes, timeout_s: float = 60.0):
    """Make calls at once; how each ended."""
    ended = []
    frames = await connect(
        server.address,
        EMBED,
        request,
        timeout_s=timeout_s,
        on_end=lambda *end: ended.append(end),
    )
    for _ in range(calls):
        frames.call()
    await frames.idle.wait()
    frames.close()
    return ended


def test_every_call_is_answered_once(server_of):
    """Many at once, more than may be open, and messages larger than a frame and a window."""

    async def main():
        server = await server_of()
        small = await call(server, 1500, message(1))
        large = await call(server, 4, message(1, side=400))
        await server.drain(limit_s=10)
        assert [code for code, *_ in small] == ["OK"] * 1500
        assert [code for code, *_ in large] == ["OK"] * 4
        assert all(seconds > 0 for _, seconds, _ in small)

    asyncio.run(main())


def test_a_refusal_has_its_status_and_says_whether_it_tells_when_to_come_back(server_of):
    """Found in the trailers, whatever else is there."""

    async def main():
        server = await server_of(max_in_flight_mib=1)
        wrong = await call(server, 3, b"\xff\xff")
        server.valve._lag = type("Slow", (), {"seconds": 1.0})()
        late = await call(server, 3, message(1), timeout_s=3.0)
        await server.drain(limit_s=10)
        assert {(code, told) for code, _, told in wrong} == {("INVALID_ARGUMENT", False)}
        assert {(code, told) for code, _, told in late} == {("DEADLINE_EXCEEDED", True)}

    asyncio.run(main())


def test_a_call_is_given_up_at_its_deadline(server_of):
    """And the server hears of it: it has nothing under way then."""

    async def main():
        server = await server_of()
        engine = server.catalog.model().engine
        with engine._changed:  # no batch begins
            ended = await call(server, 2, message(1), timeout_s=0.05)
        assert [code for code, *_ in ended] == ["DEADLINE_EXCEEDED"] * 2
        await server.calls.wait_idle()
        await server.drain(limit_s=10)

    asyncio.run(main())


def test_who_waits_for_a_stream_says_what_is_left_of_its_time():
    """As gRPC's own clients do; and one that has waited too long is given up."""
    left_s, go_on = [], asyncio.Event()

    async def answer(request, context):
        left_s.append(context.time_remaining())
        await go_on.wait()
        return b""

    async def main():
        server = grpc.aio.server(options=[("grpc.max_concurrent_streams", 1)])
        handler = grpc.unary_unary_rpc_method_handler(answer)
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("horace.v1.Horace", {"Embed": handler})]
        )
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        asyncio.get_running_loop().call_later(0.2, go_on.set)
        ended = await call(type("At", (), {"address": address}), 2, b"", timeout_s=30.0)
        assert [code for code, *_ in ended] == ["OK"] * 2
        assert left_s[1] <= left_s[0] - 0.19
        go_on.clear()
        late = await call(type("At", (), {"address": address}), 3, b"", timeout_s=0.05)
        assert [code for code, *_ in late] == ["DEADLINE_EXCEEDED"] * 3
        await server.stop(None)

    asyncio.run(main())


def test_a_lost_connection_ends_every_call():
    """Those that wait for a stream, too: none is begun on it, and none is forgotten."""

    async def hang_up(reader, writer):
        writer.write(frame(SETTINGS, 0, 0, struct.pack(">HI", MAX_CONCURRENT_STREAMS, 1)))
        await reader.readuntil(b"grpc-timeout")
        writer.close()

    async def main():
        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
            address = "127.0.0.1:{1}".format(*server.sockets[0].getsockname())
            ended = await call(type("At", (), {"address": address}), 3, b"")
        assert [code for code, *_ in ended] == ["UNAVAILABLE"] * 3

    asyncio.run(main())


def test_a_status_is_read_in_either_form_and_never_guessed():
    """Coded as Rust's h2 writes it, plain as grpcio does; a block without one is an error."""
    coded = b"\x00\x88" + huffman("grpc-status") + b"\x82" + huffman("14")
    assert read_status(b"\x20" + coded) == grpc.StatusCode.UNAVAILABLE.name
    assert read_status(b"\x40\x0bgrpc-status\x018\x40\x0cgrpc-message\x00") == (
        grpc.StatusCode.RESOURCE_EXHAUSTED.name
    )
    with pytest.raises(ValueError, match="trailers: expected grpc-status"):
        read_status(b"\x88")
