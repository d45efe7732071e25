"""Parts: what a build has embedded so far, on disk, so that a killed build goes on.

Beside the collection `C` that is being built lies the directory `C.parts`. Each part is one
file of consecutive records, see `index.building.part_file`.

Rules:
    A part is whole or absent, and its name says where it starts: what is there is done.
    Parts of other parameters (source, encoder, sizes) are never mixed in: they are refused.
    One build at a time: the directory is locked while a process works in it.
    A source must list the same keys when a killed build goes on; a file that was changed
    under its own name is not noticed.
    An image is kept once: a second one of its id, or a vector that is not finite, is a reject.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index.building.part_file import COLUMNS, Part, RunKey, open_part, read_part, write_part
from index.collection import id_of
from index.embed import ImageBatch, Reject
from index.errors import CollectionError
from index.storage.rows import ROW_SCHEMA
from index.storage.segment import Block
from models.files import atomic_file
from models.image_source import ImageRecord

LOCK_FILE = "lock"
RUN_ID_FILE = "run-id"
PART_PREFIX = "part-"

DUPLICATE_KEY, NOT_FINITE = "duplicate_key", "not_finite"
"""Faults of a `Reject` that only a whole build can see."""

log = logging.getLogger("horace.index")


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
            kept = () if restart else (PART_PREFIX, RUN_ID_FILE)
            self._remove_all_but(LOCK_FILE, *kept)
            self.run_id = read_run_id(out) or self._start_run()
            self.finished = list(self._find_finished())
            self._ids: set[int] = set()
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

    def resume(self, records: Iterator[ImageRecord]) -> Iterator[ImageRecord]:
        """Go past the records of the finished parts, which must still be there.

        Args:
            records: every record of the source; none of those passed is read.

        Returns:
            The records that no part covers yet.

        Raises:
            CollectionError: the source lists others now, or a part was damaged.
        """
        for part in self.finished:
            table = read_part(part, ["id", "key"], self.key.dim)
            self._ids.update(cast(list[int], table["id"].to_pylist()))
            keys = cast(list[str], table["key"].to_pylist())
            done = sorted([*keys, *(reject.key for reject in part.rejects)])
            found = sorted(record.key for record in islice(records, part.n_records))
            if found != done:
                gone = sorted(set(done) - set(found)) or sorted(set(found) - set(done)) or done
                raise CollectionError(
                    self.key.source,
                    expected=f"the images that {part.file} was made of",
                    found=f"others, {gone[0]!r} among what differs",
                    mend="the source has changed since: start anew with --restart",
                )
        return records

    def add(self, batches: Sequence[ImageBatch], vectors: Sequence[NDArray[np.float32]]) -> None:
        """Write the next part: the batches that follow the finished ones, with their vectors."""
        keys = [key for batch in batches for key in batch.keys]
        labels = [label for batch in batches for label in batch.labels]
        vectors_ND = np.concatenate(vectors)
        kept, unsound = self._choose(keys, vectors_ND)
        part = Part(
            file=self._file(self.n_records),
            start=self.n_records,
            n_records=sum(len(batch) for batch in batches),
            n_images=len(kept),
            rejects=(*(reject for batch in batches for reject in batch.rejects), *unsound),
        )
        write_part(
            part, self.key, [keys[n] for n in kept], [labels[n] for n in kept], vectors_ND[kept]
        )
        self.finished.append(part)

    def _choose(
        self, keys: Sequence[str], vectors_ND: NDArray[np.float32]
    ) -> tuple[list[int], list[Reject]]:
        """Give the rows to keep, and why not the others."""
        kept, rejects = [], []
        is_finite_N = np.logical_and.reduce(np.isfinite(vectors_ND), axis=1)
        for row, key in enumerate(keys):
            id_ = id_of(key)
            if id_ in self._ids:
                message = f"{key}: expected a key of its own, found an earlier image of this key"
                rejects.append(Reject(key=key, fault=DUPLICATE_KEY, message=message))
            elif not is_finite_N[row]:
                message = f"{key}: expected a finite vector, found NaN or infinity"
                rejects.append(Reject(key=key, fault=NOT_FINITE, message=message))
            else:
                self._ids.add(id_)
                kept.append(row)
        return kept, rejects

    def blocks(self) -> Iterator[Block]:
        """Read the finished parts, one at a time, as rows of a segment.

        Raises:
            CollectionError: a part was damaged after it was written.
        """
        for part in self.finished:
            table = read_part(part, COLUMNS, self.key.dim)
            column = cast("pa.ListArray[pa.FloatScalar]", table["vector"].combine_chunks())
            vectors = column.flatten().to_numpy()
            source = pa.array([self.key.source] * len(table), pa.string())
            rows = table.drop_columns(["vector"]).append_column("source", source)
            yield Block(
                rows=rows.cast(ROW_SCHEMA).replace_schema_metadata(),
                vectors_ND=vectors.reshape(len(table), self.key.dim),
            )

    def discard(self) -> None:
        """Delete the directory: the collection is made, or nothing was.

        The run's name and the lock go last, so that a build killed here is still found.
        """
        with suppress(OSError):
            self._remove_all_but(LOCK_FILE, RUN_ID_FILE)
            (self.directory / RUN_ID_FILE).unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _file(self, start: int) -> Path:
        """Name the part that starts at a record."""
        return self.directory / f"{PART_PREFIX}{start:012}.parquet"

    def _remove_all_but(self, *kept: str) -> None:
        """Remove the entries of the directory whose names do not begin so."""
        for entry in self.directory.iterdir():
            if entry.name.startswith(kept):
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
            part = open_part(file, self.key)
            if part is None:
                log.warning("%s is damaged and will be embedded again", file)
                return
            yield part
            start += part.n_records


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
