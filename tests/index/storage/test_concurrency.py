"""Readers beside a writer, in threads and in processes, and processes that are killed."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from index.collection import Collection, id_of
from index.errors import CollectionError
from index.storage import store as store_module
from index.storage import writer as writer_module
from index.storage.journal import JournalFile
from index.storage.publishing import put_in_place
from index.storage.writer import CollectionWriter
from index.verify import verify
from tests.index.storage.conftest import DIM, FINGERPRINT, table

ROOT = Path(__file__).parents[3]


@pytest.fixture
def path(tmp_path):
    """An empty collection."""
    path = tmp_path / "c"
    CollectionWriter.create(path, name="made", fingerprint=FINGERPRINT, dim=DIM).close()
    return path


def test_readers_see_whole_snapshots_while_a_writer_writes(path, unit_rows):
    """Every answer is exact over the snapshot that was asked, and snapshots never go back.

    The writer puts 3 images at a time, whose keys name the write: a snapshot with some of them
    has all. One thread compacts all the while.
    """
    vectors = unit_rows(180, DIM)
    is_done = threading.Event()
    has_read = [threading.Event() for _ in range(3)]
    faults = []

    def read(has_read):
        collection = Collection.open(path, threads=1)
        while not is_done.is_set():
            latest = collection.latest()
            ids, keys = latest.ids, latest.keys()
            if latest.version < collection.version or len(keys) % 3:
                faults.append(f"{latest} after {collection}")
            if latest.count:
                stored = latest.vectors(ids)
                found = latest.search(vectors[:1], 3, fingerprint=FINGERPRINT, exact=True)
                best = np.sort(stored @ vectors[0])[::-1][:3]
                if not np.allclose(found.scores[0], best, atol=1e-6):
                    faults.append(f"{found.scores[0]} where {best} was there")
                if [row.id for row in latest.rows(found.ids[0])] != found.ids[0].tolist():
                    faults.append(f"rows of {found.ids[0]}")
                has_read.set()
            collection = latest

    def guarded(work, *arguments):
        try:
            work(*arguments)
        except Exception as error:
            faults.append(repr(error))

    with CollectionWriter.open(path, threads=1) as writer:

        def compact():
            while not is_done.is_set():
                writer.compact(all=True)

        works = [(compact,), *((read, event) for event in has_read)]
        threads = [threading.Thread(target=guarded, args=work) for work in works]
        for thread in threads:
            thread.start()
        try:
            for n in range(60):
                own = [3 * n, 3 * n + 1, 3 * n + 2]
                writer.upsert(table(*map(str, own)), vectors[own], fingerprint=FINGERPRINT)
                if n % 3 == 2:
                    writer.delete([id_of(str(row)) for row in range(3 * n - 3, 3 * n)])
                if n == 30:
                    assert all(event.wait(60) for event in has_read), faults
        finally:
            is_done.set()
            for thread in threads:
                thread.join()
        expected = {str(3 * n + i) for n in range(60) for i in range(3) if n % 3 != 1}
        assert set(writer.collection.keys()) == expected
    assert faults == []
    assert set(Collection.open(path).keys()) == expected
    assert verify(path).faults == verify(path).unknown == []


def test_writes_during_a_compaction_survive_it(path, unit_rows, monkeypatch):
    """Additions, replacements, deletions, and a delta that becomes a segment meanwhile."""
    vectors = unit_rows(50, DIM)
    with CollectionWriter.open(path, threads=1) as writer:

        def put(*rows):
            writer.upsert(table(*map(str, rows)), vectors[list(rows)], fingerprint=FINGERPRINT)

        put(*range(10))
        writer.seal()
        put(*range(10, 20))
        merge = writer_module.merge

        def meanwhile(*arguments, **options):
            made = merge(*arguments, **options)
            writer.delete([id_of("3"), id_of("13")])
            put(5, 30)
            writer.seal()
            put(6, 31)
            writer.delete([id_of("30"), id_of("15")])
            return made

        monkeypatch.setattr(writer_module, "merge", meanwhile)
        writer.compact(all=True)
        expected = {str(n) for n in range(20)} - {"3", "13", "15"} | {"31"}
        assert set(writer.collection.keys()) == expected
        assert len(writer.collection.manifest.segments) == 2
        np.testing.assert_array_equal(
            writer.collection.vectors([id_of("5"), id_of("31")]), vectors[[5, 31]]
        )
    with Collection.open(path) as collection:
        assert set(collection.keys()) == expected
    assert verify(path).faults == verify(path).unknown == []


def test_a_merge_never_brings_back_a_column_that_is_of_another_type_by_then(
    path, unit_rows, monkeypatch
):
    """All that had it was deleted, and others write it as text: the merge is of no use."""
    vectors = unit_rows(3, DIM)
    with CollectionWriter.open(path, threads=1) as writer:

        def put(n, **columns):
            writer.upsert(table(str(n), **columns), vectors[[n]], fingerprint=FINGERPRINT)
            writer.seal()

        put(0, price=[1])
        put(1)
        merge = writer_module.merge

        def meanwhile(*arguments, **options):
            made = merge(*arguments, **options)
            writer.delete([id_of("0")])
            writer.seal()
            put(2, price=["dear"])
            return made

        with monkeypatch.context() as patch:
            patch.setattr(writer_module, "merge", meanwhile)
            with pytest.raises(
                CollectionError, match=r"expected columns of the types .* do it again"
            ):
                writer.compact(all=True)
        writer.compact(all=True)
        rows = writer.collection.rows([id_of("1"), id_of("2")])
        assert [row.metadata["price"] for row in rows] == [None, "dear"]
    assert verify(path).faults == verify(path).unknown == []


@pytest.mark.parametrize("step", [CollectionWriter.compact, CollectionWriter.close])
def test_who_compacts_or_closes_waits_for_the_whole(path, unit_rows, step):
    """The segment that an index is made of is neither merged nor left to another writer."""
    with CollectionWriter.open(path) as writer:
        writer.add(table("a"), unit_rows(1, DIM), fingerprint=FINGERPRINT)
        with writer.whole():
            thread = threading.Thread(target=step, args=(writer,))
            thread.start()
            thread.join(0.1)
            assert thread.is_alive()
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("error", [None, FileNotFoundError(2, "No such file", "ids.npy")])
def test_a_file_that_goes_while_it_is_opened_is_looked_for_anew(
    path, unit_rows, monkeypatch, error
):
    """A reader between manifest and segments, or within one, whom a compaction overtakes."""
    vectors = unit_rows(4, DIM)
    open_segment = store_module.open_segment
    with CollectionWriter.open(path, threads=1) as writer:
        for n in range(2):
            writer.add(table(str(n)), vectors[n : n + 1], fingerprint=FINGERPRINT)
            writer.seal()
        n_opened = 0

        def overtaken(*arguments, **options):
            nonlocal n_opened
            n_opened += 1
            if n_opened == 1:
                writer.compact(all=True)
                if error is not None:
                    raise error
            return open_segment(*arguments, **options)

        monkeypatch.setattr(store_module, "open_segment", overtaken)
        assert sorted(Collection.open(path).keys()) == ["0", "1"]
        (entry,) = writer.collection.manifest.segments
        (path / "segments" / entry.name / "ids.npy").unlink()  # and this one is really gone
        with pytest.raises(CollectionError, match=r"expected a file that manifest.json lists"):
            Collection.open(path)


def test_segments_are_opened_once_however_often_a_reader_is_overtaken(path, unit_rows, monkeypatch):
    """Large ones take long: who began anew with them would never catch up."""
    vectors = unit_rows(3, DIM)
    open_segment, opened = store_module.open_segment, []
    with CollectionWriter.open(path, threads=1) as writer:

        def add(n):
            writer.add(table(str(n)), vectors[n : n + 1], fingerprint=FINGERPRINT)
            writer.seal()

        def overtaken(directory, manifest, entry, **options):
            opened.append(entry.name)
            if len(opened) == 2:
                add(2)
                raise FileNotFoundError(2, "No such file", "ids.npy")
            return open_segment(directory, manifest, entry, **options)

        add(0)
        add(1)
        monkeypatch.setattr(store_module, "open_segment", overtaken)
        assert Collection.open(path).keys() == ["0", "1", "2"]
    assert opened == ["000000", "000001", "000001", "000002"]


def test_a_disk_that_fails_is_told_in_one_line(built, monkeypatch):
    """With the file; the collection may be sound."""

    def fail(file):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))

    monkeypatch.setattr("index.storage.manifest.sha256_file", fail)
    with pytest.raises(CollectionError, match=r"npy: expected a file that can be read, found Inpu"):
        Collection.open(built)


def test_a_write_that_failed_and_is_lost_is_seen_no_more(path, unit_rows, monkeypatch):
    """A reader had seen all of it in the journal, before the disk gave up its last bytes."""

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    vectors = unit_rows(2, DIM)
    with CollectionWriter.open(path) as writer:
        writer.add(table("a"), vectors[:1], fingerprint=FINGERPRINT)
        journal = path / writer.collection.manifest.journal.name
        whole = journal.stat().st_size
        monkeypatch.setattr(JournalFile, "commit", fail)
        with pytest.raises(CollectionError, match="found Input/output error"):
            writer.add(table("b"), vectors[1:], fingerprint=FINGERPRINT)
        assert writer.collection.is_current()
    reader = Collection.open(path)
    assert reader.keys() == ["a", "b"]
    os.truncate(journal, whole)
    assert not reader.is_current()
    assert reader.latest().keys() == ["a"]


def test_a_directory_that_is_exchanged_while_it_is_opened(
    tmp_path, unit_rows, make_collection, monkeypatch
):
    """Files of both have the same names and sizes: never is one's manifest read with the other's.

    Not even where nothing is hashed.
    """
    path = make_collection(tmp_path / "c", unit_rows(40, DIM), n_segments=2)
    vectors = unit_rows(40, DIM, seed=1)
    other = make_collection(tmp_path / "other", vectors, n_segments=2)
    open_segment = store_module.open_segment
    n_opened = 0

    def overtaken(*arguments, **options):
        nonlocal n_opened
        n_opened += 1
        if n_opened == 2:
            put_in_place(other, path, replace=True)
        return open_segment(*arguments, **options)

    monkeypatch.setattr(store_module, "open_segment", overtaken)
    collection = Collection.open(path, verify=False)
    assert (n_opened, collection.version) == (4, (1, 0))
    np.testing.assert_array_equal(collection.vectors(collection.ids), vectors)


def test_what_could_not_be_read_is_read_again(path, unit_rows, monkeypatch):
    """Storage that fails for a moment keeps nobody at what was there before a seal."""
    reader = Collection.open(path)
    read = JournalFile.read
    fails = iter([True])

    def read_later(journal, position):
        if next(fails, False):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(journal, position)

    with CollectionWriter.open(path) as writer:
        writer.add(table("a"), unit_rows(1, DIM), fingerprint=FINGERPRINT)
        writer.seal()
    monkeypatch.setattr(JournalFile, "read", read_later)
    with pytest.raises(CollectionError, match=r"journal-000002: .* found Input/output error"):
        reader.latest()
    assert not reader.is_current()
    assert reader.latest().keys() == ["a"]
    assert reader.latest().is_current()


WRITES = """
import json, random, sys
import numpy as np, pyarrow as pa
from index.collection import id_of
from index.storage.writer import CollectionWriter

path, seed = sys.argv[1], int(sys.argv[2])
rng = random.Random(seed)
with CollectionWriter.open(path, threads=1) as writer:
    writer._seal_rows = 40
    print(json.dumps(["open"]), flush=True)
    for n in range(10_000):
        keys = [str(rng.randrange(60)) for _ in range(rng.randrange(1, 6))]
        keys = sorted(set(keys))
        act = rng.choice(["upsert", "upsert", "upsert", "delete", "compact"])
        print(json.dumps(["begin", act, keys, n]), flush=True)
        if act == "upsert":
            vectors = np.zeros((len(keys), 8), np.float32)
            vectors[:, n % 8] = 1
            table = pa.table({"key": keys, "source": [f"{seed}:{n}"] * len(keys)})
            writer.upsert(table, vectors, fingerprint="f" * 64)
        elif act == "delete":
            writer.delete([id_of(key) for key in keys])
        else:
            writer.compact(all=rng.random() < 0.5)
        print(json.dumps(["done"]), flush=True)
"""


def test_what_was_acknowledged_survives_a_kill(path):
    """SIGKILL at any moment: the collection opens, is sound, and has every write once.

    A write that was under way may be there as a whole or not at all.
    """
    rng = random.Random(5)
    model = {}
    for seed in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITES, str(path), str(seed)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert json.loads(process.stdout.readline()) == ["open"]
        begun, last = None, rng.randrange(20, 60)
        for n, line in enumerate(process.stdout):
            event, *details = json.loads(line)
            if event == "begin":
                begun = details
            else:
                model, begun = after(model, begun, seed), None
            if n == last:
                os.kill(process.pid, signal.SIGKILL)  # while it goes on
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        assert verify(path).faults == []
        with Collection.open(path, threads=1) as collection:
            found = {row.key: row.source for row in collection.rows(collection.ids)}
            assert len(found) == collection.count
        assert found in (model, after(model, begun, seed))
        with CollectionWriter.open(path, threads=1) as writer:
            assert set(writer.collection.keys()) == set(found)
        assert verify(path).unknown == []
        model = found


def after(model, begun, seed):
    """What is there after a write."""
    if begun is None or begun[0] == "compact":
        return model
    act, keys, n = begun
    rest = {key: source for key, source in model.items() if key not in keys}
    return rest | {key: f"{seed}:{n}" for key in keys} if act == "upsert" else rest
