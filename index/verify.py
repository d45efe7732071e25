"""`python -m index.verify C`: whether a collection, or a bundle, is what it was when written.

Of a collection it looks at everything: size and SHA-256 of every file that the manifest names;
the manifest itself, to the byte; arrays, metadata and index by type, size and content; that
vectors are unit vectors, ids those of their keys and each there once, and that the index holds
the same vectors as are stored beside it. Of a bundle: every file's SHA-256, the fingerprint, and
`bundle.json` to the byte.

Rules:
    Every fault of a collection is found in one run, and each names its file; status 1 where
    there is one.
    Nothing is changed. Memory holds a block of vectors and the index, whatever a header says.
    What the manifest does not name is not part of the collection: it is mentioned, no fault.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tyro.conf import Positional

from index.ann.checking import index_fault
from index.collection import id_of
from index.errors import CollectionError
from index.storage.lock import LOCK_FILE
from index.storage.manifest import (
    MANIFEST_FILE,
    REJECTS_FILE,
    Manifest,
    check_file,
    manifest_bytes,
    read_manifest,
)
from index.storage.segment import Segment, open_segment, segment_files
from models.bundle import BUNDLE_FILE, is_as_written, read_bundle
from models.command import run_command
from models.errors import BundleError, HoraceError

BLOCK_ROWS = 16384
UNIT_TOLERANCE = 1e-4
"""Of a vector's length: float32 keeps unit vectors of thousands of dimensions within 1e-5."""


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
        size_bytes: of those.
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
    found = verify(options.path)
    if options.json:
        print(json.dumps(asdict(found), indent=2))
    else:
        for name in found.unknown:
            print(f"{options.path / name}: no part of it")
        if not found.faults:
            print(
                f"{options.path}: {found.content} in {found.files} files, "
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
    try:
        manifest = read_manifest(path)
    except CollectionError as error:
        return _unreadable(error)
    faults = [*_check_manifest(path, manifest), *_check_files(path, manifest)]
    if not faults:  # what follows reads the files that have just been found to be right
        faults += _check_content(path, manifest)
    journal = "" if manifest.journal is None else manifest.journal.name
    return Verification(
        content=f"{manifest.count} images",
        files=len(manifest.files) + 1,
        size_bytes=sum(entry.size_bytes for entry in manifest.files.values()),
        faults=faults,
        unknown=_find_unknown(path, {MANIFEST_FILE, LOCK_FILE, journal, *manifest.files}),
    )


def _verify_bundle(path: Path) -> Verification:
    """Look at everything in a bundle's directory, up to the first fault."""
    try:
        bundle = read_bundle(path)
        as_written = is_as_written(path)
    except BundleError as error:
        return _unreadable(error)
    fault = f"{path / BUNDLE_FILE}: expected the bytes that were written, found others"
    return Verification(
        content=f"an encoder of {bundle.dim} dimensions",
        files=len(bundle.files) + 1,
        size_bytes=sum((path / name).stat().st_size for name in bundle.files),
        faults=[] if as_written else [fault],
        unknown=_find_unknown(path, {BUNDLE_FILE, *bundle.files}),
    )


def _unreadable(error: HoraceError) -> Verification:
    """Say that nothing more can be looked at."""
    return Verification(content="", files=1, size_bytes=0, faults=[str(error)], unknown=[])


def _check_manifest(path: Path, manifest: Manifest) -> Iterator[str]:
    """Hold the manifest against what it would be written as, and its segments' files."""
    if (path / MANIFEST_FILE).read_bytes() != manifest_bytes(manifest):
        yield f"{path / MANIFEST_FILE}: expected the bytes that were written, found others"
    for name in (name for entry in manifest.segments for name in segment_files(entry)):
        if name not in manifest.files:
            yield f"{path / name}: expected a file that {MANIFEST_FILE} lists, found none"


def _check_files(path: Path, manifest: Manifest) -> Iterator[str]:
    """Hold every file that the manifest names against its size and hash."""
    for name, entry in manifest.files.items():
        try:
            check_file(path, name, entry, verify=True)
        except CollectionError as error:
            yield str(error)


def _check_content(path: Path, manifest: Manifest) -> Iterator[str]:
    """Open every segment and look at what is in it; the hashes are known to be right."""
    ids: list[NDArray[np.int64]] = []
    for entry in manifest.segments:
        try:
            segment = open_segment(path, manifest, entry, verify=False)
        except CollectionError as error:
            yield str(error)
            continue
        ids.append(segment.ids_N)
        folder = path / Path(segment_files(entry)[0]).parent
        yield from _check_vectors(folder, segment)
        yield from _check_ids(folder, segment)
    all_ids, counts = np.unique(np.concatenate([np.empty(0, np.int64), *ids]), return_counts=True)
    for id_ in all_ids[counts > 1][:1]:
        yield f"{path}: expected every id once, found {id_} again"
    if sum(manifest.sources.values()) != manifest.count:
        found = f"{sum(manifest.sources.values())} images of its sources"
        yield f"{path / MANIFEST_FILE}: expected {manifest.count} images, found {found}"
    if REJECTS_FILE in manifest.files:
        yield from _check_rejects(path / REJECTS_FILE)


def _check_vectors(folder: Path, segment: Segment) -> Iterator[str]:
    """Look at every vector: of unit length, and in the index what was made of it."""
    for start in range(0, len(segment.vectors_ND), BLOCK_ROWS):
        block_ND = segment.vectors_ND[start : start + BLOCK_ROWS]
        lengths_N = np.sqrt(np.square(block_ND, dtype=np.float64).sum(axis=1))
        wrong = np.flatnonzero(~(np.abs(lengths_N - 1) <= UNIT_TOLERANCE))
        if wrong.size:
            row, length = start + wrong[0], lengths_N[wrong[0]]
            yield (
                f"{folder / 'vectors.npy'}: expected vectors of length 1, found {length:.4g} in "
                f"row {row}"
            )
            return
    if segment.index is not None and (fault := index_fault(segment.index)) is not None:
        yield f"{folder / 'index.faiss'}: {fault}"


def _check_ids(folder: Path, segment: Segment) -> Iterator[str]:
    """Hold every id against its key."""
    for start in range(0, len(segment.ids_N), BLOCK_ROWS):
        ids = segment.ids_N[start : start + BLOCK_ROWS].tolist()
        keys = segment.rows["key"].slice(start, BLOCK_ROWS).to_pylist()
        for row, (id_, key) in enumerate(zip(ids, keys, strict=True), start):
            if key is None or id_of(str(key)) != id_:
                found = f"expected the id of key {key!r}, found {id_} in row {row}"
                yield f"{folder / 'rows.parquet'}: {found}"
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
    """List files that nothing names."""
    files = (file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir())
    return sorted(set(files) - known)


if __name__ == "__main__":
    sys.exit(run_command(VerifyOptions, main, prog="python -m index.verify"))
