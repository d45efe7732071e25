"""What a manifest says, in Python and as JSON: segments, journal, files, encoder, sources.

Rules:
    Nothing is taken on trust: of every field the type and the range are checked, and names
    stay inside the collection's directory.

Here is no file: that is `index.storage.manifest`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import cast

from index.knn import COSINE, EUCLIDEAN
from models.bundle import Json

SCHEMA_VERSION = 2


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
        is_provisional: whether it is `Flat` only since it was a delta, and nobody chose that.
    """

    name: str
    count: int
    factory: str
    parameters: Mapping[str, int] = field(default_factory=dict)
    tombstones: str = ""
    dead: int = 0
    is_provisional: bool = False


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

    @property
    def count(self) -> int:
        """Living vectors in all segments; those of the journal come on top."""
        return sum(segment.count - segment.dead for segment in self.segments)


def manifest_to_json(manifest: Manifest) -> dict[str, Json]:
    """Lay the manifest out for people to read."""
    journal = manifest.journal
    return {
        "schema_version": SCHEMA_VERSION,
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
        **({"is_provisional": True} if segment.is_provisional else {}),
    }


def manifest_from_json(document: Mapping[str, Json]) -> Manifest:
    """Build the manifest from its JSON; what is amiss raises KeyError and its kin.

    A right checksum says only that the file is as its writer left it, whoever that was.
    """
    encoder = cast(dict[str, Json], document["encoder"])
    sources = cast(list[dict[str, Json]], document["sources"])
    files = cast(dict[str, dict[str, Json]], document["files"])
    segments = tuple(
        _segment_from_json(segment) for segment in cast(list[dict[str, Json]], document["segments"])
    )
    names = [segment.name for segment in segments]
    if len(set(names)) < len(names):
        raise ValueError(f"segments {names!r}")
    metric = document["metric"]
    if metric not in (COSINE, EUCLIDEAN):
        raise ValueError(f"metric {metric!r}")
    journal = cast(dict[str, Json] | None, document["journal"])
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
        generation=_number(document["generation"], 0),
        journal=None if journal is None else _journal_from_json(journal),
        tuning=dict(cast(dict[str, Json], document["tuning"])),
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
        is_provisional=_flag(segment.get("is_provisional", False)),
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


def _flag(value: Json) -> bool:
    """Read what is true or false."""
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _refuse_escape(name: str) -> None:
    """Raise ValueError for a name that leads out of the collection."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"path {name!r}")
