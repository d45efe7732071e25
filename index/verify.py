"""`python -m index.verify C`: whether a collection, or a bundle, is what it was when written.

Of a collection it looks at everything: size and SHA-256 of every file that the manifest names;
the manifest itself, to the byte; arrays, metadata and index by type, size and content; that
vectors are unit vectors, ids those of their keys and each alive once; that the index holds the
same vectors as are stored beside it; and every record of the journal. Of a bundle: every file's
SHA-256, the fingerprint, and `bundle.json` to the byte.

Rules:
    Every fault of a collection is found in one run, and each names its file; status 1 where
    there is one.
    Nothing is changed. Memory holds a block of vectors and the index, whatever a header says.
    What the manifest does not name is not part of the collection: it is mentioned, with what
    becomes of it, and no fault.
    Of the journal that is what was acknowledged; a torn write behind it never was.
    A collection may be written meanwhile: where its manifest was replaced, all begins again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tyro.conf import Positional

from index.ann.checking import index_fault
from index.building.sync_state import SYNC_FOLDER, is_sound, is_state
from index.collection import id_of
from index.errors import CollectionError
from index.knn import COSINE
from index.milvus.connection import require_directory
from index.storage.incoming import UNIT_TOLERANCE
from index.storage.journal import JournalFile, Position
from index.storage.lock import LOCK_FILE
from index.storage.manifest import (
    MANIFEST_FILE,
    REJECTS_FILE,
    Manifest,
    ManifestFile,
    check_file,
    content_bytes,
    manifest_bytes,
    unreadable,
)
from index.storage.publishing import written_names
from index.storage.records import Delete, decode
from index.storage.segment import Segment, open_segment, segment_files
from index.storage.store import Contents, read_alive
from models.bundle import BUNDLE_FILE, read_bundle
from models.command import counted, run_command, shown
from models.errors import BundleError, HoraceError

BLOCK_ROWS = 16384

MINE = "Horace neither reads nor deletes it"
"""What becomes of a file that is nobody's."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Check every file of a collection or of a bundle; status 1 where something is wrong."""

    path: Positional[Path]
    """The collection's directory, or the bundle's."""
    json: bool = False
    """Print what was found as JSON."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was looked at and what was found.

    Attributes:
        content: what it is, such as `12 images`; empty where that cannot be told.
        files: files that the manifest names, and itself.
        size_bytes: of all of those.
        faults: one line each, with the file's name.
        unknown: files in the directory that nothing names.
    """

    content: str
    files: int
    size_bytes: int
    faults: Sequence[str]
    unknown: Sequence[str]


def main(options: VerifyOptions) -> None:
    """Check the collection and say what was found.

    Raises:
        CollectionError: there is a fault, or there are several, which have been printed.
    """
    require_directory(options.path)
    found = verify(options.path)
    if options.json:
        print(json.dumps(asdict(found), indent=2))
    else:
        swept = written_names(options.path)
        for name in found.unknown:
            fate = "the next writer, such as `index.compact`, deletes it" if name in swept else MINE
            print(f"{shown(str(options.path / name))}: no part of it; {fate}")
        if not found.faults:
            print(
                f"{options.path}: {found.content} in {counted(found.files, 'file')}, "
                f"{found.size_bytes} bytes: sound"
            )
        elif len(found.faults) > 1:
            print("\n".join(found.faults))
    if len(found.faults) == 1:
        raise CollectionError(found.faults[0])
    if found.faults:
        raise CollectionError(f"{len(found.faults)} faults, the first: {found.faults[0]}")


def verify(path: Path) -> Verification:
    """Look at everything in the directory of a collection or of a bundle."""
    if (path / BUNDLE_FILE).is_file():
        return _verify_bundle(path)
    while True:
        try:
            file = ManifestFile(path)
        except CollectionError as error:
            return _unreadable(error)
        try:
            found = _verify_collection(path, file.manifest)
        except OSError as error:
            found = _unreadable(unreadable(path, error))
        if not found.faults or (file.is_current() and file.is_here()):
            return found


def _verify_collection(path: Path, manifest: Manifest) -> Verification:
    """Look at everything that a manifest names."""
    journal = [] if manifest.journal is None else [manifest.journal.name]
    faults = [*_check_manifest(path, manifest), *_check_files(path, manifest)]
    contents = Contents(replace(manifest, segments=()), [], [])
    is_readable = not faults
    if is_readable:  # what follows reads the files that have just been found to be right
        contents, faults = _check_content(path, manifest)
    try:
        _read_journal(path, manifest, contents)
    except CollectionError as error:
        faults.append(str(error))
    faults += _check_sync_files(path)
    count = contents.snapshot(0).count if is_readable else manifest.count
    return Verification(
        content=counted(count, "image"),
        files=len(manifest.files) + len(journal) + 1,
        size_bytes=content_bytes(path, manifest),
        faults=faults,
        unknown=_find_unknown(path, {MANIFEST_FILE, LOCK_FILE, *journal, *manifest.files}),
    )


def _verify_bundle(path: Path) -> Verification:
    """Look at everything in a bundle's directory, up to the first fault."""
    try:
        bundle = read_bundle(path)
    except BundleError as error:
        return _unreadable(error)
    return Verification(
        content=f"an encoder of {bundle.dim} dimensions",
        files=len(bundle.files) + 1,
        size_bytes=sum((path / name).stat().st_size for name in (BUNDLE_FILE, *bundle.files)),
        faults=[],
        unknown=_find_unknown(path, {BUNDLE_FILE, *bundle.files}),
    )


def _unreadable(error: HoraceError) -> Verification:
    """Say that nothing more can be looked at."""
    return Verification(content="", files=1, size_bytes=0, faults=[str(error)], unknown=[])


def _check_manifest(path: Path, manifest: Manifest) -> Iterator[str]:
    """Hold the manifest against what it would be written as, and its segments' files."""
    if (path / MANIFEST_FILE).read_bytes() != manifest_bytes(manifest):
        yield f"{path / MANIFEST_FILE}: expected the bytes that were written, found others"
    names = [name for entry in manifest.segments for name in segment_files(entry)]
    for name in (*names, *(entry.tombstones for entry in manifest.segments)):
        if name and name not in manifest.files:
            yield f"{path / name}: expected a file that {MANIFEST_FILE} lists, found none"


def _check_files(path: Path, manifest: Manifest) -> Iterator[str]:
    """Hold every file that the manifest names against its size and hash."""
    for name, entry in manifest.files.items():
        try:
            check_file(path, name, entry, verify=True)
        except CollectionError as error:
            yield str(error)


def _check_content(path: Path, manifest: Manifest) -> tuple[Contents, list[str]]:
    """Open every segment and look at what is in it; the hashes are known to be right."""
    entries, segments, alive, faults = [], [], [], []
    for entry in manifest.segments:
        try:
            segment = open_segment(path, manifest, entry, verify=False)
            alive_N = read_alive(path, manifest, entry, verify=False)
        except CollectionError as error:
            faults.append(str(error))
            continue
        entries.append(entry)
        alive.append(alive_N)
        segments.append(segment)
        folder = path / Path(segment_files(entry)[0]).parent
        faults += _check_vectors(folder / "vectors.npy", segment.vectors_ND, manifest.metric)
        if segment.index is not None:
            fault = index_fault(segment.index, entry.parameters)
            faults += [f"{folder / 'index.faiss'}: {fault}"] if fault else []
        faults += _check_ids(folder / "rows.parquet", segment.rows)
    faults += _check_whole(path, manifest, segments, alive)
    return Contents(replace(manifest, segments=tuple(entries)), segments, alive), faults


def _check_whole(
    path: Path,
    manifest: Manifest,
    segments: Sequence[Segment],
    alive: Sequence[NDArray[np.bool_] | None],
) -> Iterator[str]:
    """Look at what no segment has alone."""
    ids = [
        segment.ids_N if alive_N is None else segment.ids_N[alive_N]
        for segment, alive_N in zip(segments, alive, strict=True)
    ]
    all_ids, counts = np.unique(np.concatenate([np.empty(0, np.int64), *ids]), return_counts=True)
    for id_ in all_ids[counts > 1][:1]:
        yield f"{path}: expected every id once, found {id_} again"
    if sum(manifest.sources.values()) != manifest.count:
        found = f"{sum(manifest.sources.values())} images of its sources"
        yield f"{path / MANIFEST_FILE}: expected {manifest.count} images, found {found}"
    if REJECTS_FILE in manifest.files:
        yield from _check_rejects(path / REJECTS_FILE)


def _read_journal(path: Path, manifest: Manifest, contents: Contents) -> None:
    """Replay the journal, and look at every record.

    Raises:
        CollectionError: one is not what a writer of this collection writes.
    """
    if manifest.journal is None:
        return
    journal = JournalFile(path, manifest.journal)
    for record in journal.read(Position()):
        change = decode(record, manifest.dim, str(journal.file))
        if isinstance(change, Delete):
            contents.kill(change.ids)
            continue
        number = record.position.n_records - 1
        where = Path(f"{journal.file}, record {number}")
        for fault in (
            *_check_vectors(where, change.vectors_ND, manifest.metric),
            *_check_ids(where, change.rows),
        ):
            raise CollectionError(fault)
        contents.put(change)


def _check_vectors(file: Path, vectors_ND: NDArray[np.float32], metric: str) -> Iterator[str]:
    """Look at every vector: finite, and of unit length where cosines are meant."""
    for start in range(0, len(vectors_ND), BLOCK_ROWS):
        block_ND = vectors_ND[start : start + BLOCK_ROWS]
        lengths_N = np.sqrt(np.square(block_ND, dtype=np.float64).sum(axis=1))
        is_sound_N = np.isfinite(lengths_N)
        if metric == COSINE:
            is_sound_N = np.abs(lengths_N - 1) <= UNIT_TOLERANCE
        wrong = np.flatnonzero(~is_sound_N)
        if wrong.size:
            row, length = start + wrong[0], lengths_N[wrong[0]]
            expected = "vectors of length 1" if metric == COSINE else "finite vectors"
            yield f"{file}: expected {expected}, found {length:.4g} in row {row}"
            return


def _check_ids(file: Path, rows: pa.Table) -> Iterator[str]:
    """Hold every id against its key."""
    for start in range(0, len(rows), BLOCK_ROWS):
        ids = rows["id"].slice(start, BLOCK_ROWS).to_pylist()
        keys = rows["key"].slice(start, BLOCK_ROWS).to_pylist()
        for row, (id_, key) in enumerate(zip(ids, keys, strict=True), start):
            if key is None or id_of(str(key)) != id_:
                yield f"{file}: expected the id of key {key!r}, found {id_} in row {row}"
                return


def _check_rejects(file: Path) -> Iterator[str]:
    """Read the log of rejected images."""
    try:
        with file.open("rb") as lines:
            for line in lines:
                _ = json.loads(line)["key"]
    except (ValueError, KeyError, TypeError, RecursionError):
        yield f"{file}: expected a JSON object with a key on every line, found something else"


def _find_unknown(path: Path, known: set[str]) -> list[str]:
    """List files that nothing names, but those that spare a sync some reading.

    A folder that a writer removes meanwhile is passed over.
    """
    files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
    known |= {file.relative_to(path).as_posix() for file in _sync_files(path)}
    return sorted({file.relative_to(path).as_posix() for file in files} - known)


def _check_sync_files(path: Path) -> Iterator[str]:
    """Hold what syncs have remembered against its own hash."""
    for file in _sync_files(path):
        if not is_sound(file) and file.exists():
            yield f"{file}: expected the bytes that were written, found others; delete the file"


def _sync_files(path: Path) -> list[Path]:
    """List what syncs have remembered of their sources."""
    return sorted(file for file in (path / SYNC_FOLDER).glob("*") if is_state(file))


if __name__ == "__main__":
    sys.exit(run_command(VerifyOptions, main, prog="python -m index.verify"))
