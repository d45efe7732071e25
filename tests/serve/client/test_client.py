from __future__ import annotations

import asyncio
import random
import socket

import grpc
import numpy as np
import pytest

from protos import horace_pb2 as pb
from serve.client import AsyncClient, Client, RetryPolicy
from serve.client.plans import UNSAID, Call, Failure, Pause, Planner
from serve.client.requests import (
    EmbedOptions,
    RequestSize,
    SearchOptions,
    group_images,
    make_queries,
)
from serve.client.results import EmbedResult, ItemStatus, Timings
from serve.config import ServeOptions
from serve.errors import (
    DeadlineError,
    FailedItemsError,
    PreconditionError,
    QueueFullError,
    RequestError,
    UnavailableError,
    UnknownNameError,
)

UNAVAILABLE = Failure(grpc.StatusCode.UNAVAILABLE, "connection refused")
BUSY = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue: full")


class Largest(random.Random):
    """Draws the longest wait that may be drawn."""

    def uniform(self, a, b):
        """Give the upper end."""
        return b


class Drive:
    """Performs plans with answers from a script, on a clock that only pauses move."""

    def __init__(self, *answers, call_s=0.0, by_tls=False, **policy):
        self.now_s = 0.0
        self.steps = []
        self.call_s = call_s
        self.answers = list(answers)
        self.planner = Planner(
            "there:1",
            retry=RetryPolicy(**policy),
            clock=lambda: self.now_s,
            rng=Largest(),
            by_tls=by_tls,
        )

    def run(self, plan):
        """Perform a plan to its end."""
        answer = None
        while True:
            try:
                step = plan.send(answer)
            except StopIteration as end:
                return end.value
            self.steps.append(step)
            if isinstance(step, Pause):
                self.now_s += step.seconds
                continue
            self.now_s += self.call_s
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            if callable(answer):
                answer = answer(step)

    @property
    def pauses(self):
        """How long each pause was."""
        return [step.seconds for step in self.steps if isinstance(step, Pause)]

    @property
    def calls(self):
        """The calls that were made."""
        return [step for step in self.steps if isinstance(step, Call)]


def models_reply(images=1000, request_bytes=1 << 20):
    """What a server with these limits says of itself."""
    spec = '{"height":8,"width":8,"channels":1,"resize":8,"interpolation":"bilinear","revision":1}'
    model = pb.Model(
        name="m",
        preprocessing_json=spec,
        max_images_per_request=images,
        max_request_bytes=request_bytes,
    )
    return pb.ListModelsResponse(models=[model])


def embedded(call):
    """Answer a request of images with a vector for each."""
    n = len(call.request.images)
    vectors = pb.Vectors(data=b"\0" * 4 * n, rows=n, dim=1)
    return pb.EmbedResponse(vectors=vectors, statuses=[pb.ItemStatus()] * n)


def test_a_server_that_comes_back_is_noticed_by_nobody():
    """Two failures, growing pauses, then the reply."""
    drive = Drive(UNAVAILABLE, BUSY, models_reply())
    assert [model.name for model in drive.run(drive.planner.list_models(60))] == ["m"]
    assert drive.pauses == [0.1, 0.2]


def test_a_server_that_restarts_is_waited_for():
    """One that has replied is tried again until the deadline, so long as the budget lasts."""
    drive = Drive(models_reply(), *[UNAVAILABLE] * 20, models_reply(), UNAVAILABLE)
    for _ in range(2):
        assert drive.run(drive.planner.list_models(60))
    assert len(drive.calls) == 22
    before_s = drive.now_s
    with pytest.raises(UnavailableError):
        drive.run(drive.planner.list_models(30))
    assert 28 <= drive.now_s - before_s <= 30


def test_a_server_that_never_replied_is_soon_given_up():
    """However much time there is: the address may be wrong."""
    drive = Drive(UNAVAILABLE)
    for _ in range(2):
        with pytest.raises(UnavailableError, match="check host and port"):
            drive.run(drive.planner.list_models(600))
    assert len(drive.calls) == 12


def test_pauses_grow_to_a_limit_and_attempts_end():
    """After the last attempt the error says what, expected, found and how to mend it."""
    drive = Drive(UNAVAILABLE, attempts=8)
    with pytest.raises(UnavailableError) as error:
        drive.run(drive.planner.list_models(600))
    assert drive.pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0])
    assert str(error.value) == (
        "server there:1: expected a Horace server that answers, found connection refused; "
        "start it with `python -m serve`, or check host and port"
    )


def test_a_model_whose_servers_are_gone_is_not_a_server_that_is():
    """The server that says so has answered: nobody is sent to start it."""
    details = "model cats: expected servers that compute it, found none that answers"
    drive = Drive(Failure(grpc.StatusCode.UNAVAILABLE, details), attempts=1)
    with pytest.raises(UnavailableError) as error:
        drive.run(drive.planner.list_models(600))
    assert str(error.value) == f"server there:1: found {details}; try again, or elsewhere"


def test_no_pause_passes_the_deadline():
    """One that would is not begun, and every attempt gets what is left of the time."""
    drive = Drive(BUSY, attempts=99)
    with pytest.raises(QueueFullError, match="queue: full"):
        drive.run(drive.planner.list_models(1.0))
    assert drive.now_s <= 1.0
    assert [call.timeout_s for call in drive.calls] == pytest.approx([1.0, 0.9, 0.7, 0.3])


def test_time_that_calls_take_counts():
    """Failures that take long leave no time for another attempt."""
    drive = Drive(UNAVAILABLE, call_s=5.0, attempts=99)
    with pytest.raises(UnavailableError):
        drive.run(drive.planner.list_models(6.0))
    assert len(drive.calls) == 2


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("INVALID_ARGUMENT", "RequestError"),
        ("NOT_FOUND", "UnknownNameError"),
        ("FAILED_PRECONDITION", "PreconditionError"),
        ("INTERNAL", "InternalError"),
        ("PERMISSION_DENIED", "InternalError"),
        ("DEADLINE_EXCEEDED", "DeadlineError"),
        ("UNIMPLEMENTED", "UnavailableError"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(code, kind):
    """Each code has one exception, raised after one attempt."""
    drive = Drive(Failure(grpc.StatusCode[code], "why"))
    with pytest.raises(Exception, match=r"why|within") as error:
        drive.run(drive.planner.list_models(60))
    assert type(error.value).__name__ == kind
    assert len(drive.calls) == 1


def test_a_server_in_trouble_is_not_buried_under_retries():
    """Once the burst is spent, most calls are made once and fail as they ended."""
    drive = Drive(UNAVAILABLE, attempts=99, share=0.2, burst=3, per_s=0)
    for _ in range(10):
        with pytest.raises(UnavailableError):
            drive.run(drive.planner.list_models(60))
    assert len(drive.calls) == 10 + 3 + 1  # the burst, and a fifth of the other calls


def test_parts_from_two_encoders_are_no_result():
    """A server that changes its model between two requests is noticed."""
    vectors = pb.Vectors(data=b"\0" * 4, rows=1, dim=1)
    replies = [
        pb.EmbedResponse(vectors=vectors, statuses=[pb.ItemStatus()], fingerprint=name)
        for name in ("one", "two")
    ]
    drive = Drive(models_reply(images=1), *replies)
    with pytest.raises(PreconditionError, match="expected one encoder for all parts, one, found"):
        drive.run(drive.planner.embed([b"1", b"2"], EmbedOptions(), 60))


def test_a_message_that_is_too_large_is_not_sent_again():
    """GRPC's refusal of a large message has the code of a full queue, and will not pass."""
    large = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (9 vs 8)")
    drive = Drive(models_reply(), large)
    with pytest.raises(RequestError, match=r"larger than max \(9 vs 8\); split it"):
        drive.run(drive.planner.embed([b"1"], EmbedOptions(), 60))
    assert [call.method for call in drive.calls] == ["ListModels", "Embed"]


@pytest.mark.parametrize(
    "refusal",
    [
        Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (9 vs 8)"),
        Failure(grpc.StatusCode.INVALID_ARGUMENT, "images: expected 1 to 1 a request, found 2"),
    ],
)
def test_a_server_that_takes_less_than_before_gets_less(refusal):
    """Its limits are asked again, the images are cut anew, and the caller notices nothing."""
    reply = pb.EmbedResponse(
        vectors=pb.Vectors(data=b"\0" * 4, rows=1, dim=1), statuses=[pb.ItemStatus()]
    )
    drive = Drive(models_reply(images=9), reply, refusal, models_reply(images=1), reply)
    drive.run(drive.planner.embed([b"1"], EmbedOptions(), 60))
    result = drive.run(drive.planner.embed([b"1", b"2"], EmbedOptions(), 60))
    assert len(result.statuses) == 2
    assert [call.method for call in drive.calls] == [
        "ListModels", "Embed", "Embed", "ListModels", "Embed", "Embed",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("takes", "codes", "requests", "later"),
    [
        ({"images": 2}, ["ok", "ok", "ok"], [2, 1], [2, 1]),
        ({"request_bytes": 5000}, ["ok", "too_many_bytes", "ok"], [3], [3]),
        ({"images": 9}, ["request_failed"] * 3, [], [3]),
    ],
)
def test_a_group_is_cut_anew_for_a_server_that_takes_less(takes, codes, requests, later):
    """An iterable goes on, and no further group is refused; what limits do not mend is told."""
    refusal = Failure(grpc.StatusCode.INVALID_ARGUMENT, "images: expected 1 to 2 a request")
    drive = Drive(models_reply(images=9), refusal, models_reply(**takes), embedded)
    size = drive.run(drive.planner.request_size(9, 60))
    (group,) = group_images([b"1", b"2" * 2000, b"3"], size)
    group.first = 7
    items = drive.run(drive.planner.embed_group(group, EmbedOptions(), 60))
    assert [item.index for item in items] == [7, 8, 9]
    assert [item.status.code for item in items] == codes
    assert [len(call.request.images) for call in drive.calls[3:]] == requests
    drive.run(drive.planner.embed_group(group, EmbedOptions(), 60))
    assert [len(call.request.images) for call in drive.calls[3 + len(requests) :]] == later


def test_of_a_group_that_is_cut_anew_a_part_may_fail():
    """And the others have their vectors."""
    failure = Failure(grpc.StatusCode.INTERNAL, "internal error")
    drive = Drive(models_reply(images=1), embedded, failure, embedded)
    drive.run(drive.planner.request_size(9, 60))
    (group,) = group_images([b"1", b"2", b"3"], RequestSize(images=9, request_bytes=1 << 20))
    items = drive.run(drive.planner.embed_group(group, EmbedOptions(), 60))
    assert [item.status.code for item in items] == ["ok", "request_failed", "ok"]


def test_requests_fit_the_longest_vectors_of_any_collection():
    """Of hits with their vectors; a model may be gone, and who asks for none asks no list."""
    size = 10 * (256 + 4 * 64) * 3  # of three queries
    collections = pb.ListCollectionsResponse(collections=[pb.Collection(dim=64)])
    reply = pb.SearchResponse(results=[pb.Hits(status=pb.ItemStatus(code=pb.OK))])
    drive = Drive(collections, models_reply(request_bytes=size), reply)
    queries = make_queries(None, None, [1, 2, 3, 4], None)
    drive.run(drive.planner.search(queries, SearchOptions(include_vectors=True), 60))
    assert [call.method for call in drive.calls] == [
        "ListCollections", "ListModels", "Search", "Search",
    ]  # fmt: skip
    drive = Drive(models_reply(), reply)
    drive.run(drive.planner.search(queries, SearchOptions(), 60))
    assert [call.method for call in drive.calls] == ["ListModels", "Search"]


def test_a_server_without_a_model_is_asked_all_the_same(serving, stored):
    """Its collection is searched, and its own refusal says that there is no model."""
    options = {"bundle": (str(stored.bundle),), "collection": (str(stored.collection),)}
    images = [path.read_bytes() for path in stored.files[:2]]

    async def main():
        async with serving(**options, model_control=True) as server:
            async with AsyncClient(server.address) as client:
                result = await client.embed(images)
            await server.lifecycle.unload(result.model)
            async with AsyncClient(server.address) as client:
                found = await client.search(vectors=result, include_vectors=True)
                with pytest.raises(UnknownNameError, match="model"):
                    await client.embed(images)
                items = [item async for item in client.embed_iter(images)]
        return found, items

    found, items = asyncio.run(main())
    assert [hits[0].score for hits in found.hits] == pytest.approx([1, 1], abs=1e-3)
    assert [type(item.error) for item in items] == [UnknownNameError] * 2


def test_what_is_sent_to_a_server_that_says_nothing_is_what_servers_take():
    """Unless they are told otherwise."""
    options = ServeOptions(bundle=("b",))
    assert options.max_images_per_request == UNSAID.images
    assert options.max_message_mib << 20 == UNSAID.request_bytes


def test_a_server_that_gives_up_first_says_why():
    """One that cannot be in time refuses at once, which is no silence."""
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    for details, found in (("too many wait", "too many wait"), ("", "none")):
        drive = Drive(Failure(code, details))
        with pytest.raises(DeadlineError, match=f"within 60 s, found {found}; allow more with"):
            drive.run(drive.planner.list_models(60))


def test_a_server_that_stops_is_not_called_absent():
    """Who drains says so; the advice is not to start another."""
    drive = Drive(Failure(grpc.StatusCode.UNAVAILABLE, "the server is stopping; call another"))
    with pytest.raises(UnavailableError) as error:
        drive.run(drive.planner.list_models(60))
    assert str(error.value) == (
        "server there:1: found the server is stopping; call another; try again, or elsewhere"
    )


def test_a_model_that_is_out_of_order_is_no_server_that_is_absent(serving, fake, image):
    """The line names the model: to start the server would mend nothing."""

    async def main():
        once = RetryPolicy(attempts=1)
        async with (
            serving(fake) as server,
            AsyncClient(server.address, retry=once) as client,
        ):
            engine = server.catalog.model().engine
            await asyncio.to_thread(engine.close)
            with pytest.raises(UnavailableError) as error:
                await client.embed([image(1)])
            return server.address, str(error.value)

    address, line = asyncio.run(main())
    assert line == (
        f"server {address}: found model fake: expected one that is alive, found one that is "
        "closed; try again, or elsewhere"
    )


def test_what_one_address_says_counts_for_more_than_that_another_is_empty():
    """A handshake that fails is told; what ends a call tells nothing of one."""
    closed = "connections to all backends failing; last error: UNAVAILABLE: ipv4:1: Socket closed"
    refused = "connections to all backends failing; last error: UNKNOWN: ipv6:1: Connection refused"
    for before, told in ((closed, "the server may want TLS"), ("Socket closed", "start it with")):
        answers = (Failure(grpc.StatusCode.UNAVAILABLE, details) for details in (before, refused))
        drive = Drive(*answers)
        with pytest.raises(UnavailableError, match=told):
            drive.run(drive.planner.list_models(60))


@pytest.mark.parametrize("by_tls", [False, True])
def test_a_server_that_has_replied_wants_no_other_handshake(by_tls):
    """One that dies in mid-call closes its connections, too; it is told to be down."""
    closed = (
        "connections to all backends failing; last error: UNAVAILABLE: Connection reset by peer"
    )
    drive = Drive(models_reply(), Failure(grpc.StatusCode.UNAVAILABLE, closed), by_tls=by_tls)
    drive.run(drive.planner.list_models(60))
    with pytest.raises(UnavailableError, match="reset by peer; start it with `python -m serve`"):
        drive.run(drive.planner.list_models(60))
    unknown = Failure(grpc.StatusCode.NOT_FOUND, "no such model")  # a reply, too
    drive = Drive(unknown, Failure(grpc.StatusCode.UNAVAILABLE, closed), by_tls=by_tls)
    with pytest.raises(UnknownNameError, match="no such model"):
        drive.run(drive.planner.list_models(60))
    with pytest.raises(UnavailableError, match="reset by peer; start it with `python -m serve`"):
        drive.run(drive.planner.list_models(60))
    untrusted = "last error: CERTIFICATE_VERIFY_FAILED"
    drive = Drive(models_reply(), Failure(grpc.StatusCode.UNAVAILABLE, untrusted), by_tls=by_tls)
    drive.run(drive.planner.list_models(60))
    with pytest.raises(UnavailableError, match="its certificate is not trusted"):
        drive.run(drive.planner.list_models(60))


def test_a_closed_client_says_so(serving, fake, image, eventually):
    """After close, during a call, and in the midst of an iterable; blocking and not."""
    closed = "expected an open one, found one that was closed; make another"

    async def blocking(address):
        client = Client(address)
        await asyncio.to_thread(client.list_models)
        items = client.embed_iter(iter([image(1)] * 9), images_per_request=1, in_flight=1)
        assert (await asyncio.to_thread(next, items)).ok
        fake.gate.clear()
        fake.entered.clear()
        call = asyncio.create_task(asyncio.to_thread(client.embed, [image(1)]))
        await eventually(fake.entered.is_set)
        client.close()
        with pytest.raises(UnavailableError, match=closed):
            await call
        fake.gate.set()
        with pytest.raises(UnavailableError, match=closed):
            await asyncio.to_thread(list, items)
        with pytest.raises(UnavailableError, match=closed):
            client.embed([image(1)])

    async def unblocking(address):
        client = AsyncClient(address)
        await client.list_models()
        items = client.embed_iter(iter([image(1)] * 9), images_per_request=1, in_flight=1)
        assert (await anext(items)).ok
        fake.gate.clear()
        fake.entered.clear()
        call = asyncio.create_task(client.embed([image(1)]))
        await eventually(fake.entered.is_set)
        await client.close()
        with pytest.raises(UnavailableError, match=closed):
            await call
        fake.gate.set()
        with pytest.raises(UnavailableError, match=closed):
            [item async for item in items]
        with pytest.raises(UnavailableError, match=closed):
            await client.embed([image(1)])

    async def main():
        async with serving(fake) as server:
            await blocking(server.address)
            await unblocking(server.address)

    asyncio.run(main())


def test_a_cancelled_call_is_cancelled(serving, fake, image, eventually):
    """A caller's own cancellation is not taken for anything else."""

    async def main():
        async with serving(fake) as server, AsyncClient(server.address) as client:
            await client.list_models()
            fake.gate.clear()
            call = asyncio.create_task(client.embed([image(1)]))
            await eventually(fake.entered.is_set)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

    asyncio.run(main())


def test_a_result_can_be_read_by_image_and_insists_on_request():
    """None where an image failed, and one line that counts and names the first."""
    result = EmbedResult(
        vectors=np.ones((2, 3), np.float32),
        statuses=(ItemStatus(), ItemStatus("corrupt", "half a JPEG"), ItemStatus()),
        fingerprint="f",
        model="m",
        timings=Timings(),
    )
    assert [vector is None for vector in result.by_image()] == [False, True, False]
    with pytest.raises(FailedItemsError) as error:
        result.raise_for_status()
    assert str(error.value) == (
        "1 of 3 images: expected a result for each, found corrupt for number 1: half a JPEG"
    )


NOBODY = "start it with `python -m serve`, or check host and port"


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("127.0.0.1:{port}", "127.0.0.1:{port}: Connection refused"),
        ("a..b:1", "address lookup failed for a..b:1: Misformatted domain name"),
    ],
)
def test_why_there_is_no_connection_is_told_for_people(target, found):
    """Without the codes and escapes that gRPC has for itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        target, found = target.format(port=port), found.format(port=port)
        once = RetryPolicy(attempts=1)
        with Client(target, retry=once) as client, pytest.raises(UnavailableError) as error:
            client.health()
    assert str(error.value) == (
        f"server {target}: expected a Horace server that answers, found {found}; {NOBODY}"
    )


def test_an_address_is_told_as_it_is_written():
    """Also one of IPv6, whose brackets gRPC escapes."""
    details = (
        "connections to all backends failing; last error: UNKNOWN: ipv6:%5B::1%5D:1: "
        "Failed to connect to remote host: Connection refused"
    )
    drive = Drive(Failure(grpc.StatusCode.UNAVAILABLE, details), attempts=1)
    with pytest.raises(UnavailableError, match=r"found \[::1\]:1: Connection refused; start it"):
        drive.run(drive.planner.list_models(60))


def test_no_server_is_one_line():
    """The line names the address and how to start one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{free.getsockname()[1]}"
        retry = RetryPolicy(attempts=2, initial_s=0.001)
        with Client(target, retry=retry) as client, pytest.raises(UnavailableError) as error:
            client.embed([b"1"])
    assert str(error.value).startswith(f"server {target}: expected a Horace server that answers")
    assert str(error.value).endswith(NOBODY)


def test_a_deadline_that_passes_is_one_line(serving, fake, image):
    """It says how long was waited and how to allow more."""

    async def main():
        async with serving(fake) as server, AsyncClient(server.address) as client:
            await client.list_models()
            fake.gate.clear()
            with pytest.raises(DeadlineError, match=r"expected a reply within 0\.2 s, found none"):
                await client.embed([image(1)], timeout_s=0.2)
            fake.gate.set()

    asyncio.run(main())


@pytest.mark.parametrize("details", ["Deadline Exceeded", "Deadline%20Exceeded"])
def test_what_grpc_says_of_a_deadline_is_no_reply(details):
    """The native front end's own comes with its blank escaped, now and then."""
    drive = Drive(Failure(grpc.StatusCode.DEADLINE_EXCEEDED, details))
    with pytest.raises(DeadlineError, match="expected a reply within 60 s, found none"):
        drive.run(drive.planner.list_models(timeout_s=60))


def test_a_busy_server_is_tried_again_until_it_has_room(serving, fake, image, eventually):
    """The caller waits within its deadline and never sees the refusals."""

    async def main():
        pauses = []

        async def sleep(seconds):
            pauses.append(seconds)
            fake.gate.set()
            await eventually(lambda: engine.statistics().held_requests == 0)

        async with (
            serving(fake, max_queue_images=1) as server,
            AsyncClient(server.address, sleep=sleep) as client,
        ):
            engine = server.catalog.model("").engine
            fake.gate.clear()
            held = asyncio.create_task(client.embed([image(1)]))
            await eventually(fake.entered.is_set)
            result = await client.embed([image(2)], normalize=False)
            assert result.vectors[0, 0] == 2
            assert len(pauses) == 1
            await held

    asyncio.run(main())


def test_both_clients_do_the_same(serving, fake, image):
    """Embedding, lists, health and iterables, blocking and not."""
    values = list(range(70))
    images = [image(n) for n in values]

    def blocking(address):
        with Client(address) as client:
            assert client.health()
            assert client.list_collections() == []
            (model,) = client.list_models()
            result = client.embed(np.stack(images), normalize=False)
            items = [item.vector[0] for item in client.embed_iter(images, normalize=False)]
            with pytest.raises(UnknownNameError, match="expected 'fake', found 'cat'"):
                client.embed(images, model="cat")
            return model.name, result.vectors[:, 0].tolist(), items

    async def unblocking(address):
        async with AsyncClient(address) as client:
            assert await client.health()
            assert await client.list_collections() == []
            (model,) = await client.list_models()
            result = await client.embed(np.stack(images), normalize=False)
            items = [item.vector[0] async for item in client.embed_iter(images, normalize=False)]
            with pytest.raises(UnknownNameError, match="expected 'fake', found 'cat'"):
                await client.embed(images, model="cat")
            return model.name, result.vectors[:, 0].tolist(), items

    async def main():
        async with serving(fake) as server:
            return await asyncio.to_thread(blocking, server.address), await unblocking(
                server.address
            )

    one, other = asyncio.run(main())
    assert one == other == ("fake", values, values)


def test_an_image_too_large_for_any_request_has_a_status(serving, fake, image):
    """It is not sent; its neighbours are embedded, in a call and of an iterable."""
    images = [image(1), b"x" * (2 << 20), image(2)]

    async def main():
        async with (
            serving(fake, max_message_mib=1) as server,
            AsyncClient(server.address) as client,
        ):
            result = await client.embed(images)
            assert [status.code for status in result.statuses] == ["ok", "too_many_bytes", "ok"]
            assert "expected at most 1048576 bytes a request" in result.statuses[1].message
            items = [item async for item in client.embed_iter(images)]
            assert tuple(item.status for item in items) == result.statuses

    asyncio.run(main())


def test_a_version_may_be_asked_for_and_is_told(serving, fake, image):
    """In every way to embed, and in the list of models."""

    async def main():
        async with serving(fake) as server, AsyncClient(server.address) as client:
            (model,) = await client.list_models()
            assert (model.version, model.versions) == ("1", ("1",))
            assert (await client.embed([image(1)], version="1")).version == "1"
            with pytest.raises(UnknownNameError, match="version"):
                await client.embed([image(1)], version="9")
            (item,) = [item async for item in client.embed_iter([image(1)], version="9")]
            assert isinstance(item.error, UnknownNameError)

    asyncio.run(main())
