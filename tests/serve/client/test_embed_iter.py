from __future__ import annotations

import asyncio
import itertools
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from models.errors import UsageError
from serve.client import AsyncClient, Client, RetryPolicy
from serve.config import ServeOptions
from serve.errors import DeadlineError, QueueFullError, UnavailableError
from serve.server import Server

ONCE = RetryPolicy(attempts=1)
ROOT = Path(__file__).parents[3]


async def collect(client, images, **options):
    """All items of either client."""
    items = []
    await read(client.embed_iter(images, **options), items)
    return items


async def read(iterator, items):
    """Append what either client's iterator gives, to its end or its error."""
    if isinstance(iterator, Iterator):
        await asyncio.to_thread(items.extend, iterator)
        return
    async for item in iterator:
        items.append(item)


async def read_one(iterator):
    """What either client's iterator gives first, and no more."""
    if not isinstance(iterator, Iterator):
        item = await anext(iterator)
        await iterator.aclose()
        return item
    item = await asyncio.to_thread(next, iterator)
    await asyncio.to_thread(iterator.close)
    return item


@pytest.fixture(params=[Client, AsyncClient])
def make_client(request):
    """Either client."""
    return request.param


async def close(client):
    """Close either client."""
    if isinstance(client, AsyncClient):
        await client.close()
    else:
        client.close()


def values_of(items):
    """What the fake encoder saw: the first number of each vector."""
    return [None if item.vector is None else int(item.vector[0]) for item in items]


@pytest.mark.parametrize("ordered", [True, False])
def test_every_image_becomes_one_item(serving, fake, image, make_client, ordered):
    """With its index and its vector, in order where that is asked for, else in some order."""
    images = [image(n) for n in range(200)]

    async def main():
        async with serving(fake) as server:
            client = make_client(server.address)
            items = await collect(
                client, images, ordered=ordered, images_per_request=7, normalize=False
            )
            array = await collect(client, np.stack(images), normalize=False)
            await close(client)
            return items, array

    items, array = asyncio.run(main())
    if not ordered:
        items.sort(key=lambda item: item.index)
    assert [item.index for item in items] == list(range(200))
    assert values_of(items) == values_of(array) == list(range(200))
    assert {item.fingerprint for item in items} == {fake.fingerprint}


def test_what_is_no_image_is_an_item(serving, fake, image, make_client):
    """A broken file, something else than an image, and one that no request can hold."""
    images = [image(1), b"no image", "a/path.jpg", b"x" * (2 << 20), None, image(2)]

    async def main():
        async with serving(fake, max_message_mib=1) as server:
            client = make_client(server.address)
            items = await collect(client, images, normalize=False)
            await close(client)
            return items

    items = asyncio.run(main())
    assert values_of(items) == [1, None, None, None, None, 2]
    assert [item.status.code for item in items] == [
        "ok", "unsupported_format", "not_an_image", "too_many_bytes", "not_an_image", "ok",
    ]  # fmt: skip
    assert "read the file with Path(...).read_bytes()" in items[2].status.message
    assert not any(item.error for item in items)


def test_a_request_that_fails_loses_nothing_else(serving, fake, image, make_client):
    """Its images say what it failed with; those of the others have vectors."""
    images = [image(n) for n in range(6)]

    async def main():
        async with serving(fake) as server:
            client = make_client(server.address, retry=ONCE)
            fake.failures.append(RuntimeError("once"))
            items = await collect(
                client, images, in_flight=1, images_per_request=2, normalize=False
            )
            await close(client)
            return items

    items = asyncio.run(main())
    assert values_of(items) == [None, None, 2, 3, 4, 5]
    assert [item.status.code for item in items[:2]] == ["request_failed"] * 2
    assert all(str(item.error) == item.status.message for item in items[:2])
    assert "the encoder failed on these images" in items[0].status.message


def test_no_more_is_read_than_is_under_way(serving, fake, image, make_client, eventually):
    """An endless iterable is asked for what is in flight, and again as replies come."""
    read = []

    def endless():
        for n in itertools.count():
            read.append(n)
            yield image(n % 256)

    async def main():
        async with serving(fake) as server:
            client = make_client(server.address)
            iterator = client.embed_iter(endless(), in_flight=3, images_per_request=2)
            fake.gate.clear()
            if make_client is Client:
                first = asyncio.create_task(asyncio.to_thread(next, iterator))
            else:
                first = asyncio.ensure_future(anext(iterator))
            await eventually(lambda: len(read) == 6)
            engine = server.catalog.model("").engine
            await eventually(lambda: engine.statistics().held_requests == 3)
            assert len(read) == 6
            fake.gate.set()
            assert (await first).index == 0
            assert len(read) <= 14  # one answered at most as often as it was asked
            if make_client is Client:
                await asyncio.to_thread(iterator.close)
            else:
                await iterator.aclose()
            await eventually(lambda: engine.statistics().held_requests == 0)
            await close(client)

    asyncio.run(main())


def test_requests_of_large_images_are_small(serving, fake, make_client, eventually):
    """Or a server has no room for all that is under way, and refuses some of it for good."""
    read = []

    def endless():
        while True:
            read.append(0)
            yield np.zeros((1 << 11, 1 << 11, 1), np.uint8)  # 4 MiB

    async def main():
        async with serving(fake) as server:
            client = make_client(server.address)
            fake.gate.clear()
            iterator = client.embed_iter(endless(), in_flight=2)
            first = asyncio.create_task(read_one(iterator))
            engine = server.catalog.model("").engine
            await eventually(lambda: engine.statistics().held_requests == 2)
            assert engine.statistics().held_images == 2, "two of them pass 8 MiB"
            assert len(read) == 3
            fake.gate.set()
            assert (await first).ok
            await close(client)

    asyncio.run(main())


def test_who_stops_early_cancels(serving, fake, image, make_client, eventually, monkeypatch):
    """Closing the iterator ends what is under way on the server, too."""

    async def main():
        async with serving(fake) as server:
            engine = server.catalog.model("").engine
            client = make_client(server.address)
            iterator = client.embed_iter(
                itertools.repeat(image(0)), in_flight=4, images_per_request=1, ordered=False
            )
            passes = threading.Semaphore(0)
            monkeypatch.setattr(fake.gate, "wait", lambda s: passes.acquire(timeout=s))
            if make_client is Client:
                first = asyncio.create_task(asyncio.to_thread(next, iterator))
            else:
                first = asyncio.ensure_future(anext(iterator))
            await eventually(lambda: server.calls.active == 4)
            passes.release()  # the first batch passes, the others wait
            await first
            if make_client is Client:
                await asyncio.to_thread(iterator.close)
            else:
                await iterator.aclose()
            await eventually(lambda: server.calls.active == 0)  # while the encoder still waits
            passes.release(100)
            await eventually(lambda: engine.statistics().held_requests == 0)
            await close(client)

    asyncio.run(main())


@pytest.mark.parametrize("images_per_request", [1, 2, 32])
def test_an_error_of_the_iterable_comes_last(serving, fake, image, make_client, images_per_request):
    """After the items of all images that it gave before, those of a request half full, too."""

    def failing():
        yield from map(image, range(3))
        raise OSError("disk gone")

    async def failing_slowly():
        for given in failing():
            yield given

    async def main():
        async with serving(fake) as server:
            client = make_client(server.address)
            for images in [failing()] if make_client is Client else [failing(), failing_slowly()]:
                items = []
                iterator = client.embed_iter(
                    images, images_per_request=images_per_request, normalize=False
                )
                with pytest.raises(OSError, match="disk gone"):
                    await read(iterator, items)
                assert values_of(items) == [0, 1, 2]
            await close(client)

    asyncio.run(main())


def test_a_slow_iterable_does_not_hold_the_event_loop(serving, fake, image):
    """While it blocks, other tasks run: here the one that it waits for."""
    go_on = threading.Event()

    def images():
        yield image(1)
        assert go_on.wait(10), "the event loop stood still"
        yield image(2)

    async def main():
        async with serving(fake) as server, AsyncClient(server.address) as client:
            iterator = client.embed_iter(images(), images_per_request=1)
            await anext(iterator)
            go_on.set()
            assert len([item async for item in iterator]) == 1

    asyncio.run(main())


A_QUEUE = """
import asyncio, queue, sys
from serve.client import AsyncClient

async def main():
    images = queue.Queue()
    images.put(b"no image")
    async with AsyncClient(sys.argv[1]) as client:
        async for _ in client.embed_iter(iter(images.get, None), images_per_request=1):
            break

asyncio.run(main())
"""


@pytest.mark.parametrize("frontend", ["native"])
def test_an_iterable_that_blocks_keeps_no_program_from_ending(serving, fake):
    """Nothing more comes from the queue; who stops reading is done."""

    async def main():
        async with serving(fake) as server:
            argv = [sys.executable, "-c", A_QUEUE, server.address]
            await asyncio.to_thread(subprocess.run, argv, cwd=ROOT, check=True, timeout=60)

    asyncio.run(main())


def test_an_asynchronous_iterable_is_read_as_it_comes(serving, fake, image):
    """Items come while it has yet to give more; an error of its own comes after them."""

    async def main():
        async with serving(fake) as server, AsyncClient(server.address) as client:
            more = asyncio.Event()

            async def images():
                yield image(1)
                await more.wait()
                yield image(2)
                raise OSError("disk gone")

            iterator = client.embed_iter(images(), images_per_request=1, normalize=False)
            items = [await anext(iterator)]
            more.set()
            with pytest.raises(OSError, match="disk gone"):
                await read(iterator, items)
            return values_of(items)

    assert asyncio.run(main()) == [1, 2]


def test_a_restart_loses_no_image(serving, fake, image):
    """The server is away for more attempts than one that never replied would get."""
    pauses = itertools.count(1)

    async def main():
        gone, back = asyncio.Event(), asyncio.Event()

        async def images():
            yield image(0)
            await gone.wait()
            for n in range(1, 8):
                yield image(n)

        async def sleep(seconds):
            if next(pauses) == 20:  # of two requests
                back.set()
            await asyncio.sleep(0.01)

        async def start_again(port):
            await back.wait()
            options = ServeOptions(port=port, bundle=("fake://fake",))
            server = Server(options, open_model=lambda uri, **_: fake)
            await server.start()
            return server

        async with serving(fake) as server:
            client = AsyncClient(server.address, sleep=sleep)
            iterator = client.embed_iter(
                images(), in_flight=2, images_per_request=1, normalize=False
            )
            items = [await anext(iterator)]
        port = int(server.address.rpartition(":")[2])
        starting = asyncio.create_task(start_again(port))
        gone.set()
        await read(iterator, items)
        await client.close()
        await (await starting).kill()
        return items

    assert values_of(asyncio.run(main())) == list(range(8))


def test_busy_servers_are_tried_again(serving, fake, image, make_client):
    """Refusals for want of room are waited out, and no image is lost."""
    images = [image(n) for n in range(64)]

    async def main():
        async with serving(fake, max_queue_images=4) as server:
            client = make_client(server.address, retry=RetryPolicy(initial_s=0.01))
            items = await collect(
                client, images, images_per_request=2, in_flight=8, normalize=False
            )
            await close(client)
            return items

    assert values_of(asyncio.run(main())) == list(range(64))


def test_the_first_question_has_the_limit_of_a_request(make_client):
    """What the server takes is not waited for any longer than an answer."""

    async def main(address):
        client = make_client(address, timeout_s=5)
        with pytest.raises(DeadlineError, match=r"ListModels .* within 0\.2 s, found none"):
            await collect(client, [], timeout_s=0.2)
        await close(client)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        asyncio.run(main(f"127.0.0.1:{silent.getsockname()[1]}"))


def test_a_closed_client_is_no_item(serving, fake, image, make_client):
    """It is an error of the caller's."""

    async def main():
        async with serving(fake) as server:
            client = make_client(server.address)
            await close(client)
            with pytest.raises(UnavailableError, match="one that was closed"):
                await collect(client, [image(1)])

    asyncio.run(main())


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (b"one", {}, "images: expected an iterable of images, found bytes"),
        ([], {"in_flight": 0}, "in_flight: expected an integer, 1 to 4294967295, found 0"),
        ([], {"dtype": "bf16"}, "dtype: expected fp32 or fp16 or int8, found 'bf16'"),
        ([], {"priority": 4}, "priority: expected an integer, 0 to 3, found 4"),
        ([], {"timeout_s": 0}, "timeout_s: expected a positive number of seconds"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(images, options, message):
    """Before anything is sent, and before the first item is asked for."""
    with Client("localhost:1") as client, pytest.raises(UsageError, match=message):
        client.embed_iter(images, **options)


def test_a_full_queue_without_retries_is_told(serving, fake, image, eventually):
    """By the kind of error that a single call would raise."""

    async def main():
        async with (
            serving(fake, max_queue_images=1) as server,
            AsyncClient(server.address, retry=ONCE) as client,
        ):
            await client.list_models()
            fake.gate.clear()
            held = asyncio.create_task(client.embed([image(1)]))
            await eventually(fake.entered.is_set)
            (item,) = [item async for item in client.embed_iter([image(2)])]
            fake.gate.set()
            await held
            return item

    item = asyncio.run(main())
    assert isinstance(item.error, QueueFullError)
