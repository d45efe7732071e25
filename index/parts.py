"""Parts: what a build has embedded so far, on disk, so that a killed build goes on.

Beside the collection `C` that is being built lies the directory `C.parts`. Each part is one
parquet file of consecutive records: id, key, label and vector of every image, and in the
file's metadata the rejects and the parameters that the part belongs to.

Rules:
    A part is whole or absent, and its name says where it starts: what is there is done.
    Parts of other parameters (source, encoder, sizes) are never mixed in: they are refused.
    One build at a time: the directory is locked while a process works in it.
    A source is taken to be unchanged between a killed build and the next; of the changes
    that could be noticed, another number of images is.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index.collection import id_of
from index.embed import ImageBatch, Reject
from index.errors import CollectionError
from index.segment import ROW_SCHEMA, Block
from models.bundle import Json
from models.files import atomic_file, canonical_json

METADATA_KEY = b"horace.part"
LOCK_FILE = "lock"
RUN_ID_FILE = "run-id"

log = logging.getLogger("horace.index")


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


class PartStore:
    """The locked directory of parts. Use as a context manager."""

    def __init__(self, out: Path, key: RunKey, *, restart: bool = False) -> None:
        """Take the parts of the collection `out`, and keep every other build out.

        Args:
            out: the collection that is being built.
            key: the parameters of this run.
            restart: whether to drop the parts that may be there.

        Raises:
            CollectionError: another process is building, or the parts are of another run.
        """
        self.directory = parts_directory(out)
        self.key = key
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.directory / LOCK_FILE)
        try:
            self._clean(everything=restart)
            self.run_id = read_run_id(out) or self._start_run()
            self.finished = list(self._find_finished())
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> PartStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Unlock; the parts stay for the next run."""
        if not self.finished:
            self.discard()
        os.close(self._lock)

    @property
    def n_records(self) -> int:
        """Records that finished parts cover: where to go on."""
        return sum(part.n_records for part in self.finished)

    @property
    def n_images(self) -> int:
        """Images in finished parts."""
        return sum(part.n_images for part in self.finished)

    @property
    def rejects(self) -> list[Reject]:
        """The rejects of all finished parts, in order."""
        return [reject for part in self.finished for reject in part.rejects]

    def add(self, batches: Sequence[ImageBatch], vectors: Sequence[NDArray[np.float32]]) -> None:
        """Write the next part: the batches that follow the finished ones, with their vectors."""
        start = self.n_records
        rejects = tuple(reject for batch in batches for reject in batch.rejects)
        n_records = sum(len(batch) for batch in batches)
        metadata = {
            "key": self.key.to_json(),
            "start": start,
            "n_records": n_records,
            "rejects": [asdict(reject) for reject in rejects],
        }
        values = pa.array(np.concatenate(vectors).ravel(), pa.float32())
        keys = [key for batch in batches for key in batch.keys]
        labels = [label for batch in batches for label in batch.labels]
        table = pa.table(
            {
                "id": pa.array([id_of(key) for key in keys], pa.int64()),
                "key": pa.array(keys, pa.string()),
                "label": pa.array(labels, pa.string()),
                "vector": pa.FixedSizeListArray.from_arrays(values, self.key.dim),
            }
        ).replace_schema_metadata({METADATA_KEY: canonical_json(metadata)})
        file = self._file(start)
        with atomic_file(file) as temporary:
            pq.write_table(table, temporary, compression="none", write_page_checksum=True)
        self.finished.append(
            Part(file=file, start=start, n_records=n_records, n_images=len(keys), rejects=rejects)
        )

    def blocks(self) -> Iterator[Block]:
        """Read the finished parts, one at a time, as rows of a segment.

        Raises:
            CollectionError: a part was damaged after it was written.
        """
        for part in self.finished:
            try:
                with pq.ParquetFile(part.file, page_checksum_verification=True) as parquet:
                    table = parquet.read()
            except (pa.ArrowException, OSError) as error:
                raise CollectionError(
                    str(part.file),
                    expected="the part as it was written",
                    found=str(error).splitlines()[0],
                    mend="delete this file and run the same command again",
                ) from error
            column = cast("pa.ListArray[pa.FloatScalar]", table["vector"].combine_chunks())
            vectors = column.flatten().to_numpy()
            source = pa.array([self.key.source] * len(table), pa.string())
            rows = table.drop_columns(["vector"]).append_column("source", source)
            yield Block(
                rows=rows.cast(ROW_SCHEMA).replace_schema_metadata(),
                vectors_ND=vectors.reshape(len(table), self.key.dim),
            )

    def ids(self) -> NDArray[np.int64]:
        """Read the ids of all finished parts, in order."""
        columns = [
            pq.read_table(part.file, columns=["id"], partitioning=None)["id"].to_numpy()
            for part in self.finished
        ]
        return np.concatenate([np.empty(0, np.int64), *columns])

    def discard(self) -> None:
        """Delete the directory: the collection is made, or nothing was."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _file(self, start: int) -> Path:
        """Name the part that starts at a record."""
        return self.directory / f"part-{start:012}.parquet"

    def _clean(self, *, everything: bool) -> None:
        """Remove what killed processes left, and on request the parts."""
        for entry in self.directory.iterdir():
            is_part = entry.name.startswith("part-")
            is_kept = (is_part or entry.name == RUN_ID_FILE) and not everything
            if entry.name == LOCK_FILE or is_kept:
                continue
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _start_run(self) -> str:
        """Give this run a name of its own, which its later processes find."""
        run_id = uuid.uuid4().hex
        with atomic_file(self.directory / RUN_ID_FILE) as temporary:
            temporary.write_text(run_id)
        return run_id

    def _find_finished(self) -> Iterator[Part]:
        """List the parts from the first record on, up to the first that is missing."""
        start = 0
        while (file := self._file(start)).is_file():
            part = self._read_part(file)
            if part is None:
                log.warning("%s is damaged and will be embedded again", file)
                return
            yield part
            start += part.n_records

    def _read_part(self, file: Path) -> Part | None:
        """Read what a part says of itself; None where it cannot be read.

        Raises:
            CollectionError: it is sound, but of another run.
        """
        try:
            with pq.ParquetFile(file) as parquet:
                n_images = parquet.metadata.num_rows
                about = json.loads((parquet.schema_arrow.metadata or {})[METADATA_KEY])
            found, start, n_records = about["key"], about["start"], about["n_records"]
            rejects = tuple(Reject(**reject) for reject in about["rejects"])
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
            return None
        self._require_own(file, cast(Mapping[str, Json], found))
        return Part(file=file, start=start, n_records=n_records, n_images=n_images, rejects=rejects)

    def _require_own(self, file: Path, found: Mapping[str, Json]) -> None:
        """Refuse the parts of another run, and name what differs."""
        own = self.key.to_json()
        for name, value in own.items():
            if found.get(name) != value:
                raise CollectionError(
                    str(file),
                    expected=f"a part of this run, with {name} {value}",
                    found=f"one with {name} {found.get(name)}",
                    mend="finish that build with its own options, or drop its parts with --restart",
                )


def parts_directory(out: Path) -> Path:
    """Name the directory of the parts of a collection."""
    return out.with_name(f"{out.name}.parts")


def read_run_id(out: Path) -> str | None:
    """Give the name of the unfinished run of a collection; None where there is none."""
    file = parts_directory(out) / RUN_ID_FILE
    return file.read_text() if file.is_file() else None


def _lock(file: Path) -> int:
    """Lock a file and give its descriptor; the lock ends with the process.

    Raises:
        CollectionError: another process has it.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise CollectionError(
                str(file.parent),
                expected="no other build of this collection",
                found="one at work",
                mend="wait for it, or choose another --out",
            ) from error
        if file.exists() and os.fstat(descriptor).st_ino == file.stat().st_ino:
            return descriptor
        os.close(descriptor)  # its holder has just finished and deleted it
        file.parent.mkdir(parents=True, exist_ok=True)
