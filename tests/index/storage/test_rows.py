import json
from dataclasses import replace
from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.collection import Collection, id_of
from index.errors import CollectionError
from index.storage.manifest import (
    Manifest,
    SegmentEntry,
    hash_files,
    read_manifest,
    write_manifest,
)
from index.storage.rows import (
    MAX_COLUMNS,
    MAX_ROW_BYTES,
    MAX_TEXT_BYTES,
    ROW_SCHEMA,
    Row,
    is_row_schema,
    read_rows,
    take_rows,
)
from index.storage.segment import Block, write_segment
from index.storage.writer import CollectionWriter
from models.errors import UsageError

FURTHER = {
    "digest": pa.string(),
    "price": pa.float64(),
    "count": pa.int64(),
    "sold": pa.bool_(),
    "day": pa.date32(),
    "taken": pa.timestamp("us", "UTC"),
}
NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


def rows_of(keys, *, further=FURTHER):
    """Make a table of rows; every second one has no further values."""
    values = {
        "digest": "ab", "price": 1.5, "count": 3, "sold": True, "day": date(2024, 5, 1),
        "taken": NOON,
    }  # fmt: skip
    columns = {
        "id": [id_of(key) for key in keys],
        "key": keys,
        "label": [None] * len(keys),
        "source": ["folder:/nowhere"] * len(keys),
    }
    for name in further:
        columns[name] = [None if n % 2 else values[name] for n in range(len(keys))]
    return pa.table(columns, schema=pa.schema([*ROW_SCHEMA, *further.items()]))


def test_a_row_carries_what_its_table_has():
    """Typed values, None where there are none, and the digest apart from what is the user's."""
    first, second = read_rows(rows_of(["a", "b"]))
    assert first == Row(
        id=id_of("a"), key="a", label=None, source="folder:/nowhere", digest="ab",
        metadata={
            "price": 1.5, "count": 3, "sold": True, "day": date(2024, 5, 1), "taken": NOON
        },
    )  # fmt: skip
    assert json.loads(json.dumps(first.to_json()))["metadata"] == {
        "price": 1.5, "count": 3, "sold": True, "day": "2024-05-01",
        "taken": "2024-05-01T12:00:00+00:00",
    }  # fmt: skip
    assert second.digest is None
    assert set(second.metadata.values()) == {None}
    (plain,) = read_rows(rows_of(["a"], further={}))
    assert (plain.digest, plain.metadata) == (None, {})
    assert len({first, second, plain}) == 3  # a row can be a member of a set


@given(st.lists(st.integers(0, 9), max_size=20))
def test_rows_are_taken_as_asked_for(numbers):
    """In any order, each as often as it is asked for; some chunks are empty."""
    rows = rows_of([*"abcdefghij"])
    chunks = [rows.slice(0, 3), rows.slice(3, 0), rows.slice(3, 6), rows.slice(9, 1)]
    asked = np.array(numbers, np.int64)
    taken = take_rows(pa.concat_tables(chunks), asked)
    assert taken.to_pylist() == rows.take(pa.array(asked)).to_pylist()
    assert taken.schema == rows.schema


def test_to_take_some_rows_no_other_chunk_is_copied():
    """A search looks up ten of a million."""
    chunk = pa.table({"key": ["x" * 100] * 1000})
    rows = pa.concat_tables([chunk] * 100)
    default = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(default)
    pa.set_memory_pool(pool)
    try:
        assert len(take_rows(rows, np.array([70_000, 5]))) == 2
    finally:
        pa.set_memory_pool(default)
    assert 0 < pool.max_memory() < chunk.nbytes / 10


def test_a_date_that_python_cannot_hold_is_none():
    """As older collections have, of years beyond 9999: their other values are there."""
    later = pa.array([3_000_000], pa.int32()).cast(pa.date32())
    rows = rows_of(["a"])
    for name in ("day", "taken"):
        place = rows.column_names.index(name)
        rows = rows.set_column(place, name, later.cast(FURTHER[name]))
    (row,) = read_rows(rows)
    assert row.metadata == {"price": 1.5, "count": 3, "sold": True, "day": None, "taken": None}


@pytest.mark.parametrize(
    ("fields", "sound"),
    [
        ([], True),
        ([*FURTHER.items()], True),
        ([("taken", pa.timestamp("us"))], True),
        ([("count", pa.int32())], False),
        ([("digest", pa.int64())], False),
        ([("words", pa.list_(pa.string()))], False),
        ([("one", pa.int64()), ("one", pa.int64())], False),
    ],
)
def test_which_columns_may_be_stored(fields, sound):
    """Those that filters and JSON can carry, each once."""
    assert is_row_schema(pa.schema([*ROW_SCHEMA, *fields])) is sound
    assert not is_row_schema(pa.schema([*list(ROW_SCHEMA)[1:], *fields]))


def test_segments_of_other_columns_are_one_collection(tmp_path, unit_rows):
    """A row of a segment without a column has null there, and filters see it so."""
    entries, names, vectors = [], [], unit_rows(4, 8)
    for number, (keys, further) in enumerate([(["a", "b"], {}), (["c", "d"], FURTHER)]):
        rows = rows_of(keys, further=further)
        entry = SegmentEntry(name=f"{number:06}", count=2, factory="Flat")
        block = Block(rows=rows, vectors_ND=vectors[2 * number :][:2])
        names += write_segment(tmp_path, entry, [block], 8, schema=rows.schema)
        entries.append(entry)
    manifest = Manifest(
        name="made", fingerprint="f" * 64, dim=8, encoder="/nowhere", preprocessing={},
        sources={"folder:/nowhere": 4}, segments=tuple(entries),
        files=hash_files(tmp_path, names), versions={}, build={},
    )  # fmt: skip
    write_manifest(tmp_path, manifest)
    with Collection.open(tmp_path) as collection:
        found = {row.key: row.metadata["price"] for row in collection.rows(collection.ids)}
        assert found == {"a": None, "b": None, "c": 1.5, "d": None}
        assert collection.select("price > 1").mask_N.tolist() == [False, False, True, False]
        assert collection.select("price is null").count == 3
        assert collection.table(["key"]).to_pydict() == {"key": ["a", "b", "c", "d"]}
        np.testing.assert_array_equal(collection.vectors([id_of("c")])[0], vectors[2])


@pytest.mark.parametrize(
    "note",
    [
        ["x" * 5_000_000] + [None] * 49,  # which its footer says
        ["x" * 150_000] * 50,  # one text in the file, and fifty in memory
        [None] * 25 + ["x" * 150_000] * 25,
    ],
)
def test_some_bytes_that_stand_for_many(tmp_path, unit_rows, note):
    """A file holds no more than its rows may: it is refused before there is a table of it."""
    with CollectionWriter.create(
        tmp_path / "c", name="made", fingerprint="f" * 64, dim=8
    ) as writer:
        rows = rows_of([f"{n}.png" for n in range(50)])
        writer.add(rows, unit_rows(50, 8), fingerprint="f" * 64)
        writer.seal()
    name = "segments/000000/rows.parquet"
    assert Collection.open(tmp_path / "c").table().equals(rows)
    table = rows.append_column("note", pa.array(note, pa.string()))
    pq.write_table(table, tmp_path / "c" / name, compression="zstd")
    assert (tmp_path / "c" / name).stat().st_size < 10_000
    manifest = read_manifest(tmp_path / "c")
    files = {**manifest.files, **hash_files(tmp_path / "c", [name])}
    write_manifest(tmp_path / "c", replace(manifest, files=files))
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(
            CollectionError, match=f"found no such table .more than {50 * MAX_ROW_BYTES}"
        ):
            Collection.open(tmp_path / "c")
    finally:
        pa.set_memory_pool(usual)
    assert pool.max_memory() < table.nbytes / 4


def test_what_no_file_may_have(tmp_path, unit_rows):
    """Is refused when it comes in: too long a text, with its key, and too many columns."""
    longest = MAX_TEXT_BYTES - len("b.png" + "folder:/nowhere")
    with CollectionWriter.create(
        tmp_path / "c", name="made", fingerprint="f" * 64, dim=8
    ) as writer:

        def add(key, vector, **further):
            rows = pa.table({"key": [key], "source": ["folder:/nowhere"], **further})
            writer.add(rows, unit_rows(4, 8)[vector : vector + 1], fingerprint="f" * 64)

        with pytest.raises(UsageError, match=r"row of key 'b.png': expected at most 61440 bytes"):
            add("b.png", 0, note=["x" * (longest + 1)])
        add("b.png", 0, note=["x" * longest])
        writer.seal()
        columns = {f"c{n}": [n] for n in range(MAX_COLUMNS - 5)}
        add("c.png", 1, note=["x" * longest], **columns)
        writer.compact(all=True)
        with pytest.raises(UsageError, match=r"rows: expected at most 256 columns, .* found 257"):
            add("d.png", 2, other=[1])
        writer.compact(all=True)
    assert len(Collection.open(tmp_path / "c").table()) == 2
