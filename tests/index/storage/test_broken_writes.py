"""A collection survives full disks, kills and broken-off changes, whatever step they meet."""

import errno
import gc
import os
from pathlib import Path

import pytest

from index.collection import Collection, id_of
from index.errors import CollectionError
from index.storage import publishing
from index.storage.journal import JournalFile
from index.storage.lock import CollectionLockedError, take_lock
from index.storage.store import Store
from index.storage.writer import CollectionWriter
from index.verify import verify
from models.files import TEMPORARY_PREFIX
from tests.index.storage.conftest import DIM, FINGERPRINT, table, write_hnsw


def test_a_full_disk_is_not_tried_at_every_write(writer, vectors, monkeypatch):
    """A delta that cannot become a segment is tried again where it is twice as large."""
    tried_at = []

    def full(*_, **options):
        tried_at.append(n + 1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_seal_rows", 2)
    monkeypatch.setattr(publishing, "write_segment", full)
    for n in range(9):
        writer.add(table(str(n)), vectors[n : n + 1], fingerprint=FINGERPRINT)
    assert tried_at == [2, 4, 8]


def test_a_manifest_names_nothing_that_is_not_on_the_disk(writer, vectors, disk):
    """A segment, tombstones and a journal have content and name there before; it has at last."""
    writer.add(table("a", "b"), vectors[:2], fingerprint=FINGERPRINT)
    writer.seal()
    writer.delete([id_of("a")])
    writer.add(table("c"), vectors[2:3], fingerprint=FINGERPRINT)
    before = writer.collection.manifest.files
    disk.clear()
    writer.seal()
    manifest = writer.collection.manifest
    new = [writer.path / name for name in (*manifest.files, manifest.journal.name)
           if name not in before]  # fmt: skip
    assert any("tombstones" in path.name for path in new)
    named = disk.index(("name", writer.path / "manifest.json"))
    synced = {path for event, path in disk[:named] if event == "sync"}
    assert synced >= {*new, *(path.parent for path in new), writer.path / "segments"}
    assert ("sync", writer.path) in disk[named:]


def test_a_full_disk_costs_nothing_that_was_acknowledged(writer, vectors, monkeypatch, caplog):
    """Whatever step it meets; when there is room again, the same call does it."""

    def full(*_, **options):
        raise OSError(28, "No space left on device")

    writer.add(table("a", "b"), vectors[:2], fingerprint=FINGERPRINT)
    for step in (writer.seal, lambda: writer.compact(all=True)):
        for name in ("write_segment", "create_journal", "write_manifest"):
            with monkeypatch.context() as patch:
                patch.setattr(publishing, name, full)
                with pytest.raises(CollectionError, match="found No space left on device; make ro"):
                    step()
            assert Collection.open(writer.path).keys() == writer.collection.keys() == ["a", "b"]
            assert verify(writer.path).faults == []
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "write_manifest", full)
        patch.setattr(writer, "_seal_rows", 3)
        writer.add(table("c"), vectors[2:3], fingerprint=FINGERPRINT)
        assert "the delta stays in the journal" in caplog.text
    writer.compact(all=True)
    assert Collection.open(writer.path).keys() == writer.collection.keys() == ["a", "b", "c"]
    writer.close()
    CollectionWriter.open(writer.path).close()
    assert verify(writer.path).faults == verify(writer.path).unknown == []


def test_a_disk_without_a_byte_lets_a_writer_in_to_delete(writer, vectors, monkeypatch):
    """The number of its process beside the lock is for a message alone."""
    writer.add(table("a"), vectors[:1], fingerprint=FINGERPRINT)
    writer.close()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("index.storage.lock.os.pwrite", full)
        descriptor = take_lock(writer.path)
    with pytest.raises(CollectionLockedError):
        CollectionWriter.open(writer.path)
    os.close(descriptor)


def test_what_a_killed_sync_has_left_is_swept(writer, vectors):
    """Its half-written memory lies beside the whole one."""
    (writer.path / "sync").mkdir()
    left, kept = (writer.path / "sync" / name for name in (".tmp-state.x", "state.jsonl"))
    left.touch()
    kept.touch()
    writer.add(table("a"), vectors[:1], fingerprint=FINGERPRINT)
    writer.compact(all=True)
    writer.close()
    CollectionWriter.open(writer.path).close()
    assert not left.exists()
    assert kept.exists()


def test_a_disk_that_takes_nothing_is_told_what_helps(writer, vectors, monkeypatch):
    """Room helps a full one, and no other."""
    writer.add(table("a"), vectors[:1], fingerprint=FINGERPRINT)
    for number, mend in [(errno.EDQUOT, "make room"), (errno.EROFS, "mend that")]:

        def refuse(*_, number=number, **options):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(publishing, "write_segment", refuse)
        message = f"found {os.strerror(number)}; {mend}; nothing was lost"
        with pytest.raises(CollectionError, match=message):
            writer.seal()


def deleted_but_mapped():
    """Give the names of files that hold room on the disk only for this process."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return "\n".join(line for line in maps if line.endswith("(deleted)"))


def test_a_segment_that_was_merged_gives_its_room_back(writer, vectors):
    """When the last reader has the next state: deleted files that are open still take it."""
    writer.add(table("a", "b"), vectors[:2], fingerprint=FINGERPRINT)
    writer.seal()
    reader = Collection.open(writer.path)
    writer.delete([id_of("a")])
    writer.compact(all=True)
    gc.collect()
    assert f"{writer.path}/" in deleted_but_mapped()
    reader = reader.latest()
    gc.collect()
    assert f"{writer.path}/" not in deleted_but_mapped()
    assert reader.keys() == ["b"]


def test_a_collection_that_nobody_has_keeps_no_file_open(writer, vectors):
    """A server follows collections for months: of a state that is gone none is left."""

    def n_open():
        gc.collect()
        names = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
        own = [name for name in names if name.startswith(f"{writer.path}/")]
        return sum("/segments/" not in name for name in own)

    reader = Collection.open(writer.path)
    writer.add(table("a"), vectors[:1], fingerprint=FINGERPRINT)
    reader = reader.latest()
    n_before = n_open()
    for n in range(1, 4):
        writer.seal()
        writer.add(table(str(n)), vectors[n : n + 1], fingerprint=FINGERPRINT)
        reader = reader.latest()
        assert n_open() == n_before
    writer.close()
    del reader, writer._store, writer._collection, writer._journal
    assert n_open() == 0


def test_a_full_disk_keeps_no_segment_that_nobody_names(writer, unit_rows, tmp_path, monkeypatch):
    """Where it cannot be opened, or its manifest finds no room, it would stay in the way."""

    def full(*_, **options):
        raise OSError(28, "No space left on device")

    def names():
        return sorted(folder.name for folder in writer.path.glob("segments/*"))

    def refused(step, *more):
        before = names()
        for name in ("write_manifest", "_write_tombstones", "open_segment", *more):
            with monkeypatch.context() as patch:
                patch.setattr(publishing, name, full)
                with pytest.raises(CollectionError, match="found No space left on device; make ro"):
                    step()
            assert names() == before
        gc.collect()
        assert f"{writer.path}/" not in deleted_but_mapped()
        step()
        assert names() == [one.name for one in writer.collection.manifest.segments]
        assert verify(writer.path).faults == verify(writer.path).unknown == []

    vectors = unit_rows(60, DIM)
    for start in (0, 30):
        keys = list(map(str, range(start, start + 30)))
        writer.add(table(*keys), vectors[start : start + 30], fingerprint=FINGERPRINT)
        refused(writer.seal, "hash_files")
    refused(lambda: writer.compact(all=True), "hash_files")
    with writer.whole() as whole:
        file = tmp_path / "index.faiss"
        asked = write_hnsw(whole.segment.vectors_ND, file)
        refused(lambda: writer.replace_index(whole, file, **asked))


BREAKS = {
    "append": (Store, "apply"),  # counted in the header, and not in memory
    "publish": (Store, "publish"),
    "commit": (JournalFile, "commit"),
    "manifest": (publishing, "write_manifest"),
    "load": (Store, "load"),  # of the next manifest
    "replay": (Store, "_replay"),
    "remove": (publishing, "_remove"),
}


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("place", BREAKS)
def test_a_change_that_is_broken_off(writer, vectors, monkeypatch, place, error):
    """Wherever: the writer takes no more, and what anybody saw stays, for every reader."""
    writer.add(table("a", "b"), vectors[:2], fingerprint=FINGERPRINT)
    reader = Collection.open(writer.path)
    owner, name = BREAKS[place]
    step = getattr(owner, name)

    def broken_off(*arguments, **options):
        step(*arguments, **options)
        raise error

    monkeypatch.setattr(owner, name, broken_off)

    def change():
        writer.upsert(table("b", "c"), vectors[2:4], fingerprint=FINGERPRINT)
        writer.seal()

    with pytest.raises(error):
        change()
    monkeypatch.undo()
    seen = reader.latest().keys()
    assert seen == ["a", "b", "c"]
    for write in (
        lambda: writer.add(table("d"), vectors[4:5], fingerprint=FINGERPRINT),
        lambda: writer.delete([id_of("a")]),
        writer.seal,
        lambda: writer.compact(all=True),
    ):
        with pytest.raises(CollectionError, match="found one that was broken off; close it and op"):
            write()
    writer.close()
    with CollectionWriter.open(writer.path) as again:
        assert again.collection.keys() == seen
        again.add(table("d"), vectors[4:5], fingerprint=FINGERPRINT)
    assert reader.latest().keys() == Collection.open(writer.path).keys() == [*seen, "d"]
    assert verify(writer.path).faults == []


def test_a_refusal_behind_the_next_manifest_breaks_a_change_off(writer, vectors, monkeypatch):
    """The files have changed and memory has not: the writer takes no more."""
    writer.add(table("a"), vectors[:1], fingerprint=FINGERPRINT)
    load = Store.load

    def refused(store):
        load(store)
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "load", refused)
        with pytest.raises(CollectionError, match="found Input/output error"):
            writer.seal()
    with pytest.raises(CollectionError, match="found one that was broken off; close it and op"):
        writer.add(table("b"), vectors[1:2], fingerprint=FINGERPRINT)


def test_what_a_killed_writer_has_left_is_swept_away(writer):
    """Files that no manifest names, a manifest that had no name yet, and a folder without files."""
    writer.close()
    left = [writer.path / name for name in ("segments/000007/ids.npy", "journal-000007")]
    left.append(writer.path / f"{TEMPORARY_PREFIX}manifest.json.x")
    left[0].parent.mkdir(parents=True)
    for file in left:
        file.touch()
    left.append(writer.path / "segments/000009")
    left[-1].mkdir()
    CollectionWriter.open(writer.path).close()
    assert not any(file.exists() for file in left)
