"""The one who writes a collection: adds, replaces and deletes images, and tidies up.

Rules:
    One writer a collection, in whatever process: the others are refused.
    When a call returns, its write is on the disk and in `collection`; a process that is killed
    before has written all of it or nothing.
    Snapshots that were taken stay as they are; files that they need are deleted under them,
    which a process that has them open does not notice.
    Any number of threads may call; their writes come one after the other.
    A change that is broken off at any line, as by Ctrl-C, may be in the files and not in memory:
    the writer takes no more then. Whoever opens the collection anew has all of it or nothing.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from index.collection import Collection
from index.errors import CollectionError, first_line, mend_of
from index.knn import COSINE
from index.storage.compaction import choose_segments
from index.storage.creating import create_collection
from index.storage.ids import as_ids
from index.storage.incoming import check_keys, check_table, check_vectors, prepare_rows
from index.storage.journal import JournalFile
from index.storage.lock import take_lock
from index.storage.manifest import read_manifest
from index.storage.merging import (
    Whole,
    is_whole,
    merge,
    still_alive,
    whole_aside,
    with_index,
)
from index.storage.publishing import (
    begin_journal,
    new_segment_name,
    publish,
    removed_unless_named,
    sweep,
    write_parts,
)
from index.storage.records import DELETE, PUT, Delete, encode_delete, encode_put
from index.storage.rows import unify
from index.storage.segment import FLAT, Block
from index.storage.snapshot import Part
from index.storage.store import Store
from models.bundle import Json
from models.cpu import cpu_budget
from models.errors import HoraceError, UsageError, reason_of

SEAL_ROWS, SEAL_BYTES = 16_384, 64 << 20
"""Rows of the delta, or records or bytes of the journal, from which the delta becomes a segment:
beyond, searching it takes milliseconds, and opening the collection a moment."""

log = logging.getLogger("horace.index")


class CollectionWriter:
    """The open writer of a collection. Use as a context manager, or close it.

    One that is dropped lets others in when it is collected as garbage.
    """

    def __init__(self, lock: int, store: Store, *, threads: int) -> None:
        """Take over a locked collection; use `open` or `create`."""
        self.path = store.path
        self._descriptor: int | None = lock
        self._store = store
        self._threads = threads
        self._lock, self._compaction = threading.RLock(), threading.Lock()
        self._seal_rows, self._seal_bytes = SEAL_ROWS, SEAL_BYTES
        self._journal: JournalFile | None = None
        self._is_broken = False
        store.is_written_here = True
        sweep(store.path, store.manifest)
        if store.manifest.journal is not None:
            self._open_journal()
        self._take_over()
        self._let_go = weakref.finalize(self, _let_go, lock, store)
        self._let_go.atexit = False  # the lock ends with the process

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        name: str,
        fingerprint: str,
        dim: int,
        encoder: str = "",
        preprocessing: Mapping[str, Json] | None = None,
        metric: str = COSINE,
        threads: int | None = None,
    ) -> CollectionWriter:
        """Make an empty collection and open it.

        Args:
            path: a directory that does not exist.
            name: a word for people.
            fingerprint: of the encoder whose vectors it will hold.
            dim: length of a vector.
            encoder: that encoder's URI or absolute path.
            preprocessing: of that encoder, as JSON.
            metric: `cosine`, or `euclidean` for vectors of any length.
            threads: CPU threads of a search; the CPU budget where None.

        Raises:
            UsageError: the path exists, or dim or metric make no sense.
        """
        create_collection(
            Path(path), name=name, fingerprint=fingerprint, dim=dim, encoder=encoder,
            preprocessing=preprocessing or {}, metric=metric,
        )  # fmt: skip
        return cls.open(path, threads=threads)

    @classmethod
    def open(
        cls, path: str | Path, *, verify: bool = True, threads: int | None = None
    ) -> CollectionWriter:
        """Open a collection to write to it.

        What a writer that was killed has left is taken over, where it was written whole, and
        swept away elsewhere.

        Args:
            path: the collection's directory.
            verify: whether to hash every file that is read.
            threads: CPU threads of a search; the CPU budget where None.

        Raises:
            CollectionLockedError: another writer has it; names its process.
            CollectionError: there is none, or a file is missing, damaged or foreign.
        """
        path = Path(path)
        read_manifest(path)  # before a lock is put where no collection is
        lock = take_lock(path)
        try:
            return cls(lock, Store(path, verify=verify), threads=threads or cpu_budget())
        except BaseException:
            os.close(lock)
            raise

    def __enter__(self) -> CollectionWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other writers in; waits for what is under way. Snapshots stay usable."""
        with self._compaction, self._lock:
            if self._descriptor is not None:
                self._descriptor = None
                self._let_go()

    @property
    def collection(self) -> Collection:
        """What is there after the last write that was acknowledged; it never changes."""
        return self._collection

    def add(self, rows: pa.Table, vectors_ND: ArrayLike, *, fingerprint: str) -> None:
        """Add images that are not there.

        Args:
            rows: key, source and, where known, label of each, and further columns; an id is
                computed of the key.
            vectors_ND: (n, D) float32, of unit length where the metric is cosine.
            fingerprint: of the encoder that made them.

        Raises:
            FingerprintMismatchError: another encoder made the vectors.
            UsageError: rows or vectors are not of this shape, or a key is there already.
            CollectionError: the disk refuses, or another key has the same id.
        """
        self._put(rows, vectors_ND, fingerprint, replace=False)

    def upsert(self, rows: pa.Table, vectors_ND: ArrayLike, *, fingerprint: str) -> None:
        """Add images, in the place of those that have their keys; see `add`."""
        self._put(rows, vectors_ND, fingerprint, replace=True)

    def delete(self, ids: ArrayLike) -> int:
        """Take images out; give how many of the ids were there.

        Raises:
            UsageError: what is given is no whole numbers.
            CollectionError: the disk refuses.
        """
        asked = np.unique(as_ids(ids))
        with self._lock:
            self._require_open()
            parts, _ = self._store.snapshot.locate(asked)
            there = asked[parts >= 0]
            if there.size:
                self._write(DELETE, encode_delete(there), Delete(ids=there))
        return len(there)

    def seal(self) -> None:
        """Make a segment of the delta and begin a new journal; nothing where neither has any."""
        with self._lock, _disk(self.path):
            self._require_open()
            self._seal()

    def compact(self, *, all: bool = False) -> None:
        """Seal, then merge segments that are small, have many dead rows, or lack an index.

        Other threads may write meanwhile; what they write survives. Where an index goes whose
        recall was measured, the log says so.

        Args:
            all: whether to merge every segment into one, without dead rows.

        Raises:
            CollectionError: the disk refuses, or a column is of another type since this began;
                nothing has changed then.
        """
        with self._compaction, _disk(self.path):
            with self._lock:
                self._require_open()
                self._seal()
                parts = self._store.snapshot.parts
                chosen = choose_segments(self._store.manifest.segments, all=all)
                if not chosen:
                    return
                name = new_segment_name(self._store)
            merged = [part for part in parts if part.segment.entry.name in chosen]
            new = merge(self._store, merged, name=name)
            with self._lock, self._changing(), removed_unless_named(self._store, new):
                self._require_same_types(merged)
                new = replace(new, alive_N=still_alive(merged, self._store.snapshot))
                tuning = self._store.manifest.tuning
                publish(self._store, added=new, merged=chosen)
                self._take_over()
            if tuning and not self._collection.manifest.tuning:
                self._tell_untuned(tuning)

    @contextmanager
    def whole(self) -> Iterator[Whole]:
        """Give all living rows as one segment, for somebody to make an index of them.

        Where there are several segments, deleted rows, or rows in no segment yet, that one is
        written beside them, and is gone after the block; only `replace_index` changes anything
        that readers see. Other threads may write in the block; who compacts waits for its end.

        Raises:
            UsageError: there is no row.
            CollectionError: the disk refuses.
        """
        with ExitStack() as stack:
            stack.enter_context(self._compaction)
            with _disk(self.path):
                with self._lock:
                    self._require_open()
                    self._seal()
                    parts = self._store.snapshot.parts
                    if not parts:
                        raise UsageError(
                            f"collection {self.path}",
                            expected="images to make an index of",
                            found="none",
                        )
                    name = None if is_whole(parts) else new_segment_name(self._store)
                if name is None:
                    whole = Whole(part=parts[0], merged=parts)
                else:
                    whole = stack.enter_context(whole_aside(self._store, parts, name=name))
            yield whole

    def replace_index(
        self,
        whole: Whole,
        file: Path | None,
        *,
        factory: str,
        parameters: Mapping[str, int],
        tuning: Mapping[str, Json],
    ) -> None:
        """Put one segment with another index in the place of those that it was made of.

        What was written since `whole` survives.

        Args:
            whole: the rows, within the block of the method of that name.
            file: the FAISS index over them, in their order; None for `Flat`. It is copied.
            factory: of the index.
            parameters: search parameters for callers that name no others.
            tuning: the report of how these were chosen, for the manifest.

        Raises:
            CollectionError: the file is no such index, the disk refuses, or every row was deleted
                meanwhile.
        """
        with self._lock, _disk(self.path):
            self._require_open()
            merged = [part.segment.entry.name for part in whole.merged]
            there = [part.segment.entry.name for part in self._store.snapshot.parts]
            if not set(merged) & set(there):
                raise CollectionError(
                    f"collection {self.path}",
                    expected="rows of which the index was made",
                    found="all of them deleted meanwhile",
                    mend="make the index again, of what is there now",
                )
            self._require_same_types(whole.merged)
            new = with_index(
                self._store, whole.part, file, name=new_segment_name(self._store), factory=factory,
                parameters=parameters,
            )  # fmt: skip
            new = replace(new, alive_N=still_alive(whole.merged, self._store.snapshot))
            with self._changing(), removed_unless_named(self._store, new):
                publish(self._store, added=new, merged=merged, tuning=tuning)
                self._take_over()

    def _put(
        self, rows: pa.Table, vectors_ND: ArrayLike, fingerprint: str, *, replace: bool
    ) -> None:
        """Write images."""
        self._collection.require(fingerprint)
        check_table(rows)
        vectors = check_vectors(
            vectors_ND, len(rows), dim=self._store.manifest.dim, metric=self._store.manifest.metric
        )
        with self._lock:
            self._require_open()
            snapshot = self._store.snapshot
            table = prepare_rows(rows, snapshot.schema)
            check_keys(table, snapshot.keys_of(table["id"].to_numpy()), replace=replace)
            if len(table):
                block = Block(rows=table, vectors_ND=vectors)
                self._write(PUT, encode_put(block), block)

    def _write(self, kind: int, body: Sequence[bytes | memoryview], change: Block | Delete) -> None:
        """Put a change into the journal, then into memory, then into the collection."""
        self._store.require_current()
        with _disk(self.path):
            journal = self._open_journal()
        with self._changing():
            position = journal.append(kind, body, self._store.position)
            self._store.apply(change, position)
            self._store.publish()
            self._take_over()
        written = max(self._store.contents.delta.n_rows, position.n_records)
        if written >= self._seal_rows or position.end >= self._seal_bytes:
            self._seal_when_large()

    def _seal_when_large(self) -> None:
        """Make a segment of a large delta; what was written is safe without."""
        try:
            self._seal()
        except (OSError, HoraceError) as error:
            log.warning("%s: the delta stays in the journal: %s", self.path, error)
            self._seal_rows, self._seal_bytes = 2 * self._seal_rows, 2 * self._seal_bytes

    def _seal(self) -> None:
        """Make a segment of the delta, where anything was written since the last."""
        store = self._store
        store.require_current()
        if store.position.n_records == 0:
            return
        added = None
        if store.contents.delta.n_alive:
            added = write_parts(
                store, store.snapshot.parts[-1:], name=new_segment_name(self._store), factory=FLAT,
                parameters={}, is_provisional=True,
            )  # fmt: skip
        with self._changing(), removed_unless_named(store, added):
            publish(store, added=added, journal=begin_journal(store))
            self._journal = None
            self._take_over()

    def _open_journal(self) -> JournalFile:
        """Give the journal to append to, and begin one where there is none."""
        if self._journal is None:
            if self._store.manifest.journal is None:
                with self._changing():
                    publish(self._store, journal=begin_journal(self._store))
            entry = self._store.manifest.journal
            assert entry is not None
            journal = JournalFile(self.path, entry, writable=True)
            journal.cut(self._store.position)
            self._journal = journal
        return self._journal

    def _tell_untuned(self, tuning: Mapping[str, Json]) -> None:
        """Say that nobody has measured the index that there is now, unless it was and is exact."""
        chosen = tuning.get("chosen")
        factory = chosen.get("factory") if isinstance(chosen, dict) else None
        if factory == self._collection.factory == FLAT:
            return
        asked = "".join(f" --{name} {tuning[name]}" for name in ("recall", "k") if name in tuning)
        log.warning(
            "%s: recall was measured of the index before, and not of the present %s; "
            "run `python -m index.tune %s%s`",
            self.path, self._collection.factory, self.path, asked,
        )  # fmt: skip

    def _take_over(self) -> None:
        """Make the store's snapshot the collection."""
        self._collection = Collection(self._store, self._store.snapshot, threads=self._threads)

    def _require_same_types(self, merged: Sequence[Part]) -> None:
        """Refuse a merge that has a column which was written with another type meanwhile.

        It can be so where all rows that had the column were deleted first: it was nobody's then.
        """
        try:
            unify([self._store.snapshot.schema, *(part.segment.rows.schema for part in merged)])
        except pa.ArrowException as error:
            raise CollectionError(
                f"collection {self.path}",
                expected="columns of the types that they had when this began",
                found=first_line(error),
                mend="do it again",
            ) from error

    def _require_open(self) -> None:
        """Refuse to write once others may."""
        if self._descriptor is None:
            raise CollectionError(f"writer of {self.path}", expected="an open one", found="closed")
        if self._is_broken:
            raise CollectionError(
                f"writer of {self.path}",
                expected="one whose writes were all finished",
                found="one that was broken off",
                mend="close it and open the collection again; what was acknowledged is there",
            )

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Take no more where a change is broken off: memory may not be what the files are.

        What the disk refuses before there is another manifest leaves both as they were; of the
        journal, it says itself that it takes no more.
        """
        before = self._store.manifest
        try:
            yield
        except BaseException as error:
            is_refusal = isinstance(error, (OSError, HoraceError))
            if not is_refusal or self._store.manifest is not before:
                self._is_broken = True
            raise


def _let_go(lock: int, store: Store) -> None:
    """Let other writers in."""
    store.is_written_here = False
    os.close(lock)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Say in one line what the disk refuses."""
    try:
        yield
    except OSError as error:
        raise CollectionError(
            str(path),
            expected="a collection that can be written, with room for more",
            found=reason_of(error),
            mend=f"{mend_of(error)}; nothing was lost",
        ) from error
