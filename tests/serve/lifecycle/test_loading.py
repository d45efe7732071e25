from __future__ import annotations

import asyncio
import threading
from functools import partial

import numpy as np
import pytest

from models.errors import EncoderError
from models.preprocess import ImageLimits
from serve.engine import Engine
from serve.errors import StartError
from serve.leases import at_once
from serve.lifecycle.loading import Loader, warm_up
from serve.lifecycle.opening import open_on
from serve.lifecycle.options import NamedPath, read_model_options
from serve.lifecycle.reading import Reader
from serve.lifecycle.sources import CollectionSource
from serve.pool import ThreadPool


@pytest.fixture
def pool():
    """A thread that opens, and that decodes for the engines."""
    pool = ThreadPool(threads=1, name="open")
    yield pool
    pool.close()


@pytest.fixture
def load(fake, pool):
    """A function that loads the fake encoder as options say; it gives how it was opened."""

    def run(text: str) -> tuple[tuple, dict]:
        opened = []

        def open_model(path, **how):
            opened.append((path, how))
            return fake

        loader = Loader(
            open_model=open_model,
            make_engine=lambda encoder, options, *, name, version: Engine(
                encoder, decode_pool=pool
            ),
            divide_threads=lambda options: 5,
            pool=pool,
            dispose=at_once,
            largest_batch=4,
        )
        options = read_model_options(text)

        async def main():
            loaded = await loader.load(options, options.path, name=options.name, version="1")
            loaded.close()
            return loaded.name

        name = asyncio.run(main())
        ((path, how),) = opened
        return (name, path), how

    return run


def test_options_reach_the_runtime(load, fake):
    """Precision, provider and threads of the model; its share of the CPUs where it has none."""
    named, how = load("m=dir,precision=int8,threads=2")
    assert named == ("m", "dir")
    assert (how["threads"], how["precision"], how["placement"].provider) == (2, "int8", "cpu")
    named, how = load("dir")
    assert named == ("fake", "dir")
    assert (how["threads"], how["precision"]) == (5, None)
    assert [len(batch) for batch in fake.batches] == [1, 1]
    assert fake.closed


@pytest.mark.parametrize(
    ("text", "with_lanes"),
    [
        ("dir", True),
        ("dir,threads=2", True),
        ("dir,instances=1", False),
        ("dir,provider=cuda", False),
    ],
)
def test_lanes_are_for_cpus_whose_instances_nobody_chose(load, text, with_lanes):
    """Who says how many batches run at once has them on all threads."""
    _, how = load(text)
    assert how["with_lanes"] == with_lanes


def test_a_remote_model_has_its_own(load):
    """No precision and no provider cross the wire."""
    _, how = load("m=horace://there:1/m,instances=2")
    assert how == {"threads": 5}


def test_a_gpu_sees_batches_before_a_caller_does(load, fake):
    """What is planned by shape is planned; the last is the image that goes the callers' way."""
    load("dir,provider=cuda")
    assert [len(batch) for batch in fake.batches] == [4, 1, 1]


def test_what_fails_in_its_largest_batch_is_closed(load, fake):
    """Too little memory for a full batch is found here."""
    fake.failures.append(EncoderError("out of memory"))
    with pytest.raises(EncoderError, match="out of memory"):
        load("dir,provider=cuda")
    assert fake.closed


def test_what_is_opened_for_nobody_is_closed(fake, pool):
    """The load is cancelled while a thread opens; one whose turn had not come is not opened."""
    gate, entered = threading.Event(), threading.Event()
    opened = []

    def open_model(path, **how):
        entered.set()
        assert gate.wait(30)
        opened.append(fake)
        return fake

    loader = Loader(
        open_model=open_model,
        make_engine=lambda *_, **__: pytest.fail("nobody waits for it"),
        divide_threads=lambda options: 1,
        pool=pool,
        dispose=at_once,
    )
    options = read_model_options("dir")

    async def main():
        loading = partial(loader.load, options, "dir", name=None, version="1")
        loads = [asyncio.create_task(loading()) for _ in range(2)]
        assert await asyncio.to_thread(entered.wait, 30)
        for load in loads:
            load.cancel()
        gone = await asyncio.gather(*loads, return_exceptions=True)
        assert [type(error) for error in gone] == [asyncio.CancelledError] * 2
        gate.set()
        await pool.run(lambda: None)
        await asyncio.sleep(0)

    asyncio.run(main())
    assert (opened, fake.closed) == ([fake], True)


def test_what_is_warmed_up_for_nobody_is_closed(fake, pool, monkeypatch):
    """The load is cancelled while the encoder computes its first vector."""
    monkeypatch.setattr("serve.lifecycle.loading.CLOSE_TIMEOUT_S", 0.05)
    fake.gate.clear()
    loader = Loader(
        open_model=lambda path, **how: fake,
        make_engine=lambda *_, **__: Engine(fake, decode_pool=pool),
        divide_threads=lambda options: 1,
        pool=pool,
        dispose=at_once,
    )

    async def main():
        options = read_model_options("dir")
        load = asyncio.create_task(loader.load(options, "dir", name=None, version="1"))
        assert await asyncio.to_thread(fake.entered.wait, 30)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load

    asyncio.run(main())
    fake.gate.set()
    assert fake.closed


def test_what_hangs_is_given_up(load, fake, monkeypatch):
    """The line says how long was waited, and the encoder is closed."""
    monkeypatch.setattr("serve.lifecycle.loading.WARM_UP_S", 0.05)
    monkeypatch.setattr("serve.lifecycle.loading.CLOSE_TIMEOUT_S", 0.05)
    fake.gate.clear()
    with pytest.raises(StartError, match=r"expected a vector of a grey image within 0.05 s, found"):
        load("dir")
    fake.gate.set()
    assert fake.closed


def test_nonsense_is_not_served(load, fake):
    """A vector that is not finite is no vector."""
    fake.encode = lambda images: np.full((len(images), 4), np.inf, np.float32)
    with pytest.raises(StartError, match="expected a vector of finite numbers"):
        load("dir")
    assert fake.closed


@pytest.mark.parametrize(
    ("limits", "line"),
    [
        (ImageLimits(max_pixels=63), "found 8 x 8 = 64; allow more with --max-image-pixels"),
        (ImageLimits(max_image_bytes=20), "found .* bytes; allow more with --max-image-bytes"),
    ],
)
def test_limits_that_leave_the_encoders_own_size_out_are_named(fake, pool, limits, line):
    """No other export would mend that."""
    engine = Engine(fake, decode_pool=pool, limits=limits)
    with pytest.raises(StartError, match=f"{line}$"):
        asyncio.run(warm_up(engine, "m"))
    engine.close()


def test_an_opening_that_hangs_is_named_with_what_to_do(pool):
    """At a start it is all that a person is told."""
    gate = threading.Event()

    async def main():
        opening = asyncio.ensure_future(open_on(pool, gate.wait, at_once, what="model m"))
        while not opening.done():
            pool.look(elapsed_s=1.0, limit_s=0.5)
            await asyncio.sleep(0)
        await opening

    try:
        with pytest.raises(StartError, match=r"^model m: .*--watchdog\.opening-s, .* more time$"):
            asyncio.run(main())
    finally:
        gate.set()


@pytest.fixture
def away(pool, monkeypatch):
    """A coroutine function: wait for what looks at a path called `away`, which hangs."""
    begun, gate = threading.Event(), threading.Event()

    def sign_or_hang(directory):
        if directory.name == "away":
            begun.set()
            gate.wait()
        return ()

    async def run(work):
        looking = asyncio.ensure_future(work)
        while not begun.is_set():
            await asyncio.sleep(0)
        for _ in range(2):  # the first notes what its thread is at
            pool.look(elapsed_s=1.0, limit_s=0.5)
        return await looking

    monkeypatch.setattr("serve.lifecycle.reading.sign", sign_or_hang)
    yield run
    gate.set()


def collection(name: str) -> CollectionSource:
    """One that is not there."""
    return CollectionSource(name=name, options=NamedPath(name=name, path=name))


def test_what_hangs_before_it_is_opened_is_named_too(pool, away):
    """As a file server that is away: what is on it is looked at first."""

    async def main():
        reader = Reader(pool, lambda source, error: None)
        await away(reader.read(collection("away"), asyncio.Event().wait))

    with pytest.raises(StartError, match=r"^collection away: .*--watchdog\.opening-s, "):
        asyncio.run(main())


def test_what_hangs_in_a_look_is_told_and_the_others_are_looked_at(pool, away):
    """It was an error of our own code, and ended the look."""
    told = []

    async def main():
        reader = Reader(pool, lambda source, error: told.append((str(source), type(error))))
        await away(reader.look([collection("away"), collection("there")]))

    asyncio.run(main())
    assert told == [("collection away", StartError)]
