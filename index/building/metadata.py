"""What is known of images besides their pixels: a table of the user's, joined by key.

The file is CSV (`.csv`, `.tsv`, also compressed) or parquet. Its column `key` names the images as
their source does; every other column goes into the collection, beside the vectors of the same
rows, under its own name.

Rules:
    A key stands there once. An image without a row has nulls; a row without an image is
    counted and said, never an error, unless no row has one.
    A column `label` is the class where it has a value; the source's own stands elsewhere.
    Types are those of `index.storage.rows`. Those of a CSV are told from all of its values: an
    empty field is null, and a column with one word in it is text. What is text in a collection
    that is there is read as text, so that a code keeps its zeros.
    What JSON cannot carry, NaN and infinity, is null.

The table is held in memory, as it is in every process that opens the collection.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from index.errors import CollectionError
from index.filters import is_nameable
from index.storage.incoming import VECTOR, YEARS, YEARS_MEND, finite_or_null
from index.storage.rows import DIGEST, ROW_SCHEMA, first_unheld
from index.storage.segment import Block
from models.bundle import Json
from models.command import counted
from models.errors import UsageError
from models.files import open_regular, sha256_file
from models.image_source import ImageSource

KEY, LABEL = "key", "label"
RESERVED = (*(name for name in ROW_SCHEMA.names if name not in (KEY, LABEL)), DIGEST, VECTOR)
"""Names of columns that Horace fills itself, or gives the vectors where they are exported."""

Column: TypeAlias = "pa.ChunkedArray[pa.Scalar[pa.DataType]]"

CSV_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".csv.zst", ".tsv.zst")
MAX_CSV_BLOCK_BYTES = 1 << 30
"""Types are told from the first block, so that the file is one: up to this size."""


@dataclass(frozen=True, kw_only=True)
class JoinReport:
    """How images and rows of metadata met.

    Attributes:
        file: the table's path.
        sha256: of the file.
        columns: names and types of what it adds to the collection.
        rows: in the table.
        without_image: of those, how many name no image.
        without_row: images that the table does not name.
    """

    file: str
    sha256: str
    columns: dict[str, str]
    rows: int
    without_image: int
    without_row: int

    def to_json(self) -> dict[str, Json]:
        """Give the report as it stands in the manifest's."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, document: Mapping[str, Json]) -> JoinReport:
        """Read it from there."""
        return cls(**cast(dict[str, Any], document))

    def __str__(self) -> str:
        columns = ", ".join(f"{name} ({kind})" for name, kind in self.columns.items())
        lines = f"metadata of {counted(self.rows, 'row')}: {columns or 'no column of its own'}"
        if self.without_image:
            lines += f"; {counted(self.without_image, 'row')} without an image"
        if self.without_row:
            lines += f"; {counted(self.without_row, 'image')} without a row"
        return lines


class Metadata:
    """A table of metadata in memory."""

    def __init__(self, file: Path, schema: pa.Schema = ROW_SCHEMA) -> None:
        """Read and check the table.

        Args:
            file: the table.
            schema: of the collection that is there; its columns get the types that they have.

        Raises:
            UsageError: its name tells no format.
            CollectionError: it cannot be read, lacks keys, or has a column that cannot be kept, or
                not of the collection's type.
        """
        self.file = file
        table = _with_stored_types(file, _read(file, schema))
        _check_keys(file, table[KEY])
        self.sha256 = sha256_file(file)
        keys = cast(list[str], table[KEY].to_pylist())
        self._rows = {key: row for row, key in enumerate(keys)}
        self._values = _in_types_of(file, table.drop_columns([KEY]), schema)
        self._is_met_M = np.zeros(len(table), np.bool_)
        self._n_without_row = 0

    @property
    def columns(self) -> pa.Schema:
        """The further columns that it gives to rows; `label` is none of them."""
        return pa.schema([one for one in self._values.schema if one.name != LABEL])

    @property
    def gives_labels(self) -> bool:
        """Whether it has a column of labels: where that is empty, the source's own holds."""
        return LABEL in self._values.column_names

    def join(self, rows: pa.Table) -> pa.Table:
        """Append its columns to rows, by their keys.

        Args:
            rows: with the columns of `ROW_SCHEMA`; those of the same name as one of the table's
                are replaced, also by null.
        """
        places = [self._rows.get(key) for key in cast(list[str], rows[KEY].to_pylist())]
        values = self._values.take(pa.array(places, pa.int64()))
        for name in values.column_names:
            column = values[name]
            if name == LABEL:
                column = pc.coalesce(column, rows[LABEL])
            if name in rows.column_names:
                rows = rows.set_column(rows.column_names.index(name), name, column)
            else:
                rows = rows.append_column(name, column)
        return rows

    def meet(self, keys: Sequence[str]) -> None:
        """Take note of which rows these images are."""
        met = [row for row in map(self._rows.get, keys) if row is not None]
        self._is_met_M[met] = True
        self._n_without_row += len(keys) - len(met)

    def require_met(self, example: str) -> None:
        """Refuse a table of which no row is an image that was met.

        Args:
            example: the key of an image.

        Raises:
            CollectionError: it is so, as where the keys were written in another way.
        """
        if self._rows and not self._is_met_M.any():
            raise self._of_others(example)

    def require_known(self, source: ImageSource) -> None:
        """Refuse a table of which no row is an image of a source, before any image is read.

        Of a source that only reading would list, `require_met` tells later.

        Raises:
            CollectionError: it is so.
            SourceError: the source cannot be listed.
        """
        if source.count() is None or not self._rows:
            return
        first = next(source.records(), None)
        if first is not None and not any(record.key in self._rows for record in source.records()):
            raise self._of_others(first.key)

    def _of_others(self, example: str) -> CollectionError:
        """Make the error for a table of which no row is an image."""
        first = next(iter(self._rows))
        return CollectionError(
            f"--metadata {self.file}",
            expected=f"keys of images, such as {example!r}",
            found=f"{counted(len(self._rows), 'row')} of others, such as {first!r}",
            mend="write the keys as the source does, paths below its root",
        )

    def report(self) -> JoinReport:
        """Say how images and rows met so far."""
        n_met = int(self._is_met_M.sum())
        return JoinReport(
            file=str(self.file),
            sha256=self.sha256,
            columns={one.name: str(one.type) for one in self._values.schema},
            rows=len(self._rows),
            without_image=len(self._rows) - n_met,
            without_row=self._n_without_row,
        )


def join_blocks(metadata: Metadata, blocks: Iterator[Block]) -> Iterator[Block]:
    """Give the blocks with the columns of the table.

    Raises:
        CollectionError: at the end, where no row of the table is one of an image.
    """
    key = None
    for block in blocks:
        keys = cast(list[str], block.rows[KEY].to_pylist())
        key = next(iter(keys), key)
        metadata.meet(keys)
        yield replace(block, rows=metadata.join(block.rows))
    if key is not None:
        metadata.require_met(key)


def _read(file: Path, schema: pa.Schema) -> pa.Table:
    """Read the whole table; of a CSV, with text where a collection has text."""
    name = file.name.lower()
    if not name.endswith((".parquet", *CSV_SUFFIXES)):
        raise UsageError(
            f"--metadata {file}",
            expected="a name that ends in .csv, .tsv or .parquet",
            found=repr(file.suffix),
        )
    try:
        os.close(open_regular(file, os.O_RDONLY))  # a pipe would keep Arrow waiting
        if name.endswith(".parquet"):
            return pq.ParquetFile(file).read()
        inflation = 1 if name.endswith((".csv", ".tsv")) else 16
        size_bytes = min(max(file.stat().st_size * inflation, 1 << 20), MAX_CSV_BLOCK_BYTES)
        return pacsv.read_csv(
            file,
            read_options=pacsv.ReadOptions(block_size=size_bytes),
            parse_options=pacsv.ParseOptions(
                delimiter="\t" if ".tsv" in name else ",", newlines_in_values=True
            ),
            convert_options=pacsv.ConvertOptions(
                column_types={one.name: one.type for one in schema if one.type == pa.string()},
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CollectionError(
            f"--metadata {file}",
            expected="a table in CSV or parquet",
            found=str(error).splitlines()[0],
            mend="check the file; its first line names the columns",
        ) from error


def _with_stored_types(file: Path, table: pa.Table) -> pa.Table:
    """Turn every column into one of the types that a collection keeps."""
    names = table.column_names
    if KEY not in names:
        raise CollectionError(
            f"--metadata {file}",
            expected=f"a column {KEY!r} that names the images",
            found=f"columns {', '.join(names)}",
            mend="rename the column that does",
        )
    for name in names:
        _check_name(file, name, names)
    columns = [_as_stored(file, name, table[name]) for name in names]
    return pa.table(columns, names=names)


def _in_types_of(file: Path, values: pa.Table, schema: pa.Schema) -> pa.Table:
    """Give columns the types that they have in a collection."""
    for place, one in enumerate(values.schema):
        if one.name not in schema.names or one.type == schema.field(one.name).type:
            continue
        wanted = schema.field(one.name).type
        try:
            column = values[one.name].cast(wanted)
        except pa.ArrowException as error:
            raise CollectionError(
                f"--metadata {file}, column {one.name!r}",
                expected=f"{wanted}, as the collection has it",
                found=f"{one.type}: {next(iter(str(error).splitlines()), 'others')}",
                mend="mend the values, rename the column, or build the collection again",
            ) from error
        values = values.set_column(place, one.name, column)
    return values


def _check_name(file: Path, name: str, names: Sequence[str]) -> None:
    """Refuse a column that could not be told from another, or not be named in a filter."""
    if name in RESERVED:
        found = "one of that name, which Horace fills itself"
    elif names.count(name) > 1:
        found = f"{names.count(name)} of that name"
    elif not is_nameable(name):
        found = "a name that no filter can have"
    else:
        return
    raise CollectionError(
        f"--metadata {file}, column {name!r}",
        expected="a name of its own",
        found=found,
        mend="rename it",
    )


def _as_stored(file: Path, name: str, column: Column) -> Column:
    """Turn a column into the type in which it is kept."""
    wanted = pa.string() if name in (KEY, LABEL) else _stored_type(column.type)
    try:
        if wanted is None:
            raise pa.ArrowInvalid(f"values of {column.type}")
        # A moment between two microseconds is put at the earlier.
        kept = pc.cast(column, wanted, safe=not pa.types.is_timestamp(wanted))
        kept.validate(full=True)  # parquet may say of any bytes that they are text
    except (pa.ArrowException, NotImplementedError) as error:
        raise CollectionError(
            f"--metadata {file}, column {name!r}",
            expected="texts, numbers, true or false, dates or times",
            found=str(error).splitlines()[0],
            mend="write it as text, or leave it out",
        ) from error
    if unheld := first_unheld(kept):
        raise CollectionError(
            f"--metadata {file}, column {name!r}", expected=YEARS, found=unheld, mend=YEARS_MEND
        )
    return finite_or_null(kept)


def _stored_type(kind: pa.DataType) -> pa.DataType | None:
    """Choose the type in which values of `kind` are kept; None where there is none."""
    if isinstance(kind, pa.DictionaryType):
        return _stored_type(kind.value_type)
    if isinstance(kind, pa.TimestampType):
        return pa.timestamp("us", "UTC") if kind.tz else pa.timestamp("us")
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if is_text or pa.types.is_null(kind) or pa.types.is_time(kind):
        return pa.string()
    if pa.types.is_boolean(kind):
        return pa.bool_()
    if pa.types.is_integer(kind):
        return pa.int64()
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return pa.float64()
    return pa.date32() if pa.types.is_date(kind) else None


def _check_keys(file: Path, keys: Column) -> None:
    """Refuse a table in which a key is missing or stands twice."""
    if keys.null_count:
        row = int(np.flatnonzero(keys.is_null().to_numpy())[0])
        found = f"none in row {row + 1}"
    else:
        values, counts_M = keys.value_counts().flatten()
        twice = np.flatnonzero(counts_M.to_numpy() > 1)
        if not twice.size:
            return
        found = f"{counts_M[twice[0]]} rows of {values[twice[0]].as_py()!r}"
    raise CollectionError(
        f"--metadata {file}",
        expected="one row an image, with its key",
        found=found,
        mend="leave one row for each key",
    )
