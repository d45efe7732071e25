"""The manifest of a collection: the one file that says what the collection is.

A collection is a directory. Its files never change once they are written, but for the journal,
which grows; `manifest.json` names the ones that count, with their sizes and SHA-256, and whoever
replaces the manifest by a rename replaces the collection. What the manifest does not name is
not there.

Rules:
    The manifest carries a checksum of itself: an edited one is found, like any other file.
    Every manifest of a directory has a generation above that of the one it replaced.
    A manifest of schema 1, which knew no journal and no tombstones, is still read.
    Names in it stay inside the collection's directory.
    Times and dates stand in the manifest's build report only, never in a file with a hash,
    so that two builds of the same images by the same encoder give the same files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import cast

from index.errors import CollectionError
from index.knn import COSINE, EUCLIDEAN
from models.bundle import Json
from models.files import atomic_file, canonical_json, sha256_file

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, SCHEMA_VERSION)
MANIFEST_FILE = "manifest.json"
REJECTS_FILE = "rejects.jsonl"
MAX_MANIFEST_BYTES = 64 << 20
"""More is refused unread: a manifest grows by some hundred bytes a segment."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What a file of the collection must be."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class JournalEntry:
    """The journal of this generation.

    Attributes:
        name: its file in the collection's directory.
        id: 32 hexadecimal digits that no other journal has.
    """

    name: str
    id: str


@dataclass(frozen=True, kw_only=True)
class SegmentEntry:
    """One immutable segment.

    Attributes:
        name: its directory under `segments/`.
        count: vectors in it, dead ones too.
        factory: `Flat`, or the factory string of the FAISS index in `index.faiss`.
        parameters: search parameters by FAISS's own names, such as `efSearch`, for searches
            whose caller names no others.
        tombstones: the file that lists its dead rows; empty where all are alive.
        dead: how many those are.
    """

    name: str
    count: int
    factory: str
    parameters: Mapping[str, int] = field(default_factory=dict)
    tombstones: str = ""
    dead: int = 0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a collection holds.

    Attributes:
        name: a word for people.
        fingerprint: of the encoder that made every vector.
        dim: length of a vector.
        encoder: URI or absolute path of that encoder when the collection was built.
        preprocessing: of that encoder, as JSON.
        sources: URI and number of living images of each source, in order; the journal's are
            not counted.
        segments: in the order of their rows.
        files: by path within the collection, with `/`; the journal is not among them.
        versions: of the libraries that wrote it.
        build: the report of the build: images, rejects, seconds, parameters.
        metric: `cosine` or `euclidean`.
        generation: above that of every manifest that stood here before.
        journal: what was written since; None where nobody wrote.
        tuning: the report of `index.tune`; empty where it was not run.
        schema_version: of the file that it was read from.
    """

    name: str
    fingerprint: str
    dim: int
    encoder: str
    preprocessing: Mapping[str, Json]
    sources: Mapping[str, int]
    segments: tuple[SegmentEntry, ...]
    files: Mapping[str, FileEntry]
    versions: Mapping[str, str]
    build: Mapping[str, Json]
    metric: str = COSINE
    generation: int = 0
    journal: JournalEntry | None = None
    tuning: Mapping[str, Json] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def count(self) -> int:
        """Living vectors in all segments; those of the journal come on top."""
        return sum(segment.count - segment.dead for segment in self.segments)


class ManifestFile:
    """A manifest as it was read, and whether it still is the one of its directory."""

    def __init__(self, directory: Path) -> None:
        """Read and check the manifest; no other file is opened.

        Raises:
            CollectionError: there is none, it is of another schema, or it was damaged or edited.
        """
        self._path = directory / MANIFEST_FILE
        self._directory = directory
        self._descriptor = _open_descriptor(directory)
        self._directory_inode = os.stat(directory).st_ino
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
            return os.stat(self._directory).st_ino == self._directory_inode
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


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, whole or not at all, over the one that may be there."""
    with atomic_file(directory / MANIFEST_FILE) as temporary:
        temporary.write_bytes(manifest_bytes(manifest))


def manifest_bytes(manifest: Manifest) -> bytes:
    """Give the content of `manifest.json`."""
    document = _to_json(manifest)
    document["checksum"] = _checksum(document)
    return _document_bytes(document)


def _document_bytes(document: Mapping[str, Json]) -> bytes:
    """Write a document as it stands in the file."""
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest; no other file is opened.

    Raises:
        CollectionError: there is none, it is of another schema, or it was damaged or edited.
    """
    return ManifestFile(directory).manifest


def _parse(descriptor: int, file: Path) -> Manifest:
    """Read the manifest from an open file."""
    document = _read_document(descriptor, file)
    try:
        return _from_json(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CollectionError(
            str(file),
            expected=f"a manifest of schema {document['schema_version']}",
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


def _to_json(manifest: Manifest) -> dict[str, Json]:
    """Lay the manifest out for people to read, as its schema version has it."""
    document: dict[str, Json] = {
        "schema_version": manifest.schema_version,
        "name": manifest.name,
        "fingerprint": manifest.fingerprint,
        "dim": manifest.dim,
        "metric": manifest.metric,
        "count": manifest.count,
        "encoder": {"uri": manifest.encoder, "preprocessing": dict(manifest.preprocessing)},
        "sources": [{"uri": uri, "count": count} for uri, count in manifest.sources.items()],
        "segments": [_segment_to_json(segment) for segment in manifest.segments],
        "files": {
            name: {"sha256": entry.sha256, "bytes": entry.size_bytes}
            for name, entry in sorted(manifest.files.items())
        },
        "versions": dict(manifest.versions),
        "build": dict(manifest.build),
    }
    if manifest.schema_version == 1:
        return document
    journal = manifest.journal
    return {
        **document,
        "generation": manifest.generation,
        "journal": None if journal is None else {"name": journal.name, "id": journal.id},
        "tuning": dict(manifest.tuning),
    }


def _segment_to_json(segment: SegmentEntry) -> dict[str, Json]:
    """Lay out one segment; tombstones are named where there are any."""
    dead: dict[str, Json] = {"tombstones": segment.tombstones, "dead": segment.dead}
    return {
        "name": segment.name,
        "count": segment.count,
        "factory": segment.factory,
        "parameters": dict(segment.parameters),
        **(dead if segment.tombstones else {}),
    }


def _from_json(document: Mapping[str, Json]) -> Manifest:
    """Build the manifest from its JSON; what is amiss raises KeyError and its kin.

    A right checksum says only that the file is as its writer left it, whoever that was.
    """
    version = cast(int, document["schema_version"])
    encoder = cast(dict[str, Json], document["encoder"])
    sources = cast(list[dict[str, Json]], document["sources"])
    files = cast(dict[str, dict[str, Json]], document["files"])
    segments = tuple(
        _segment_from_json(segment) for segment in cast(list[dict[str, Json]], document["segments"])
    )
    names = [segment.name for segment in segments]
    if (version == 1 and not names) or len(set(names)) < len(names):
        raise ValueError(f"segments {names!r}")
    metric = document["metric"]
    if metric not in ((COSINE,) if version == 1 else (COSINE, EUCLIDEAN)):
        raise ValueError(f"metric {metric!r}")
    journal = cast(dict[str, Json] | None, None if version == 1 else document["journal"])
    for name in (*files, *names, *(segment.tombstones for segment in segments)):
        _refuse_escape(name)
    return Manifest(
        name=_text(document["name"]),
        fingerprint=_text(document["fingerprint"]),
        dim=_number(document["dim"]),
        encoder=_text(encoder["uri"]),
        preprocessing=dict(cast(dict[str, Json], encoder["preprocessing"])),
        sources={_text(source["uri"]): _number(source["count"]) for source in sources},
        segments=segments,
        files={
            name: FileEntry(sha256=_text(entry["sha256"]), size_bytes=_number(entry["bytes"], 0))
            for name, entry in files.items()
        },
        versions=dict(cast(dict[str, str], document["versions"])),
        build=dict(cast(dict[str, Json], document["build"])),
        metric=_text(metric),
        generation=0 if version == 1 else _number(document["generation"], 0),
        journal=None if journal is None else _journal_from_json(journal),
        tuning={} if version == 1 else dict(cast(dict[str, Json], document["tuning"])),
        schema_version=version,
    )


def _segment_from_json(segment: Mapping[str, Json]) -> SegmentEntry:
    """Read one segment."""
    parameters = cast(dict[str, Json], segment["parameters"])
    entry = SegmentEntry(
        name=_text(segment["name"]),
        count=_number(segment["count"]),
        factory=_text(segment["factory"]),
        parameters={_text(key): _number(value) for key, value in parameters.items()},
        tombstones=_text(segment.get("tombstones", "")),
        dead=_number(segment.get("dead", 0), 0),
    )
    if entry.dead > entry.count or bool(entry.dead) != bool(entry.tombstones):
        raise ValueError(f"dead {entry.dead} of {entry.count}")
    return entry


def _journal_from_json(journal: Mapping[str, Json]) -> JournalEntry:
    """Read the journal's name, which is that of a file in the directory itself."""
    entry = JournalEntry(name=_text(journal["name"]), id=_text(journal["id"]))
    if len(bytes.fromhex(entry.id)) != 16 or PurePosixPath(entry.name).name != entry.name:
        raise ValueError(f"journal {entry.name!r}")
    return entry


def _text(value: Json) -> str:
    """Take a text; anything else raises TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"of text: {value!r:.50}")
    return value


def _number(value: Json, least: int = 1) -> int:
    """Take a whole number that FAISS and NumPy can count to; anything else raises."""
    if type(value) is not int or not least <= value < 1 << 63:
        raise TypeError(f"of a number from {least}: {value!r:.50}")
    return value


def _open_descriptor(directory: Path) -> int:
    """Open `manifest.json`."""
    try:
        return os.open(directory / MANIFEST_FILE, os.O_RDONLY)
    except OSError as error:
        found = f"no {MANIFEST_FILE} in it" if directory.is_dir() else "no such directory"
        raise CollectionError(
            str(directory),
            expected="a collection directory",
            found=found,
            mend="make one with `python -m index.build --images SRC --encoder BUNDLE --out C`",
        ) from error


def _read_document(descriptor: int, file: Path) -> dict[str, Json]:
    """Parse `manifest.json` and check its schema version and its checksum."""
    if (size_bytes := os.fstat(descriptor).st_size) > MAX_MANIFEST_BYTES:
        raise CollectionError(
            str(file),
            expected=f"at most {MAX_MANIFEST_BYTES} bytes",
            found=f"{size_bytes}",
            mend="the file is damaged: restore it, or build the collection again",
        )
    try:
        with open(descriptor, "rb", closefd=False) as content:
            text = content.read(MAX_MANIFEST_BYTES)
        document = json.loads(text)
        version, checksum = document["schema_version"], _checksum(document)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CollectionError(
            str(file),
            expected="JSON with a schema_version",
            found="something else",
            mend="the file is damaged: restore it, or build the collection again",
        ) from error
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise CollectionError(
            str(file),
            expected=f"schema version {' or '.join(map(str, READABLE_VERSIONS))}",
            found=f"version {version}",
            mend="open it with the Horace that wrote it, or build the collection again",
        )
    if checksum != document.get("checksum"):
        raise CollectionError(
            str(file),
            expected=f"checksum {document.get('checksum')}",
            found=checksum,
            mend="the file is damaged or was edited: restore it, or build the collection again",
        )
    if _document_bytes(document) != text:  # white space, or a key that is there twice
        raise CollectionError(
            str(file),
            expected="the bytes that were written",
            found="others that say the same",
            mend="the file is damaged or was edited: restore it, or build the collection again",
        )
    return cast(dict[str, Json], document)


def _checksum(document: Mapping[str, Json]) -> str:
    """Hash everything but the checksum itself."""
    rest = {key: value for key, value in document.items() if key != "checksum"}
    return hashlib.sha256(canonical_json(rest)).hexdigest()


def _refuse_escape(name: str) -> None:
    """Raise ValueError for a name that leads out of the collection."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"path {name!r}")
