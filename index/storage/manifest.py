"""The manifest of a collection: the one file that says what the collection is.

A collection is a directory. Its files never change once they are written, but for the journal,
which grows; `manifest.json` names the ones that count, with their sizes and SHA-256, and whoever
replaces the manifest by a rename replaces the collection. What the manifest does not name is
not there.

Rules:
    The manifest carries a checksum of itself: an edited one is found, like any other file.
    Every manifest of a directory has a generation above that of the one it replaced.
    Times and dates stand in the manifest's build report only, never in a file with a hash,
    so that two builds of the same images by the same encoder give the same files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from index.errors import CollectionError, refuse_to_blame
from index.storage.entries import SCHEMA_VERSION, manifest_from_json, manifest_to_json
from index.storage.entries import FileEntry as FileEntry
from index.storage.entries import JournalEntry as JournalEntry
from index.storage.entries import Manifest as Manifest
from index.storage.entries import SegmentEntry as SegmentEntry
from models.documents import document_bytes, read_document
from models.errors import reason_of
from models.files import atomic_file, open_regular, sha256_file

MANIFEST_FILE = "manifest.json"
REJECTS_FILE = "rejects.jsonl"


class ManifestFile:
    """A manifest as it was read, and whether it still is the one of its directory."""

    def __init__(self, directory: Path) -> None:
        """Read and check the manifest; no other file is opened.

        Raises:
            CollectionError: there is none, it is of another schema, or it was damaged or edited.
        """
        self._path = directory / MANIFEST_FILE
        self._directory = directory
        self._inode = 0
        with suppress(OSError):  # whatever it is, the manifest cannot be opened either
            self._inode = directory.stat().st_ino
        self._descriptor = _open_descriptor(directory)
        self.manifest = _parse(self._descriptor, self._path)

    def __del__(self) -> None:
        # While it is open no other file gets its inode, so that a number says who is who.
        if (descriptor := getattr(self, "_descriptor", None)) is not None:
            os.close(descriptor)

    def is_current(self) -> bool:
        """Tell whether no other manifest has taken its place."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except OSError:
            return False

    def is_here(self) -> bool:
        """Tell whether its directory was not exchanged for another since."""
        try:
            return self._directory.stat().st_ino == self._inode
        except OSError:
            return False


def hash_files(directory: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Record size and SHA-256 of files of `directory`."""
    return {
        name: FileEntry(
            sha256=sha256_file(directory / name), size_bytes=(directory / name).stat().st_size
        )
        for name in names
    }


def content_bytes(directory: Path, manifest: Manifest) -> int:
    """Add up the files of a collection: those that its manifest names, itself and the journal."""
    written = (
        [MANIFEST_FILE] if manifest.journal is None else [MANIFEST_FILE, manifest.journal.name]
    )
    sizes = [file.stat().st_size for name in written if (file := directory / name).is_file()]
    return sum(sizes) + sum(entry.size_bytes for entry in manifest.files.values())


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, whole or not at all, over the one that may be there."""
    with atomic_file(directory / MANIFEST_FILE) as temporary:
        temporary.write_bytes(manifest_bytes(manifest))


def manifest_bytes(manifest: Manifest) -> bytes:
    """Give the content of `manifest.json`."""
    return document_bytes(manifest_to_json(manifest))


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest; no other file is opened.

    Raises:
        CollectionError: there is none, it is of another schema, or it was damaged or edited.
    """
    return ManifestFile(directory).manifest


def _parse(descriptor: int, file: Path) -> Manifest:
    """Read the manifest from an open file."""
    try:
        with open(descriptor, "rb", closefd=False) as content:
            document = read_document(
                content,
                file,
                schema_version=SCHEMA_VERSION,
                error=CollectionError,
                restore="restore it",
                again="build the collection again",
            )
    except OSError as error:
        raise unreadable(file, error) from error
    try:
        return manifest_from_json(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CollectionError(
            str(file),
            expected=f"a manifest of schema {SCHEMA_VERSION}",
            found=f"no usable field {error}",
            mend="build the collection again",
        ) from error


def check_file(directory: Path, name: str, entry: FileEntry | None, *, verify: bool) -> Path:
    """Hold a file against the manifest: its presence and size, and on request its hash.

    Args:
        directory: of the collection.
        name: of the file within it.
        entry: what the manifest says of it; None where it says nothing.
        verify: whether to hash the file.

    Raises:
        CollectionError: it is missing, of another size or of other content.
    """
    file = directory / name
    mend = "the file is damaged: copy the collection again, or build it again"
    if entry is None or not file.is_file():
        raise CollectionError(
            str(file), expected=f"a file that {MANIFEST_FILE} lists", found="none", mend=mend
        )
    size_bytes = file.stat().st_size
    if size_bytes != entry.size_bytes:
        raise CollectionError(
            str(file), expected=f"{entry.size_bytes} bytes", found=f"{size_bytes} bytes", mend=mend
        )
    if verify and (found := sha256_file(file)) != entry.sha256:
        raise CollectionError(str(file), expected=f"SHA-256 {entry.sha256}", found=found, mend=mend)
    return file


def unreadable(path: Path, error: OSError) -> CollectionError:
    """Say in one line what cannot be read."""
    found = reason_of(error)
    name = str(error.filename or path)
    return CollectionError(name, expected="a file that can be read", found=found)


def _open_descriptor(directory: Path) -> int:
    """Open `manifest.json`."""
    try:
        return open_regular(directory / MANIFEST_FILE, os.O_RDONLY)
    except OSError as error:
        refuse_to_blame(directory / MANIFEST_FILE, error)
        found = f"{MANIFEST_FILE}: {reason_of(error)}"
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            in_it = os.path.isdir(directory)  # `is_dir` raises where it may not look
            found = f"no {MANIFEST_FILE} in it" if in_it else "no such directory"
        raise CollectionError(
            str(directory),
            expected="a collection directory",
            found=found,
            mend="make one with `python -m index.build --images SRC --encoder BUNDLE --out C`",
        ) from error
