"""Reads rows.parquet of a segment, which may be forged: no more than its rows may take.

Rules:
    Some bytes of parquet can stand for any number of equal texts: texts are read as the codes
    that the file has, and laid out once it is known how long they become.
    What the file says of its sizes is asked first, and not believed.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from index.storage.rows import MAX_ROW_BYTES, is_row_schema, row_bytes

READ_ROWS = 1 << 14
"""Rows of metadata that are laid out at a time."""

SLACK_BYTES = 1 << 20
"""What the pages of a parquet file may have besides their rows: heads, codes of few rows."""


def read_table(file: Path, count: int) -> pa.Table:
    """Read a table of `count` rows, or less of what is none: never more than such rows may take.

    Raises:
        ValueError: it has more bytes than so many rows may have.
    """
    most = count * MAX_ROW_BYTES
    with pq.ParquetFile(file) as parquet:
        metadata, schema = parquet.metadata, parquet.schema_arrow.remove_metadata()
        if metadata.num_rows != count or not is_row_schema(schema):
            return schema.empty_table()
        groups = range(metadata.num_row_groups)
        if sum(metadata.row_group(n).total_byte_size for n in groups) > most + SLACK_BYTES:
            raise ValueError(f"more than {most} bytes")
        texts = [one.name for one in schema if pa.types.is_string(one.type)]
    batches, n_bytes = [], 0
    with pq.ParquetFile(file, read_dictionary=texts) as parquet:
        for codes in parquet.iter_batches(READ_ROWS):
            codes.validate(full=True)  # of a forged file: codes of no text, text that is no UTF-8
            n_bytes += int(row_bytes(codes).sum())
            if n_bytes > most:
                raise ValueError(f"more than {most} bytes")
            columns = [
                column.cast(one.type) for column, one in zip(codes.columns, schema, strict=True)
            ]
            batches.append(pa.RecordBatch.from_arrays(columns, schema=schema))
    return pa.Table.from_batches(batches, schema=schema)
