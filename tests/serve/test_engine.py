from __future__ import annotations

import asyncio
import threading
import time
import weakref
from contextlib import asynccontextmanager

import numpy as np
import pytest

import serve.decoding
from models.errors import (
    EncoderUnavailableError,
    FingerprintMismatchError,
    ImageError,
    ImageFault,
)
from serve.engine import Engine
from serve.errors import (
    DeadlineError,
    InternalError,
    QueueFullError,
    RequestError,
    UnavailableError,
)
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
    assert await asyncio.to_thread(encoder.entered.wait, 120)
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

    monkeypatch.setattr(serve.decoding, "preprocess", broken)

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


def test_an_encoder_whose_servers_do_not_answer_is_unavailable(fake, image):
    """Another time may do better, and no address reaches the caller."""

    async def main():
        async with running(fake) as engine:
            fake.failures.append(EncoderUnavailableError("triton://10.0.0.7:8001/m: gone"))
            with pytest.raises(UnavailableError, match=r"^model fake: expected servers that compu"):
                await embed(engine, [image(1)])
            assert first_values(await embed(engine, [image(2)])) == [2.0]

    asyncio.run(main())


def test_an_encoder_that_has_become_another_is_unavailable_and_trouble(fake, image, caplog):
    """The caller is told both fingerprints and no address; the log has the rest, once."""
    mismatch = FingerprintMismatchError(
        "horace://10.0.0.7:50051/m", expected="a" * 64, found="b" * 64, mend="open it again"
    )
    troubles = []

    async def main():
        async with running(fake, on_trouble=lambda: troubles.append(1)) as engine:
            for _ in range(2):
                fake.failures.append(mismatch)
                with pytest.raises(UnavailableError) as error:
                    await embed(engine, [image(1)])
            return str(error.value)

    assert asyncio.run(main()) == (
        f"model fake: expected encoder {'a' * 64}, found encoder {'b' * 64}; "
        "call another server, or have this one read its models again"
    )
    assert troubles == [1, 1]
    assert caplog.text.count("horace://10.0.0.7:50051/m: expected encoder aaa") == 1


@pytest.mark.parametrize("part", [np.s_[:0], np.s_[:, :1]], ids=["vectors", "values"])
def test_an_encoder_that_gives_too_few_is_an_error(fake, image, monkeypatch, part):
    """A wrong shape is never handed out as somebody's vectors, nor one value for all of them."""
    encode = fake.encode
    monkeypatch.setattr(fake, "encode", lambda images: encode(images)[part])

    async def main():
        async with running(fake) as engine:
            with pytest.raises(InternalError, match="the encoder failed on these images"):
                await embed(engine, [image(1)])

    asyncio.run(main())


def test_a_worker_that_dies_fails_its_batch_and_is_replaced(fake, image):
    """What runs fails at once, what waits is computed by another thread, and health is told."""

    async def main():
        told = threading.Event()
        async with running(fake, on_trouble=told.set) as engine:
            held = await hold(engine, fake, image)
            waiting = asyncio.create_task(embed(engine, [image(1)]))
            await asyncio.sleep(0)
            fake.failures.append(SystemExit("the thread is gone"))
            fake.gate.set()
            with pytest.raises(InternalError, match="lost a thread at these images"):
                await held
            assert first_values(await waiting) == [1.0]
            assert await asyncio.to_thread(told.wait, 10)
            assert engine.alive
            assert engine.statistics().running_batches == 0

    asyncio.run(main())


def test_a_worker_that_hangs_fails_its_batch_and_is_replaced(fake, image, eventually):
    """Its callers are told, the next are served, and what it gives later is for nobody."""

    async def main():
        trouble = []
        async with running(fake, on_trouble=lambda: trouble.append(1)) as engine:
            held = await hold(engine, fake, image)
            hanging, fake.gate = fake.gate, threading.Event()
            fake.gate.set()
            waiting = asyncio.create_task(embed(engine, [image(1)]))
            await asyncio.sleep(0)
            engine.look(elapsed_s=1.0, limit_s=1.5)
            engine.look(elapsed_s=1.0, limit_s=1.5)
            assert not trouble
            engine.look(elapsed_s=1.0, limit_s=1.5)
            with pytest.raises(InternalError, match="lost a thread at these images"):
                await held
            assert first_values(await waiting) == [1.0]
            assert trouble == [1]
            assert "<Crew infer-fake 1/1 threads, 1 hanging>" in repr(engine)
            hanging.set()
            await eventually(lambda: "hanging" not in repr(engine))
            assert fake.computed == [1, 0]
            assert first_values(await embed(engine, [image(2)])) == [2.0]
            assert engine.statistics().computed_images == 2

    asyncio.run(main())


def test_an_engine_whose_threads_all_hang_says_so_until_one_comes_back(fake, image, eventually):
    """No more threads are given to what hangs; nobody waits for it; it recovers by itself."""

    async def main():
        async with running(fake) as engine:
            for n_hanging in (1, 2):
                held = await hold(engine, fake, image)
                if n_hanging == 2:
                    waiting = asyncio.create_task(embed(engine, [image(1)]))
                    await asyncio.sleep(0)
                engine.look(elapsed_s=1.0, limit_s=0.5)
                engine.look(elapsed_s=1.0, limit_s=0.5)
                with pytest.raises(InternalError):
                    await held
            assert engine.state == "stuck"
            stuck = "model fake: expected one that is alive, found one that is stuck"
            with pytest.raises(UnavailableError, match=f"^{stuck}$"):
                await asyncio.wait_for(waiting, 10)
            with pytest.raises(UnavailableError, match=f"^{stuck}$"):
                await embed(engine, [image(1)])
            fake.gate.set()
            await eventually(lambda: engine.alive)
            assert first_values(await embed(engine, [image(2)])) == [2.0]

    asyncio.run(main())


def test_a_fault_in_our_own_policy_leaves_nobody_waiting(fake, image, monkeypatch, eventually):
    """A thread that dies between batches ends the engine: what is held fails, and health knows."""

    async def main():
        told = threading.Event()
        async with running(fake, on_trouble=told.set) as engine:
            held = await hold(engine, fake, image)
            waiting = asyncio.create_task(embed(engine, [image(1)]))
            await asyncio.sleep(0)
            monkeypatch.setattr(engine._batcher, "decide", lambda now_s: 1 / 0)
            fake.gate.set()
            assert first_values(await held) == [0.0]
            with pytest.raises(InternalError, match="lost a thread of this model"):
                await waiting
            assert await asyncio.to_thread(told.wait, 10)
            assert engine.state == "crashed"
            with pytest.raises(UnavailableError):
                await embed(engine, [image(2)])

    asyncio.run(main())


@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_an_image_that_takes_its_decoder_along_has_an_error(fake, image, monkeypatch, fault):
    """Its request is answered, the thread is replaced, and the next file is decoded."""
    hanging, entered = threading.Event(), threading.Event()

    def preprocess(data, spec, limits):
        if isinstance(data, bytes) and data == b"evil":
            entered.set()
            if fault == "dies":
                raise SystemExit
            hanging.wait(30)
        return image(7) if isinstance(data, bytes) else data

    monkeypatch.setattr(serve.decoding, "preprocess", preprocess)

    async def main():
        async with running(fake) as engine:
            request = asyncio.create_task(embed(engine, [image(1), b"evil", image(2)]))
            assert await asyncio.to_thread(entered.wait, 120)
            if fault == "hangs":
                engine._decoder._pool.look(elapsed_s=1.0, limit_s=0.5)
                engine._decoder._pool.look(elapsed_s=1.0, limit_s=0.5)
            embedded = await request
            assert first_values(embedded) == [1.0, 2.0]
            assert str(embedded.errors[1]) == (
                "image: expected one that decodes, found one that stopped the decoder, "
                "or shared a task with it"
            )
            hanging.set()
            assert first_values(await embed(engine, [b"good"] * 20)) == [7.0] * 20
            assert engine.statistics().held_requests == 0

    asyncio.run(main())


def test_a_deadline_that_cannot_be_met_is_refused_at_once(fake, image):
    """Nothing is computed for it, and the caller hears so before the deadline."""

    async def main():
        now = [0.0]

        def encode(images):
            now[0] += 1.0
            return encoder_encode(images)

        encoder_encode, fake.encode = fake.encode, encode
        async with running(fake, clock=lambda: now[0]) as engine:
            for _ in range(12):
                await embed(engine, [image(0)])
            computed = len(fake.computed)
            with pytest.raises(DeadlineError, match="for 1 images with 0 before them"):
                await embed(engine, [image(1)], deadline_s=now[0] + 0.5)
            assert len(fake.computed) == computed
            assert engine.statistics().unmeetable_requests == 1
            await embed(engine, [image(1)], deadline_s=now[0] + 5)

    asyncio.run(main())


def test_a_single_request_does_not_wait_for_a_bulk_client(fake, image):
    """Between one's thousand images another's one runs in the next batch, with priority first."""

    async def main():
        async with running(fake, max_batch_images=4) as engine:
            held = await hold(engine, fake, image)
            bulk = asyncio.create_task(embed(engine, [image(1)] * 40, client="bulk"))
            single = asyncio.create_task(embed(engine, [image(2)], client="single"))
            first = asyncio.create_task(embed(engine, [image(3)], client="bulk", priority=1))
            await asyncio.sleep(0)
            fake.gate.set()
            await asyncio.gather(held, bulk, single, first)
            assert fake.batches[1][0] == 3
            assert 2 in fake.batches[1] + fake.batches[2]

    asyncio.run(main())


def test_a_single_file_is_not_decoded_behind_all_of_a_bulk_client(fake, image, monkeypatch):
    """Clients take turns at the decoders, too, and a higher priority goes first."""
    decoded = []

    def preprocess(data, spec, limits):
        decoded.append(data[:1])
        return image(data[0])

    monkeypatch.setattr(serve.decoding, "preprocess", preprocess)
    busy = threading.Event()

    async def main():
        async with running(fake) as engine:
            for _ in range(engine._decoder._pool.size):
                engine._decoder._pool.submit(lambda: busy.wait(30))
            bulk = [
                asyncio.create_task(embed(engine, [b"b"] * 40, client="bulk")) for _ in range(3)
            ]
            single = asyncio.create_task(embed(engine, [b"s"], client="single"))
            first = asyncio.create_task(embed(engine, [b"f"], client="bulk", priority=1))
            await asyncio.sleep(0)
            busy.set()
            await asyncio.gather(*bulk, single, first)
            assert len(decoded) == 122
            assert decoded.index(b"f") < 9, "nothing but what another thread has taken already"
            assert decoded.index(b"s") < 26, "after a turn or two of the bulk client"

    asyncio.run(main())


def test_a_priority_that_is_none_is_refused(fake, image):
    """Before anything is held for it."""

    async def main():
        async with running(fake) as engine:
            with pytest.raises(RequestError, match="priority"):
                await embed(engine, [image(1)], priority=4)
            assert engine.statistics().admitted_requests == 0

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
                asyncio.create_task(embed(engine, [image(n)], on_admitted=lambda: None))
                for n in (1, 2)
            ]
            await asyncio.sleep(0)
            fake.gate.set()
            await asyncio.gather(held, *waiting)
            assert fake.computed == [0, 1, 2]

    asyncio.run(main())


def test_who_waits_for_room_is_told_once_the_time_is_up(fake, image):
    """It leaves the line then, and not when there is room; nothing of it is read."""

    async def main():
        async with running(fake, max_held_images=1) as engine:
            held = await hold(engine, fake, image)
            late = embed(
                engine,
                [image(1)],
                deadline_s=time.monotonic() + 0.01,
                on_admitted=lambda: pytest.fail("there was no room"),
            )
            with pytest.raises(DeadlineError, match="passed while the request waited for room"):
                await asyncio.wait_for(late, 60)
            statistics = engine.statistics()
            assert (statistics.lined_up_requests, statistics.lined_up_bytes) == (0, 0)
            assert (statistics.expired_requests, statistics.cancelled_requests) == (1, 0)
            fake.gate.set()
            await held
            assert fake.computed == [0]

    asyncio.run(main())


@pytest.mark.parametrize("outcome", ["computed", "failed"])
def test_who_waits_gets_the_room_of_a_request_that_nobody_awaits(fake, image, outcome):
    """A request is cancelled while it runs; when its batch ends, the next in line runs."""

    async def main():
        async with running(fake, max_held_images=2) as engine:
            gone = await hold(engine, fake, image)
            waiting = asyncio.create_task(
                embed(engine, [image(1), image(2)], on_admitted=lambda: None)
            )
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
            for _ in range(engine._decoder._pool.size):
                engine._decoder._pool.submit(lambda: busy.wait(10))
            gone = asyncio.create_task(embed(engine, [b"no image", b"no image"]))
            waiting = asyncio.create_task(embed(engine, [image(1)], on_admitted=lambda: None))
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
            waiting = asyncio.create_task(embed(engine, [image(2)] * 3, on_admitted=lambda: None))
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
            large = asyncio.create_task(embed(engine, [image(1)] * 4, on_admitted=lambda: None))
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError, match=r"1 of 4 images .* 1 requests in line"):
                await embed(engine, [image(2)])
            after = asyncio.create_task(embed(engine, [image(3)], on_admitted=lambda: None))
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
            waiting = asyncio.create_task(embed(engine, [image(1)], on_admitted=lambda: None))
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
                engine.embed(images(), count=1, payload_bytes=50, on_admitted=lambda: None)
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


def test_an_encoder_with_lanes_is_called_in_both_manners(fake, image):
    """One image on all threads; more than one side by side, each in a lane."""
    both = threading.Barrier(2, timeout=10)
    fake.lanes = 2
    fake.encode_in_lane = lambda images: (both.wait(), fake.encode(images))[1]

    async def main():
        async with running(fake) as engine:
            assert engine.instances == 2
            assert first_values(await embed(engine, [image(7)])) == [7]
            assert not both.n_waiting
            embedded = await embed(engine, [image(n) for n in range(6)])
            assert first_values(embedded) == list(range(6))
            assert sorted(map(len, fake.batches)) == [1, 3, 3]

    asyncio.run(main())


def test_an_image_does_not_wait_for_threads_that_hang(fake, image, monkeypatch):
    """An idle lane asks again once what all threads are at is overdue."""
    monkeypatch.setattr("serve.running_batches.PATIENCE", 0.01)
    fake.lanes = 4
    fake.encode_in_lane = type(fake)().encode

    async def main():
        async with running(fake) as engine:
            held = await hold(engine, fake, image)
            embedded = await asyncio.wait_for(embed(engine, [image(7)]), 10)
            assert first_values(embedded) == [7]
            fake.gate.set()
            assert first_values(await held) == [0]

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


def test_a_batch_counts_once_whatever_of_a_request_is_in_it(fake, image, eventually):
    """Images that are decoded one by one come to the queue one by one, and may run together."""

    async def main():
        now, encode = [0.0], fake.encode
        large = np.zeros((16, 16, 1), np.uint8)

        def encode_slowly(images_NHWC):
            now[0] += 2.0
            return encode(images_NHWC)

        async with running(fake, clock=lambda: now[0]) as engine:
            held = await hold(engine, fake, image)
            waiting = asyncio.create_task(embed(engine, [large, large]))
            await eventually(lambda: engine.statistics().waiting_images == 2)
            fake.encode = encode_slowly
            fake.gate.set()
            assert (await waiting).inference_s == 2.0
            await held
        assert [len(batch) for batch in fake.batches] == [1, 2]

    asyncio.run(main())


def test_pixels_are_not_in_memory_twice(fake, image, monkeypatch):
    """Once they lie side by side for the encoder, those of the request are let go."""
    images, are_there = [image(n) for n in range(2)], []
    first, encode = weakref.ref(images[0]), fake.encode

    def noting(images_NHWC):
        are_there.append(first() is not None)
        return encode(images_NHWC)

    monkeypatch.setattr(fake, "encode", noting)

    async def main():
        async with running(fake, max_batch_images=1) as engine:
            sent = (images.pop(0) for _ in range(2))
            await engine.embed(sent, count=2, payload_bytes=0)
        assert are_there == [False, False]

    asyncio.run(main())


def test_vectors_do_not_depend_on_the_batch(make_bundle):
    """Every image has the same vector, to the bit, alone and in any company."""
    from models.encoder import open_encoder

    async def main():
        images = np.random.default_rng(0).integers(0, 256, (50, 28, 28, 1), dtype=np.uint8)
        encoder = open_encoder(make_bundle().path, threads=2, with_lanes=True)
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


def test_what_is_not_finite_in_one_batch_of_a_request_is_known_after_the_next(fake, image):
    """And a request all of whose numbers are finite is known to be that."""

    async def main():
        async with running(fake, max_batch_images=1) as engine:
            encode = fake.encode
            spoil = {1: np.nan}
            fake.encode = lambda images: encode(images) * spoil.get(images[0, 0, 0, 0], 1.0)
            assert not (await embed(engine, [image(1), image(2)])).all_finite
            assert (await embed(engine, [image(2), image(3)])).all_finite

    asyncio.run(main())


def test_vectors_of_a_wider_kind_are_looked_at_as_they_are_sent(fake, image):
    """What float32 does not hold is infinite in it."""

    async def main():
        async with running(fake) as engine:
            encode = fake.encode
            fake.encode = lambda images: encode(images).astype(np.float64) * 1e300
            assert not (await embed(engine, [image(1)])).all_finite

    asyncio.run(main())
