"""The file of one part of a build: images in parquet, and in its metadata what it belongs to.

Columns are id, key, label, digest and vector of every image; the metadata holds the parameters of
the run, where the part starts, how many records it covers, and the rejects among them.

Rules:
    Pages carry checksums: a byte that a disk has lost is found when the part is read.
    A part of other parameters is refused, and the error names what differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index.collection import id_of
from index.embed import Reject
from index.errors import CollectionError, SourceChangedError
from index.storage.rows import DIGEST, ROW_SCHEMA
from models.bundle import Json
from models.files import atomic_file, canonical_json

METADATA_KEY = b"horace.part"
COLUMNS = ("id", "key", "label", "digest", "vector")
PART_ROW_SCHEMA = pa.schema([*ROW_SCHEMA, (DIGEST, pa.string())])
"""Of the rows that come out of a part."""


@dataclass(frozen=True, kw_only=True)
class RunKey:
    """What decides the parts; a part of one key is of no use to another.

    Attributes:
        source: URI of the images.
        source_count: records in the source, where it can tell.
        fingerprint: of the encoder.
        dim: length of a vector.
        batch_size: images that are encoded at once; runtimes may round another way in
            batches of another size.
        part_size: records a part.
    """

    source: str
    source_count: int | None
    fingerprint: str
    dim: int
    batch_size: int
    part_size: int

    def to_json(self) -> dict[str, Json]:
        """Give the key as it stands in parts and in the manifest's build report."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One finished part.

    Attributes:
        file: its parquet file.
        start: number of its first record in the source.
        n_records: records that it covers, images and rejects.
        n_images: images in it.
        rejects: the records that could not be used.
    """

    file: Path
    start: int
    n_records: int
    n_images: int
    rejects: tuple[Reject, ...]


def write_part(
    part: Part,
    key: RunKey,
    keys: Sequence[str],
    labels: Sequence[str | None],
    digests: Sequence[str],
    vectors_ND: NDArray[np.float32],
) -> None:
    """Write a part's file, whole or not at all."""
    metadata = {
        "key": key.to_json(),
        "start": part.start,
        "n_records": part.n_records,
        "rejects": [asdict(reject) for reject in part.rejects],
    }
    values = pa.array(vectors_ND.ravel(), pa.float32())
    table = pa.table(
        {
            "id": [id_of(key) for key in keys],
            "key": keys,
            "label": labels,
            DIGEST: digests,
            "vector": pa.FixedSizeListArray.from_arrays(values, key.dim),
        },
        schema=_schema(COLUMNS, key.dim),
    ).replace_schema_metadata({METADATA_KEY: canonical_json(metadata)})
    with atomic_file(part.file) as temporary:
        # A dictionary of what never repeats costs time; that of the labels would spare little.
        pq.write_table(
            table, temporary, compression="none", use_dictionary=False, write_page_checksum=True
        )


def open_part(file: Path, key: RunKey) -> Part | None:
    """Read what a part says of itself; None where it cannot be read.

    Raises:
        CollectionError: it is sound, but of another run.
    """
    try:
        with pq.ParquetFile(file) as parquet:
            n_images = parquet.metadata.num_rows
            if parquet.schema_arrow.names != list(COLUMNS):
                return None
            about = json.loads((parquet.schema_arrow.metadata or {})[METADATA_KEY])
        found, start, n_records = dict(about["key"]), int(about["start"]), int(about["n_records"])
        rejects = tuple(Reject(**reject) for reject in about["rejects"])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None
    _require_own(file, key, cast(Mapping[str, Json], found))
    return Part(file=file, start=start, n_records=n_records, n_images=n_images, rejects=rejects)


def read_part(part: Part, columns: Sequence[str], dim: int) -> pa.Table:
    """Read columns of a part, every page held against its checksum.

    Raises:
        CollectionError: the part was damaged after it was written.
    """
    try:
        with pq.ParquetFile(part.file, page_checksum_verification=True) as parquet:
            table = parquet.read(columns=list(columns)).replace_schema_metadata()
        found = f"{len(table)} rows of {', '.join(table.column_names)}"
        sound = len(table) == part.n_images and table.schema.equals(_schema(columns, dim))
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        found, sound = str(error).splitlines()[0], False
    if not sound:
        raise CollectionError(
            str(part.file),
            expected="the part as it was written",
            found=found,
            mend="delete this file and run the same command again",
        )
    return table


def _schema(columns: Sequence[str], dim: int) -> pa.Schema:
    """Give the types of columns of a part."""
    types = {field.name: field.type for field in PART_ROW_SCHEMA}
    types["vector"] = pa.list_(pa.float32(), dim)
    return pa.schema({name: types[name] for name in columns})


def _require_own(file: Path, key: RunKey, found: Mapping[str, Json]) -> None:
    """Refuse the parts of another run, and name what differs."""
    differing = [name for name, value in key.to_json().items() if found.get(name) != value]
    if differing:
        kind = SourceChangedError if differing == ["source_count"] else CollectionError
        name = differing[0]
        raise kind(
            str(file),
            expected=f"a part of this run, with {name} {key.to_json()[name]}",
            found=f"one with {name} {found.get(name)}",
            mend="finish that build with its own options, or drop its parts with --restart",
        )
