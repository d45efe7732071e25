"""Rows on their way into Milvus and out of it.

Rules:
    Every row names every column of the collection, null where it has no value: an upsert of
    Milvus Lite keeps the dynamic fields that are not named.
    What comes out has the types that went in; dates and times travel as texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index.milvus.description import MAX_TEXT_BYTES, VECTOR
from index.milvus.filters import stored
from models.errors import UsageError


def to_entities(
    table: pa.Table, vectors_ND: NDArray[np.float32], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """Lay rows out as pymilvus takes them.

    Raises:
        UsageError: a text is longer than Milvus holds.
    """
    values: dict[str, Iterable[object]] = {
        name: map(stored, table[name].to_pylist())
        if name in table.column_names
        else [None] * len(table)
        for name in columns
    }
    lines = zip(*values.values(), vectors_ND, strict=True)
    entities = [dict(zip([*values, VECTOR], line, strict=True)) for line in lines]
    for entity in entities:
        for name in ("key", "label", "source"):
            if len((entity[name] or "").encode()) > MAX_TEXT_BYTES:
                raise UsageError(
                    f"{name} of image {entity['key']:.40}...",
                    expected=f"at most {MAX_TEXT_BYTES} bytes for a collection in Milvus",
                    found="more",
                )
    return entities


def to_table(entities: Sequence[Mapping[str, Any]], columns: pa.Schema) -> pa.Table:
    """Make a table of what pymilvus gave."""
    arrays = [
        pa.array([_restored(one.get(column.name), column.type) for one in entities], column.type)
        for column in columns
    ]
    return pa.Table.from_arrays(arrays, schema=columns)


def to_vectors(entities: Sequence[Mapping[str, Any]], dim: int) -> NDArray[np.float32]:
    """Make an array (n, D) of the vectors that pymilvus gave."""
    vectors_ND = np.empty((len(entities), dim), np.float32)
    for row_D, entity in zip(vectors_ND, entities, strict=True):
        row_D[:] = entity[VECTOR]
    return vectors_ND


def _restored(value: object, kind: pa.DataType) -> object:
    """Give a value the type that it had."""
    if value is None or not isinstance(value, str):
        return value
    if isinstance(kind, pa.TimestampType):
        moment = datetime.fromisoformat(value)
        return moment.replace(tzinfo=UTC) if kind.tz else moment
    return date.fromisoformat(value) if pa.types.is_date(kind) else value
