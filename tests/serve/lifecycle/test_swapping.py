from __future__ import annotations

import asyncio
import signal
import time

import numpy as np

from models.encoder import open_encoder
from models.vectors import finish_vectors
from serve.client import AsyncClient, Client
from serve.client.retry import RetryPolicy

ONCE = RetryPolicy(attempts=1)
IMAGE = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
SWAPS = 6
CALLERS = 4


def vector_of(bundle) -> np.ndarray:
    """The image's unit vector by a bundle's encoder, computed here."""
    encoder = open_encoder(bundle.path, threads=1)
    (row,) = finish_vectors(encoder.encode(IMAGE.reshape(1, 28, 28, 1)))
    encoder.close()
    return row


async def calling(call, done: asyncio.Event, outcomes: list) -> None:
    """Call again and again until done; whatever fails ends the test."""
    while not done.is_set():
        outcomes.append(await call())


async def while_calling(call, change) -> list:
    """Make all changes while several callers call, each change after some more replies."""
    done, outcomes = asyncio.Event(), []
    callers = [asyncio.create_task(calling(call, done, outcomes)) for _ in range(CALLERS)]
    for n in range(SWAPS):
        await change(n)
        enough = len(outcomes) + 2 * CALLERS
        async with asyncio.timeout(120):
            while len(outcomes) < enough and not any(caller.done() for caller in callers):
                await asyncio.wait(callers, timeout=0.01)
    done.set()
    await asyncio.gather(*callers)
    return outcomes


def test_no_call_fails_while_a_bundle_is_swapped(serving, put_bundle, tmp_path):
    """Every call is answered, by the one encoder or the other, and never by a bit of each."""
    path = tmp_path / "m"
    bundles = [put_bundle(path, 1), put_bundle(tmp_path / "other", 2)]
    expected = {bundle.fingerprint: vector_of(bundle) for bundle in bundles}
    put_bundle(path, 1)

    async def main():
        async with (
            serving(bundle=(f"m={path}",)) as server,
            AsyncClient(server.address, retry=ONCE) as client,
        ):

            async def change(n):
                put_bundle(path, 1 + (n + 1) % 2)
                assert await server.reloads.run() == []

            results = await while_calling(lambda: client.embed([IMAGE]), change)
            assert server.catalog.model("m").version == str(SWAPS + 1)
            return results

    results = asyncio.run(main())
    assert {result.fingerprint for result in results} == set(expected)
    for result in results:
        np.testing.assert_array_equal(result.vectors[0], expected[result.fingerprint])


def test_no_query_fails_while_a_collection_is_swapped(
    serving, put_bundle, put_collection, tmp_path
):
    """By image and by id: every query has its hits while the collection is replaced."""
    bundle = put_bundle(tmp_path / "m", 1)
    things = put_collection(tmp_path / "things", bundle)

    async def main():
        async with (
            serving(bundle=(f"m={bundle.path}",), collection=(f"c={things}",)) as server,
            AsyncClient(server.address, retry=ONCE) as client,
        ):
            first = await client.search([IMAGE], k=3)
            ids = [hit.id for hit in first.hits[0]]

            async def search():
                found = await client.search([IMAGE], k=3)
                near = await client.search(ids=ids[:1], k=3)
                return [hit.id for hit in found.hits[0]], len(near.hits[0])

            async def change(_):
                put_collection(things, bundle)
                assert await server.reloads.run() == []

            outcomes = await while_calling(search, change)
            assert server.lifecycle.statistics()["collection c"].loads == SWAPS + 1
            assert all(outcome == (ids, 3) for outcome in outcomes)

    asyncio.run(main())


def test_collections_are_listed_while_they_are_swapped(
    serving, put_bundle, put_collection, tmp_path
):
    """The first is looked at while the second moves to another version of its model."""
    bundle = put_bundle(tmp_path / "m", 1)
    things = put_collection(tmp_path / "things", bundle)
    options = {"bundle": (f"m={bundle.path}",), "collection": (f"c={things}", f"d={things}")}

    async def main():
        async with (
            serving(**options, model_control=True) as server,
            AsyncClient(server.address, retry=ONCE) as client,
        ):
            following = server.catalog.collection("c").following

            async def snapshot(_):
                await server.lifecycle.load("m")
                assert server.calls.active == 1
                return following.current

            following.snapshot = snapshot
            listed = await client.list_collections()
            assert [(one.name, one.count) for one in listed] == [("c", 6), ("d", 6)]
            assert server.catalog.collection("d").model.version == "2"

    asyncio.run(main())


def test_a_signal_reloads(start_server, put_bundle, tmp_path):
    """SIGHUP to the process: a while later the new encoder answers."""
    one = put_bundle(tmp_path / "m", 1)
    server = start_server("--bundle", f"m={one.path}")
    with Client(server.address) as client:
        assert client.embed([IMAGE]).fingerprint == one.fingerprint
        two = put_bundle(tmp_path / "m", 2)
        server.process.send_signal(signal.SIGHUP)
        deadline_s = time.monotonic() + 120
        while client.embed([IMAGE]).fingerprint != two.fingerprint:
            assert time.monotonic() < deadline_s, server.log.read_text()
    assert server.stop() == 0
