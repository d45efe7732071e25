import gc

import pytest

from benchmarks.ledger import DIM, FINGERPRINT, read_state, rows_of, vectors_of
from index.collection import Collection, id_of
from index.errors import CollectionError
from index.storage import writer as writing
from index.storage.writer import CollectionWriter
from index.verify import verify


def put(writer, images):
    """Add images and make a segment of them."""
    writer.add(rows_of(images), vectors_of(images), fingerprint=FINGERPRINT)
    writer.seal()


@pytest.fixture
def writer(tmp_path):
    """The writer of a collection of two segments."""
    path = tmp_path / "c"
    with CollectionWriter.create(path, name="c", fingerprint=FINGERPRINT, dim=DIM) as made:
        put(made, {"a": 1})
        put(made, {"b": 1})
        yield made


def test_a_seal_during_a_compaction_takes_another_name(writer, monkeypatch):
    """The name is taken when it is chosen, not when the first byte is written."""
    merge = writing.merge

    def seal_first(*args, **kwargs):
        put(writer, {"c": 1})
        return merge(*args, **kwargs)

    monkeypatch.setattr(writing, "merge", seal_first)
    writer.compact(all=True)
    assert verify(writer.path).faults == []
    with Collection.open(writer.path) as collection:
        assert read_state(collection) == {"a": 1, "b": 1, "c": 1}


def test_a_compaction_that_fails_takes_nothing_of_others_along(writer, monkeypatch):
    """What was sealed meanwhile is there, and what was begun is swept away."""
    write_segment = "index.storage.publishing.write_segment"

    def fail(*args, **kwargs):
        monkeypatch.undo()
        put(writer, {"c": 1})
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write_segment, fail)
    with pytest.raises(CollectionError, match="found No space left on device"):
        writer.compact(all=True)
    assert read_state(writer.collection) == {"a": 1, "b": 1, "c": 1}
    writer.close()
    with CollectionWriter.open(writer.path) as again:
        again.compact(all=True)
        assert read_state(again.collection) == {"a": 1, "b": 1, "c": 1}
    found = verify(writer.path)
    assert (found.faults, found.unknown) == ([], [])


def test_a_name_is_not_used_again_while_somebody_has_the_segment(writer):
    """Where all its rows go while an index of them is made, those that come after stay."""
    writer.compact(all=True)
    with writer.whole() as whole:
        assert writer.delete(writer.collection.ids) == 2
        writer.seal()
        assert writer.collection.manifest.segments == ()
        put(writer, {"c": 1, "d": 1, "e": 1})
        (entry,) = writer.collection.manifest.segments
        assert entry.name > whole.segment.entry.name
        with pytest.raises(CollectionError, match="found all of them deleted meanwhile; make the"):
            writer.replace_index(whole, None, factory="Flat", parameters={}, tuning={})
    assert read_state(writer.collection) == {"c": 1, "d": 1, "e": 1}
    assert verify(writer.path).faults == []


def test_a_name_that_is_used_again_is_another_segment(writer):
    """For a reader, too, who has the segment open that had it before."""
    reader = Collection.open(writer.path)
    names = [entry.name for entry in reader.manifest.segments]
    writer.delete([id_of("b")])
    writer.seal()
    writer.close()
    with CollectionWriter.open(writer.path) as again:
        put(again, {"c": 1})
        assert [entry.name for entry in again.collection.manifest.segments] == names
    assert read_state(reader.latest()) == {"a": 1, "c": 1}


def test_a_writer_that_is_dropped_lets_others_in(writer, tmp_path):
    """Without being closed; a snapshot that was taken of it follows the next one."""
    path = tmp_path / "d"
    dropped = CollectionWriter.create(path, name="d", fingerprint=FINGERPRINT, dim=DIM)
    put(dropped, {"a": 1})
    snapshot = dropped.collection
    del dropped
    gc.collect()
    with CollectionWriter.open(path) as other:
        put(other, {"b": 1})
        assert read_state(snapshot.latest()) == {"a": 1, "b": 1}
