from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest

from models.wire import image_to_wire, vectors_from_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc
from serve.client import AsyncClient, Client

ROOT = Path(__file__).parents[3]


def stub_of(server):
    """A channel and the plain stub, without the client's help."""
    channel = grpc.aio.insecure_channel(server.address)
    return channel, pb_grpc.HoraceStub(channel)


def test_a_slow_iterable_does_not_hold_the_event_loop(serving, fake, image):
    """While it blocks, other tasks run: here the one that it waits for."""
    go_on = threading.Event()

    def images():
        yield image(1)
        assert go_on.wait(10), "the event loop stood still"
        yield image(2)

    async def main():
        async with serving(fake) as server, AsyncClient(server.address) as client:
            stream = client.embed_stream(images(), images_per_request=1)
            await anext(stream)
            go_on.set()
            assert len([reply async for reply in stream]) == 1

    asyncio.run(main())


A_QUEUE = """
import asyncio, queue, sys
from serve.client import AsyncClient

async def main():
    images = queue.Queue()
    images.put(b"no image")
    async with AsyncClient(sys.argv[1]) as client:
        embed = getattr(client, sys.argv[2])
        async for _ in embed(iter(images.get, None), images_per_request=1):
            break

asyncio.run(main())
"""


@pytest.mark.parametrize("method", ["embed_iter", "embed_stream"])
def test_an_iterable_that_blocks_keeps_no_program_from_ending(serving, fake, method):
    """Nothing more comes from the queue; who stops reading is done."""

    async def main():
        async with serving(fake) as server:
            argv = [sys.executable, "-c", A_QUEUE, server.address, method]
            await asyncio.to_thread(subprocess.run, argv, cwd=ROOT, check=True, timeout=60)

    asyncio.run(main())


def test_leaving_an_asyncio_stream_ends_it(serving, fake, image, eventually):
    """An endless iterable is read no further, and the server has no call left."""

    async def endless():
        while True:
            yield image(1)

    async def main():
        async with serving(fake) as server, AsyncClient(server.address) as client:
            stream = client.embed_stream(endless(), images_per_request=2, in_flight=2)
            assert len((await anext(stream)).statuses) == 2
            assert server.calls.active == 1
            await stream.aclose()
            await eventually(lambda: server.calls.active == 0)

    asyncio.run(main())


def test_a_stream_reads_an_endless_iterable_a_few_requests_ahead(serving, fake, image):
    """What is under way is bounded; leaving the loop ends the stream."""
    taken = []

    def endless():
        n = 0
        while True:
            taken.append(n)
            yield image(n % 256)
            n += 1

    def blocking(address):
        with Client(address) as client:
            stream = client.embed_stream(endless(), images_per_request=5, in_flight=2)
            for n, reply in enumerate(stream):
                assert len(reply.statuses) == 5
                assert len(taken) <= (n + 3) * 5
                if n == 20:
                    break
            stream.close()

    async def main():
        async with serving(fake) as server:
            await asyncio.to_thread(blocking, server.address)

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["blocking", "iterable", "asynchronous"])
def test_an_error_of_the_callers_iterable_is_the_callers(serving, fake, image, kind):
    """It comes after the results of what was sent before it."""

    def broken():
        yield from (image(n) for n in range(4))
        raise LookupError("no more images")

    async def abroken():
        for n in range(4):
            yield image(n)
        raise LookupError("no more images")

    def blocking(address, sizes):
        with Client(address) as client:
            for reply in client.embed_stream(broken(), images_per_request=2):
                sizes.append(len(reply.statuses))

    async def asynchronous(address, sizes):
        images = broken() if kind == "iterable" else abroken()
        async with AsyncClient(address) as client:
            async for reply in client.embed_stream(images, images_per_request=2):
                sizes.append(len(reply.statuses))

    async def main():
        sizes = []
        async with serving(fake) as server:
            if kind == "blocking":
                work = asyncio.to_thread(blocking, server.address, sizes)
            else:
                work = asynchronous(server.address, sizes)
            with pytest.raises(LookupError, match="no more images"):
                await work
        assert sizes == [2, 2]

    asyncio.run(main())


def test_a_stream_answers_in_order_and_survives_a_bad_request(serving, fake, image):
    """A request that would fail as a call gets a reply with its error; the next is served."""
    requests = [
        pb.EmbedRequest(images=[image_to_wire(image(n))], request_id=str(n), skip_normalize=True)
        for n in range(40)
    ]
    requests[7].model = "nobody"

    async def main():
        async with serving(fake) as server:
            channel, stub = stub_of(server)
            async with channel:
                return [reply async for reply in stub.EmbedStream(iter(requests))]

    replies = asyncio.run(main())
    assert [reply.request_id for reply in replies] == [str(n) for n in range(40)]
    assert replies[7].error.code == grpc.StatusCode.NOT_FOUND.value[0]
    assert replies[7].error.message == "model: expected 'fake', found 'nobody'"
    values = [vectors_from_wire(r.vectors)[0, 0] for n, r in enumerate(replies) if n != 7]
    assert values == [n for n in range(40) if n != 7]


def test_a_stream_reads_no_further_than_its_bound(serving, fake, image, eventually):
    """With the encoder held, only so many requests of a stream are under way."""

    async def main():
        async with serving(fake, stream_requests=3) as server:
            engine = server.catalog.model("").engine
            channel, stub = stub_of(server)
            fake.gate.clear()
            async with channel:
                requests = [pb.EmbedRequest(images=[image_to_wire(image(n))]) for n in range(9)]
                call = stub.EmbedStream(iter(requests))
                await eventually(lambda: engine.statistics().held_requests == 3)
                held = await stub.ListModels(pb.ListModelsRequest())
                assert held.models
                assert engine.statistics().held_requests == 3
                fake.gate.set()
                assert len([reply async for reply in call]) == 9
        assert fake.computed == list(range(9))

    asyncio.run(main())


def test_a_stream_waits_where_a_call_is_refused(serving, fake, image):
    """A queue with room for one image holds a stream of ten back, and refuses none."""

    async def main():
        async with serving(fake, max_queue_images=1) as server:
            channel, stub = stub_of(server)
            async with channel:
                requests = [pb.EmbedRequest(images=[image_to_wire(image(n))]) for n in range(10)]
                replies = [reply async for reply in stub.EmbedStream(iter(requests))]
        assert not any(reply.HasField("error") for reply in replies)
        assert sorted(fake.computed) == list(range(10))

    asyncio.run(main())


def test_a_stream_reads_no_further_than_its_first_request_in_line(serving, fake, image, eventually):
    """While one request waits for room, the next is not read from the wire."""

    async def main():
        async with serving(fake, max_queue_images=1) as server:
            engine = server.catalog.model("").engine
            channel, stub = stub_of(server)
            fake.gate.clear()
            async with channel:
                requests = [pb.EmbedRequest(images=[image_to_wire(image(n))]) for n in range(9)]
                call = stub.EmbedStream(iter(requests))
                await eventually(lambda: engine.statistics().lined_up_requests == 1)
                assert (await stub.ListModels(pb.ListModelsRequest())).models
                assert engine.statistics().lined_up_requests == 1
                fake.gate.set()
                assert len([reply async for reply in call]) == 9
        assert fake.computed == list(range(9))

    asyncio.run(main())


def test_a_stream_goes_on_after_a_call_that_hung_up(serving, fake, image, eventually):
    """It waited for the room of a call that was cancelled while it ran."""

    async def main():
        async with serving(fake, max_queue_images=2) as server:
            engine = server.catalog.model("").engine
            channel, stub = stub_of(server)
            fake.gate.clear()
            async with channel:
                gone = stub.Embed(pb.EmbedRequest(images=[image_to_wire(image(1))] * 2))
                await eventually(fake.entered.is_set)
                call = stub.EmbedStream(iter([pb.EmbedRequest(images=[image_to_wire(image(2))])]))
                await eventually(lambda: engine.statistics().lined_up_requests == 1)
                gone.cancel()
                await eventually(lambda: engine.statistics().cancelled_requests == 1)
                fake.gate.set()
                replies = [reply async for reply in call]
                assert [len(reply.statuses) for reply in replies] == [1]
                assert await asyncio.wait_for(server.drain(limit_s=20), 10) == 0

    asyncio.run(main())


def test_draining_ends_a_stream_after_what_was_read(serving, fake, image):
    """What the server has read is answered; then the stream says that it stops."""

    async def main():
        async with serving(fake) as server:
            channel, stub = stub_of(server)
            async with channel:
                call = stub.EmbedStream()
                await call.write(pb.EmbedRequest(images=[image_to_wire(image(1))]))
                assert (await call.read()).statuses
                draining = asyncio.create_task(server.drain(limit_s=20))
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await call.read()
                assert await draining == 0
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "has not read the rest of this stream" in error.value.details()

    asyncio.run(main())
