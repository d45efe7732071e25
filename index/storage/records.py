"""What the records of a journal say: these images are there from now on, those no more.

    put     = bytes of the table (8) | rows (8) | table as an Arrow stream | vectors, float32
    delete  = ids, int64

A put replaces what has the same ids; no record names an id twice. All numbers are little-endian.

Rules:
    Whatever a body claims, it is no larger in memory than its bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index.errors import CollectionError
from index.storage.journal import Record
from index.storage.rows import is_row_schema
from index.storage.segment import Block

PUT, DELETE = 1, 2
_PUT_HEAD = struct.Struct("<QQ")
_MESSAGE_HEADER, _BATCH_COMPRESSION = 2, 3
"""Fields of Arrow's Message and RecordBatch, counted from 0."""


@dataclass(frozen=True, kw_only=True)
class Delete:
    """Ids that are there no more."""

    ids: NDArray[np.int64]


def encode_put(block: Block) -> list[bytes | memoryview]:
    """Lay rows and vectors out as the body of a record."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, block.rows.schema) as stream:
        stream.write_table(block.rows)
    table = memoryview(sink.getvalue())
    vectors = np.ascontiguousarray(block.vectors_ND, "<f4").data.cast("B")
    return [_PUT_HEAD.pack(len(table), len(block.rows)), table, vectors]


def encode_delete(ids: NDArray[np.int64]) -> list[bytes | memoryview]:
    """Lay ids out as the body of a record."""
    return [np.ascontiguousarray(ids, "<i8").tobytes()]


def decode(record: Record, dim: int, file: str) -> Block | Delete:
    """Read a record's body.

    Args:
        record: whose digest is known to be right.
        dim: of the collection's vectors.
        file: the journal, for the error.

    Raises:
        CollectionError: it is not what a writer of this collection writes.
    """
    try:
        if record.kind == DELETE:
            return Delete(ids=_each_once(np.frombuffer(record.body, "<i8")))
        if record.kind == PUT:
            return _decode_put(record.body, dim)
        found = f"kind {record.kind}"
    except (pa.ArrowException, ValueError, OSError, KeyError, struct.error, MemoryError) as error:
        found = (str(error).splitlines() or [type(error).__name__])[0]
    raise CollectionError(
        file,
        expected=f"rows of this collection in record {record.position.n_records - 1}",
        found=found,
        mend="the file is not this collection's: copy or build the collection again",
    )


def _refuse_compression(stream: pa.Buffer) -> None:
    """Refuse what Arrow would unpack to whatever size it claims; we never write that.

    pyarrow does not tell, so that the flatbuffer is read, as in Arrow's Message.fbs: a table
    begins with the distance back to its list of fields, whose places are 0 where there is none.
    """
    messages = pa.ipc.MessageReader.open_stream(stream)
    while True:
        try:
            message = messages.read_next_message()
        except StopIteration:
            return
        if message.type == "schema":
            continue
        metadata = message.metadata.to_pybytes()
        header = _field(metadata, _table(metadata, 0), _MESSAGE_HEADER)
        batch = _table(metadata, header)
        if message.type != "record batch" or _field(metadata, batch, _BATCH_COMPRESSION):
            raise ValueError(f"a {message.type}, maybe compressed")


def _table(metadata: bytes, place: int) -> int:
    """Give the place of the table to which a flatbuffer points here."""
    (distance,) = struct.unpack_from("<I", metadata, place)
    return place + int(distance)


def _field(metadata: bytes, table: int, number: int) -> int:
    """Give the place of a field of a flatbuffer's table; 0 where it has none."""
    fields = table - int(*struct.unpack_from("<i", metadata, table))
    (size,) = struct.unpack_from("<H", metadata, fields)
    if 4 + 2 * number >= size:
        return 0
    (place,) = struct.unpack_from("<H", metadata, fields + 4 + 2 * number)
    return table + int(place) if place else 0


def _decode_put(body: bytes, dim: int) -> Block:
    """Read rows and vectors."""
    table_bytes, n_rows = _PUT_HEAD.unpack_from(body)
    start = _PUT_HEAD.size + table_bytes
    if len(body) != start + n_rows * dim * 4 or n_rows == 0:
        raise ValueError(f"{len(body)} bytes for {n_rows} rows of {dim} dimensions")
    stream = pa.py_buffer(body)[_PUT_HEAD.size : start]
    _refuse_compression(stream)
    with pa.ipc.open_stream(stream) as reader:
        if not is_row_schema(reader.schema):
            raise ValueError(f"rows of {', '.join(reader.schema.names)}")
        rows = reader.read_all()
    rows.validate(full=True)
    if len(rows) != n_rows or rows["id"].null_count:
        raise ValueError(f"{len(rows)} rows, some without an id")
    _each_once(rows["id"].to_numpy())
    vectors_ND = np.frombuffer(body, "<f4", n_rows * dim, start).reshape(n_rows, dim)
    return Block(rows=rows, vectors_ND=vectors_ND)


def _each_once(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Refuse an id that is there twice, or rows would be counted twice."""
    if len(np.unique(ids)) < len(ids):
        raise ValueError("an id twice")
    return ids
