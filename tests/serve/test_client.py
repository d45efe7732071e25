from __future__ import annotations

import asyncio
import random
import socket

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import UsageError
from protos import horace_pb2 as pb
from serve.client import AsyncClient, Client, RetryPolicy
from serve.errors import (
    DeadlineError,
    FailedItemsError,
    PreconditionError,
    QueueFullError,
    UnavailableError,
    UnknownNameError,
)
from serve.plans import Call, Failure, Pause, Planner
from serve.requests import EmbedOptions, RequestSize, group_images, make_queries
from serve.results import EmbedResult, ItemStatus, Timings

UNAVAILABLE = Failure(grpc.StatusCode.UNAVAILABLE, "connection refused")
BUSY = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue: full")


class Largest(random.Random):
    """Draws the longest wait that may be drawn."""

    def uniform(self, a, b):
        """Give the upper end."""
        return b


class Drive:
    """Performs plans with answers from a script, on a clock that only pauses move."""

    def __init__(self, *answers, call_s=0.0, **policy):
        self.now_s = 0.0
        self.steps = []
        self.call_s = call_s
        self.answers = list(answers)
        self.planner = Planner(
            "there:1", retry=RetryPolicy(**policy), clock=lambda: self.now_s, rng=Largest()
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


def test_a_server_that_comes_back_is_noticed_by_nobody():
    """Two failures, growing pauses, then the reply."""
    drive = Drive(UNAVAILABLE, BUSY, models_reply())
    assert [model.name for model in drive.run(drive.planner.list_models(60))] == ["m"]
    assert drive.pauses == [0.1, 0.2]


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


@given(st.integers(1, 50), st.floats(0, 100), st.randoms())
def test_waits_are_within_their_bounds(failures, remaining_s, rng):
    """Never negative, never beyond the longest, never past the deadline."""
    policy = RetryPolicy(attempts=51)
    wait_s = policy.wait_s(
        grpc.StatusCode.UNAVAILABLE, failures=failures, remaining_s=remaining_s, rng=rng
    )
    assert wait_s is None or 0 <= wait_s <= min(policy.max_s, remaining_s)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=40), st.integers(1, 9))
def test_groups_keep_every_image_in_order_within_the_servers_limits(sizes, most):
    """Nothing is lost, nothing is too large, and an oversize image has its own status."""
    size = RequestSize(images=most, request_bytes=4096 + 2000)
    images = [bytes([n]) * n_bytes for n, n_bytes in enumerate(sizes)]
    groups = list(group_images(images, size))
    assert all(1 <= len(group.images) <= most for group in groups)
    assert all(
        pb.EmbedRequest(images=group.images).ByteSize() <= size.request_bytes for group in groups
    )
    sent = [image.encoded for group in groups for image in group.images]
    assert sent == [image if len(image) + 64 <= 2000 else b"" for image in images]
    refused = [n in g.refused for g in groups for n in range(len(g.images))]
    assert refused == [len(image) + 64 > 2000 for image in images]


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


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (b"one file", "bytes"),
        (np.zeros((8, 8, 3), np.uint8), r"an array of shape \(8, 8, 3\)"),
        (np.zeros((8, 8), np.uint8), r"an array of shape \(8, 8\)"),
        ("path.png", "str"),
    ],
)
def test_a_single_image_is_not_taken_for_several(images, found):
    """It would be read as its bytes or rows; the line says to put it into a list."""
    with Client("localhost:1") as client, pytest.raises(UsageError, match=f"found {found}; put a"):
        client.embed(images)


def test_arguments_that_cannot_be_meant_are_refused_before_a_call():
    """Nothing is sent for them."""
    ones = np.ones((1, 4), np.float32)
    with Client("localhost:1") as client:
        with pytest.raises(UsageError, match="images: expected at least one, found none"):
            client.embed([])
        with pytest.raises(UsageError, match="dtype: expected fp32 or fp16 or int8, found 'fp8'"):
            client.embed([b"1"], dtype="fp8")
        with pytest.raises(UsageError, match="dims: expected at least 1, found 0"):
            client.embed([b"1"], dims=0)
        with pytest.raises(UsageError, match="k: expected at least 1, found 0"):
            client.search(ids=[1], k=0)
        with pytest.raises(UsageError, match="expected one of images, vectors and ids, found none"):
            client.search()
        with pytest.raises(UsageError, match="found images and ids"):
            client.search([b"1"], ids=[1])
        with pytest.raises(UsageError, match="found an array alone; pass the result of embed"):
            client.search(vectors=ones)
        with pytest.raises(UsageError, match=r"expected shape \(N, D\)"):
            client.search(vectors=ones[0], fingerprint="f")
        with pytest.raises(UsageError, match="none negative, found -1"):
            client.search(ids=[-1])
        with pytest.raises(UsageError, match="image array: expected"):
            list(group_images([ones], RequestSize(images=1, request_bytes=10_000)))


def test_many_query_vectors_and_ids_go_in_several_requests():
    """Each within the server's limits, in order, with the fingerprint."""
    size = RequestSize(images=3, request_bytes=10_000)
    vectors = np.arange(28, dtype=np.float32).reshape(7, 4)
    requests = [r for r, _ in make_queries(None, vectors, None, "f").requests(size)]
    assert [request.vectors.vectors.rows for request in requests] == [3, 3, 1]
    assert {request.vectors.fingerprint for request in requests} == {"f"}
    requests = [r for r, _ in make_queries(None, None, range(7), None).requests(size)]
    assert [list(request.ids.ids) for request in requests] == [[0, 1, 2], [3, 4, 5], [6]]


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


def test_no_server_is_one_line():
    """The line names the address and how to start one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{free.getsockname()[1]}"
        retry = RetryPolicy(attempts=2, initial_s=0.001)
        with Client(target, retry=retry) as client, pytest.raises(UnavailableError) as error:
            client.embed([b"1"])
    assert str(error.value).startswith(f"server {target}: expected a Horace server that answers")
    assert str(error.value).endswith("start it with `python -m serve`, or check host and port")


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
    """Embedding, lists, health and streams, blocking and not."""
    values = list(range(70))
    images = [image(n) for n in values]

    def blocking(address):
        with Client(address) as client:
            assert client.health()
            assert client.list_collections() == []
            (model,) = client.list_models()
            result = client.embed(np.stack(images), normalize=False)
            streamed = [r.vectors[:, 0] for r in client.embed_stream(images, normalize=False)]
            with pytest.raises(UnknownNameError, match="expected 'fake', found 'cat'"):
                list(client.embed_stream(images, model="cat"))
            return model.name, result.vectors[:, 0].tolist(), [r.tolist() for r in streamed]

    async def unblocking(address):
        async with AsyncClient(address) as client:
            assert await client.health()
            assert await client.list_collections() == []
            (model,) = await client.list_models()
            result = await client.embed(np.stack(images), normalize=False)
            stream = client.embed_stream(images, normalize=False)
            streamed = [reply.vectors[:, 0] async for reply in stream]
            with pytest.raises(UnknownNameError, match="expected 'fake', found 'cat'"):
                [reply async for reply in client.embed_stream(images, model="cat")]
            return model.name, result.vectors[:, 0].tolist(), [r.tolist() for r in streamed]

    async def main():
        async with serving(fake) as server:
            return await asyncio.to_thread(blocking, server.address), await unblocking(
                server.address
            )

    one, other = asyncio.run(main())
    assert one == other == ("fake", values, [values[:32], values[32:64], values[64:]])


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


def test_an_image_too_large_for_any_request_has_a_status(serving, fake, image):
    """It is not sent; its neighbours are embedded, in a call and in a stream."""
    images = [image(1), b"x" * (2 << 20), image(2)]

    async def main():
        async with (
            serving(fake, max_message_mib=1) as server,
            AsyncClient(server.address) as client,
        ):
            result = await client.embed(images)
            assert [status.code for status in result.statuses] == ["ok", "too_many_bytes", "ok"]
            assert "expected at most 1048576 bytes a request" in result.statuses[1].message
            (streamed,) = [reply async for reply in client.embed_stream(images)]
            assert streamed.statuses == result.statuses

    asyncio.run(main())
