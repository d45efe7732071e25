"""Makes the next generation of a collection: new files, then the manifest, then the old go.

Rules:
    Files of a new generation have names that nothing there has, nor anything had since the writer
    began, and are on the disk before the manifest that names them takes its place by a rename.
    A later writer may use a name again that is free: readers know files by their hashes.
    A process that is killed leaves the old generation or the new one, and files that nobody names.
    Those are swept away by the next writer. Nothing is deleted but segments and journals.
    Tombstones are written as they are in memory, whatever the journal says as well: to kill
    what is dead changes nothing, so that the journal may be replayed over them.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from index.ann.versions import library_versions
from index.errors import CollectionError
from index.storage.journal import create_journal
from index.storage.lock import writer_lock
from index.storage.manifest import (
    MANIFEST_FILE,
    FileEntry,
    JournalEntry,
    Manifest,
    SegmentEntry,
    hash_files,
    read_manifest,
    write_manifest,
)
from index.storage.rows import ROW_SCHEMA, in_schema, unify
from index.storage.segment import SEGMENTS, Block, open_segment, segment_files, write_segment
from index.storage.snapshot import Part
from index.storage.store import Store
from models.bundle import Json
from models.files import TEMPORARY_PREFIX, publish_directory, sync

JOURNAL_PREFIX = "journal-"
BLOCK_ROWS = 16384
"""Rows that are copied from one segment to another at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewSegment:
    """A segment that no manifest names yet.

    Attributes:
        entry: for the manifest.
        files: its files, likewise.
        alive_N: (N,) bool, which of its rows are alive; None where all are.
    """

    entry: SegmentEntry
    files: Mapping[str, FileEntry]
    alive_N: NDArray[np.bool_] | None = None


def publish(
    store: Store,
    *,
    added: NewSegment | None = None,
    merged: Sequence[str] = (),
    journal: JournalEntry | None = None,
    tuning: Mapping[str, Json] | None = None,
) -> None:
    """Put the next manifest in its place and read it; memory and files agree afterwards.

    Args:
        store: the collection, whose lock is held.
        added: a segment to name.
        merged: the segments that it stands for; those of the delta where there are none.
        journal: a new one, where everything in the old one is in segments now; else that stays.
        tuning: the report of how the index of `added`, then the only segment, was chosen. It goes
            with the first segment, which is that one as long as it is there.

    Raises:
        CollectionError: another collection stands at the path, or none.
    """
    store.require_current()
    old = store.manifest
    generation = old.generation + 1
    segments, files = [], dict(added.files) if added else {}
    for part in store.snapshot.parts:
        entry = part.segment.entry
        if entry.name and entry.name not in merged:
            files |= {name: old.files[name] for name in segment_files(entry)}
            if entry.tombstones:
                files[entry.tombstones] = old.files[entry.tombstones]
            entry, names = _write_tombstones(store.path, entry, part.alive_N, generation)
            files |= names
            segments.append(entry)
    if added is not None:
        entry, names = _write_tombstones(store.path, added.entry, added.alive_N, generation)
        files |= names
        segments.insert(len(segments) if tuning is None else 0, entry)
    segments = [entry for entry in segments if entry.dead < entry.count]
    named = {name for entry in segments for name in (*segment_files(entry), entry.tombstones)}
    others = {name: entry for name, entry in old.files.items() if not _is_ours(name)}
    is_sealed = journal is not None
    manifest = dataclasses.replace(
        old,
        segments=tuple(segments),
        files=others | {name: entry for name, entry in files.items() if name in named},
        generation=generation,
        journal=journal or old.journal,
        sources=count_sources(store.snapshot.parts, with_delta=is_sealed),
        tuning=_tuning_of(old, segments) if tuning is None else tuning,
        versions={**old.versions, **library_versions()},
    )
    sync(store.path)
    write_manifest(store.path, manifest)
    store.load()
    _remove(store.path, _names(old) | set(files), manifest)


def _tuning_of(old: Manifest, segments: Sequence[SegmentEntry]) -> Mapping[str, Json]:
    """Give the report of the old generation, unless the segment that it is of has gone."""
    is_there = bool(old.segments and segments) and old.segments[0].name == segments[0].name
    return old.tuning if is_there else {}


def put_in_place(built: Path, path: Path, *, replace: bool) -> None:
    """Give a collection that was built elsewhere its name, maybe that of another.

    Args:
        built: its directory, on the file system of `path`.
        path: its name from now on.
        replace: whether a collection may stand there. Its generation goes on, so that readers
            see a later version, and `built` is the old one afterwards.

    Raises:
        CollectionLockedError: a writer has the collection that stands there: what it wrote would
            be lost, and what it writes, too.
    """
    if not (replace and (path / MANIFEST_FILE).is_file()):
        publish_directory(built, path, replace=replace)
        return
    with writer_lock(path):
        with suppress(CollectionError):  # to replace what is damaged is a good reason
            generation = read_manifest(path).generation + 1
            manifest = read_manifest(built)
            write_manifest(built, dataclasses.replace(manifest, generation=generation))
        publish_directory(built, path, replace=True)


def begin_journal(store: Store) -> JournalEntry:
    """Put an empty journal on the disk, for the next generation."""
    return create_journal(store.path, f"{JOURNAL_PREFIX}{store.manifest.generation + 1:06}")


def write_parts(
    store: Store,
    parts: Sequence[Part],
    *,
    name: str,
    factory: str,
    parameters: Mapping[str, int],
    is_provisional: bool = False,
) -> NewSegment:
    """Write the living rows of parts as one segment; on failure nothing of it is left."""
    new = write_aside(store, parts, name=name, factory=factory, parameters=parameters)
    entry = dataclasses.replace(new.entry, is_provisional=is_provisional)
    new = dataclasses.replace(new, entry=entry)
    with removed_unless_named(store, new):
        return checked(store, new)


def write_aside(
    store: Store,
    parts: Sequence[Part],
    *,
    name: str,
    factory: str,
    parameters: Mapping[str, int],
) -> NewSegment:
    """Write the living rows of parts as one segment that is not opened yet."""
    entry = SegmentEntry(
        name=name,
        count=sum(part.count for part in parts),
        factory=factory,
        parameters=parameters,
    )
    folder = store.path / SEGMENTS / name
    schema = unify([ROW_SCHEMA, *(part.segment.rows.schema for part in parts)])
    try:
        names = write_segment(
            store.path,
            entry,
            living_blocks(parts, schema),
            store.manifest.dim,
            schema=schema,
            metric=store.manifest.metric,
        )
        for file in (*folder.iterdir(), folder, folder.parent):
            sync(file)
        return NewSegment(entry=entry, files=hash_files(store.path, names))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def checked(store: Store, new: NewSegment) -> NewSegment:
    """Open a new segment, before a manifest names it, and keep it open for when one does."""
    manifest = dataclasses.replace(store.manifest, files=new.files)
    store.keep(open_segment(store.path, manifest, new.entry, verify=False), manifest)
    return new


@contextmanager
def removed_unless_named(store: Store, new: NewSegment | None) -> Iterator[None]:
    """Remove a new segment where this block raises and no manifest names it.

    Where the manifest is not the one that was read last, it may be the next one, or that of
    another collection: then the segment stays, for the next writer to sweep away.
    """
    try:
        yield
    except BaseException:
        named = [entry.name for entry in store.manifest.segments]
        if new is not None and new.entry.name not in named and store.is_current():
            store.let_go(new.entry.name)
            shutil.rmtree(store.path / SEGMENTS / new.entry.name, ignore_errors=True)
        raise


def living_blocks(parts: Sequence[Part], schema: pa.Schema) -> Iterator[Block]:
    """Give the living rows of parts, some thousands at a time."""
    for part in parts:
        segment = part.segment
        for start in range(0, len(segment.ids_N), BLOCK_ROWS):
            rows = in_schema(segment.rows.slice(start, BLOCK_ROWS), schema)
            vectors_ND = segment.vectors_ND[start : start + BLOCK_ROWS]
            if part.alive_N is not None:
                alive_N = part.alive_N[start : start + BLOCK_ROWS]
                rows, vectors_ND = rows.filter(pa.array(alive_N)), vectors_ND[alive_N]
            yield Block(rows=rows, vectors_ND=vectors_ND)


def new_segment_name(store: Store) -> str:
    """Make the folder of a new segment, which has a name that no other one has or will take.

    A compaction writes for minutes while other threads seal, and a name is told from another
    also where the segment that had it was emptied and is gone meanwhile.
    """
    folder = store.path / SEGMENTS
    taken = [int(entry.name) for entry in folder.glob("*") if entry.name.isdecimal()]
    number = max([store.next_segment, *(name + 1 for name in taken)])
    (folder / f"{number:06}").mkdir(parents=True)
    store.next_segment = number + 1
    return f"{number:06}"


def sweep(directory: Path, manifest: Manifest) -> None:
    """Delete what a writer that was killed has left, indexes that were being tried out, too."""
    _remove(directory, written_names(directory), manifest)
    for folder in (directory / SEGMENTS).glob("*"):
        with suppress(OSError):  # not empty, as a rule
            folder.rmdir()


def written_names(directory: Path) -> set[str]:
    """Name the files that writers write, whether a manifest names them or nobody does."""
    found = [
        *(directory / SEGMENTS).glob("*/*"),
        *directory.glob(f"{JOURNAL_PREFIX}*"),
        *directory.glob(f"{TEMPORARY_PREFIX}{MANIFEST_FILE}.*"),
        *directory.glob(f"sync/{TEMPORARY_PREFIX}*"),
    ]
    return {file.relative_to(directory).as_posix() for file in found}


def count_sources(parts: Iterable[Part], *, with_delta: bool = True) -> dict[str, int]:
    """Count the living images of each source, in the order in which they come."""
    counts: dict[str, int] = {}
    for part in parts:
        if not with_delta and not part.segment.entry.name:
            continue
        column = part.segment.rows["source"]
        living = column if part.alive_N is None else column.filter(pa.array(part.alive_N))
        found = pc.value_counts(living)
        values, numbers = found.field("values").to_pylist(), found.field("counts").to_pylist()
        for source, number in zip(values, numbers, strict=True):
            counts[str(source)] = counts.get(str(source), 0) + cast(int, number)
    return counts


def _write_tombstones(
    directory: Path, entry: SegmentEntry, alive_N: NDArray[np.bool_] | None, generation: int
) -> tuple[SegmentEntry, dict[str, FileEntry]]:
    """Write which rows are dead, where that has changed; give the entry and what it names."""
    dead = 0 if alive_N is None else entry.count - int(np.count_nonzero(alive_N))
    if dead == entry.dead:
        return entry, {}
    assert alive_N is not None
    name = f"{SEGMENTS}/{entry.name}/tombstones-{generation:06}.npy"
    np.save(directory / name, np.flatnonzero(~alive_N))
    sync(directory / name)
    sync((directory / name).parent)
    return dataclasses.replace(entry, tombstones=name, dead=dead), hash_files(directory, [name])


def _is_ours(name: str) -> bool:
    """Tell whether a file belongs to a segment."""
    return name.startswith(f"{SEGMENTS}/")


def _names(manifest: Manifest) -> set[str]:
    """Name the files that a manifest names."""
    journal = set() if manifest.journal is None else {manifest.journal.name}
    return {*manifest.files} | journal


def _remove(directory: Path, names: set[str], manifest: Manifest) -> None:
    """Delete those files that the manifest in place does not name."""
    for name in names - _names(manifest):
        with suppress(OSError):  # the next writer tries again
            (directory / name).unlink(missing_ok=True)
            (directory / name).parent.rmdir()
