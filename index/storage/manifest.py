"""The manifest of a collection: the one file that says what the collection is.

A collection is a directory. Its files never change once they are written; `manifest.json`
names the ones that count, with their sizes and SHA-256, and whoever replaces the manifest
by a rename replaces the collection. What the manifest does not name is not there.

Rules:
    The manifest carries a checksum of itself: an edited one is found, like any other file.
    Names in it stay inside the collection's directory.
    Times and dates stand in the manifest's build report only, never in a file with a hash,
    so that two builds of the same images by the same encoder give the same files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import cast

from index.errors import CollectionError
from models.bundle import Json
from models.files import atomic_file, canonical_json, sha256_file

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
REJECTS_FILE = "rejects.jsonl"
MAX_MANIFEST_BYTES = 64 << 20
"""More is refused unread: a manifest grows by some hundred bytes a segment."""

METRIC = "cosine"


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What a file of the collection must be."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class SegmentEntry:
    """One immutable segment.

    Attributes:
        name: its directory under `segments/`.
        count: vectors in it.
        factory: `Flat`, or the factory string of the FAISS index in `index.faiss`.
        parameters: search parameters by FAISS's own names, such as `efSearch`, for searches
            whose caller names no others.
    """

    name: str
    count: int
    factory: str
    parameters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a collection holds.

    Attributes:
        name: a word for people.
        fingerprint: of the encoder that made every vector.
        dim: length of a vector.
        encoder: URI or absolute path of that encoder when the collection was built.
        preprocessing: of that encoder, as JSON.
        sources: URI and number of images of each source, in order.
        segments: in the order of their rows.
        files: by path within the collection, with `/`.
        versions: of the libraries that wrote it.
        build: the report of the build: images, rejects, seconds, parameters.
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

    @property
    def count(self) -> int:
        """Vectors in all segments."""
        return sum(segment.count for segment in self.segments)


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
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest; no other file is opened.

    Raises:
        CollectionError: there is none, it is of another schema, or it was damaged or edited.
    """
    document = _read_document(directory)
    try:
        return _from_json(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CollectionError(
            str(directory / MANIFEST_FILE),
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


def _to_json(manifest: Manifest) -> dict[str, Json]:
    """Lay the manifest out for people to read."""
    return {
        "schema_version": SCHEMA_VERSION,
        "name": manifest.name,
        "fingerprint": manifest.fingerprint,
        "dim": manifest.dim,
        "metric": METRIC,
        "count": manifest.count,
        "encoder": {"uri": manifest.encoder, "preprocessing": dict(manifest.preprocessing)},
        "sources": [{"uri": uri, "count": count} for uri, count in manifest.sources.items()],
        "segments": [
            {
                "name": segment.name,
                "count": segment.count,
                "factory": segment.factory,
                "parameters": dict(segment.parameters),
            }
            for segment in manifest.segments
        ],
        "files": {
            name: {"sha256": entry.sha256, "bytes": entry.size_bytes}
            for name, entry in sorted(manifest.files.items())
        },
        "versions": dict(manifest.versions),
        "build": dict(manifest.build),
    }


def _from_json(document: Mapping[str, Json]) -> Manifest:
    """Build the manifest from its JSON; what is amiss raises KeyError and its kin.

    A right checksum says only that the file is as its writer left it, whoever that was.
    """
    encoder = cast(dict[str, Json], document["encoder"])
    sources = cast(list[dict[str, Json]], document["sources"])
    segments = cast(list[dict[str, Json]], document["segments"])
    files = cast(dict[str, dict[str, Json]], document["files"])
    if document["metric"] != METRIC:
        raise ValueError(f"metric {document['metric']!r}")
    names = [_text(segment["name"]) for segment in segments]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"segments {names!r}")
    for name in (*files, *names):
        _refuse_escape(name)
    return Manifest(
        name=_text(document["name"]),
        fingerprint=_text(document["fingerprint"]),
        dim=_number(document["dim"]),
        encoder=_text(encoder["uri"]),
        preprocessing=dict(cast(dict[str, Json], encoder["preprocessing"])),
        sources={_text(source["uri"]): _number(source["count"]) for source in sources},
        segments=tuple(
            SegmentEntry(
                name=name,
                count=_number(segment["count"]),
                factory=_text(segment["factory"]),
                parameters={
                    _text(key): _number(value)
                    for key, value in cast(dict[str, Json], segment["parameters"]).items()
                },
            )
            for name, segment in zip(names, segments, strict=True)
        ),
        files={
            name: FileEntry(sha256=_text(entry["sha256"]), size_bytes=_number(entry["bytes"], 0))
            for name, entry in files.items()
        },
        versions=dict(cast(dict[str, str], document["versions"])),
        build=dict(cast(dict[str, Json], document["build"])),
    )


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


def _read_document(directory: Path) -> dict[str, Json]:
    """Parse `manifest.json` and check its schema version and its checksum."""
    file = directory / MANIFEST_FILE
    if not file.is_file():
        found = f"no {MANIFEST_FILE} in it" if directory.is_dir() else "no such directory"
        raise CollectionError(
            str(directory),
            expected="a collection directory",
            found=found,
            mend="make one with `python -m index.build --images SRC --encoder BUNDLE --out C`",
        )
    if (size_bytes := file.stat().st_size) > MAX_MANIFEST_BYTES:
        raise CollectionError(
            str(file),
            expected=f"at most {MAX_MANIFEST_BYTES} bytes",
            found=f"{size_bytes}",
            mend="the file is damaged: restore it, or build the collection again",
        )
    try:
        document = json.loads(file.read_bytes())
        version, checksum = document["schema_version"], _checksum(document)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CollectionError(
            str(file),
            expected="JSON with a schema_version",
            found="something else",
            mend="the file is damaged: restore it, or build the collection again",
        ) from error
    if version != SCHEMA_VERSION:
        raise CollectionError(
            str(file),
            expected=f"schema version {SCHEMA_VERSION}",
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
