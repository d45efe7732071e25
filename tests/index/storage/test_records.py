import struct

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.errors import CollectionError
from index.storage.journal import Position, Record
from index.storage.records import DELETE, PUT, Delete, decode, encode_delete, encode_put
from index.storage.rows import ROW_SCHEMA
from index.storage.segment import Block

DIM = 8
ROWS = {"id": [3, 1], "key": ["a", "b"], "label": ["x", None], "source": ["s", "s"]}


def body_of(rows, vectors, **options):
    """The body of a put, as `encode_put` makes it, but with options of Arrow."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema, options=pa.ipc.IpcWriteOptions(**options)) as stream:
        stream.write_table(rows)
    table = sink.getvalue().to_pybytes()
    return struct.pack("<QQ", len(table), len(rows)) + table + vectors.tobytes()


def decoded(kind, body):
    """Read a record with this body."""
    position = Position(end=64 + len(body), n_records=8)
    return decode(Record(kind=kind, body=body, position=position), DIM, "journal-000001")


@pytest.fixture
def block(unit_rows):
    """Two rows with a further column."""
    rows = pa.table(ROWS, schema=ROW_SCHEMA).append_column("width", pa.array([1, None], pa.int64()))
    return Block(rows=rows, vectors_ND=unit_rows(2, DIM))


def test_rows_and_ids_come_back(block):
    """As they were, to the bit."""
    found = decoded(PUT, b"".join(encode_put(block)))
    assert found.rows.equals(block.rows)
    np.testing.assert_array_equal(found.vectors_ND, block.vectors_ND)
    ids = np.array([5, -1, 1 << 62])
    found = decoded(DELETE, b"".join(encode_delete(ids)))
    assert isinstance(found, Delete)
    np.testing.assert_array_equal(found.ids, ids)


def test_what_is_no_record_of_this_collection_is_refused(block):
    """Its digest was right, so that somebody made it: one line says what is wrong."""
    rows, vectors = block.rows, block.vectors_ND
    good = body_of(rows, vectors)
    for kind, body, found in [
        (9, good, "found kind 9"),
        (DELETE, good[:-1], "found buffer size must be a multiple of element size"),
        (PUT, b"", "unpack_from requires a buffer"),
        (PUT, good[:-4], "bytes for 2 rows of 8 dimensions"),
        (PUT, struct.pack("<QQ", 1 << 60, 2) + good[16:], "bytes for 2 rows of 8 dimensions"),
        (PUT, struct.pack("<QQ", 0, 1 << 60), "bytes for 1152921504606846976 rows"),
        (PUT, body_of(rows.drop_columns(["key"]), vectors), "found rows of id, label, source"),
        (PUT, body_of(rows.slice(0, 1), vectors[:1]) + vectors[:1].tobytes(), "bytes for 1 rows"),
        (PUT, good[:16] + b"\xff" * 100 + good[116:], "expected rows of this collection"),
        (PUT, good[:16] + good[80:], "bytes for 2 rows"),
        (PUT, body_of(rows.take([1, 1]), vectors), "found an id twice"),
        (DELETE, np.array([5, 1, 5]).tobytes(), "found an id twice"),
    ]:
        with pytest.raises(CollectionError, match="journal-000001: expected rows of") as error:
            decoded(kind, body)
        assert found in str(error.value)


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_tables_are_refused_before_they_are_unpacked(block, compression):
    """They may claim any size."""
    with pytest.raises(CollectionError, match="found a record batch, maybe compressed"):
        decoded(PUT, body_of(block.rows, block.vectors_ND, compression=compression))
    coded = block.rows.set_column(1, "key", block.rows["key"].dictionary_encode())
    with pytest.raises(CollectionError, match="found a dictionary, maybe compressed"):
        decoded(PUT, body_of(coded, block.vectors_ND))


@given(at=st.integers(16, 900), value=st.integers(0, 255), cut=st.integers(0, 40))
def test_whatever_a_table_claims_it_is_refused_or_read(at, value, cut):
    """Nothing but our own error, and no more rows than there are vectors."""
    rows = pa.table(ROWS, schema=ROW_SCHEMA)
    body = bytearray(body_of(rows, np.zeros((2, DIM), np.float32)))
    at = min(at, len(body) - 65 - cut)
    body[at : at + 1 + cut] = bytes([value]) * (1 + cut)
    try:
        found = decoded(PUT, bytes(body))
    except CollectionError:
        return
    assert len(found.rows) == len(found.vectors_ND) == 2
