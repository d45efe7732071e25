from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from models.wire import image_to_wire, vectors_from_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc
from serve import answering
from serve.answering import Answering
from serve.operation.options import MetricsOptions

MIB = 1 << 20


def stub_of(server):
    """A channel and the plain stub, without the client's help."""
    channel = grpc.aio.insecure_channel(server.address)
    return channel, pb_grpc.HoraceStub(channel)


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
    assert replies[7].error.message == (
        "model: expected 'fake', found 'nobody'; name one that is there, or have it served"
    )
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


def embed_stream(channel, image, timeout):
    """A stream of one request, in Horace's own protocol."""
    request = pb.EmbedRequest(images=[image_to_wire(image)])
    return pb_grpc.HoraceStub(channel).EmbedStream(iter([request]), timeout=timeout)


def infer_stream(channel, image, timeout):
    """The same in KServe's."""
    request = service_pb2.ModelInferRequest(model_name="fake")
    tensor = request.inputs.add(name="images", datatype="UINT8", shape=[1, *image.shape])
    tensor.contents.uint_contents.extend(image.ravel().tolist())
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    return stub.ModelStreamInfer(iter([request]), timeout=timeout)


@pytest.mark.parametrize(
    ("method", "start"), [("EmbedStream", embed_stream), ("ModelStreamInfer", infer_stream)]
)
def test_requests_of_a_stream_whose_time_ends_while_they_are_computed_count_as_late(
    serving, fake, image, eventually, method, start
):
    """As a call does; those of one that hangs up then count as cancelled."""

    async def main():
        async with (
            serving(fake, metrics=MetricsOptions(port=0)) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):

            async def counted(code):
                text = (await server.operation.metrics()).decode()
                return f'horace_requests_total{{code="{code}",method="{method}"}} 1' in text

            engine = server.catalog.model("").engine
            fake.gate.clear()
            late = start(channel, image(1), 1.0023)  # grpcio has 1.01 of it on the wire
            await eventually(fake.entered.is_set)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                _ = [reply async for reply in late]
            assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            gone = start(channel, image(2), 60)
            await eventually(lambda: engine.statistics().waiting_images == 1)
            gone.cancel()
            await eventually(lambda: engine.statistics().waiting_images == 0)
            await eventually(lambda: not server.calls.active)
            assert await counted("DEADLINE_EXCEEDED")
            assert await counted("CANCELLED")

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
        assert server.calls.accepted == 1

    asyncio.run(main())


@asynccontextmanager
async def unread_stream(server, image, eventually):
    """A stream of large replies whose caller takes none, and sends for as long as that is read."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        stream = pb_grpc.HoraceStub(channel).EmbedStream()
        request = pb.EmbedRequest(images=[image_to_wire(image(1))], request_id="x" * MIB)

        async def send():
            for _ in range(64):
                await stream.write(request)
            await stream.done_writing()

        sending = asyncio.create_task(send())
        counts = [-1] * 50
        engine = server.catalog.model("").engine

        def is_held_back():
            counts.append(engine.statistics().admitted_requests)
            return counts[-1] == counts[-50]

        await eventually(is_held_back)
        yield stream, sending
        sending.cancel()


def test_a_caller_who_goes_while_nothing_moves_holds_up_no_drain(serving, fake, image, eventually):
    """It has taken no reply, so that nothing more was read of it."""

    async def main():
        async with serving(fake) as server, unread_stream(server, image, eventually) as (stream, _):
            stream.cancel()
            assert await asyncio.wait_for(server.drain(limit_s=60), 30) == 0

    asyncio.run(main())


def test_a_caller_who_goes_while_nothing_moves_keeps_its_place_for_a_while_at_most(
    serving, fake, image, eventually, monkeypatch
):
    """It is noticed once what it has sent is passed over."""
    monkeypatch.setattr(answering, "UNREAD_S", 0.5)

    async def main():
        async with serving(fake) as server, unread_stream(server, image, eventually) as (stream, _):
            stream.cancel()
            await eventually(lambda: not server.calls.active)

    asyncio.run(main())


def test_a_stream_whose_replies_are_not_taken_is_read_no_further(
    serving, fake, image, eventually, monkeypatch
):
    """What was read is answered, and then its caller is told."""
    monkeypatch.setattr(answering, "UNREAD_S", 0.5)

    async def main():
        async with (
            serving(fake) as server,
            unread_stream(server, image, eventually) as (stream, sending),
        ):
            await asyncio.wait_for(sending, 60)
            replies = []

            async def take_all():
                while True:
                    replies.append(await stream.read())

            with pytest.raises(grpc.aio.AioRpcError) as error:
                await take_all()
            assert len(replies) == len(fake.computed) < 64
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.value.details() == (
            "replies of a stream: expected a caller who takes the next within 0.5 s, found one "
            "who did not; read replies while requests are sent; the rest of these was not read"
        )

    asyncio.run(main())


class Caller:
    """A stream's context whose caller takes no reply before it is told to."""

    def __init__(self):
        self.takes = asyncio.Event()
        self.taken = []

    async def write(self, reply):
        """Wait until it is taken."""
        await self.takes.wait()
        self.taken.append(reply)

    async def abort(self, code, message, metadata):
        """Fail: there is no reason to."""
        pytest.fail(message)


@pytest.mark.parametrize("drains", [False, True])
def test_a_stream_that_is_cut_short_once_it_was_read_to_its_end_ends_well(
    eventually, monkeypatch, drains
):
    """It had as many requests as may be under way: only its end was not read yet."""
    monkeypatch.setattr(answering, "UNREAD_S", 60 if drains else 0.05)

    async def main():
        own, caller, ended, asked = Answering(), Caller(), asyncio.Event(), []

        async def requests():
            yield 1
            yield 2
            ended.set()

        async def answer(request, on_admitted):
            asked.append(request)
            return request

        streaming = asyncio.create_task(own.stream(requests(), caller, answer, window=2))
        await eventually(lambda: asked == [1, 2])
        if drains:
            own.calls.drain()
        await asyncio.wait_for(ended.wait(), 30)
        caller.takes.set()
        await streaming
        assert caller.taken == [1, 2]

    asyncio.run(main())
