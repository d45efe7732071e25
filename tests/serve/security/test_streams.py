"""What a stream keeps in memory between its messages, and while it waits for its turn."""

from __future__ import annotations

import asyncio
import math
import sys
import weakref
from contextlib import asynccontextmanager

import grpc
import pytest

from serve.answering import Answering
from serve.operation.observer import Call
from serve.security.buckets import Quota
from serve.security.guard import Guard
from serve.security.interceptor import GuardInterceptor
from serve.security.ring import ApiKey, KeyRing, hash_token

METHOD = "/a.Service/Echo"
TOKEN = (("x-api-key", "secret"),)


def ring_of(**limits: float) -> KeyRing:
    """The key of `TOKEN`, with limits of its own."""
    key = ApiKey(name="a", digest=hash_token("secret"), limits=tuple(limits.items()))
    return KeyRing([key])


class Message:
    """A parsed message that can be watched."""

    def __init__(self, raw: bytes) -> None:
        self.size = len(raw)


class Service:
    """Answers each message of a stream with its size, by way of `Answering`."""

    def __init__(self, *, quota: Quota | None = None, max_bytes: int = 1 << 20) -> None:
        """Keep the raw messages, and watch the parsed ones."""
        self.raw: list[bytes] = []
        self.parsed: weakref.WeakSet[Message] = weakref.WeakSet()
        self.turn, self.gate = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.now_s = 0.0
        self.ring: KeyRing | None = None
        self.interceptor = GuardInterceptor(
            Guard(ring=lambda: self.ring, quota=quota, clock=lambda: self.now_s),
            max_in_flight_bytes=max_bytes,
            sleep=self._sleep,
        )
        self._answering = Answering()

    async def _sleep(self, wait_s: float) -> None:
        """Wait until the test says that so much time has passed."""
        await self.turn.wait()
        self.now_s += wait_s

    def _parse(self, raw: bytes) -> Message:
        self.raw.append(raw)
        message = Message(raw)
        self.parsed.add(message)
        return message

    async def _echo(self, requests, context) -> None:
        async def answer(request: Message, on_admitted) -> bytes:
            on_admitted()
            work = self._size_of(request.size)
            del request
            call = Call(method="Echo", arrived_s=0.0, metadata=context.invocation_metadata)
            return await self._answering.answer_in_stream(
                call, work, lambda *_: b"refused", late_s=math.inf
            )

        await self._answering.stream(requests, context, answer, window=1)

    async def _size_of(self, size: int) -> bytes:
        await self.gate.wait()
        return b"%d" % size

    @asynccontextmanager
    async def serve(self):
        """Serve, and give what opens a stream."""
        handler = grpc.stream_stream_rpc_method_handler(self._echo, self._parse, None)
        server = grpc.aio.server(interceptors=(self.interceptor,))
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("a.Service", {"Echo": handler}),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel.stream_stream(METHOD)
        await server.stop(0)


@pytest.fixture
def no_images(monkeypatch):
    """Messages that nobody has to count images of."""
    monkeypatch.setattr("serve.security.interceptor.count_images", lambda _: 0)


@pytest.mark.parametrize("is_answered", [True, False])
def test_an_open_stream_keeps_nothing_of_its_last_message(no_images, eventually, is_answered):
    """Neither the bytes nor what was parsed of them, while it waits for the next, or for room."""

    async def main():
        service = Service()
        async with service.serve() as open_stream:
            stream = open_stream()
            if not is_answered:
                service.gate.clear()
            await stream.write(bytes(1000))
            if is_answered:
                assert await stream.read() == b"1000"
            await eventually(lambda: service.raw and not service.parsed)
            raw = service.raw.pop()
            await eventually(lambda: sys.getrefcount(raw) == 2)  # `raw` and the argument
            stream.cancel()

    asyncio.run(main())


def test_a_message_that_waits_for_its_turn_is_among_the_bytes_under_way(no_images, eventually):
    """It is taken up when its turn has come, and then counts as nothing."""

    async def main():
        service = Service(quota=Quota(requests_per_s=1.0))
        async with service.serve() as open_stream:
            stream = open_stream()
            for size in (1000, 2000):
                await stream.write(bytes(size))
            assert await stream.read() == b"1000"
            await eventually(lambda: service.interceptor.in_flight.bytes == 2000)
            service.turn.set()
            assert await stream.read() == b"2000"
            assert service.interceptor.in_flight.bytes == 0
            stream.cancel()

    asyncio.run(main())


def test_a_message_that_would_wait_without_room_ends_its_stream(no_images, eventually):
    """With the time after which to come back; who need not wait is not refused."""

    async def main():
        service = Service(quota=Quota(requests_per_s=1.0), max_bytes=2500)
        async with service.serve() as open_stream:
            waiting, refused = open_stream(), open_stream()
            for size in (1000, 2000):
                await waiting.write(bytes(size))
            await eventually(lambda: service.interceptor.in_flight.bytes == 2000)
            await refused.write(bytes(600))
            assert await refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "found 2000 bytes, and this one with 600" in await refused.details()
            assert dict(await refused.trailing_metadata())["retry-after-ms"] == "1000"
            service.turn.set()
            waiting.cancel()

    asyncio.run(main())


async def held_back(service, open_stream, eventually):
    """Open a stream by a key of one request a second: its second message waits for its turn."""
    stream = open_stream(metadata=TOKEN)
    for size in (1000, 2000):
        await stream.write(bytes(size))
    assert await stream.read() == b"1000"
    await eventually(lambda: service.interceptor.in_flight.bytes == 2000)
    return stream


def test_a_key_that_is_taken_back_ends_its_stream_at_the_next_message(no_images, eventually):
    """Which is not parsed; what was taken in before is answered."""

    async def main():
        service = Service()
        service.ring = ring_of()
        async with service.serve() as open_stream, asyncio.timeout(60):
            stream = open_stream(metadata=TOKEN)
            service.gate.clear()
            await stream.write(bytes(1000))
            await eventually(lambda: service.raw)
            service.ring = KeyRing([])
            await stream.write(bytes(2000))
            service.gate.set()
            assert await stream.read() == b"1000"
            assert await stream.code() is grpc.StatusCode.UNAUTHENTICATED
            assert await stream.details() == (
                "API key of this stream: expected one that the server still knows, found one that "
                "was taken back; open another with another key"
            )
            assert len(service.raw) == 1

    asyncio.run(main())


def test_a_key_that_is_taken_back_ends_a_stream_that_is_held_back(no_images, eventually):
    """A message that waits for its turn is not taken in when that has come."""

    async def main():
        service = Service()
        service.ring = ring_of(requests_per_s=1.0)
        async with service.serve() as open_stream, asyncio.timeout(60):
            stream = await held_back(service, open_stream, eventually)
            service.ring = KeyRing([])
            service.turn.set()
            assert await stream.code() is grpc.StatusCode.UNAUTHENTICATED
            assert service.interceptor.in_flight.bytes == 0

    asyncio.run(main())


def test_new_limits_of_a_key_hold_in_a_stream_that_is_open(no_images, eventually):
    """From its next message on, and for one that waits for its turn from the next look on."""

    async def main():
        service = Service()
        service.ring = ring_of(requests_per_s=1.0)
        async with service.serve() as open_stream, asyncio.timeout(60):
            stream = await held_back(service, open_stream, eventually)
            service.ring = ring_of()
            service.turn.set()
            for size in (3000, 4000):
                await stream.write(bytes(size))
                await stream.read()
            assert service.now_s == 1.0, "nothing else has waited"
            stream.cancel()

    asyncio.run(main())
