import errno
import itertools
import os
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.indexed import give_index
from index.ann.versions import library_versions
from index.collection import Collection, id_of
from index.errors import CollectionError, UnknownIdError
from index.selection import Selector
from index.storage import compaction
from index.storage import writer as writing
from index.storage.incoming import prepare_rows
from index.storage.lock import CollectionLockedError
from index.storage.publishing import put_in_place
from index.storage.rows import ROW_SCHEMA
from index.storage.snapshot import Part
from index.storage.writer import CollectionWriter
from index.verify import verify
from models.errors import FingerprintMismatchError, UsageError
from tests.index.storage.conftest import DIM, FINGERPRINT, table, write_hnsw


def nearest(collection, queries, k=1):
    """The keys of the k nearest, by an exact search."""
    found = collection.search(queries, k, fingerprint=FINGERPRINT, exact=True)
    return [[row.key for row in collection.rows(ids[ids >= 0])] for ids in found.ids]


def test_an_empty_collection_is_a_collection(writer, vectors):
    """It is searched, filtered and verified like any other."""
    collection = writer.collection
    assert (collection.count, collection.keys(), collection.labels()) == (0, [], [])
    assert collection.search(vectors, 5, fingerprint=FINGERPRINT).ids.shape == (40, 0)
    assert collection.select("label = 'Coat'").count == 0
    assert (collection.factory, collection.metric, collection.sources) == ("Flat", "cosine", {})
    with pytest.raises(UsageError, match="expected a column: id, key, label, source, found"):
        collection.select("size = 1")
    with pytest.raises(UnknownIdError, match="found none such; it is empty"):
        collection.find_key("a")
    assert verify(writer.path).faults == []


def test_what_was_written_is_there_at_once(writer, vectors):
    """For the writer and for whoever asks for the latest; older snapshots stay as they are."""
    before = Collection.open(writer.path)
    assert before.latest() is before
    writer.add(table("a", "b", "c"), vectors[:3], fingerprint=FINGERPRINT)
    after = before.latest()
    assert after.keys() == writer.collection.keys() == ["a", "b", "c"]
    assert (before.count, after.latest()) == (0, after)
    assert before.version < after.version
    writer.upsert(table("b", "d"), vectors[3:5], fingerprint=FINGERPRINT)
    assert writer.delete([id_of("a"), id_of("a"), id_of("nobody")]) == 1
    latest = after.latest()
    assert latest.keys() == ["c", "b", "d"]
    assert nearest(latest, vectors[2:5]) == [["c"], ["b"], ["d"]]
    assert nearest(after, vectors[:3]) == [["a"], ["b"], ["c"]]
    np.testing.assert_array_equal(latest.vectors([id_of("b")]), vectors[3:4])


def test_a_write_outlives_its_process(writer, vectors):
    """Whoever opens the files next finds it, written or sealed or compacted."""
    writer.add(table("a", "b"), vectors[:2], fingerprint=FINGERPRINT)
    writer.delete([id_of("a")])
    writer.close()
    with CollectionWriter.open(writer.path) as again:
        assert again.collection.keys() == ["b"]
        again.upsert(table("a"), vectors[7:8], fingerprint=FINGERPRINT)
        again.seal()
        assert Collection.open(writer.path).keys() == ["b", "a"]
        again.delete([id_of("b")])
        again.add(table("z"), vectors[8:9], fingerprint=FINGERPRINT)
        again.compact(all=True)
    collection = Collection.open(writer.path)
    assert collection.keys() == ["a", "z"]
    assert [segment.count for segment in collection.manifest.segments] == [2]
    assert verify(writer.path).faults == []


def test_other_writers_are_refused(writer):
    """In one line that names the process; after the first has closed they are let in."""
    with pytest.raises(CollectionLockedError, match=r"expected no other writer, found process \d+"):
        CollectionWriter.open(writer.path)
    writer.close()
    CollectionWriter.open(writer.path).close()
    with pytest.raises(CollectionError, match="expected an open one, found closed"):
        writer.seal()


def test_what_does_not_belong_is_refused(writer, vectors):
    """And nothing of it is written."""
    writer.add(table("a"), vectors[:1], fingerprint=FINGERPRINT)
    version = writer.collection.version
    for message, rows, rows_vectors in [
        ("key 'a': expected one that is not in the collection", table("b", "a"), vectors[:2]),
        ("key 'b': expected every key once", table("b", "b"), vectors[:2]),
        (r"vectors: expected \(2, 8\), found \(3, 8\)", table("b", "c"), vectors[:3]),
        ("vector 1: expected length 1, found 2", table("b", "c"), vectors[:2] * [[1], [2]]),
        ("vector 0: expected finite numbers", table("b"), vectors[:1] * np.nan),
        ("rows: expected a column source", table("b").drop_columns(["source"]), vectors[:1]),
        ("column key: expected a text in every row", table(None), vectors[:1]),
        (
            "column '': expected a name, found one that no filter",
            table("b", **{"": [1]}),
            vectors[:1],
        ),
        ("column 'a`b': expected a name, found one", table("b", **{"a`b": [1]}), vectors[:1]),
    ]:
        with pytest.raises(UsageError, match=message):
            writer.add(rows, rows_vectors, fingerprint=FINGERPRINT)
    with pytest.raises(FingerprintMismatchError):
        writer.add(table("b"), vectors[:1], fingerprint="e" * 64)
    assert writer.collection.version == version
    assert verify(writer.path).faults == []


def test_whatever_is_accepted_opens_again(tmp_path, vectors):
    """Columns of any names and types: refused in one line, or read, and found by a filter."""
    no_text = pa.array([b"\xff\xfe"]).view(pa.string())
    values = [
        pa.array([1]), pa.array([1], pa.int8()), pa.array(["x"]), pa.array([True]),
        pa.array(["x"]).dictionary_encode(), pa.array([None]), pa.array([[1]]), pa.array([1.5]),
        pa.array([b"x"]), no_text,
        pa.array(["x" * 70_000]), pa.array(["x" * 60_000], pa.large_string()),
    ]  # fmt: skip
    n_accepted = 0
    for number, (name, value) in enumerate(
        itertools.product(
            ["key", "label", "source", "digest", "id", "size", "a b", "", "`"], values
        )
    ):
        path = tmp_path / str(number)
        rows = {"key": pa.array(["a"]), "source": pa.array(["s"]), name: value}
        with CollectionWriter.create(path, name="made", fingerprint=FINGERPRINT, dim=DIM) as writer:
            with suppress(UsageError):
                writer.add(pa.table(rows), vectors[:1], fingerprint=FINGERPRINT)
            n_accepted += writer.collection.count
            for step in (lambda: None, writer.seal):
                step()
                opened = Collection.open(path)
                assert opened.rows(opened.ids) == writer.collection.rows(opened.ids)
                if opened.count:
                    assert opened.select(f"`{name}` is null or key is not null").count == 1
    assert 30 < n_accepted < 80


def test_two_columns_of_one_name(writer, vectors):
    """Nobody could tell them apart."""
    rows = table("a").append_column("size", pa.array([1])).append_column("size", pa.array([2]))
    for write in (writer.add, writer.upsert):
        with pytest.raises(UsageError, match="rows: expected one column size, found 2"):
            write(rows, vectors[:1], fingerprint=FINGERPRINT)


def test_a_column_called_as_vectors_are(writer, vectors):
    """An export would have two of that name; one that is there already stays writable."""
    with pytest.raises(UsageError, match="column 'vector': expected a name of its own, found that"):
        writer.add(table("a", vector=[1]), vectors[:1], fingerprint=FINGERPRINT)
    older = pa.schema([*ROW_SCHEMA, pa.field("vector", pa.int64())])
    assert prepare_rows(table("a", vector=[1]), older)["vector"].to_pylist() == [1]


def test_what_json_cannot_carry_is_null(writer, vectors):
    """NaN and infinity, whoever wrote them."""
    rows = table("a", "b", "c", price=[float("nan"), float("inf"), 1.5])
    writer.upsert(rows, vectors[:3], fingerprint=FINGERPRINT)
    prices = [row.metadata["price"] for row in writer.collection.rows(writer.collection.ids)]
    assert prices == [None, None, 1.5]


@pytest.mark.parametrize(
    ("kind", "sound", "unsound"),
    [
        (pa.date32(), [-719162, 2932896], [-719163, 2932897]),
        (
            pa.timestamp("us"),
            [-62135596800000000, 253402300799999999],
            [-62135596800000001, 253402300800000000],
        ),
    ],
)
def test_dates_are_of_the_years_that_python_has(writer, vectors, kind, sound, unsound):
    """Or a search that found such a row could not say so."""
    whole = pa.int32() if kind == pa.date32() else pa.int64()
    times = pa.array([*sound, None], whole).cast(kind)
    writer.add(table("a", "b", "c", until=times), vectors[:3], fingerprint=FINGERPRINT)
    first, last, none = writer.collection.rows([id_of(key) for key in "abc"])
    assert (first.metadata["until"].year, last.metadata["until"].year) == (1, 9999)
    assert none.metadata["until"] is None
    for number in unsound:
        rows = table("d", until=pa.array([number], whole).cast(kind))
        with pytest.raises(UsageError, match="column until: expected years from 1 to 9999, in UTC"):
            writer.add(rows, vectors[:1], fingerprint=FINGERPRINT)


def test_a_key_whose_id_another_has_is_refused(writer, vectors, monkeypatch):
    """Never is one image taken for another."""
    monkeypatch.setattr("index.storage.incoming.id_of", lambda key: len(key))
    writer.add(table("ab"), vectors[:1], fingerprint=FINGERPRINT)
    for write in (writer.add, writer.upsert):
        with pytest.raises(CollectionError, match="key 'cd': expected an id of its own, found"):
            write(table("cd"), vectors[:1], fingerprint=FINGERPRINT)
        with pytest.raises(CollectionError, match="key 'def': expected an id of its own"):
            write(table("abc", "def"), vectors[:2], fingerprint=FINGERPRINT)
    monkeypatch.setattr("index.collection.id_of", lambda key: len(key))
    with pytest.raises(UnknownIdError, match="key 'cd': expected a key of the 1 in"):
        writer.collection.find_key("cd")


def test_further_columns_stay_through_everything(writer, vectors):
    """Images that were written without them have none; a type that differs is refused."""
    writer.add(table("a"), vectors[:1], fingerprint=FINGERPRINT)
    writer.seal()
    writer.add(table("b", "c", width=[3, 5]), vectors[1:3], fingerprint=FINGERPRINT)
    with pytest.raises(UsageError, match="column width: expected int64, found string"):
        writer.add(table("d", width=["wide"]), vectors[3:4], fingerprint=FINGERPRINT)
    for step in (lambda: None, writer.seal, lambda: writer.compact(all=True)):
        step()
        collection = writer.collection
        rows = collection.rows([id_of("c"), id_of("a")])
        assert [row.metadata for row in rows] == [{"width": 5}, {"width": None}]
        assert collection.select("width > 4 or width is null").mask_N.tolist() == [1, 0, 1]
    assert verify(writer.path).faults == []


def test_a_collection_that_is_replaced(writer, vectors, tmp_path, make_collection):
    """Not while a writer has it; readers go on with what they have and then see the new one."""
    writer.add(table("a"), vectors[:1], fingerprint=FINGERPRINT)
    reader = Collection.open(writer.path)
    other = make_collection(tmp_path / "other", vectors)
    with pytest.raises(CollectionLockedError, match="expected no other writer, found process"):
        put_in_place(other, writer.path, replace=True)
    writer.close()
    put_in_place(other, writer.path, replace=True)
    assert reader.keys() == ["a"]
    latest = reader.latest()
    assert (latest.count, latest.version > reader.version) == (40, True)
    with CollectionWriter.open(writer.path) as again:
        again.delete([id_of("0003")])
    assert latest.latest().count == 39
    assert verify(writer.path).faults == []


def test_a_directory_that_is_moved_away_under_a_writer(writer, vectors, tmp_path, make_collection):
    """By whoever asked for no lock: nothing is acknowledged that nobody would find."""
    writer.add(table("a"), vectors[:1], fingerprint=FINGERPRINT)
    writer.path.rename(tmp_path / "away")
    make_collection(writer.path, vectors)
    for write in (
        lambda: writer.add(table("b"), vectors[:1], fingerprint=FINGERPRINT),
        lambda: writer.delete([id_of("a")]),
        writer.seal,
        lambda: writer.compact(all=True),
    ):
        with pytest.raises(CollectionError, match="expected the collection that this writer open"):
            write()
    assert Collection.open(tmp_path / "away").keys() == ["a"]
    assert verify(writer.path).faults == []
    with CollectionWriter.open(writer.path):
        pass
    assert verify(writer.path).unknown == []


def test_a_directory_that_is_exchanged_during_a_compaction(
    writer, vectors, tmp_path, make_collection, monkeypatch
):
    """The other collection keeps its own manifest."""
    merge = writing.merge

    def meanwhile(*arguments, **options):
        made = merge(*arguments, **options)
        writer.path.rename(tmp_path / "away")
        make_collection(writer.path, vectors)
        return made

    writer.add(table("a"), vectors[:1], fingerprint=FINGERPRINT)
    writer.seal()
    writer.add(table("b"), vectors[1:2], fingerprint=FINGERPRINT)
    monkeypatch.setattr(writing, "merge", meanwhile)
    with pytest.raises(CollectionError, match="expected the collection that this writer open"):
        writer.compact()
    assert Collection.open(writer.path).count == 40
    assert Collection.open(tmp_path / "away").keys() == ["a", "b"]


def test_what_is_damaged_may_be_replaced(writer, vectors, tmp_path, make_collection):
    """It is a good reason to build anew."""
    writer.close()
    (writer.path / "manifest.json").write_text("{")
    put_in_place(make_collection(tmp_path / "other", vectors), writer.path, replace=True)
    assert Collection.open(writer.path).count == 40


def test_files_that_stand_for_nothing_any_more_are_named_nowhere(writer, vectors):
    """Of what is deleted there is one list a segment, and of an empty segment nothing."""

    def files():
        assert verify(writer.path).faults == verify(writer.path).unknown == []
        return {name.rpartition("/")[2] for name in writer.collection.manifest.files}

    segment = {"ids.npy", "rows.parquet", "vectors.npy"}
    writer.add(table("a", "b", "c"), vectors[:3], fingerprint=FINGERPRINT)
    writer.seal()
    for key in "ab":
        writer.delete([id_of(key)])
        writer.seal()
        generation = writer.collection.manifest.generation
        assert files() == {*segment, f"tombstones-{generation:06}.npy"}
    writer.add(table("d"), vectors[3:4], fingerprint=FINGERPRINT)
    writer.seal()  # and writes no list again that is the same
    assert files() == {*segment, f"tombstones-{generation:06}.npy"}
    writer.delete([id_of("c"), id_of("d")])
    writer.seal()
    assert files() == set()


def test_a_manifest_has_the_versions_that_wrote_it(tmp_path, vectors, make_collection):
    """Whatever made the collection."""
    with CollectionWriter.open(make_collection(tmp_path / "c", vectors)) as writer:
        assert writer.collection.manifest.versions == {}
        writer.delete([id_of("0003")])
        assert writer.collection.manifest.versions == library_versions()


def test_what_is_deleted_is_counted_until_its_space_is_given_back(writer, vectors):
    """Rows of the delta, too, though none of them is left."""
    writer.add(table("a", "b"), vectors[:2], fingerprint=FINGERPRINT)
    writer.delete([id_of("a"), id_of("b")])
    assert writer.collection.deleted == {"": 2}
    writer.seal()
    assert writer.collection.deleted == {}
    writer.add(table("a", "b"), vectors[:2], fingerprint=FINGERPRINT)
    assert writer.collection.delta_count == 2
    writer.seal()
    assert writer.collection.delta_count == 0


def test_another_index_over_the_same_rows(writer, unit_rows, tmp_path):
    """Its rows are not copied; a foreign one is refused."""
    with pytest.raises(UsageError, match="expected images to make an index of, found none"):
        writer.whole().__enter__()
    vectors, file = unit_rows(60, DIM), tmp_path / "index.faiss"
    writer.add(table(*map(str, range(60))), vectors, fingerprint=FINGERPRINT)
    with writer.whole() as whole:
        inode = (writer.path / "segments/000000/vectors.npy").stat().st_ino
        asked = write_hnsw(whole.segment.vectors_ND[:59], file)
        version = writer.collection.version
        with pytest.raises(CollectionError, match="expected HNSW32 of 60 x 8, inner product"):
            writer.replace_index(whole, file, **asked)
        assert writer.collection.version == version
        write_hnsw(whole.segment.vectors_ND, file)
        before = writer.collection
        writer.replace_index(whole, file, **asked)
    for collection in (writer.collection, Collection.open(writer.path)):
        (entry,) = collection.manifest.segments
        assert (collection.factory, entry.parameters) == ("HNSW32", {"efSearch": 77})
        assert collection.manifest.tuning == {"recall": 0.99}
        assert nearest(collection, vectors[:2]) == nearest(before, vectors[:2])
    assert (writer.path / "segments" / entry.name / "vectors.npy").stat().st_ino == inode
    with writer.whole() as whole:
        writer.replace_index(whole, None, factory="Flat", parameters={}, tuning={})
    assert (writer.collection.factory, writer.collection.manifest.tuning) == ("Flat", {})
    assert verify(writer.path).faults == verify(writer.path).unknown == []


def test_an_index_is_of_living_rows(writer, unit_rows):
    """Though one segment has all of them."""
    vectors = unit_rows(60, DIM)
    writer.add(table(*map(str, range(60))), vectors, fingerprint=FINGERPRINT)
    writer.seal()
    writer.delete([id_of(str(n)) for n in range(5)])
    with writer.whole() as whole:
        assert whole.segment.rows["key"].to_pylist() == list(map(str, range(5, 60)))
    give_index(writer, "HNSW32")
    (entry,) = writer.collection.manifest.segments
    assert (entry.count, entry.dead) == (55, 0)
    assert nearest(writer.collection, vectors[5:7]) == [["5"], ["6"]]


def test_another_index_where_a_file_has_one_name(writer, unit_rows, monkeypatch):
    """As on exFAT and on many a network's file system."""

    def refuse(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("index.storage.merging.os.link", refuse)
    vectors = unit_rows(60, DIM)
    writer.add(table(*map(str, range(60))), vectors, fingerprint=FINGERPRINT)
    give_index(writer, "HNSW32")
    assert writer.collection.factory == "HNSW32"
    assert nearest(writer.collection, vectors[:2]) == [["0"], ["1"]]
    assert verify(writer.path).faults == verify(writer.path).unknown == []


def test_rows_are_made_one_segment_beside_the_collection(writer, unit_rows, tmp_path):
    """Which searches as before until there is an index; what is written meanwhile survives."""
    vectors, file = unit_rows(63, DIM), tmp_path / "index.faiss"
    writer.add(table(*map(str, range(60))), vectors[:60], fingerprint=FINGERPRINT)
    give_index(writer, "HNSW16")
    writer.add(table("new"), vectors[60:61], fingerprint=FINGERPRINT)
    writer.delete([id_of("7")])
    with writer.whole() as whole:  # and nobody makes an index
        assert whole.part.count == 60
    assert [one.factory for one in writer.collection.manifest.segments] == ["HNSW16", "Flat"]
    assert verify(writer.path).faults == verify(writer.path).unknown == []
    with writer.whole() as whole:
        assert writer.collection.factory == "HNSW16+Flat"
        writer.delete([id_of("8"), id_of("new")])
        writer.add(table("later"), vectors[61:62], fingerprint=FINGERPRINT)
        writer.seal()
        writer.add(table("last"), vectors[62:], fingerprint=FINGERPRINT)
        asked = write_hnsw(whole.segment.vectors_ND, file)
        writer.replace_index(whole, file, **asked)
    keys = [str(n) for n in range(60) if n not in (7, 8)]
    for collection in (writer.collection, Collection.open(writer.path)):
        assert collection.factory == "HNSW32+Flat"
        assert collection.keys() == [*keys, "later", "last"]
        assert nearest(collection, vectors[[8, 61, 62]])[1:] == [["later"], ["last"]]
    assert verify(writer.path).faults == verify(writer.path).unknown == []


def test_a_segment_that_is_emptied_while_it_is_merged(writer, unit_rows):
    """Its rows stay dead, though no segment of that name is there any more."""
    vectors = unit_rows(60, DIM)
    for keys in (range(50), range(50, 60)):
        writer.add(table(*map(str, keys)), vectors[list(keys)], fingerprint=FINGERPRINT)
        writer.seal()
    with writer.whole() as whole:
        writer.delete([id_of(str(n)) for n in range(50, 60)])
        writer.seal()
        assert len(writer.collection.manifest.segments) == 1
        writer.replace_index(whole, None, factory="Flat", parameters={}, tuning={})
    assert writer.collection.keys() == list(map(str, range(50)))
    assert verify(writer.path).faults == verify(writer.path).unknown == []


def test_a_report_goes_with_the_segment_that_it_is_of(writer, unit_rows):
    """Writes beside it leave it; a merge makes another index, of which it says nothing."""
    vectors = unit_rows(90, DIM)
    writer.add(table(*map(str, range(60))), vectors[:60], fingerprint=FINGERPRINT)
    with writer.whole() as whole:
        writer.replace_index(whole, None, factory="Flat", parameters={}, tuning={"recall": 0.9})
    writer.add(table("a", "b"), vectors[60:62], fingerprint=FINGERPRINT)
    writer.seal()
    writer.delete([id_of("3")])
    writer.seal()
    assert writer.collection.manifest.tuning == {"recall": 0.9}
    writer.compact()
    assert len(writer.collection.manifest.segments) == 1
    assert writer.collection.manifest.tuning == {}


def test_a_collection_that_grows_gets_an_index(writer, unit_rows, monkeypatch):
    """By one large write or by several; what somebody made Flat stays so.

    The bounds are those of a small collection.
    """
    monkeypatch.setattr(compaction, "FLAT_MAX_COUNT", 60)
    monkeypatch.setattr(writer, "_seal_rows", 50)
    vectors = unit_rows(320, DIM)
    keys = list(map(str, range(320)))

    def add(start, end):
        writer.add(table(*keys[start:end]), vectors[start:end], fingerprint=FINGERPRINT)

    def segments():
        kinds = [(one.factory, one.count) for one in writer.collection.manifest.segments]
        opened = Collection.open(writer.path)
        assert opened.manifest == writer.collection.manifest
        assert nearest(opened, vectors[:3]) == [["0"], ["1"], ["2"]]
        return kinds

    for start in range(0, 60, 30):
        add(start, start + 30)
    writer.compact()
    assert segments() == [("Flat", 60)]
    for start in range(60, 180, 30):
        add(start, start + 30)
    assert segments() == [("Flat", 60)] * 3
    writer.compact()
    assert segments() == [("HNSW32", 180)]
    add(180, 300)
    assert segments() == [("HNSW32", 180), ("Flat", 120)]
    writer.compact()
    assert segments() == [("HNSW32", 180), ("HNSW32", 120)]
    give_index(writer, "Flat")
    assert segments() == [("Flat", 300)]
    writer.compact(all=True)
    assert segments() == [("Flat", 300)]
    add(300, 320)
    writer.compact(all=True)
    assert segments() == [("Flat", 320)]
    assert verify(writer.path).faults == []


def test_a_few_rows_beside_an_index_of_more_lists_are_compacted(writer, unit_rows, monkeypatch):
    """They get an index of the same kind, which they can fill."""
    monkeypatch.setattr(compaction, "FLAT_MAX_COUNT", 60)
    vectors, keys = unit_rows(370, DIM), list(map(str, range(370)))
    writer.add(table(*keys[:300]), vectors[:300], fingerprint=FINGERPRINT)
    give_index(writer, "RR,IVF200,RaBitQ,RFlat")
    writer.add(table(*keys[300:]), vectors[300:], fingerprint=FINGERPRINT)
    writer.compact()
    assert [(one.factory, one.count) for one in writer.collection.manifest.segments] == [
        ("RR,IVF200,RaBitQ,RFlat", 300), ("RR,IVF16,RaBitQ,RFlat", 70)
    ]  # fmt: skip
    assert nearest(writer.collection, vectors[350:352]) == [["350"], ["351"]]
    efforts = [
        part.segment.index.effort_parameters(200, 10, part.segment.entry.parameters)["nprobe"]
        for part in writer.collection._snapshot.parts
    ]
    assert efforts[0] > efforts[1]  # and of one search the most that any wants
    assert writer.collection.effort_parameters(200, 10)["nprobe"] == efforts[0]


def test_a_filter_is_worked_out_once_a_part(writer, vectors, monkeypatch):
    """A write looks at the rows of the delta alone; a snapshot keeps what it chose."""
    n_worked_out = []
    work_out = Selector._work_out

    def counted(self, *arguments):
        n_worked_out.append(len(self._rows))
        return work_out(self, *arguments)

    monkeypatch.setattr(Selector, "_work_out", counted)
    writer.add(table(*map(str, range(30))), vectors[:30], fingerprint=FINGERPRINT)
    writer.seal()
    writer.add(table("a", "b", width=[1, 2]), vectors[30:32], fingerprint=FINGERPRINT)
    for _ in range(2):
        assert writer.collection.select("width is null").count == 30
    assert n_worked_out == [30, 2]
    writer.add(table("c", width=[3]), vectors[32:33], fingerprint=FINGERPRINT)
    writer.delete([id_of("7")])
    assert writer.collection.select("width is null").count == 29
    assert n_worked_out == [30, 2, 3]


def test_a_seal_keeps_what_was_worked_out_of_other_segments(writer, vectors):
    """Though a tombstone more is named: to sort the ids of millions takes seconds."""
    writer.add(table(*map(str, range(30))), vectors[:30], fingerprint=FINGERPRINT)
    writer.seal()
    reader = Collection.open(writer.path)
    chosen = reader.select("key > '2'")
    assert reader.row_numbers(chosen.parts[0].segment.ids_N[:1]) == [0]
    before = reader._snapshot.parts[0].segment
    writer.delete([id_of("7")])
    writer.seal()
    after = reader.latest()._snapshot.parts[0].segment
    assert (before.entry.dead, after.entry.dead) == (0, 1)
    assert after._places is before._places
    schema = reader._snapshot.schema
    assert after.selector(schema, 0) is before.selector(schema, 0)


def test_keys_and_labels_are_given_without_copying_other_columns(writer, vectors):
    """Where a row is dead the living ones are copied, which may have 60 KiB of text each."""
    rows = table(*map(str, range(40)), text=["x" * 10_000] * 40)
    writer.add(rows, vectors, fingerprint=FINGERPRINT)
    writer.delete([id_of("0")])
    default = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(default)
    pa.set_memory_pool(pool)
    try:
        collection = writer.collection
        assert len(collection.keys()) == len(collection.labels()) == 39
        assert collection.schema.names == [*ROW_SCHEMA.names, "text"]
        with pytest.raises(UnknownIdError, match="keys here look like '1'"):
            collection.find_key("a")
    finally:
        pa.set_memory_pool(default)
    assert 0 < pool.max_memory() < rows.nbytes / 10


def test_an_unknown_key_is_told_without_reading_all_keys(writer, vectors, monkeypatch):
    """Whoever asks for keys may ask for many that are not there; one that is there is shown."""
    writer.add(table(*map(str, range(9))), vectors[:9], fingerprint=FINGERPRINT)
    writer.delete([id_of("0")])
    monkeypatch.delattr(Part, "rows")
    with pytest.raises(UnknownIdError, match="keys here look like '1'"):
        writer.collection.find_key("a")


def test_a_delta_of_many_bytes_becomes_a_segment(writer, vectors, monkeypatch):
    """However few its rows are; where there is nothing to seal, there is no other state."""
    monkeypatch.setattr(writer, "_seal_bytes", 300)
    writer.add(table("a"), vectors[:1], fingerprint=FINGERPRINT)
    collection = writer.collection
    assert [segment.count for segment in collection.manifest.segments] == [1]
    writer.seal()
    assert writer.collection.version == collection.version


def test_a_journal_of_many_records_is_sealed(writer, vectors, monkeypatch):
    """Deletions fill no delta and few bytes, and whoever opens the collection reads each again."""
    writer.add(table(*map(str, range(9))), vectors[:9], fingerprint=FINGERPRINT)
    writer.seal()
    monkeypatch.setattr(writer, "_seal_rows", 3)
    for n in range(3):
        assert writer.collection.manifest.segments[0].dead == 0
        writer.delete([id_of(str(n))])
    assert writer.collection.manifest.segments[0].dead == 3
    assert writer.collection.version[1] == 0
    assert Collection.open(writer.path).keys() == list("345678")


def test_what_cannot_be_created(writer, tmp_path):
    """A collection over another, of no dimension, of an unknown metric."""
    good = {"name": "made", "fingerprint": FINGERPRINT, "dim": DIM}
    with pytest.raises(UsageError, match="expected a new directory, found one that exists; open"):
        CollectionWriter.create(writer.path, **good)
    with pytest.raises(UsageError, match="dim: expected at least 1, found 0"):
        CollectionWriter.create(tmp_path / "other", **{**good, "dim": 0})
    with pytest.raises(UsageError, match="metric: expected cosine or euclidean, found manhattan"):
        CollectionWriter.create(tmp_path / "other", **good, metric="manhattan")
    assert not (tmp_path / "other").exists()
    with pytest.raises(CollectionError, match="expected a collection directory, found no such dir"):
        CollectionWriter.open(tmp_path / "other")


def test_raw_vectors_by_their_distance(tmp_path, unit_rows):
    """Scores are minus the squared distance, in the delta, in segments, and with an index."""
    vectors = unit_rows(50, DIM) * np.linspace(1, 9, 50, dtype=np.float32)[:, None]
    queries = unit_rows(5, DIM, seed=1) * 4
    expected = -((queries[:, None] - vectors[None]) ** 2).sum(axis=2)
    path = tmp_path / "c"
    with CollectionWriter.create(
        path, name="raw", fingerprint=FINGERPRINT, dim=DIM, metric="euclidean"
    ) as writer:
        writer.add(table(*map(str, range(50))), vectors, fingerprint=FINGERPRINT)
        steps = [lambda: None, writer.seal, lambda: give_index(writer, "HNSW32")]
        for step in steps:
            step()
            writer.delete([id_of("49")])
            found = writer.collection.search(queries, 3, fingerprint=FINGERPRINT)
            best = np.sort(expected[:, :49], axis=1)[:, ::-1][:, :3]
            np.testing.assert_allclose(found.scores, best, rtol=1e-4)
        assert writer.collection.metric == "euclidean"
    assert verify(path).faults == []


def test_a_selection_holds_for_the_state_that_it_was_made_of(writer, vectors):
    """After a write of as many rows, too: a deleted image is not found by an old selection."""
    writer.add(table("a", "b"), vectors[:2], fingerprint=FINGERPRINT)
    selection = writer.collection.select("key = 'a'")
    writer.delete([id_of("a")])
    writer.add(table("c"), vectors[2:3], fingerprint=FINGERPRINT)
    with pytest.raises(UsageError, match=r"a selection of this state of .*; select again"):
        writer.collection.search(vectors[:1], 2, fingerprint=FINGERPRINT, filter=selection)
