"""What a caller hears of a server that has too much to do, over real gRPC on both front ends."""

from __future__ import annotations

import asyncio
import time

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from models.wire import image_to_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc
from serve.errors import QueueFullError
from serve.front.limit import PROBES, TOO_MANY
from serve.health import MAX_WATCHES, MAX_WATCHES_A_HOST
from serve.in_flight import InFlight
from serve.latency import MIN_BATCHES
from serve.operation.options import MetricsOptions
from serve.valve import EVERY_S, LoopLag, Valve

OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
METRICS = MetricsOptions(port=0)
FRONTENDS = pytest.mark.parametrize("frontend", ["grpcio", "native"])


def request_of(*images, **fields) -> pb.EmbedRequest:
    """A request for these pixels."""
    return pb.EmbedRequest(images=[image_to_wire(one) for one in images], **fields)


def teach(server, *, batch_s: float):
    """Let the only model's forecast know how long a batch takes; its batcher."""
    batcher = server.catalog.model("fake").engine._batcher
    for _ in range(2 * MIN_BATCHES):
        batcher._running.latency.observe(1, batch_s, time.monotonic())
    return batcher


async def refusal(call) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """The status with which a call ends, and its trailing metadata."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    error = refused.value
    return error.code(), error.details() or "", dict(error.trailing_metadata() or ())


async def turned_away(server) -> dict[str, str]:
    """How many calls no service saw, by status, of a server with metrics."""
    lines = (await server.operation.metrics()).decode().splitlines()
    start = 'horace_turned_away_total{code="'
    return dict(line.removeprefix(start).split('"} ') for line in lines if line.startswith(start))


@FRONTENDS
def test_a_full_queue_says_when_to_come_back(serving, fake, image, eventually, frontend):
    """RESOURCE_EXHAUSTED at once, with a number; grpcio has it for gRPC's own retries, too."""

    async def main():
        async with (
            serving(fake, frontend=frontend, max_queue_images=2) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            teach(server, batch_s=1.5)
            fake.gate.clear()
            held = stub.Embed(request_of(image(1), image(2)))
            await eventually(fake.entered.is_set)
            code, message, trailing = await refusal(stub.Embed(request_of(image(3))))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "2 of 2 images" in message
            assert 1400 <= int(trailing["retry-after-ms"]) <= 1700
            if frontend == "grpcio":  # the native one cannot send names that begin so
                assert trailing["grpc-retry-pushback-ms"] == trailing["retry-after-ms"]
            fake.gate.set()
            await held

    asyncio.run(main())


@FRONTENDS
def test_a_deadline_that_cannot_be_met_is_refused_at_once(serving, fake, image, frontend):
    """The server's own words, long before the deadline, and nothing was computed."""

    async def main():
        async with (
            serving(fake, frontend=frontend) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            batcher = teach(server, batch_s=500.0)
            code, message, _ = await refusal(stub.Embed(request_of(image(1)), timeout=100))
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert message.startswith("deadline: expected 5")
            assert fake.computed == []
            assert batcher.statistics().unmeetable_requests == 1
            await stub.Embed(request_of(image(2)))
            assert fake.computed == [2], "without a deadline it is computed"

    asyncio.run(main())


@FRONTENDS
def test_a_priority_is_kept_over_the_wire(serving, fake, image, eventually, frontend):
    """1 runs before the default, whoever came first; 4 is none."""

    async def main():
        async with (
            serving(fake, frontend=frontend, max_batch_images=1) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            engine = server.catalog.model("fake").engine
            fake.gate.clear()
            calls = [stub.Embed(request_of(image(1)))]
            await eventually(fake.entered.is_set)
            for n, priority in ((2, 0), (3, 3), (4, 1)):
                calls.append(stub.Embed(request_of(image(n), priority=priority)))
                await eventually(lambda n=n: engine.statistics().waiting_images == n - 1)
            fake.gate.set()
            await asyncio.gather(*calls)
            assert fake.computed == [1, 4, 2, 3]
            code, message, _ = await refusal(stub.Embed(request_of(image(1), priority=4)))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert message == "priority: expected 0 to 3, 1 being the first, found 4"

    asyncio.run(main())


@FRONTENDS
def test_bytes_under_way_are_bounded(serving, fake, eventually, frontend):
    """A message beyond the bound is refused unparsed; there is room again when a call is over."""
    large = request_of(np.zeros((800, 800, 1), np.uint8))

    async def main():
        async with (
            serving(fake, frontend=frontend, max_in_flight_mib=1) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            fake.gate.clear()
            held = stub.Embed(large)
            await eventually(fake.entered.is_set)
            code, message, trailers = await refusal(stub.Embed(large))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert trailers["retry-after-ms"] == "1000"
            assert message.startswith(
                "requests under way: expected at most 1048576 bytes, found 64"
            )
            fake.gate.set()
            await held
            await stub.Embed(large)

    asyncio.run(main())


def test_where_nothing_is_under_way_any_message_fits():
    """What could never come in beside others comes in alone; a stream itself is no message."""
    in_flight = InFlight(max_bytes=10)
    with in_flight.hold(bytes(20)):
        assert repr(in_flight) == "<InFlight 20/10 bytes of 1 calls>"
        with pytest.raises(QueueFullError, match="found 20 bytes, and this one with 1"):
            in_flight.hold(b"1")
        with in_flight.hold(object()):
            assert in_flight.calls == 2
    assert (in_flight.bytes, in_flight.calls) == (0, 0)


class SlowTurns:
    """An event loop whose turns take a second."""

    seconds = 1.0


def test_a_call_needs_time_for_a_few_turns_of_the_loop():
    """Nearer deadlines are turned away, further ones and none are not."""
    valve = Valve(SlowTurns())
    refusal = valve.refuses(3.9)
    assert str(refusal) == (
        "deadline: expected over 4000 ms while this server is so busy, found 3900 ms; "
        "allow more time, or try elsewhere"
    )
    assert refusal.retry_after_s == 4.0
    assert valve.refuses(4.1) is None
    assert valve.refuses(None) is None
    assert valve.turned_away == 1


def test_nobody_is_turned_away_while_turns_are_short():
    """A deadline of a millisecond is the caller's own affair."""
    valve = Valve(LoopLag(clock=lambda: 0.0))
    assert valve.refuses(0.001) is None
    assert repr(valve) == "<Valve <LoopLag 0.0 ms>, 0 turned away>"


def test_the_second_long_turn_counts_as_soon_as_it_is_overdue():
    """A loop that hung once may have stood still; one that hangs again is slow."""
    now = [0.0]

    async def main():
        lag = LoopLag(clock=lambda: now[0])
        lag.start()
        now[0] = 2.0 + EVERY_S
        assert lag.seconds == 0.0
        lag._measure()
        assert lag.seconds == 0.0
        now[0] += 0.5 + EVERY_S
        assert lag.seconds == pytest.approx(0.5)
        lag._measure()
        assert lag.seconds == pytest.approx(0.5)
        lag.stop()
        assert lag.seconds == 0.0

    asyncio.run(main())


@FRONTENDS
def test_a_busy_server_turns_away_at_the_door(serving, fake, image, frontend):
    """Before anything is parsed; health is answered all the same."""

    async def main():
        async with (
            serving(fake, frontend=frontend, metrics=METRICS) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            server.valve._lag = SlowTurns()
            call = stub.Embed(request_of(image(1)), timeout=3)
            code, message, trailing = await refusal(call)
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert trailing["retry-after-ms"] == "4000"
            assert await turned_away(server) == {"DEADLINE_EXCEEDED": "1.0"}
            assert message.startswith("deadline: expected over 4000 ms while this server is so")
            health = health_pb2_grpc.HealthStub(channel)
            reply = await health.Check(health_pb2.HealthCheckRequest(), timeout=3)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            await stub.Embed(request_of(image(2)))
            assert fake.computed == [2]
            assert server.catalog.model("fake").engine.statistics().unmeetable_requests == 0

    asyncio.run(main())


def test_what_waits_inside_grpcio_is_bounded(serving, fake, image):
    """Of calls that an event loop does not come to, those beyond a bound end at once."""

    async def main():
        async with serving(fake, frontend="grpcio", max_calls=256) as server:
            with grpc.insecure_channel(server.address) as channel:
                await asyncio.to_thread(grpc.channel_ready_future(channel).result, 10)
                call = channel.unary_unary("/horace.v1.Horace/Embed").future
                message = request_of(image(1)).SerializeToString()
                calls = [call(message) for _ in range(250)]
                give_up_s = time.monotonic() + 30
                while sum(one.done() for one in calls) < 60:  # and the loop is kept from them
                    assert time.monotonic() < give_up_s
                replies = [asyncio.to_thread(one.exception) for one in calls]
                failed = [error for error in await asyncio.gather(*replies) if error]
            assert {error.code() for error in failed} <= {
                grpc.StatusCode.CANCELLED,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            }
            assert len(fake.computed) == 250 - len(failed) > 60

    asyncio.run(main())


@FRONTENDS
def test_watchers_without_a_key_take_no_place_of_a_call(serving, fake, eventually, frontend):
    """However many come, a few stay; calls and probes are answered beside them."""

    async def main():
        async with (
            serving(fake, frontend=frontend, max_calls=8) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            health = health_pb2_grpc.HealthStub(channel)
            ask = health_pb2.HealthCheckRequest()
            most = MAX_WATCHES if frontend == "native" else MAX_WATCHES_A_HOST
            watches = [health.Watch(ask) for _ in range(most)]
            first = await asyncio.gather(*(one.read() for one in watches))
            assert {reply.status for reply in first} == {health_pb2.HealthCheckResponse.SERVING}
            code, message, trailing = await refusal(health.Watch(ask).read())
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert message.startswith("health watches: expected at most 64, and 16 of one address")
            assert trailing["retry-after-ms"] == "10000"
            assert (await health.Check(ask, timeout=20)).status
            await pb_grpc.HoraceStub(channel).ListModels(pb.ListModelsRequest(), timeout=20)
            watches[0].cancel()
            await eventually(lambda: server.health._watchers.total() == most - 1)
            assert (await health.Watch(ask).read()).status

    asyncio.run(main())


@FRONTENDS
def test_probes_pass_where_all_calls_are_taken(serving, fake, image, eventually, frontend):
    """A call more hears when to come back, and is counted; the server is not called dead."""

    async def main():
        async with (
            serving(fake, frontend=frontend, max_calls=2, metrics=METRICS) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            fake.gate.clear()
            held = [stub.Embed(request_of(image(1))), stub.Embed(request_of(image(1)))]
            await eventually(lambda: server.calls.active == 2)
            code, message, trailing = await refusal(stub.Embed(request_of(image(1))))
            assert (code, message) == (grpc.StatusCode.RESOURCE_EXHAUSTED, TOO_MANY)
            assert trailing["retry-after-ms"] == "1000"
            assert await turned_away(server) == {"RESOURCE_EXHAUSTED": "1.0"}
            health = health_pb2_grpc.HealthStub(channel)
            for _ in range(4):
                reply = await health.Check(health_pb2.HealthCheckRequest(), timeout=20)
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
            fake.gate.set()
            await asyncio.gather(*held)

    asyncio.run(main())


@FRONTENDS
def test_probes_that_never_ask_keep_no_place_from_those_that_do(
    serving, fake, eventually, frontend
):
    """Without a key, and without a message, however many: the oldest of them give way."""

    async def main():
        async with (
            serving(fake, frontend=frontend) as server,
            grpc.aio.insecure_channel(server.address) as silence,
            grpc.aio.insecure_channel(server.address, options=OWN_CONNECTION) as channel,
        ):
            method = "/grpc.health.v1.Health/"
            silent = [silence.stream_stream(method + "Check")() for _ in range(PROBES)]
            silent += [silence.stream_stream(method + "Watch")() for _ in range(PROBES)]
            front = server._front
            limit = (front._behind if frontend == "native" else front).limit
            await eventually(lambda: ", 0 probes>" in repr(limit))
            health = health_pb2_grpc.HealthStub(channel)
            for _ in range(3):
                reply = await health.Check(health_pb2.HealthCheckRequest(), timeout=20)
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
            assert (await health.Watch(health_pb2.HealthCheckRequest()).read()).status
            for call in silent:
                call.cancel()

    asyncio.run(main())


@FRONTENDS
def test_probes_that_never_ask_keep_no_place_of_grpcio_either(serving, fake, eventually, frontend):
    """It counts calls that have no status yet, and refuses all others above a number of its own."""

    async def main():
        async with (
            serving(fake, frontend=frontend, max_calls=4) as server,
            grpc.aio.insecure_channel(server.address) as silence,
            grpc.aio.insecure_channel(server.address, options=OWN_CONNECTION) as channel,
        ):
            watch = silence.stream_stream("/grpc.health.v1.Health/Watch")
            silent = []
            for _ in range(4):
                silent.extend(watch() for _ in range(PROBES))
                await eventually(lambda: sum(not call.done() for call in silent) <= PROBES)
            health = health_pb2_grpc.HealthStub(channel)
            assert (await health.Watch(health_pb2.HealthCheckRequest()).read()).status
            await pb_grpc.HoraceStub(channel).ListModels(pb.ListModelsRequest(), timeout=20)
            for call in silent:
                call.cancel()

    asyncio.run(main())
