"""A collection in memory: what its files hold now, and snapshots of it that share what is equal.

Rules:
    A new snapshot shares every segment that stayed: files are opened, and held against their
    checksums, once.
    A file that is gone, or is another, because the collection was written meanwhile, is no
    fault: the manifest has changed as well, and reading begins again with the new one.
    Any number of threads may ask for the latest snapshot; one of them looks at the files.
    What could not be read is read again by whoever asks next: until all is, nothing is the latest.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.errors import CollectionError
from index.storage.delta import Delta
from index.storage.journal import JournalFile, Position
from index.storage.manifest import (
    FileEntry,
    Manifest,
    ManifestFile,
    SegmentEntry,
    check_file,
    unreadable,
)
from index.storage.records import Delete, decode
from index.storage.segment import Block, Segment, open_array, open_segment, segment_files
from index.storage.snapshot import Part, Snapshot


class Contents:
    """Segments, which of their rows are alive, and the delta; one thread at a time changes it."""

    def __init__(
        self, manifest: Manifest, segments: Sequence[Segment], alive: list[NDArray[np.bool_] | None]
    ) -> None:
        """Begin with what the manifest says, before anything in the journal."""
        self.manifest = manifest
        self._segments = segments
        self._alive = alive
        self._is_own = [False] * len(alive)
        """Whether each was copied since the last snapshot, so that none has it."""
        self._counts = [entry.count - entry.dead for entry in manifest.segments]
        self.delta = Delta(manifest.dim, manifest.metric)

    def put(self, block: Block) -> None:
        """Add rows, in the place of what has their ids."""
        self.kill(block.rows["id"].to_numpy())
        self.delta.add(block)

    def kill(self, ids: NDArray[np.int64]) -> int:
        """Declare the rows of ids dead, each of which is there once; give how many were alive."""
        killed = self.delta.kill(ids)
        for number, segment in enumerate(self._segments):
            rows_N = segment.find(ids)
            rows_N = rows_N[rows_N >= 0]
            alive_N = self._alive[number]
            if alive_N is not None:
                rows_N = rows_N[alive_N[rows_N]]
            if rows_N.size:
                self._own_mask(number)[rows_N] = False
                self._counts[number] -= len(rows_N)
                killed += len(rows_N)
        return killed

    def snapshot(self, n_records: int) -> Snapshot:
        """Give what is there now."""
        parts = [
            Part(segment=segment, alive_N=alive_N, count=count)
            for segment, alive_N, count in zip(
                self._segments, self._alive, self._counts, strict=True
            )
        ]
        if self.delta.n_rows:
            segment, alive_N = self.delta.view()
            parts.append(Part(segment=segment, alive_N=alive_N, count=self.delta.n_alive))
        self._is_own = [False] * len(self._alive)
        version = (self.manifest.generation, n_records)
        return Snapshot(manifest=self.manifest, version=version, parts=tuple(parts))

    def _own_mask(self, number: int) -> NDArray[np.bool_]:
        """Give the mask of a segment to write to: older snapshots have the one that was.

        It is copied once a snapshot, and not once a record: a journal has many thousands.
        """
        alive_N = self._alive[number]
        if alive_N is None or not self._is_own[number]:
            count = self._segments[number].entry.count
            alive_N = np.ones(count, np.bool_) if alive_N is None else alive_N.copy()
            self._alive[number], self._is_own[number] = alive_N, True
        return alive_N


class Store:
    """The files of a collection and the latest snapshot of them."""

    def __init__(self, path: Path, *, verify: bool) -> None:
        """Read everything.

        Args:
            path: the collection's directory.
            verify: whether to hash every file that is read.

        Raises:
            CollectionError: there is none, or a file is missing, damaged or foreign.
        """
        self.path = path
        self.is_written_here = False
        """Whether a writer of this process keeps the snapshot up to date."""
        self.next_segment = 0
        """Above the number of every segment that a writer has begun here."""
        self._verify = verify
        self._lock = threading.Lock()
        self._segments: dict[str, tuple[list[FileEntry | None], Segment]] = {}
        self.load()

    def latest(self) -> Snapshot:
        """Give what the files hold now: the same snapshot where they have not changed.

        Raises:
            CollectionError: a file that is new is missing, damaged or foreign.
        """
        if self.is_written_here:
            return self.snapshot
        with self._lock:
            if not self.is_current() or not self._is_longer():
                self.load()
            else:
                self._replay()
            return self.snapshot

    def is_current(self) -> bool:
        """Tell whether the manifest that was read last still stands in its place."""
        return self._file.is_current()

    def require_current(self) -> None:
        """Refuse to write where nobody would ever read it.

        Raises:
            CollectionError: another collection stands at the path, or none.
        """
        if not self.is_current():
            raise CollectionError(
                str(self.path),
                expected="the collection that this writer opened",
                found="another one, or none",
                mend="open it again; what was moved away or replaced has what was written before",
            )

    def is_latest(self, snapshot: Snapshot) -> bool:
        """Tell whether a snapshot is the latest, by the status of files alone."""
        if self.is_written_here or snapshot is not self.snapshot:
            return snapshot is self.snapshot
        is_whole = self.journal is None or self.journal.size_bytes() == self.position.end
        return self._is_published and is_whole and self.is_current()

    def load(self) -> None:
        """Read the manifest and everything that it names, but segments that are open."""
        while True:
            file = ManifestFile(self.path)
            try:
                contents, journal = self._open(file.manifest)
            except (CollectionError, OSError) as error:
                if not file.is_current():
                    continue
                if isinstance(error, CollectionError):
                    raise
                raise unreadable(self.path, error) from error
            if file.is_here():  # else some files may be of the one directory, some of the other
                break
        self._file, self.contents, self.journal = file, contents, journal
        self.manifest = file.manifest
        self.position, self._is_published = Position(), False
        self._replay()

    def keep(self, segment: Segment, manifest: Manifest) -> None:
        """Have an open segment ready for the manifest that will name it with these files."""
        files = [manifest.files.get(name) for name in segment_files(segment.entry)]
        self._segments[segment.entry.name] = (files, segment)

    def let_go(self, name: str) -> None:
        """Keep a segment open no longer that no manifest will name: its files hold disk."""
        self._segments.pop(name, None)

    def apply(self, change: Block | Delete, position: Position) -> int:
        """Take over what was written to the journal; give how many rows it killed."""
        killed, self._is_published = 0, False
        if isinstance(change, Delete):
            killed = self.contents.kill(change.ids)
        else:
            self.contents.put(change)
        self.position = position
        return killed

    def publish(self) -> None:
        """Make what was applied the latest snapshot."""
        self.snapshot = self.contents.snapshot(self.position.n_records)
        self._is_published = True

    def _open(self, manifest: Manifest) -> tuple[Contents, JournalFile | None]:
        """Open what a manifest names and is not open."""
        opened = {}
        for entry in manifest.segments:
            files = [manifest.files.get(name) for name in segment_files(entry)]
            kept, segment = self._segments.get(entry.name, (None, None))
            if segment is None or kept != files:
                segment = open_segment(self.path, manifest, entry, verify=self._verify)
            if segment.entry != entry:
                segment = segment.renewed(entry)
            opened[entry.name] = (files, segment)
            self._segments[entry.name] = opened[entry.name]  # also where a later one fails
        alive = [
            read_alive(self.path, manifest, entry, verify=self._verify)
            for entry in manifest.segments
        ]
        journal = None
        if manifest.journal is not None:
            journal = JournalFile(self.path, manifest.journal)
        self._segments = opened
        segments = [segment for _, segment in opened.values()]
        return Contents(manifest, segments, alive), journal

    def _is_longer(self) -> bool:
        """Tell whether the journal still has everything that was read of it."""
        return self.journal is None or self.journal.size_bytes() >= self.position.end

    def _replay(self) -> None:
        """Take over what the journal has beyond what was read of it."""
        if self.journal is not None:
            try:
                for record in self.journal.read(self.position):
                    change = decode(record, self.manifest.dim, str(self.journal.file))
                    self.apply(change, record.position)
            except OSError as error:
                raise unreadable(self.journal.file, error) from error
        if not self._is_published:
            self.publish()


def read_alive(
    directory: Path, manifest: Manifest, entry: SegmentEntry, *, verify: bool
) -> NDArray[np.bool_] | None:
    """Read which rows of a segment are alive; None where all are.

    Raises:
        CollectionError: the file is missing, damaged, or lists what are no rows.
    """
    if not entry.tombstones:
        return None
    file = check_file(
        directory, entry.tombstones, manifest.files.get(entry.tombstones), verify=verify
    )
    dead = open_array(file, np.int64, (entry.dead,), mapped=False)
    if (np.diff(dead) <= 0).any() or dead[0] < 0 or dead[-1] >= entry.count:
        raise CollectionError(
            str(file),
            expected=f"rows of {entry.count}, each once and ascending",
            found="others",
            mend="the file is not this collection's: copy or build the collection again",
        )
    alive_N = np.ones(entry.count, np.bool_)
    alive_N[dead] = False
    return alive_N
