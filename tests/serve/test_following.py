from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from index.collection import Collection, id_of
from index.errors import CollectionError
from index.storage.writer import CollectionWriter
from models.errors import FingerprintMismatchError
from models.files import atomic_directory
from serve import following
from serve.client import AsyncClient
from serve.client.retry import RetryPolicy
from serve.following import Following
from serve.pool import ThreadPool

ROOT = Path(__file__).parents[2]
ONCE = RetryPolicy(attempts=1)
SEARCHES = 8


def unit(n, dim=16, seed=0):
    """Random unit vectors."""
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def named(keys):
    """Metadata of images with these keys."""
    return pa.table({"key": keys, "label": ["new"] * len(keys), "source": ["more:"] * len(keys)})


@pytest.fixture
def searching(stored, serving):
    """A server of the stored images, with a client that never tries again."""

    def run(**options):
        return serving(
            bundle=(str(stored.bundle),), collection=(str(stored.collection),), **options
        )

    return run


def add(writer, keys, seed=0):
    """Write images; their vectors are given back."""
    vectors = unit(len(keys), seed=seed)
    writer.upsert(named(keys), vectors, fingerprint=writer.collection.fingerprint)
    return vectors


async def nearest(client, stored, vectors, **options):
    """The keys of the nearest images."""
    found = await client.search(
        vectors=vectors, fingerprint=stored.fingerprint, exact=True, **options
    )
    return [[hit.key for hit in hits] for hits in found.raise_for_status().hits]


def test_what_was_written_is_seen_by_the_next_search(stored, searching):
    """Added, replaced, deleted, sealed, compacted: each at once, and each has a version."""

    async def main():
        async with searching() as server, AsyncClient(server.address, retry=ONCE) as client:
            with CollectionWriter.open(stored.collection) as writer:
                vectors = add(writer, ["a", "b"], seed=1)
                assert await nearest(client, stored, vectors, k=1) == [["a"], ["b"]]
                other = add(writer, ["a"], seed=2)
                assert await nearest(client, stored, other, k=1) == [["a"]]
                found = await client.search(
                    vectors=vectors[:1], fingerprint=stored.fingerprint, filter="key = 'a'"
                )
                assert found.hits[0][0].score < 0.9
                writer.delete([id_of("b")])
                assert "b" not in (await nearest(client, stored, vectors[1:], k=50))[0]
                by_id = await client.search(ids=[id_of("b")])
                assert by_id.statuses[0].code == "not_found"
                versions = []
                for change in (writer.seal, lambda: writer.compact(all=True)):
                    change()
                    found = await client.search(ids=[id_of("a")], k=50)
                    assert len(found.hits[0]) == 12
                    versions += found.versions
                (info,) = await client.list_collections()
                assert (info.count, info.version) == (13, versions[-1])
                assert len(set(versions)) == 2
                assert await nearest(client, stored, other, k=1, filter="label = 'new'") == [["a"]]

    asyncio.run(main())


def test_a_writer_of_another_process_is_followed(stored, searching):
    """`python -m index.delete` beside a server: no restart, no signal."""

    async def main():
        async with searching() as server, AsyncClient(server.address, retry=ONCE) as client:
            (before,) = await client.list_collections()
            argv = [sys.executable, "-m", "index.delete", str(stored.collection)]
            argv += ["--filter", "label = 'class-0'"]
            done = await asyncio.to_thread(
                subprocess.run, argv, cwd=ROOT, capture_output=True, text=True
            )
            assert done.stdout.endswith("deleted 6 images, 6 are left\n"), done.stderr
            vectors = unit(2)
            found = await client.search(vectors=vectors, fingerprint=stored.fingerprint, k=50)
            assert {hit.label for hits in found.hits for hit in hits} == {"class-1"}
            (after,) = await client.list_collections()
            assert (before.count, after.count) == (12, 6)
            assert server.catalog.collection().collection.count == 6

    asyncio.run(main())


def test_no_search_fails_while_a_writer_writes(stored, searching):
    """Through adding, sealing, compacting and deleting every search has hits of one snapshot."""
    vectors = unit(4, seed=3)

    async def main():
        async with searching() as server, AsyncClient(server.address, retry=ONCE) as client:
            done = asyncio.Event()
            counts: list[set[int]] = []

            async def search():
                while not done.is_set():
                    found = await client.search(
                        vectors=vectors, fingerprint=stored.fingerprint, k=200, filter="key != 'z'"
                    )
                    counts.append({len(hits) for hits in found.raise_for_status().hits})
                    assert len(found.versions) == 1

            def write():
                with CollectionWriter.open(stored.collection) as writer:
                    for turn in range(6):
                        keys = [f"{turn}-{n}" for n in range(10)]
                        add(writer, keys, seed=turn)
                        if turn % 2:
                            writer.seal()
                        if turn % 3 == 2:
                            writer.compact(all=turn == 5)
                        writer.delete([id_of(key) for key in keys[:5]])

            searches = [asyncio.create_task(search()) for _ in range(4)]
            await asyncio.to_thread(write)
            seen = len(counts)
            while len(counts) < seen + 8 and not any(task.done() for task in searches):
                await asyncio.wait(searches, timeout=0.01)
            done.set()
            await asyncio.gather(*searches)
            possible = {12 + 5 * turn for turn in range(7)} | {22 + 5 * turn for turn in range(6)}
            assert all(len(count) == 1 and count <= possible for count in counts)
            assert counts[-1] == {42}

    asyncio.run(main())


def test_parallel_searches_are_exact_over_tombstones_and_delta(stored, searching):
    """Eight at once, by vectors and by ids, with and without filters: the collection's answers."""
    with CollectionWriter.open(stored.collection) as writer:
        add(writer, [f"k{n:03}" for n in range(300)], seed=4)
        writer.seal()
        add(writer, [f"k{n:03}" for n in range(100, 180)], seed=5)
        writer.delete([id_of(f"k{n:03}") for n in range(0, 300, 7)])
        last = add(writer, ["last"], seed=6)
    queries = np.concatenate([unit(40, seed=7), last])
    options = [{}, {"filter": "label = 'new' and key > 'k1'"}, {"filter": "label is null"}]

    async def main():
        async with searching() as server, AsyncClient(server.address, retry=ONCE) as client:

            async def search(number):
                given = options[number % len(options)]
                by_vector = await client.search(
                    vectors=queries, fingerprint=stored.fingerprint, k=10, exact=True, **given
                )
                by_id = await client.search(ids=ids, k=10, exact=True, **given)
                return number, (by_vector, by_id)

            with Collection.open(stored.collection) as collection:
                assert sum(collection.deleted.values()) > 80
                assert collection.delta_count > 0
                ids = collection.ids[::9].tolist()
                for number, found in await asyncio.gather(*map(search, range(SEARCHES))):
                    given = options[number % len(options)]
                    truth = [
                        collection.search(
                            queries, 10, fingerprint=stored.fingerprint, exact=True, **given
                        ),
                        collection.search_ids(ids, 10, exact=True, **given),
                    ]
                    for one, expected in zip(found, truth, strict=True):
                        for hits, ids_K, scores_K in zip(
                            one.hits, expected.ids, expected.scores, strict=True
                        ):
                            there = ids_K >= 0
                            assert [hit.id for hit in hits] == ids_K[there].tolist()
                            scores = [hit.score for hit in hits]
                            np.testing.assert_allclose(scores, scores_K[there], atol=1e-6)

    asyncio.run(main())


def test_what_cannot_be_followed_is_told_once_and_changes_nothing(
    stored, searching, caplog, monkeypatch
):
    """A damaged segment: what was served is served; once it is whole again it is followed."""
    monkeypatch.setattr(following, "RETRY_S", 0.0)

    async def main():
        async with searching() as server, AsyncClient(server.address, retry=ONCE) as client:
            with CollectionWriter.open(stored.collection) as writer:
                vectors = add(writer, ["a"])
                writer.seal()
            newest = max((stored.collection / "segments").iterdir()) / "vectors.npy"
            sound = newest.read_bytes()
            newest.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
            for _ in range(3):
                assert "a" not in (await nearest(client, stored, vectors, k=50))[0]
            newest.write_bytes(sound)
            assert await nearest(client, stored, vectors, k=1) == [["a"]]

    with caplog.at_level(logging.ERROR, "horace.serve"):
        asyncio.run(main())
    (told,) = [record.getMessage() for record in caplog.records]
    assert "vectors.npy: expected SHA-256" in told
    assert told.startswith("collection things has changed and is not followed")


def test_a_collection_of_another_encoder_is_not_followed(stored, searching, caplog, monkeypatch):
    """It waits for the operator, who is told how both are read again; a search never mixes them."""
    monkeypatch.setattr(following, "RETRY_S", 0.0)

    async def main():
        async with searching() as server, AsyncClient(server.address, retry=ONCE) as client:
            ids = [(await client.search(vectors=unit(1), fingerprint=stored.fingerprint)).hits[0]]
            with atomic_directory(stored.collection, replace=True) as temporary:
                temporary.rmdir()
                CollectionWriter.create(
                    temporary, name="things", fingerprint="e" * 64, dim=16
                ).close()
            for _ in range(3):
                found = await client.search(vectors=unit(1), fingerprint=stored.fingerprint)
                assert [found.hits[0]] == ids
                assert found.fingerprint == stored.fingerprint
            failed = await server.reloads.run()
            assert failed == ["models and collections"]
            assert (await client.list_collections())[0].count == 12

    with caplog.at_level(logging.ERROR, "horace.serve"):
        asyncio.run(main())
    told = caplog.records[0].getMessage()
    assert told.endswith(
        "; serve the bundle that made it, and have the server read both again, by SIGHUP "
        "(kill -HUP) or by --watch-s"
    )


@dataclass(eq=False)
class FakeCollection:
    """A snapshot whose successor a test decides on."""

    version: tuple[int, int] = (0, 0)
    fingerprint: str = "a" * 64
    next: list = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    asked: int = 0
    closed: bool = False

    def is_current(self):
        """Whether there is nothing new."""
        return not self.next

    def latest(self):
        """Give what is new, once the gate is open."""
        self.asked += 1
        assert self.gate.wait(120)
        new = self.next.pop()
        if isinstance(new, Exception):
            raise new
        return new

    def close(self):
        """Note it."""
        self.closed = True


@pytest.fixture
def pool():
    """Threads to read on."""
    made = ThreadPool(threads=2, name="follow")
    yield made
    made.close()


def test_one_reads_for_all_and_nobody_waits_for_long(pool, monkeypatch):
    """What takes longer than a search may wait goes on behind, and is had by later searches."""
    monkeypatch.setattr(following, "WAIT_S", 0.01)
    new = FakeCollection((0, 1))
    old = FakeCollection(next=[new])

    async def main():
        followed = Following("c", old)
        snapshots = await asyncio.gather(*[followed.snapshot(pool.run) for _ in range(5)])
        assert snapshots == [old] * 5
        assert repr(followed) == "<Following of c, reading>"
        old.gate.set()
        while followed.current is old:
            await followed.snapshot(pool.run)
            await asyncio.sleep(0)  # `old` is current once `new` was taken from it
        assert (followed.current, old.asked) == (new, 1)
        assert repr(followed) == "<Following of c>"
        followed.close()
        assert (old.closed, new.closed) == (False, True)

    asyncio.run(main())


def test_what_was_written_while_another_reads_is_seen(pool, monkeypatch):
    """The read that runs looked before that, and so it is read again for who came after."""
    monkeypatch.setattr(following, "WAIT_S", 60.0)
    newest = FakeCollection((0, 2))
    new = FakeCollection((0, 1), next=[newest])
    old = FakeCollection(next=[new])
    new.gate.set()

    async def main():
        followed = Following("c", old)
        first = asyncio.create_task(followed.snapshot(pool.run))
        await asyncio.sleep(0)
        second = asyncio.create_task(followed.snapshot(pool.run))
        await asyncio.sleep(0)
        old.gate.set()
        assert await second is newest
        await first

    asyncio.run(main())


def test_nobody_waits_for_a_read_that_is_known_to_be_slow(pool, monkeypatch):
    """Who comes first waits `WAIT_S`; who comes after that is answered at once."""
    monkeypatch.setattr(following, "WAIT_S", 60.0)
    new = FakeCollection((0, 1))
    old = FakeCollection(next=[new])
    now_s = 0.0

    async def main():
        nonlocal now_s
        followed = Following("c", old, clock=lambda: now_s)
        first = asyncio.create_task(followed.snapshot(pool.run))
        await asyncio.sleep(0)
        now_s = following.WAIT_S
        assert await asyncio.wait_for(followed.snapshot(pool.run), 20) is old
        assert not first.done()
        old.gate.set()
        assert await first is new

    asyncio.run(main())


def test_a_slow_read_of_one_collection_holds_up_no_other(stored, serving, monkeypatch):
    """A collection has a thread that reads for it."""
    monkeypatch.setattr(following, "WAIT_S", 10.0)
    slow = threading.Event()

    async def main():
        collections = (f"a={stored.collection}", f"b={stored.collection}")
        async with (
            serving(bundle=(str(stored.bundle),), collection=collections) as server,
            AsyncClient(server.address, retry=ONCE) as client,
        ):
            server._following_pool.submit(lambda: slow.wait(60))
            try:
                with CollectionWriter.open(stored.collection) as writer:
                    vectors = add(writer, ["x"], seed=1)
                assert await nearest(client, stored, vectors, k=1, collection="b") == [["x"]]
            finally:
                slow.set()

    asyncio.run(main())


@pytest.mark.parametrize(
    "refused",
    [
        CollectionError("ids.npy", expected="so", found="other"),
        FakeCollection(fingerprint="b" * 64),
        RuntimeError("a fault of ours"),
    ],
)
def test_what_is_refused_is_tried_again_after_a_while(pool, refused, caplog):
    """And not before: nobody hashes a damaged gigabyte for every search."""
    new = FakeCollection((0, 1))
    old = FakeCollection(next=[new, refused])
    old.gate.set()
    now_s = 0.0

    async def main():
        nonlocal now_s
        followed = Following("c", old, clock=lambda: now_s)
        for _ in range(3):
            assert await followed.snapshot(pool.run) is old
        assert old.asked == 1
        now_s = following.RETRY_S
        assert await followed.snapshot(pool.run) is new

    asyncio.run(main())
    assert len(caplog.records) == 1


def test_catching_up_says_what_is_wrong(pool):
    """An operator who asks for it hears of it."""
    old = FakeCollection(next=[FakeCollection(fingerprint="b" * 64)])
    old.gate.set()

    async def main():
        with pytest.raises(FingerprintMismatchError, match=r"^collection c: expected .*aaaa"):
            await Following("c", old).catch_up(pool.run)

    asyncio.run(main())
