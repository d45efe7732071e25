"""`python -m index.describe C`: what a collection is: images, segments, index, encoder, sources.

What a person asks before using a collection, or before compacting it: how many images live, how
many are deleted and still take space, how many wait in the delta; of which segments it is made
and how they are searched; what the tuning measured; which encoder made the vectors and where it
was; from which sources; which files take which space; and which versions wrote it.

Rules:
    One snapshot is described, and nothing is changed.
    Sizes are checked and files opened, but not hashed: that is `index.verify`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from tyro.conf import Positional

from index.ann.kinds import FLAT
from index.ann.report import in_short
from index.collection import Collection, version_text
from index.storage.manifest import MANIFEST_FILE, Manifest
from index.storage.rows import metadata_columns
from models.bundle import Json
from models.command import counted, run_command, shown

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class DescribeOptions:
    """Say what a collection is."""

    collection: Positional[Path]
    """The collection's directory."""
    json: bool = False
    """Print it as JSON."""


@dataclass(frozen=True, kw_only=True)
class SegmentDescription:
    """One segment.

    Attributes:
        name: its directory.
        count: vectors in it, deleted ones too.
        deleted: of those.
        index: factory string, or `Flat`.
        parameters: of a search that names none.
        size_bytes: of its files.
    """

    name: str
    count: int
    deleted: int
    index: str
    parameters: Mapping[str, int]
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a collection is.

    Attributes:
        name: a word for people.
        version: of its content: each write makes another.
        count: living images.
        deleted: images that are deleted and still take space.
        delta: living images that are in no segment yet.
        dim: length of a vector.
        metric: how vectors are compared.
        index: the kinds of index, or `Flat` where every search is exact.
        fingerprint: of the encoder that made the vectors.
        encoder: where that was.
        preprocessing: of that encoder.
        segments: in the order of their rows.
        sources: living images of each source.
        columns: of the metadata.
        column_types: of those that are the user's own.
        size_bytes: by kind of file, `total` among them.
        tuning: what `index.tune` measured; empty where it was not asked.
        versions: of the libraries that wrote it.
        build: the report of the build.
    """

    name: str
    version: str
    count: int
    deleted: int
    delta: int
    dim: int
    metric: str
    index: str
    fingerprint: str
    encoder: str
    preprocessing: Mapping[str, Json]
    segments: list[SegmentDescription]
    sources: Mapping[str, int]
    columns: list[str]
    column_types: Mapping[str, str]
    size_bytes: Mapping[str, int]
    tuning: Mapping[str, Json]
    versions: Mapping[str, str]
    build: Mapping[str, Json]


def main(options: DescribeOptions) -> None:
    """Describe the collection.

    Raises:
        CollectionError: there is none, or it cannot be opened.
    """
    with Collection.open(options.collection, verify=False) as collection:
        described = describe(collection)
    if options.json:
        print(json.dumps(asdict(described), indent=2))
    else:
        print("\n".join(map(shown, _as_lines(described))))


def describe(collection: Collection) -> Description:
    """Say what a snapshot of a collection is."""
    manifest, schema = collection.manifest, collection.schema
    return Description(
        name=collection.name,
        version=version_text(collection.version),
        count=collection.count,
        deleted=sum(collection.deleted.values()),
        delta=collection.delta_count,
        dim=collection.dim,
        metric=collection.metric,
        index=collection.factory,
        fingerprint=collection.fingerprint,
        encoder=manifest.encoder,
        preprocessing=dict(manifest.preprocessing),
        segments=_describe_segments(collection),
        sources=collection.sources,
        columns=list(schema.names),
        column_types={name: str(schema.field(name).type) for name in metadata_columns(schema)},
        size_bytes=_sizes(collection.path, manifest),
        tuning=dict(manifest.tuning),
        versions=dict(manifest.versions),
        build=dict(manifest.build),
    )


def _describe_segments(collection: Collection) -> list[SegmentDescription]:
    """Describe the segments, with what was deleted of them since they were written."""
    manifest, deleted = collection.manifest, collection.deleted
    return [
        SegmentDescription(
            name=entry.name,
            count=entry.count,
            deleted=deleted[entry.name],
            index=entry.factory,
            parameters=dict(entry.parameters),
            size_bytes=sum(
                file.size_bytes
                for name, file in manifest.files.items()
                if PurePosixPath(name).parent.name == entry.name
            ),
        )
        for entry in manifest.segments
    ]


def _sizes(path: Path, manifest: Manifest) -> dict[str, int]:
    """Add up the bytes of files by what they are called: vectors, ids, rows, index and others."""
    sizes: dict[str, int] = {}
    for name, entry in manifest.files.items():
        kind = PurePosixPath(name).stem.partition("-")[0]  # generations stand behind it
        sizes[kind] = sizes.get(kind, 0) + entry.size_bytes
    names = [MANIFEST_FILE] if manifest.journal is None else [MANIFEST_FILE, manifest.journal.name]
    for name in names:
        with suppress(FileNotFoundError):  # a writer has replaced the journal meanwhile
            sizes[PurePosixPath(name).stem.partition("-")[0]] = (path / name).stat().st_size
    return {**dict(sorted(sizes.items())), "total": sum(sizes.values())}


def _as_lines(described: Description) -> Iterator[str]:
    """Lay it out for people."""
    d = described
    yield f"{d.name}: {counted(d.count, 'image')} of {d.dim} dimensions, {d.metric}, {d.index}"
    yield f"  images       {d.count} live, {d.delta} of them in the delta; {d.deleted} deleted"
    yield f"  version      {d.version}"
    yield f"  encoder      {d.encoder}"
    yield f"  fingerprint  {d.fingerprint}"
    for uri, count in d.sources.items():
        yield f"  source       {uri}: {count}"
    types = {name: f" ({kind})" for name, kind in d.column_types.items()}
    yield f"  metadata     {', '.join(name + types.get(name, '') for name in d.columns)}"
    for one in d.segments:
        settings = " ".join(f"{name}={value}" for name, value in one.parameters.items())
        yield (
            f"  segment      {one.name}: {counted(one.count, 'vector')}, {one.deleted} deleted, "
            f"{one.index}{f' {settings}' if settings else ''}, {_mib(one.size_bytes)}"
        )
    parts = ", ".join(f"{k} {_mib(v)}" for k, v in d.size_bytes.items() if k != "total")
    yield f"  size         {_mib(d.size_bytes['total'])}: {parts}"
    yield from _tuning_lines(d)
    later = [one.name for one in d.segments[1:] if one.index != FLAT]
    if d.tuning and later:
        first = d.segments[0].name
        yield f"  unmeasured   the index of {', '.join(later)}: the tuning is of {first}"
    yield f"  versions     {', '.join(f'{name} {value}' for name, value in d.versions.items())}"


def _tuning_lines(described: Description) -> Iterator[str]:
    """Say what the tuning found, or why there is none."""
    if described.tuning:
        yield from (f"  {name:<12} {text}" for name, text in in_short(described.tuning))
    elif described.index == FLAT:
        yield "  tuning       none: every search is exact"
    else:
        yield "  tuning       none: run `python -m index.tune C --recall .99`"


def _mib(size_bytes: int) -> str:
    """Write a size as people read it."""
    return f"{size_bytes / MIB:.1f} MiB" if size_bytes >= MIB else f"{size_bytes} bytes"


if __name__ == "__main__":
    sys.exit(run_command(DescribeOptions, main, prog="python -m index.describe"))
