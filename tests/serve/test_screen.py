"""Calls that end before they are begun: who is asked about, who hears what, what is counted."""

from __future__ import annotations

import asyncio
import gc
import math
from types import FrameType, SimpleNamespace
from typing import Any
from weakref import ref

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from models.errors import HoraceError
from models.wire import image_to_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc
from serve.answering import REFUSING_S, Answering
from serve.calls import Calls
from serve.errors import DeadlineError, RequestError, UnknownNameError
from serve.forecast import Forecast, Pace, Speed
from serve.job import Job
from serve.latency import MIN_BATCHES
from serve.operation.observer import Call, Nobody
from serve.operation.options import MetricsOptions
from serve.screen import (
    FRESH_S,
    MAX_BYTES,
    MAX_KIND_BYTES,
    MAX_VERDICTS,
    Method,
    Screen,
    Work,
)
from serve.security.buckets import Quota
from serve.security.guard import Guard
from serve.security.ring import ApiKey, KeyRing, hash_token

PATH = "/horace.v1.Horace/Embed"
PEER = "ipv4:10.0.0.7:1234"
LATE = DeadlineError("deadline", expected="9000 ms from now", found="500 ms")


class Ears(Nobody):
    """Hears of calls."""

    def __init__(self):
        self.calls = []

    def answered(self, call, total_s):
        """Remember what became of a call."""
        self.calls.append((call, total_s))


class Engine:
    """Decides as a test says, and remembers what it was asked."""

    def __init__(self):
        self.asked = []
        self.before = []
        self.others = []
        self.error = LATE
        self.forecast = None

    def check(self, *, count, deadline_s, client, priority, before=0):
        """Refuse, or not."""
        self.before.append(before)
        self.asked.append((client, count, priority, deadline_s))
        if self.error is not None:
            raise self.error
        return self.forecast

    def refuse_another(self, error, *, count):
        """Count one more."""
        self.others.append((error, count))


class Model:
    """One that is served."""

    name, version = "m", "1"

    def __init__(self):
        self.engine = Engine()


class Desk:
    """A screen in front of one method, with a clock that a test sets and an engine of its own."""

    def __init__(self, **guard):
        self.now_s = 100.0
        self.ears = Ears()
        self.model = Model()
        self.engine = self.model.engine
        self.answering = Answering(calls=Calls(), clock=lambda: self.now_s, observer=self.ears)
        self.screen = Screen(self.answering, Guard(**guard), max_fields=8)
        parse = pb.EmbedRequest.FromString
        embed = Method(name="Embed", parse=parse, foresee=self.foresee, images_field=2, id_field=6)
        self.screen.add(PATH, embed)
        self.within_s = math.inf

    @property
    def asked(self):
        """What the engine was asked."""
        return self.engine.asked

    def foresee(self, request):
        """Read a request as a service does; `wrong` is the name of no model."""
        if request.model == "wrong":
            raise UnknownNameError("model")
        return Work(
            model=self.model,
            images=len(request.images),
            priority=request.priority,
            within_s=self.within_s,
        )

    async def refuse_one(self):
        """Refuse a call on its usual way."""

        async def work():
            raise LATE

        async def abort(*_):
            raise grpc.aio.AbortError

        context = SimpleNamespace(abort=abort, time_remaining=lambda: None)
        with pytest.raises(grpc.aio.AbortError):
            await self.answering.answer(Call(method="Embed", arrived_s=0.0), work(), context)
        self.ears.calls.clear()

    def ask(self, request=None, *, path=PATH, metadata=(), left_s=0.5, raw=None, peer=PEER):
        """What the front end is told of a call."""
        raw = (request or images(b"x")).SerializeToString() if raw is None else raw
        return self.screen.refuses(path, raw, metadata, peer, left_s)


def images(*encoded, **fields) -> pb.EmbedRequest:
    """A request for these files."""
    return pb.EmbedRequest(images=[pb.Image(encoded=one) for one in encoded], **fields)


def forecast(takes_s: float, image_s: float = 0.0) -> Forecast:
    """One of so long, and so much longer for each image more before."""
    pace = Pace(Speed(image_s, takes_s), batch_images=1 << 20, instances=1, shares=False)
    return Forecast(pace, images=0, ready=0, around_s=0.0)


def late(takes_s: float, **attributes) -> DeadlineError:
    """What an engine says that would need so long."""
    error = DeadlineError("deadline", expected=f"{takes_s} s", found="less")
    error.forecast = forecast(takes_s)
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


@pytest.fixture
def desk():
    """One whose engine has just refused a call."""
    made = Desk()
    asyncio.run(made.refuse_one())
    return made


def test_nobody_is_asked_about_while_nothing_is_refused():
    """A server with time for all reads no message twice."""
    desk = Desk()
    assert desk.ask() is None
    assert desk.asked == []
    assert not desk.answering.is_refusing


def test_a_refusal_makes_others_likely_for_a_second(desk):
    """And each that follows does; the engine hears whose call it is, and until when it has time."""
    assert desk.answering.is_refusing
    assert desk.ask(images(b"x", b"y", priority=3)) is not None
    assert desk.asked == [("10.0.0.7", 2, 3, 100.45)]
    desk.now_s += 0.9 * REFUSING_S
    assert desk.ask(left_s=None) is not None
    assert desk.asked[1:] == [("10.0.0.7", 1, 0, math.inf)]
    desk.now_s += 0.9 * REFUSING_S
    assert desk.answering.is_refusing
    desk.now_s += 0.2 * REFUSING_S
    assert not desk.answering.is_refusing
    assert desk.ask() is None


def test_a_refusal_is_told_and_counted_as_the_services_own(desk):
    """Its code, words and time to come back, one call for whoever listens, accepted as others."""
    desk.engine.error = late(9.0, retry_after_s=0.25)
    accepted = desk.answering.calls.accepted
    code, message, trailing = desk.ask(images(b"x", request_id="mine"))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert message == "deadline: expected 9.0 s, found less"
    assert ("retry-after-ms", "250") in trailing
    [(call, total_s)] = desk.ears.calls
    assert (call.method, call.client, call.request_id) == ("Embed", "10.0.0.7", "mine")
    assert (call.model, call.version, call.images, total_s) == ("m", "1", 1, 0.0)
    assert (call.code, call.message) == (code, message)
    assert desk.answering.calls.accepted == accepted + 1


def test_what_was_said_of_a_request_holds_for_its_like_for_a_moment(desk):
    """Other images and another id are its like; each is counted, logged and told as the first."""
    desk.engine.error = late(9.0)
    first = desk.ask(images(b"x", request_id="one"))
    second = desk.ask(images(b"another", request_id="two"))
    assert second == first
    assert len(desk.asked) == 1
    assert desk.engine.others == [(desk.engine.error, 1)]
    assert [call.request_id for call, _ in desk.ears.calls] == ["one", "two"]
    assert {(call.model, call.images, call.code) for call, _ in desk.ears.calls} == {
        ("m", 1, grpc.StatusCode.DEADLINE_EXCEEDED)
    }
    desk.now_s += 1.1 * FRESH_S
    assert desk.ask(images(b"x")) is not None
    assert len(desk.asked) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"request": images(b"x", priority=1)},
        {"request": images(b"x", b"y")},
        {"request": images(b"x", model="b")},
        {"peer": "ipv4:10.0.0.8:1234"},
    ],
)
def test_what_was_said_of_a_request_is_nothing_to_others(desk, other):
    """Of another priority, size, model or caller: the engine is asked."""
    desk.engine.error = late(9.0)
    desk.ask(images(b"x"))
    desk.engine.error = None
    assert desk.ask(images(b"x")) is not None
    assert desk.ask(**other) is None
    assert len(desk.asked) == 2


@pytest.mark.parametrize("left_s", [10.0, None])
def test_who_has_more_time_than_was_said_to_be_needed_is_let_by(desk, left_s):
    """It comes to its engine, which decides; the others of its kind are refused still."""
    desk.engine.error = late(9.0)
    desk.ask()
    assert desk.ask(left_s=left_s) is None
    assert desk.ask() is not None
    assert len(desk.asked) == 1


def test_what_was_said_of_who_is_let_by_holds_for_its_like_and_grows_by_each(desk):
    """Each image takes 100 ms more; the first that has no time is refused in the engine's words."""
    desk.engine.error, desk.engine.forecast = None, forecast(0.2, image_s=0.1)
    verdicts = [desk.ask() for _ in range(3)]
    assert verdicts == [None] * 3
    assert len(desk.asked) == 1, "0.2, 0.3 and 0.4 s of 0.45"
    desk.engine.error = late(0.5)
    first = desk.ask()
    assert first[1] == "deadline: expected 0.5 s, found less"
    assert desk.engine.before[1:] == [3]
    assert desk.ask() == first
    assert len(desk.asked) == 2
    desk.engine.error = None
    assert desk.ask(left_s=0.6) is None
    assert len(desk.asked) == 2
    desk.now_s += 1.1 * FRESH_S
    assert desk.ask() is None
    assert len(desk.asked) == 3


def test_the_time_that_a_request_itself_allows_for_holds_at_the_door(desk):
    """Without a deadline of its call, too."""
    desk.within_s = 0.3
    desk.engine.error, desk.engine.forecast = None, forecast(0.2, image_s=0.1)
    assert [desk.ask(left_s=None) for _ in range(2)] == [None] * 2
    assert len(desk.asked) == 2, "the second would take all of its time, so the engine is asked"


def test_a_model_that_is_served_no_more_is_kept_by_nobody(desk):
    """What was said of it is forgotten with it."""
    desk.engine.error = late(9.0)
    desk.ask()
    gone = ref(desk.model)
    desk.model, desk.engine = Model(), Engine()
    desk.model.engine = desk.engine
    gc.collect()
    assert gone() is None
    assert desk.ask() is not None
    assert len(desk.asked) == 1


def test_kinds_of_requests_are_not_remembered_without_end(desk):
    """However many a caller makes up."""
    desk.engine.error = late(9.0)
    for n in range(3 * MAX_VERDICTS):
        desk.ask(images(b"x", model=str(n)))
    assert len(desk.screen._verdicts) <= MAX_VERDICTS


def test_who_lets_by_is_not_remembered_without_end_either(desk):
    """Callers without a deadline, of however many addresses, while only room is short."""
    desk.engine.error = None
    for n in range(3 * MAX_VERDICTS):
        assert desk.ask(left_s=None, peer=f"ipv6:[::{n:x}]:1") is None
    assert len(desk.screen._let_by) <= MAX_VERDICTS


def test_what_tells_a_kind_is_remembered_where_it_is_short(desk):
    """Kilobytes that are no image are asked about each time."""
    desk.engine.error = late(9.0)
    for name, asked in (("a" * MAX_KIND_BYTES, 2), ("a", 3)):
        assert [desk.ask(images(b"x", model=name)) is not None for _ in range(2)] == [True] * 2
        assert len(desk.asked) == asked


def test_nobody_is_refused_by_what_was_said_to_less_time(desk):
    """Those let by have made the others late; who has more than was said is asked about anew."""
    desk.engine.error = late(0.3)
    desk.engine.error.forecast = forecast(0.3, image_s=0.1)
    assert desk.ask(left_s=0.05) is not None
    assert desk.ask() is None, "0.3 s of 0.45"
    assert desk.ask() is None, "0.4 s"
    assert len(desk.asked) == 1
    desk.engine.error = late(0.5)
    assert desk.ask()[1] == "deadline: expected 0.5 s, found less"
    assert len(desk.asked) == 2


def test_who_was_let_by_in_a_burst_counts_before_those_that_follow(desk):
    """Of its own client and priority; once the next burst comes, they are in their queues."""
    desk.engine.error = None
    ends = desk.screen.begin_burst()
    for request in (images(b"x", b"y"), images(b"x"), images(b"x", priority=1)):
        assert desk.ask(request) is None
    assert desk.ask(peer="ipv4:10.0.0.8:1234") is None
    assert desk.engine.before == [0, 2, 0, 0]
    desk.screen.begin_burst()
    assert desk.ask() is None
    ends()
    assert desk.ask() is None
    assert desk.engine.before[4:] == [3, 1], "the first burst is in its queues, the second is not"


@pytest.mark.parametrize("error", [None, RequestError("priority")])
def test_whoever_would_be_taken_in_or_told_something_else_begins(desk, error):
    """Only room and time are decided here, and nobody hears of a call that is to begin."""
    desk.engine.error = error
    assert desk.ask() is None
    assert len(desk.asked) == 1
    assert desk.ask(images(b"x", model="wrong")) is None
    assert len(desk.asked) == 1
    assert desk.ears.calls == []


@pytest.mark.parametrize("raw", [b"\xff\xff", b"\x12\x05ab", b"\x12", b"\x0b\x0c", b"2\x01\xff"])
def test_what_is_no_message_of_the_method_goes_the_usual_way(desk, raw):
    """Other bytes, what is cut off, groups, and an id that is no text: nobody is asked."""
    assert desk.ask(raw=raw) is None
    assert desk.asked == []


def test_messages_of_many_fields_large_ones_and_other_methods_go_the_usual_way(desk):
    """Where they are refused, or told from messages that may be meant."""
    assert desk.ask(images(*[b"x"] * 9)) is None
    assert desk.ask(raw=bytes(MAX_BYTES + 1)) is None
    assert desk.ask(path="/horace.v1.Horace/Search") is None
    assert desk.asked == []


def test_a_server_that_drains_says_that_it_does(desk):
    """Not that it is busy: the usual way has the words for it."""
    desk.answering.calls.drain()
    assert desk.ask() is None
    assert desk.asked == []


def test_without_a_key_nobody_hears_of_an_engine():
    """The usual way says UNAUTHENTICATED; with a key it is the key's name that is asked about."""
    desk = Desk(ring=lambda: KeyRing([ApiKey(name="team", digest=hash_token("right"))]))
    asyncio.run(desk.refuse_one())
    assert desk.ask() is None
    assert desk.ask(metadata=(("x-api-key", "wrong"),)) is None
    assert desk.asked == []
    assert desk.ask(metadata=(("x-api-key", "right"),)) is not None
    assert desk.asked == [("team", 1, 0, 100.45)]


@pytest.mark.parametrize("quota", [Quota(images_per_s=1e6), Quota(calls=1e6)])
def test_who_is_charged_goes_where_that_is_done(quota):
    """A caller with a rate, or with a bound on its calls."""
    desk = Desk(quota=quota)
    asyncio.run(desk.refuse_one())
    assert desk.ask() is None
    assert desk.asked == []


def teach(server, *, batch_s):
    """Let the only model's forecast know how long a batch takes; its engine."""
    engine = server.catalog.model("fake").engine
    for _ in range(2 * MIN_BATCHES):
        engine._batcher._running.latency.observe(1, batch_s, engine._clock())
    return engine


def count_begun(server):
    """The clients of calls that come to a service, as they come."""
    begun = []
    new_call = server.services._answering.new_call

    def count(*arguments):
        call = new_call(*arguments)
        begun.append(call.client)
        return call

    server.services._answering.new_call = count
    return begun


@pytest.mark.parametrize("frontend", ["native"])
def test_of_a_burst_those_begin_that_are_taken_in(serving, fake, image, eventually, frontend):
    """Those let by count before those that follow: none begins to be refused later."""

    async def main():
        async with (
            serving(fake, max_batch_images=1, metrics=MetricsOptions(port=0)) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            fake.gate.clear()
            held = [stub.Embed(request_of(image(1)))]
            await eventually(fake.entered.is_set)
            engine = teach(server, batch_s=100.0)
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Embed(request_of(image(2)), timeout=50)
            begun = count_begun(server)
            burst = [stub.Embed(request_of(image(n)), timeout=1050) for n in range(3, 63)]
            await eventually(lambda: engine.statistics().unmeetable_requests > 40)
            await eventually(lambda: engine.statistics().held_requests + refused(engine) == 62)
            taken_in = engine.statistics().held_requests - 1
            assert 5 <= taken_in <= 10, "each takes 100 s, and there are 1050"
            assert len(begun) == taken_in
            assert refused(engine) == 61 - taken_in
            fake.gate.set()
            replies = await asyncio.gather(*held, *burst, return_exceptions=True)
            failed = [reply for reply in replies if isinstance(reply, grpc.aio.AioRpcError)]
            assert len(failed) == 60 - taken_in
            assert {error.code() for error in failed} == {grpc.StatusCode.DEADLINE_EXCEEDED}
            assert all(error.details().startswith("deadline: expected") for error in failed)
            text = (await server.operation.metrics()).decode()
            assert f'code="DEADLINE_EXCEEDED",method="Embed"}} {len(failed) + 1:.1f}' in text

    asyncio.run(main())


def refused(engine):
    """How many requests had no time."""
    return engine.statistics().unmeetable_requests


def request_of(*images, **fields) -> pb.EmbedRequest:
    """A request for these pixels."""
    return pb.EmbedRequest(images=[image_to_wire(one) for one in images], **fields)


@pytest.mark.usefixtures("no_collector")
def test_what_a_failed_call_held_waits_for_no_collector(
    serving, fake, image, eventually, monkeypatch
):
    """One that had no time, one whose batch failed, one of images that are none.

    An error keeps no frames, which would keep the messages.
    """
    monkeypatch.setattr("serve.engine.log.error", lambda *_, **__: None)  # pytest keeps records

    async def main():
        async with (
            serving(fake) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            engine = teach(server, batch_s=100.0)
            for n in range(3):
                with pytest.raises(grpc.aio.AioRpcError):
                    await stub.Embed(request_of(image(1)), timeout=50)
                assert refused(engine) == n + 1
            fake.failures = [ValueError("broken")] * 3
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError):
                    await stub.Embed(request_of(image(1)))
            await eventually(lambda: engine.statistics().held_requests == 0)
            await asyncio.sleep(0.1)
            small = np.zeros((2, 3, 1), np.uint8)
            wrong = image_to_wire(small)
            wrong.raw.height = 5
            for bad in (pb.Image(encoded=b"no image"), wrong):
                reply = await stub.Embed(pb.EmbedRequest(images=[bad]))
                assert reply.statuses[0].code != pb.OK
            await asyncio.sleep(0.1)
            objects = gc.get_objects()
            assert not [one for one in objects if type(one) is Job]
            frames = [one.f_code for one in objects if type(one) is FrameType]
            kept = [code.co_name for code in frames if "/serve/" in code.co_filename]
            assert not {"Embed", "_embed", "_decode", "read_images"} & set(kept)

    asyncio.run(main())


def test_a_newcomer_and_a_higher_priority_are_not_refused_for_a_bulk_client(
    serving, fake, image, eventually
):
    """The engine answers for each as it does on arrival, and holds nothing of whom it lets by."""

    async def main():
        async with (
            serving(fake, max_batch_images=8) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            fake.gate.clear()
            bulk = stub.Embed(request_of(*[image(1)] * 64))
            await eventually(lambda: fake.entered.is_set())
            engine = teach(server, batch_s=1.0)
            await eventually(lambda: engine.statistics().waiting_images == 56)
            deadline_s = engine._clock() + 6
            before = engine.statistics()
            mine = {"count": 1, "deadline_s": deadline_s, "client": "127.0.0.1"}
            with pytest.raises(DeadlineError, match="with 56 before them"):
                engine.check(**mine, priority=2)
            assert refused(engine) == before.unmeetable_requests + 1
            engine.check(**mine, priority=1)
            engine.check(**mine | {"client": "newcomer"}, priority=2)
            with pytest.raises(RequestError, match="priority"):
                engine.check(**mine, priority=4)
            after = engine.statistics()
            assert (after.held_requests, after.admitted_requests, after.clients) == (
                before.held_requests,
                before.admitted_requests,
                before.clients,
            )
            assert refused(engine) == before.unmeetable_requests + 1
            fake.gate.set()
            await bulk

    asyncio.run(main())


def infer_request(count: int) -> Any:
    """A request of KServe for images of the fake encoder's size."""
    request = service_pb2.ModelInferRequest(model_name="fake", id="mine")
    tensor = request.inputs.add(name="images", datatype="UINT8", shape=[count, 8, 8, 1])
    assert tensor.name
    request.raw_input_contents.append(bytes(count * 64))
    return request


@pytest.mark.parametrize("frontend", ["native"])
def test_calls_of_kserve_are_asked_about_too(serving, fake, eventually, frontend):
    """With their own priority and time; shared memory, and what is wrong, go the usual way."""

    async def main():
        async with (
            serving(fake) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            request = infer_request(3)
            request.parameters["priority"].uint64_param = 3
            request.parameters["timeout"].int64_param = 250_000
            work = server.kserve.foresee_infer(request)
            assert (work.images, work.priority, work.within_s) == (3, 3, 0.25)
            assert work.model is server.catalog.model("fake")
            request.inputs[0].parameters["shared_memory_region"].string_param = "mine"
            with pytest.raises(HoraceError):
                server.kserve.foresee_infer(request)
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            engine = teach(server, batch_s=100.0)
            begun = count_begun(server)
            for n in range(3):
                with pytest.raises(grpc.aio.AioRpcError) as failure:
                    await stub.ModelInfer(infer_request(1), timeout=50)
                assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                assert refused(engine) == n + 1
            assert len(begun) == 1, "after the first the engine was asked at the door"
            assert fake.computed == []

    asyncio.run(main())
