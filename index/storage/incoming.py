"""What may come into a collection: rows with keys, vectors of its kind, nothing twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from index.errors import CollectionError
from index.filters import is_nameable
from index.knn import COSINE
from index.storage.ids import id_of
from index.storage.rows import (
    COLUMN_TYPES,
    DIGEST,
    ROW_SCHEMA,
    Column,
    check_row_sizes,
    first_unheld,
    is_row_schema,
)
from models.errors import UsageError

YEARS, YEARS_MEND = "years from 1 to 9999, in UTC", "leave the value out where there is no date"

VECTOR = "vector"
"""What vectors are called beside the columns of metadata, in exports and in Milvus."""

UNIT_TOLERANCE = 1e-4
"""Of a vector's length: float32 keeps unit vectors of thousands of dimensions within 1e-5."""


def check_vectors(
    vectors_ND: ArrayLike, count: int, *, dim: int, metric: str
) -> NDArray[np.float32]:
    """Give vectors as float32, in C order.

    Raises:
        UsageError: they are no numbers, not (count, dim), not finite, or not of unit length for
            cosines.
    """
    try:
        vectors = np.ascontiguousarray(vectors_ND, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise UsageError(
            "vectors", expected=f"({count}, {dim}) numbers", found=str(error).splitlines()[0]
        ) from error
    if vectors.shape != (count, dim):
        raise UsageError("vectors", expected=f"({count}, {dim})", found=str(vectors.shape))
    lengths_N = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    wrong = np.flatnonzero(~np.isfinite(lengths_N))
    if wrong.size:
        raise UsageError(f"vector {wrong[0]}", expected="finite numbers", found="NaN or infinity")
    wrong = np.flatnonzero(np.abs(lengths_N - 1) > UNIT_TOLERANCE)
    if metric == COSINE and wrong.size:
        raise UsageError(
            f"vector {wrong[0]}",
            expected="length 1",
            found=f"{lengths_N[wrong[0]]:.4g}",
            mend="divide every vector by its length",
        )
    return vectors


def check_table(rows: object) -> None:
    """Refuse rows that are in no table.

    Raises:
        UsageError: it is so.
    """
    if not isinstance(rows, pa.Table):
        raise UsageError(
            "rows",
            expected="a table of pyarrow",
            found=type(rows).__name__,
            mend="`pyarrow.table` makes one of a dictionary of columns",
        )


def prepare_rows(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Give rows their ids and the types of the collection's columns.

    Args:
        rows: key, source, label where known, and further columns.
        schema: of the collection; columns that it lacks are kept as they come, but for NaN and
            infinity, which are null.

    Raises:
        UsageError: a column is missing, there twice, of another type, null where a value must be,
            of a year that no date has, no Unicode, or of a name that no filter can have or vectors
            have; or there are more columns, or a row is larger, than any file may have.
    """
    _check_table(rows, schema)
    columns = {}
    for name in ("key", "label", "source"):
        columns[name] = _text_column(rows, name)
    ids = [
        id_of(str(key))
        for key in cast("pa.ChunkedArray[pa.StringScalar]", columns["key"]).to_pylist()
    ]
    further = {name: rows[name] for name in rows.column_names if name not in ROW_SCHEMA.names}
    table = pa.table({"id": pa.array(ids, pa.int64()), **columns})
    for name, column in further.items():
        field = pa.field(name, pa.string()) if name == DIGEST else None
        if name in schema.names:
            field = schema.field(name)
        if field is not None and column.type != field.type:
            column = _cast(column, field)
        if column.type not in COLUMN_TYPES:
            known = ", ".join(map(str, COLUMN_TYPES))
            raise UsageError(f"column {name}", expected=f"one of {known}", found=str(column.type))
        if unheld := first_unheld(column):
            raise UsageError(f"column {name}", expected=YEARS, found=unheld, mend=YEARS_MEND)
        table = table.append_column(pa.field(name, column.type), finite_or_null(column))
    assert is_row_schema(table.schema), f"a file with {table.schema} would not open again"
    check_row_sizes(table, schema)
    return table


def finite_or_null(column: Column) -> Column:
    """Give a column with null for NaN and infinity, which JSON cannot carry."""
    if not pa.types.is_floating(column.type):
        return column
    finite = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
    return cast(Column, finite)


def check_keys(rows: pa.Table, there: Mapping[int, str], *, replace: bool) -> None:
    """Refuse keys that come twice, ids that other keys have, and keys that are there.

    Args:
        rows: what comes, with ids.
        there: the keys of those ids that are there already.
        replace: whether keys may be there already.

    Raises:
        UsageError: a key comes twice, or is there already.
        CollectionError: another key has the id of one.
    """
    came: dict[int, str] = {}
    ids, keys = (cast("list[Any]", rows[name].to_pylist()) for name in ("id", "key"))
    for id_, key in zip(ids, keys, strict=True):
        if id_ in came:
            _refuse_collision(key, came[id_])
            raise UsageError(f"key {key!r}", expected="every key once", found="it again")
        came[id_] = key
        if id_ not in there:
            continue
        _refuse_collision(key, there[id_])
        if not replace:
            raise UsageError(
                f"key {key!r}",
                expected="one that is not in the collection",
                found="it there",
                mend="replace it with upsert",
            )


def _check_table(rows: pa.Table, schema: pa.Schema) -> None:
    """Refuse a table whose columns have not each a name for filters, or whose texts are none."""
    names = rows.column_names
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise UsageError(
            "rows", expected=f"one column {twice[0]}", found=f"{names.count(twice[0])}"
        )
    for name in names:
        if not is_nameable(name):
            raise UsageError(
                f"column {name!r}",
                expected="a name",
                found="one that no filter can have",
                mend="rename it, to one without `",
            )
    if VECTOR in names and VECTOR not in schema.names:
        raise UsageError(
            f"column {VECTOR!r}",
            expected="a name of its own",
            found="that of the vectors in exports",
            mend="rename it",
        )
    try:
        rows.validate(full=True)
        for name in names:
            name.encode()
    except (pa.ArrowException, UnicodeError) as error:
        found = next(iter(str(error).splitlines()), "others")
        raise UsageError("rows", expected="texts in Unicode", found=found) from error


def _refuse_collision(key: str, other: str) -> None:
    """Refuse two keys of one id."""
    if key != other:
        raise CollectionError(
            f"key {key!r}",
            expected="an id of its own",
            found=f"that of key {other!r}, {id_of(key)}",
            mend="rename one of the two",
        )


def _text_column(rows: pa.Table, name: str) -> Column:
    """Take a column of texts; only labels may be missing or null."""
    if name not in rows.column_names:
        if name != "label":
            raise UsageError("rows", expected=f"a column {name}", found=f"{rows.column_names}")
        return pa.chunked_array([pa.nulls(len(rows), pa.string())])
    column = _cast(rows[name], ROW_SCHEMA.field(name))
    if name != "label" and column.null_count:
        raise UsageError(f"column {name}", expected="a text in every row", found="null")
    return column


def _cast(column: Column, field: pa.Field[pa.DataType]) -> Column:
    """Give a column the collection's type."""
    try:
        return column.cast(field.type)
    except pa.ArrowException as error:
        raise UsageError(
            f"column {field.name}", expected=str(field.type), found=str(column.type)
        ) from error
