from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager

import numpy as np
import pytest

import serve.engine
from models.errors import ImageError, ImageFault
from serve.engine import Engine
from serve.errors import DeadlineError, InternalError, QueueFullError, UnavailableError
from serve.pool import ThreadPool


@asynccontextmanager
async def running(encoder, **options):
    """An engine with a decode pool of two threads."""
    pool = ThreadPool(threads=2, name="decode")
    engine = Engine(encoder, decode_pool=pool, **options)
    try:
        yield engine
    finally:
        encoder.gate.set()
        engine.close()
        pool.close()


def embed(engine, images, **options):
    """Embed a list of images."""
    return engine.embed(images, count=len(images), payload_bytes=0, **options)


def first_values(embedded):
    """The values of the images that the vectors come from."""
    return embedded.vectors_ND[:, 0].tolist()


async def hold(engine, encoder, image):
    """Occupy the encoder with one image, until the gate opens."""
    encoder.gate.clear()
    encoder.entered.clear()
    task = asyncio.create_task(embed(engine, [image(0)]))
    await asyncio.to_thread(encoder.entered.wait)
    return task


def test_requests_that_come_while_the_encoder_is_busy_run_as_one_batch(fake, image):
    """Batches form under load, and every request gets its own vectors."""

    async def main():
        async with running(fake) as engine:
            held = await hold(engine, fake, image)
            tasks = [asyncio.create_task(embed(engine, [image(n), image(n + 1)])) for n in (10, 20)]
            await asyncio.sleep(0)
            fake.gate.set()
            assert [first_values(await task) for task in (held, *tasks)] == [
                [0.0],
                [10.0, 11.0],
                [20.0, 21.0],
            ]
        assert fake.batches == [[0], [10, 11, 20, 21]]

    asyncio.run(main())


def test_a_request_larger_than_a_batch_is_split_and_answered_whole(fake, image):
    """Seventy images run in batches of at most 32 and come back in their order."""

    async def main():
        async with running(fake) as engine:
            embedded = await embed(engine, [image(n) for n in range(70)])
            assert first_values(embedded) == list(range(70))
        assert [len(batch) for batch in fake.batches] == [32, 32, 6]

    asyncio.run(main())


def test_bad_images_have_errors_and_their_batchmates_vectors(fake, image):
    """Bytes that are no image, wrong shapes and errors that came with the request."""

    async def main():
        came_broken = ImageError(ImageFault.EMPTY, "image", found="nothing")
        async with running(fake) as engine:
            embedded = await embed(engine, [b"text", image(1), came_broken, image(2)])
            assert first_values(embedded) == [1.0, 2.0]
            faults = [error and error.fault for error in embedded.errors]
            assert faults == [ImageFault.UNSUPPORTED_FORMAT, None, ImageFault.EMPTY, None]
            nothing = await embed(engine, [b"text"])
            assert nothing.vectors_ND.shape == (0, 4)

    asyncio.run(main())


def test_a_fault_in_preprocessing_is_that_images_own(fake, image, monkeypatch):
    """Not even our own bug while decoding one image fails the others, or leaks its text."""

    def broken(data, spec, limits):
        if isinstance(data, bytes):
            raise ValueError("/secret/path")
        return data

    monkeypatch.setattr(serve.engine, "preprocess", broken)

    async def main():
        async with running(fake) as engine:
            embedded = await embed(engine, [b"image", image(5)])
            assert first_values(embedded) == [5.0]
            assert str(embedded.errors[0]) == (
                "image: expected one that decodes, found a decoder fault"
            )

    asyncio.run(main())


def test_a_failing_encoder_fails_its_batch_alone(fake, image):
    """The requests of the batch get an error without internals; the next batch runs."""

    async def main():
        async with running(fake) as engine:
            fake.failures.append(RuntimeError("CUDA out of memory at /dev/nvidia0"))
            with pytest.raises(InternalError, match=r"^the encoder failed on these images$"):
                await embed(engine, [image(1)])
            assert first_values(await embed(engine, [image(2)])) == [2.0]
            assert engine.alive

    asyncio.run(main())


def test_an_encoder_that_gives_too_few_vectors_is_an_error(fake, image):
    """A wrong shape is never handed out as somebody's vectors."""

    async def main():
        fake.dim = 5
        async with running(fake) as engine:
            with pytest.raises(InternalError):
                await embed(engine, [image(1)])

    asyncio.run(main())


def test_a_worker_that_dies_leaves_nobody_waiting(fake, image):
    """What runs and what waits fails at once, health is told, and later calls are refused."""

    async def main():
        told = threading.Event()
        async with running(fake, on_crash=told.set) as engine:
            held = await hold(engine, fake, image)
            waiting = asyncio.create_task(embed(engine, [image(1)]))
            await asyncio.sleep(0)
            fake.failures.append(SystemExit("the thread is gone"))
            fake.gate.set()
            for task in (held, waiting):
                with pytest.raises(InternalError, match="lost a thread of this model"):
                    await task
            assert await asyncio.to_thread(told.wait, 10)
            assert not engine.alive
            with pytest.raises(UnavailableError):
                await embed(engine, [image(2)])
            assert "crashed" in repr(engine)

    asyncio.run(main())


def test_what_expires_in_the_queue_is_computed_for_nobody(fake, image):
    """A deadline that passes while the encoder is busy ends the request uncomputed."""

    async def main():
        now = [0.0]
        async with running(fake, clock=lambda: now[0]) as engine:
            held = await hold(engine, fake, image)
            late = asyncio.create_task(embed(engine, [image(1)], deadline_s=5.0))
            punctual = asyncio.create_task(embed(engine, [image(2)], deadline_s=50.0))
            await asyncio.sleep(0)
            now[0] = 6.0
            fake.gate.set()
            with pytest.raises(DeadlineError, match="deadline is too near"):
                await late
            await asyncio.gather(held, punctual)
            assert fake.computed == [0, 2]
            assert engine.statistics().expired_requests == 1

    asyncio.run(main())


def test_a_cancelled_request_is_computed_for_nobody(fake, image):
    """A caller that goes while its images wait takes them along."""

    async def main():
        async with running(fake) as engine:
            held = await hold(engine, fake, image)
            gone = asyncio.create_task(embed(engine, [image(1)]))
            await asyncio.sleep(0)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            fake.gate.set()
            await held
            await embed(engine, [image(2)])
            assert fake.computed == [0, 2]
            assert engine.statistics().held_requests == 0

    asyncio.run(main())


def test_a_full_queue_refuses_at_once(fake, image):
    """Beyond its bound a request is refused, not queued; it fits again later."""

    async def main():
        async with running(fake, max_held_images=2) as engine:
            held = await hold(engine, fake, image)
            with pytest.raises(QueueFullError, match="1 of 2 images"):
                await embed(engine, [image(1), image(2)])
            fake.gate.set()
            await held
            assert first_values(await embed(engine, [image(1), image(2)])) == [1.0, 2.0]

    asyncio.run(main())


def test_who_asks_for_it_waits_for_room(fake, image):
    """A stream is held back instead of refused."""

    async def main():
        async with running(fake, max_held_images=1) as engine:
            held = await hold(engine, fake, image)
            waiting = [
                asyncio.create_task(embed(engine, [image(n)], wait_for_room=True)) for n in (1, 2)
            ]
            await asyncio.sleep(0)
            fake.gate.set()
            await asyncio.gather(held, *waiting)
            assert fake.computed == [0, 1, 2]

    asyncio.run(main())


@pytest.mark.parametrize("outcome", ["computed", "failed"])
def test_who_waits_gets_the_room_of_a_request_that_nobody_awaits(fake, image, outcome):
    """A request is cancelled while it runs; when its batch ends, the next in line runs."""

    async def main():
        async with running(fake, max_held_images=2) as engine:
            gone = await hold(engine, fake, image)
            waiting = asyncio.create_task(embed(engine, [image(1), image(2)], wait_for_room=True))
            await asyncio.sleep(0)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            assert engine.statistics().lined_up_requests == 1
            if outcome == "failed":
                fake.failures.append(RuntimeError("no memory"))
            fake.gate.set()
            assert first_values(await asyncio.wait_for(waiting, 10)) == [1.0, 2.0]

    asyncio.run(main())


def test_who_waits_gets_the_room_of_a_request_that_was_being_decoded(fake, image):
    """The decode pool is busy, and the request is cancelled there: the next in line runs."""
    busy = threading.Event()

    async def main():
        async with running(fake, max_held_images=2) as engine:
            for _ in range(engine._decode_pool.size):
                engine._decode_pool.submit(lambda: busy.wait(10))
            gone = asyncio.create_task(embed(engine, [b"no image", b"no image"]))
            waiting = asyncio.create_task(embed(engine, [image(1)], wait_for_room=True))
            await asyncio.sleep(0)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            assert engine.statistics().lined_up_requests == 1
            busy.set()
            assert first_values(await asyncio.wait_for(waiting, 10)) == [1.0]
            assert engine.statistics().held_requests == 0

    asyncio.run(main())


def test_who_waits_gets_the_room_of_a_request_that_expired(fake, image):
    """A deadline passes in the queue: its place goes to the next in line."""

    async def main():
        now = [0.0]
        async with running(fake, max_held_images=3, clock=lambda: now[0]) as engine:
            held = await hold(engine, fake, image)
            late = asyncio.create_task(embed(engine, [image(1)] * 2, deadline_s=5.0))
            waiting = asyncio.create_task(embed(engine, [image(2)] * 3, wait_for_room=True))
            await asyncio.sleep(0)
            now[0] = 6.0
            fake.gate.set()
            with pytest.raises(DeadlineError):
                await late
            assert first_values(await asyncio.wait_for(waiting, 10)) == [2.0] * 3
            await held

    asyncio.run(main())


def test_nobody_is_served_past_a_large_request_that_waits(fake, image):
    """Single images keep coming; the large request has its turn, and they have theirs."""

    async def main():
        async with running(fake, max_held_images=4) as engine:
            held = await hold(engine, fake, image)
            large = asyncio.create_task(embed(engine, [image(1)] * 4, wait_for_room=True))
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError, match=r"1 of 4 images .* 1 requests in line"):
                await embed(engine, [image(2)])
            after = asyncio.create_task(embed(engine, [image(3)], wait_for_room=True))
            await asyncio.sleep(0)
            fake.gate.set()
            await asyncio.gather(held, large, after)
            assert fake.computed == [0, 1, 1, 1, 1, 3]

    asyncio.run(main())


def test_who_waits_for_room_is_told_when_the_engine_closes(fake, image):
    """Also a request that was never admitted ends with it."""

    async def main():
        async with running(fake, max_held_images=1) as engine:
            held = await hold(engine, fake, image)
            waiting = asyncio.create_task(embed(engine, [image(1)], wait_for_room=True))
            await asyncio.sleep(0)
            closing = asyncio.create_task(asyncio.to_thread(engine.close))
            for task in (held, waiting):
                with pytest.raises(UnavailableError, match="has stopped"):
                    await task
            fake.gate.set()
            assert await closing

    asyncio.run(main())


def test_images_are_not_read_before_there_is_room_for_them(fake, image):
    """What is refused, or waits, takes no more memory than its message."""
    read = []

    def images():
        read.append(1)
        yield image(1)

    async def main():
        async with running(fake, max_held_bytes=100) as engine:
            held = await hold(engine, fake, image)
            with pytest.raises(QueueFullError, match="64 of 100 bytes"):
                await engine.embed(images(), count=1, payload_bytes=50)
            waiting = asyncio.create_task(
                engine.embed(images(), count=1, payload_bytes=50, wait_for_room=True)
            )
            await asyncio.sleep(0)
            assert not read
            fake.gate.set()
            await asyncio.gather(held, waiting)
            assert read == [1]

    asyncio.run(main())


def test_a_request_whose_images_cannot_be_read_holds_nothing(fake):
    """A fault while they are read out of the message is the caller's, and frees its place."""

    def images():
        raise LookupError("no more")
        yield

    async def main():
        async with running(fake) as engine:
            with pytest.raises(LookupError):
                await engine.embed(images(), count=1, payload_bytes=0)
            assert engine.statistics().held_requests == 0

    asyncio.run(main())


def test_closing_fails_what_is_held_and_ends_the_threads(fake, image):
    """Nobody waits for an engine that is no more."""

    async def main():
        async with running(fake) as engine:
            held = await hold(engine, fake, image)
            closing = asyncio.create_task(asyncio.to_thread(engine.close))
            with pytest.raises(UnavailableError, match="has stopped"):
                await held
            fake.gate.set()
            assert await closing
            assert not engine.alive

    asyncio.run(main())


def test_two_instances_work_on_one_request_together(fake, image):
    """More than a batch of ready images keeps every instance busy."""
    both = threading.Barrier(2, timeout=10)
    encode = fake.encode
    fake.encode = lambda images: (both.wait(), encode(images))[1]

    async def main():
        async with running(fake, instances=2, max_batch_images=4) as engine:
            embedded = await embed(engine, [image(n) for n in range(8)])
            assert first_values(embedded) == list(range(8))

    asyncio.run(main())


def test_timings_say_where_the_time_went(fake, image):
    """An image that waited for the encoder says so."""

    async def main():
        now = [0.0]
        async with running(fake, clock=lambda: now[0]) as engine:
            held = await hold(engine, fake, image)
            waiting = asyncio.create_task(embed(engine, [image(1)]))
            await asyncio.sleep(0)
            now[0] = 3.0
            fake.gate.set()
            embedded = await waiting
            assert (embedded.decode_s, embedded.queue_s, embedded.inference_s) == (0.0, 3.0, 0.0)
            assert (await held).inference_s == 3.0

    asyncio.run(main())


def test_vectors_do_not_depend_on_the_batch(make_bundle):
    """Every image has the same vector, to the bit, alone and in any company."""
    from models.encoder import open_encoder

    async def main():
        images = np.random.default_rng(0).integers(0, 256, (50, 28, 28, 1), dtype=np.uint8)
        encoder = open_encoder(make_bundle().path)
        expected = np.concatenate([encoder.encode(one[None]) for one in images])
        pool = ThreadPool(threads=2, name="decode")
        engine = Engine(encoder, decode_pool=pool)
        rng = np.random.default_rng(1)
        requests = [rng.choice(50, size=rng.integers(1, 9)) for _ in range(200)]
        replies = await asyncio.gather(*[embed(engine, list(images[r])) for r in requests])
        for request, reply in zip(requests, replies, strict=True):
            np.testing.assert_array_equal(reply.vectors_ND, expected[request])
        assert engine.statistics().computed_batches < 200
        engine.close()
        pool.close()

    asyncio.run(main())
