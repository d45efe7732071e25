"""`python -m index.export C --out X.parquet` or `--out DIR`: a collection for other programs.

    X.parquet   one table: id, key, label, source, the further metadata, and `vector`, a list of
                `dim` float32 a row.
    DIR         vectors.npy (N, D) float32, ids.npy (N,) int64 and rows.parquet (the table without
                the vectors), row by row the same images. It may be called X.npy.

Both hold the living images alone, in the order of the collection, or those that `--filter`
leaves, and say which encoder made the vectors: in the table's metadata, or in export.json.

Rules:
    What is exported is one snapshot: a writer meanwhile changes nothing of it. A Milvus has no
    snapshots: what is deleted there meanwhile ends the export.
    The output is whole or not there at all; what stood there is replaced on request only.
    Memory holds a block of vectors, whatever the collection's size.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tyro.conf import Positional

from index.errors import unwritable
from index.filters import parse_filter
from index.interface import AnyCollection, open_collection
from index.storage.incoming import VECTOR
from models.bundle import Json
from models.command import counted, progress, run_command
from models.errors import UsageError
from models.files import atomic_directory, atomic_file

BLOCK_ROWS = 16384
PARQUET = ".parquet"
VECTORS_FILE, IDS_FILE, ROWS_FILE = "vectors.npy", "ids.npy", "rows.parquet"
EXPORT_FILE = "export.json"
FACTS = b"horace"
"""Of a table's metadata: what it is."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write ids, keys, labels, metadata and vectors of a collection for other programs."""

    collection: Positional[str]
    """The collection's directory, or milvus:URI#NAME."""
    out: Path
    """X.parquet for one table with the vectors; any other name for a directory of .npy files."""
    filter: str | None = None
    """Which images to export, such as "label = 'Coat'"; all where none is given."""
    replace: bool = False
    """Whether an earlier export of that name may be replaced."""
    json: bool = False
    """Print what was written as JSON."""

    def __post_init__(self) -> None:
        """Refuse to write over anything that is not an earlier export."""
        if not self.out.exists() or (self.replace and self._is_export):
            return
        raise UsageError(
            f"--out {self.out}",
            expected="a new name" if not self.replace else "a new name, or an earlier export",
            found="something of that name",
            mend="choose another name"
            if not self._is_export or self.replace
            else "choose another name, or add --replace",
        )

    @property
    def is_table(self) -> bool:
        """Whether one Parquet file is written, vectors included."""
        return self.out.suffix.lower() == PARQUET

    @property
    def _is_export(self) -> bool:
        """Whether what stands there is of the kind that would be written."""
        return _is_our_table(self.out) if self.is_table else (self.out / EXPORT_FILE).is_file()


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Attributes:
        collection: its name.
        fingerprint: of the encoder that made the vectors.
        metric: how they are compared.
        dim: length of a vector.
        count: images.
        filter: which images were chosen; all where None.
        columns: of the metadata.
    """

    collection: str
    fingerprint: str
    metric: str
    dim: int
    count: int
    filter: str | None
    columns: list[str]


def _is_our_table(file: Path) -> bool:
    """Tell whether a file is a table that an export wrote, by what such a one says of itself."""
    try:
        return file.is_file() and FACTS in (pq.read_schema(file).metadata or {})
    except (pa.ArrowException, OSError):
        return False


def main(options: ExportOptions) -> None:
    """Export, and say what was written.

    Raises:
        HoraceError: the collection cannot be read, the filter not be meant, or the place not be
            written to.
    """
    with closing(open_collection(options.collection)) as collection:
        exported = export(collection, options)
    if options.json:
        print(json.dumps({"out": str(options.out), **dataclasses.asdict(exported)}, indent=2))
    else:
        print(f"{options.out}: {counted(exported.count, 'image')} of {exported.dim} dimensions")


def export(collection: AnyCollection, options: ExportOptions) -> Exported:
    """Write what is in a collection; it appears whole.

    Raises:
        FilterError: the filter cannot be read.
        CollectionError: the place cannot be written to.
    """
    rows = collection.table()
    if options.filter is not None:
        rows = rows.filter(parse_filter(options.filter, rows.schema))
    schema = rows.schema
    exported = Exported(
        collection=collection.name,
        fingerprint=collection.fingerprint,
        metric=collection.metric,
        dim=collection.dim,
        count=len(rows),
        filter=options.filter,
        columns=list(schema.names),
    )
    blocks = _read(collection, rows)
    try:
        if options.is_table:
            with atomic_file(options.out) as file:
                _write_table(file, blocks, schema, exported)
        else:
            with atomic_directory(options.out, replace=options.replace) as directory:
                _write_arrays(directory, blocks, schema, exported)
    except OSError as error:
        where = f"--out {options.out}"
        raise unwritable(where, "a place that can be written to", error) from error
    return exported


def _read(
    collection: AnyCollection, rows: pa.Table
) -> Iterator[tuple[pa.Table, NDArray[np.float32]]]:
    """Give metadata and vectors block by block."""
    blocks = (rows.slice(start, BLOCK_ROWS) for start in range(0, len(rows), BLOCK_ROWS))
    for block in progress(blocks, what="exporting", total=len(rows), size=len):
        yield block, collection.vectors(block["id"].to_numpy())


def _write_table(
    file: Path,
    blocks: Iterator[tuple[pa.Table, NDArray[np.float32]]],
    schema: pa.Schema,
    exported: Exported,
) -> None:
    """Write one table, the vectors as its last column."""
    vectors = pa.field(VECTOR, pa.list_(pa.float32(), exported.dim), nullable=False)
    facts = {FACTS: json.dumps(_facts(exported)).encode()}
    whole = schema.append(vectors).with_metadata(facts)
    with pq.ParquetWriter(file, whole, compression="zstd") as writer:
        for rows, vectors_ND in blocks:
            values = pa.array(vectors_ND.ravel())
            column = pa.FixedSizeListArray.from_arrays(values, exported.dim)
            writer.write_table(rows.append_column(vectors, column).cast(whole))


def _write_arrays(
    directory: Path,
    blocks: Iterator[tuple[pa.Table, NDArray[np.float32]]],
    schema: pa.Schema,
    exported: Exported,
) -> None:
    """Write vectors and ids as arrays, the metadata as a table beside them."""
    shape = (exported.count, exported.dim)
    with (
        (directory / VECTORS_FILE).open("wb") as vectors,
        (directory / IDS_FILE).open("wb") as ids,
        pq.ParquetWriter(directory / ROWS_FILE, schema, compression="zstd") as writer,
    ):
        _write_header(vectors, "<f4", shape)
        _write_header(ids, "<i8", shape[:1])
        for rows, vectors_ND in blocks:
            vectors.write(np.ascontiguousarray(vectors_ND, "<f4").data)
            ids.write(np.ascontiguousarray(rows["id"].to_numpy(), "<i8").data)
            writer.write_table(rows)
    text = json.dumps(_facts(exported), indent=2)
    (directory / EXPORT_FILE).write_text(text + "\n")


def _write_header(file: object, descr: str, shape: tuple[int, ...]) -> None:
    """Write the head of an array whose rows follow block by block."""
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]  # any that writes


def _facts(exported: Exported) -> dict[str, Json]:
    """Say in the output what it is."""
    facts: dict[str, Json] = dataclasses.asdict(exported)
    return facts


if __name__ == "__main__":
    sys.exit(run_command(ExportOptions, main, prog="python -m index.export"))
