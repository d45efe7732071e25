"""The metadata of a collection's images: one row each, in the order of their vectors.

Every row has the columns of `ROW_SCHEMA`. Further columns are the user's own (`index.build
--metadata`), and `digest`, a hash of the image's bytes, by which `--sync` knows it.

Rules:
    A column is of one of `COLUMN_TYPES` and its name is its own: what is stored is what
    filters, `Row.metadata` and JSON can carry.
    A table may lack further columns: a row without a value has null.
    A collection has at most `MAX_COLUMNS` columns, and a row at most `MAX_TEXT_BYTES` of text when
    they come in: whatever it is merged with, a row never has more than `MAX_ROW_BYTES`, and a file
    which holds more for its rows is none of ours, however small it is on the disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Any, TypeAlias, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from models.bundle import Json
from models.errors import UsageError

Column: TypeAlias = "pa.ChunkedArray[pa.Scalar[pa.DataType]]"

_FIELDS: dict[str, pa.DataType] = {
    "id": pa.int64(),
    "key": pa.string(),
    "label": pa.string(),
    "source": pa.string(),
}
ROW_SCHEMA = pa.schema(_FIELDS)

DIGEST = "digest"

COLUMN_TYPES: tuple[pa.DataType, ...] = (
    pa.string(),
    pa.int64(),
    pa.float64(),
    pa.bool_(),
    pa.date32(),
    pa.timestamp("us"),
    pa.timestamp("us", "UTC"),
)

_DAYS = tuple((day - date(1970, 1, 1)).days for day in (date.min, date.max))
_MICROSECONDS = tuple(
    (moment - datetime(1970, 1, 1)) // timedelta(microseconds=1)
    for moment in (datetime.min, datetime.max)
)
"""The first and the last that Python can hold, as they are stored."""

MAX_ROW_BYTES = 64 << 10
"""Of one row in memory: its texts, and `VALUE_BYTES` a column. Keys are paths, of at most 4 kB."""

MAX_COLUMNS = 256
"""Of a collection, those of `ROW_SCHEMA` among them."""

VALUE_BYTES = 16
"""What a value takes besides its text, at most: 8 of its own or of offsets, and a bit of
validity, which is a byte where there is one row."""

MAX_TEXT_BYTES = MAX_ROW_BYTES - VALUE_BYTES * MAX_COLUMNS
"""Of all texts of a row: later rows may bring the collection columns up to `MAX_COLUMNS`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image of a collection.

    Attributes:
        id: its 63-bit id.
        key: where it stands in its source.
        label: its class, where the source knew one.
        source: the source's URI; `models.images.open_source(source).load(key)` reads it.
        digest: hash of its bytes when it was embedded; None where nobody took it.
        metadata: the collection's further columns: text, int, float, bool, date or datetime,
            None where there is no value.
    """

    id: int
    key: str
    label: str | None
    source: str
    digest: str | None = None
    metadata: Mapping[str, object] = field(default_factory=dict, hash=False)

    def to_json(self) -> dict[str, Json]:
        """Give what a person or a program asks of an image; dates are ISO 8601 texts.

        The id is text, too: jq and JavaScript round whole numbers above 2^53.
        """
        return {
            "id": str(self.id),
            "key": self.key,
            "label": self.label,
            "source": self.source,
            "metadata": metadata_to_json(self.metadata),
        }


def metadata_to_json(metadata: Mapping[str, object]) -> dict[str, Json]:
    """Give metadata as JSON can carry it; dates are ISO 8601 texts."""
    return {
        name: value.isoformat() if isinstance(value, date) else cast(Json, value)
        for name, value in metadata.items()
    }


def read_rows(table: pa.Table) -> list[Row]:
    """Turn a table of metadata into rows; what Python cannot hold is None."""
    table, names = held_or_null(table), metadata_columns(table.schema)
    columns = [table[name].to_pylist() for name in names]
    core = [table[name].to_pylist() for name in ROW_SCHEMA.names]
    digests = table[DIGEST].to_pylist() if DIGEST in table.column_names else [None] * len(table)
    further = zip(*columns, strict=True) if columns else (() for _ in range(len(table)))
    return [
        Row(
            id=cast(int, id_),
            key=cast(str, key),
            label=cast(str | None, label),
            source=cast(str, source),
            digest=cast(str | None, digest),
            metadata=dict(zip(names, values, strict=True)),
        )
        for id_, key, label, source, digest, values in zip(*core, digests, further, strict=True)
    ]


def take_rows(table: pa.Table, rows_M: NDArray[np.int64]) -> pa.Table:
    """Take rows of a table, of which no chunk is looked at but those that they are in.

    `Table.take` puts all chunks of texts together first, whatever it takes of them.
    """
    if not len(rows_M):
        return table.slice(0, 0)
    batches = table.to_batches()
    starts = np.cumsum([0, *map(len, batches)])
    owners_M = np.searchsorted(starts, rows_M, side="right") - 1
    order_M = np.argsort(owners_M, kind="stable")
    owners, firsts = np.unique(owners_M[order_M], return_index=True)
    pieces = [
        batches[owner].take(rows_M[mine] - starts[owner])
        for owner, mine in zip(owners, np.split(order_M, firsts[1:]), strict=True)
    ]
    taken = pa.Table.from_batches(pieces, table.schema)
    is_in_order = (owners_M[1:] >= owners_M[:-1]).all()
    return taken if is_in_order else taken.take(np.argsort(order_M))


def first_unheld(column: Column) -> str | None:
    """Give a date or time of a column that is not in the years 1 to 9999; None without one.

    Python's dates hold no other, nor does ISO 8601 write them.
    """
    is_unheld = _is_unheld(column)
    if is_unheld is None:
        return None
    unheld = column.filter(is_unheld)
    return str(pc.cast(unheld[:1], pa.string())[0]) if len(unheld) else None


def held_or_null(table: pa.Table) -> pa.Table:
    """Give a table with null for such dates and times, which older collections may have."""
    for place, column in enumerate(table.columns):
        is_unheld = _is_unheld(column)
        if is_unheld is not None:
            held: Any = pc.if_else(is_unheld, pa.scalar(None, column.type), column)
            table = table.set_column(place, table.field(place), held)
    return table


def _is_unheld(column: Column) -> Any:
    """Tell of every date or time whether it is not in the years 1 to 9999; None of other types."""
    numbers: Any
    if pa.types.is_date(column.type):
        bounds, numbers = _DAYS, column.cast(pa.int32())
    elif pa.types.is_timestamp(column.type):
        bounds, numbers = _MICROSECONDS, column.cast(pa.int64())
    else:
        return None
    least, most = (pa.scalar(bound, numbers.type) for bound in bounds)
    return pc.fill_null(pc.or_(pc.less(numbers, least), pc.greater(numbers, most)), False)


def metadata_columns(schema: pa.Schema) -> list[str]:
    """Name the further columns that are the user's own."""
    return [name for name in schema.names if name not in _FIELDS and name != DIGEST]


def is_row_schema(schema: pa.Schema) -> bool:
    """Tell whether a table has the columns of `ROW_SCHEMA`, and further ones of known types."""
    names = schema.names
    further = list(schema)[len(_FIELDS) :]
    return (
        len(set(names)) == len(names)
        and pa.schema(list(schema)[: len(_FIELDS)]).equals(ROW_SCHEMA)
        and all(one.type in COLUMN_TYPES for one in further)
        and all(one.type == pa.string() for one in further if one.name == DIGEST)
    )


def row_bytes(rows: pa.Table | pa.RecordBatch) -> NDArray[np.int64]:
    """Give the bytes that each row takes in memory, at most; of codes, those they stand for."""
    return text_bytes(rows) + VALUE_BYTES * rows.num_columns


def text_bytes(rows: pa.Table | pa.RecordBatch) -> NDArray[np.int64]:
    """Give the bytes of all texts of each row; of codes, those they stand for."""
    bytes_N = np.zeros(len(rows), np.int64)
    for column in rows.columns:
        if pa.types.is_dictionary(column.type) or pa.types.is_string(column.type):
            bytes_N += _lengths(column)
    return bytes_N


def check_row_sizes(rows: pa.Table, schema: pa.Schema = ROW_SCHEMA) -> None:
    """Refuse to take in what would be, or might become, larger than is believed of a file.

    Args:
        rows: what comes.
        schema: of the collection that they come to.

    Raises:
        UsageError: the collection would have too many columns, or a row has too much text; names
            its key.
    """
    n_columns = len({*schema.names, *rows.column_names})
    if n_columns > MAX_COLUMNS:
        raise UsageError(
            "rows",
            expected=f"at most {MAX_COLUMNS} columns, with those of the collection",
            found=str(n_columns),
            mend="leave columns out",
        )
    bytes_N = text_bytes(rows)
    wrong = np.flatnonzero(bytes_N > MAX_TEXT_BYTES)
    if wrong.size:
        key = str(rows["key"][int(wrong[0])].as_py())
        raise UsageError(
            f"row of key {key[:100]!r}",
            expected=f"at most {MAX_TEXT_BYTES} bytes of text",
            found=f"{bytes_N[wrong[0]]}",
            mend="keep long texts elsewhere, and here the place where they are",
        )


def _lengths(column: Any) -> NDArray[np.int64]:
    """Give the bytes of each text; of a dictionary's codes those of the texts they stand for."""
    if isinstance(column, pa.ChunkedArray):
        pieces = [_lengths(chunk) for chunk in column.chunks]
        return np.concatenate([np.empty(0, np.int64), *pieces])
    if isinstance(column, pa.DictionaryArray):
        lengths_M = np.append(_lengths(column.dictionary), 0)
        codes: Any = column.indices
        codes = pc.fill_null(codes, len(lengths_M) - 1)
        return cast("NDArray[np.int64]", lengths_M[codes.to_numpy()])
    lengths: Any = pc.fill_null(pc.binary_length(column), 0)
    return cast("NDArray[np.int64]", lengths.to_numpy(zero_copy_only=False).astype(np.int64))


def unify(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Give the columns of all schemas, the first's first; of one name they have one type."""
    first, *others = [schema.remove_metadata() for schema in schemas]
    if all(schema.equals(first) for schema in others):
        return first
    return pa.unify_schemas([first, *others])


def in_schema(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Give a table the columns of a schema, in its order; those that it lacks are null."""
    if rows.schema.equals(schema):
        return rows
    columns = [
        rows[field.name].cast(field.type)
        if field.name in rows.column_names
        else pa.nulls(len(rows), field.type)
        for field in schema
    ]
    return pa.table(dict(zip(schema.names, columns, strict=True)), schema=schema)
