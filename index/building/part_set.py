"""The parts of a build on disk: which are finished, which records are missing, how to add one.

Rules:
    The parts lie on a grid: part n covers `part_size` records from `n * part_size` on, the
    last of all may cover fewer. What a part holds does not depend on who made it or when, so
    that processes may share the work and a gap is filled at any time.
    A part is whole or absent, and its name says where it starts: what is there is done.
    A source must list the same keys when a killed build goes on; a file that was changed
    under its own name is not noticed.
    An image is kept once: of those of one id the first in the source's order. A vector that
    is not finite or not of length 1 is a reject.

Nothing is locked here: `index.building.parts` keeps other builds out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index.building.part_file import (
    COLUMNS,
    PART_ROW_SCHEMA,
    Part,
    RunKey,
    open_part,
    read_part,
    write_part,
)
from index.embed import EmbeddedBatch, Reject
from index.errors import CollectionError, SourceChangedError
from index.knn import COSINE
from index.storage.incoming import UNIT_TOLERANCE
from index.storage.segment import Block
from models.files import atomic_file
from models.image_source import ImageRecord

PART_PREFIX = "part-"

DUPLICATE_KEY, NOT_FINITE, NOT_UNIT = "duplicate_key", "not_finite", "not_unit"
"""Faults of a `Reject` that decoding does not see."""

log = logging.getLogger("horace.index")


@dataclass(frozen=True)
class RecordBatch:
    """Consecutive records of a source that are to be embedded together.

    Attributes:
        start: number of the first in the source.
        records: at most `batch_size` of them, within one part.
    """

    start: int
    records: list[ImageRecord]


@dataclass(frozen=True, kw_only=True)
class Share:
    """Every `of`-th part, from the `number`-th on: what one of several processes makes."""

    number: int = 0
    of: int = 1


class PartSet:
    """The parts of one run in a directory.

    Attributes:
        directory: where they lie.
        key: the parameters of the run.
        n_seen: records in the source, once `missing` has come to its end.
    """

    def __init__(self, directory: Path, key: RunKey, *, restart: bool = False) -> None:
        """Find what is finished; with `restart` nothing is, whatever lies there.

        Raises:
            CollectionError: the parts are of another run.
        """
        self.directory, self.key = directory, key
        self.n_seen: int | None = None
        self._parts: dict[int, Part] = {}
        self._repeats: dict[int, dict[int, str]] = {}
        """Of a part, by its start: rows whose ids earlier images have, and the keys of those."""
        if not restart:
            self.find()

    def find(self) -> None:
        """Look again at what is finished; damaged parts are left out, to be made anew.

        Raises:
            CollectionError: the parts are of another run.
        """
        self._parts.clear()
        for file in sorted(self.directory.glob(f"{PART_PREFIX}*.parquet")):
            part = open_part(file, self.key)
            if part is None:
                log.warning("%s is damaged and will be embedded again", file)
            elif file == self._file(part.start) and part.start % self.key.part_size == 0:
                self._parts[part.start] = part

    @property
    def finished(self) -> list[Part]:
        """The finished parts, in the source's order."""
        return [self._parts[start] for start in sorted(self._parts)]

    @property
    def n_records(self) -> int:
        """Records that finished parts cover."""
        return sum(part.n_records for part in self._parts.values())

    @property
    def n_images(self) -> int:
        """Images in finished parts; those whose id is taken count until `settle` has run."""
        return sum(map(self.count_images, self._parts))

    @property
    def rejects(self) -> list[Reject]:
        """The rejects of all finished parts, in order; the repeats once `settle` has run."""
        return list(chain.from_iterable(map(self._rejects, self.finished)))

    def number(self, start: int) -> int:
        """Number the part that a record is in."""
        return start // self.key.part_size

    def count_images(self, start: int) -> int:
        """Count the images of the finished part that starts at a record."""
        return self._parts[start].n_images - len(self._repeats.get(start, ()))

    def missing(
        self, records: Iterator[ImageRecord], share: Share | None = None
    ) -> Iterator[RecordBatch]:
        """Give the records that no part covers yet, in batches of which none crosses two parts.

        Args:
            records: every record of the source; none of those passed over is read.
            share: the parts that are wanted, and held against the source; all where None.

        Raises:
            SourceChangedError: the source lists others now.
            CollectionError: a part was damaged.
        """
        share, start = share or Share(), 0
        while True:
            part = self._parts.get(start)
            if self.number(start) % share.of != share.number:
                n_passed = sum(1 for _ in islice(records, self.key.part_size))
            elif part is not None:
                passed = [record.key for record in islice(records, part.n_records)]
                is_last = part.n_records < self.key.part_size
                extra = islice(records, 1 if is_last else 0)
                self._check_keys(part, [*passed, *(record.key for record in extra)])
                n_passed = part.n_records
            else:
                n_passed = 0
                mine = islice(records, self.key.part_size)
                while batch := list(islice(mine, self.key.batch_size)):
                    yield RecordBatch(start + n_passed, batch)
                    n_passed += len(batch)
            start += n_passed
            if n_passed < self.key.part_size:
                self.n_seen = start
                self._check_end(start)
                return

    def add(self, batches: Sequence[EmbeddedBatch]) -> None:
        """Write the part that these batches fill, which belong together and are in order."""
        start = batches[0].start
        assert start % self.key.part_size == 0, f"a part cannot start at record {start}"
        keys = [key for batch in batches for key in batch.keys]
        labels = [label for batch in batches for label in batch.labels]
        digests = [digest for batch in batches for digest in batch.digests]
        vectors_ND = np.concatenate([batch.vectors_ND for batch in batches])
        unsound = reject_unsound(keys, digests, vectors_ND)
        kept = [n for n in range(len(keys)) if n not in unsound]
        part = Part(
            file=self._file(start),
            start=start,
            n_records=sum(map(len, batches)),
            n_images=len(kept),
            rejects=(*(reject for batch in batches for reject in batch.rejects), *unsound.values()),
        )
        write_part(
            part,
            self.key,
            [keys[n] for n in kept],
            [labels[n] for n in kept],
            [digests[n] for n in kept],
            vectors_ND[kept],
        )
        self._parts[start] = part

    def adopt(self, start: int, data: bytes) -> int:
        """Write the part that starts at a record, made elsewhere; give its number of records.

        Args:
            start: of the part.
            data: its file.

        Raises:
            CollectionError: it is no part of this run.
        """
        file = self._file(start)
        with atomic_file(file) as temporary:
            temporary.write_bytes(data)
        part = open_part(file, self.key)
        if part is None or part.start != start:
            file.unlink()
            raise CollectionError(
                str(file), expected="a part of this run", found="something else that was sent"
            )
        self._parts[start] = part
        return part.n_records

    def settle(self) -> None:
        """Find the images whose id an earlier one has: from here on they are rejects.

        Memory holds some 80 bytes an image meanwhile, and of repeats their keys afterwards.

        Raises:
            CollectionError: a part was damaged after it was written.
        """
        parts = self.finished
        ids = [read_part(part, ["id"], self.key.dim)["id"].to_numpy() for part in parts]
        cuts = np.cumsum([0, *map(len, ids)])
        ids_N = np.concatenate([np.empty(0, np.int64), *ids])
        ids_M, first_M = np.unique(ids_N, return_index=True)
        repeats_R = np.setdiff1d(np.arange(len(ids_N)), first_M)
        earlier_R = first_M[np.searchsorted(ids_M, ids_N[repeats_R])]
        owners_R = np.searchsorted(cuts, repeats_R, side="right") - 1
        self._repeats = {}
        for n in np.unique(owners_R).tolist():
            mine_R, start = owners_R == n, parts[n].start
            rows = (repeats_R[mine_R] - cuts[n]).tolist()
            earlier = self._read_keys(parts, cuts, earlier_R[mine_R])
            self._repeats[start] = dict(zip(rows, earlier, strict=True))

    def _read_keys(
        self, parts: Sequence[Part], cuts: NDArray[np.int64], rows_R: NDArray[np.int64]
    ) -> list[str]:
        """Read the keys of images by their numbers among those of all parts."""
        owners_R = np.searchsorted(cuts, rows_R, side="right") - 1
        keys: dict[int, str] = {}
        for n in np.unique(owners_R).tolist():
            rows = np.unique(rows_R[owners_R == n])
            table = read_part(parts[n], ["key"], self.key.dim).take(rows - cuts[n])
            keys.update(zip(rows.tolist(), _texts(table["key"]), strict=True))
        return [keys[row] for row in rows_R.tolist()]

    def blocks(self) -> Iterator[Block]:
        """Read the finished parts, one at a time, as rows of a segment.

        Raises:
            CollectionError: a part was damaged after it was written.
        """
        for part in self.finished:
            table = read_part(part, COLUMNS, self.key.dim)
            repeats = self._repeats.get(part.start)
            if repeats:
                table = table.take(np.setdiff1d(np.arange(len(table)), list(repeats)))
            column = cast("pa.ListArray[pa.FloatScalar]", table["vector"].combine_chunks())
            vectors = column.flatten().to_numpy()
            source = pa.array([self.key.source] * len(table), pa.string())
            rows = table.drop_columns(["vector"]).append_column("source", source)
            yield Block(
                rows=rows.select(PART_ROW_SCHEMA.names)
                .cast(PART_ROW_SCHEMA)
                .replace_schema_metadata(),
                vectors_ND=vectors.reshape(len(table), self.key.dim),
            )

    def _rejects(self, part: Part) -> Iterator[Reject]:
        """Give the rejects of a part, the repeats last."""
        yield from part.rejects
        repeats = self._repeats.get(part.start)
        if repeats:
            table = read_part(part, ["key", "digest"], self.key.dim).take(list(repeats))
            columns = map(_texts, table.columns)
            for key, digest, earlier in zip(*columns, repeats.values(), strict=True):
                yield _repeated(key, digest, earlier)

    def _check_keys(self, part: Part, found: Sequence[str]) -> None:
        """Refuse a source that lists others than a part was made of."""
        table = read_part(part, ["key"], self.key.dim)
        keys = cast(list[str], table["key"].to_pylist())
        done = sorted([*keys, *(reject.key for reject in part.rejects)])
        if sorted(found) != done:
            gone = sorted(set(done) - set(found)) or sorted(set(found) - set(done)) or done
            raise SourceChangedError(
                self.key.source,
                expected=f"the images that {part.file} was made of",
                found=f"others, {gone[0]!r} among what differs",
                mend="the source has changed since: start anew with --restart",
            )

    def _check_end(self, n_records: int) -> None:
        """Refuse a source that ends before a part that was made of it begins."""
        behind = [part for part in self.finished if part.start >= n_records]
        if behind:
            raise SourceChangedError(
                self.key.source,
                expected=f"the images that {behind[0].file} was made of",
                found=f"no more than {n_records}",
                mend="the source has changed since: start anew with --restart",
            )

    def _file(self, start: int) -> Path:
        """Name the part that starts at a record."""
        return self.directory / f"{PART_PREFIX}{start:012}.parquet"


def _texts(column: pa.ChunkedArray[pa.StringScalar]) -> list[str]:
    """Give the values of a column without nulls."""
    return cast(list[str], column.to_pylist())


def reject_unsound(
    keys: Sequence[str],
    digests: Sequence[str],
    vectors_ND: NDArray[np.float32],
    *,
    metric: str = COSINE,
) -> dict[int, Reject]:
    """Reject, by its row, every image whose vector no search could compare."""
    lengths_N = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND, dtype=np.float64))
    is_sound_N = np.isfinite(lengths_N)
    if metric == COSINE:
        is_sound_N = np.abs(lengths_N - 1) <= UNIT_TOLERANCE  # False of NaN, too
    return {
        row: _unsound(keys[row], digests[row], float(lengths_N[row]))
        for row in np.flatnonzero(~is_sound_N).tolist()
    }


def _unsound(key: str, digest: str, length: float) -> Reject:
    """Reject an image whose vector has that length."""
    if np.isfinite(length):
        fault, fact = NOT_UNIT, f"expected a vector of length 1, found length {length:.4g}"
    else:
        fault, fact = NOT_FINITE, "expected a finite vector, found NaN or infinity"
    return Reject(key=key, fault=fault, message=fact, digest=digest)


def _repeated(key: str, digest: str, earlier: str) -> Reject:
    """Reject an image whose id an earlier one has, as a rule since it has its key."""
    if key == earlier:
        fact = "expected a key of its own, found an earlier image of this key"
    else:
        fact = f"expected an id of its own, found that of key {earlier!r}; rename one of the two"
    return Reject(key=key, fault=DUPLICATE_KEY, message=fact, digest=digest)
