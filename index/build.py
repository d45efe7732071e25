"""`python -m index.build`: embed the images of a source and make a collection of them.

Rules:
    Decoding, encoding and writing go on at the same time, see `index.building.pipeline`.
    Memory holds a few batches, two parts and the index, whatever the size of the source.
    A build that was killed goes on where it stood when the same command is run again, and
    ends in the same files as one that was not: finished parts are never embedded twice.
    An image that cannot be used, or whose key another has, is written to `rejects.jsonl` and
    counted, never fatal.
    Metadata is joined by key as the rows are written, so that it stands beside its own vector.
    The collection appears whole, by a rename; a replaced one stays readable to those who
    have it open.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

import faiss
import numpy as np
import pyarrow as pa

from index.building.metadata import JoinReport, Metadata, join_blocks
from index.building.part_file import PART_ROW_SCHEMA, RunKey
from index.building.parts import PartStore, read_run_id
from index.building.pipeline import ENCODE_THREADS, choose_crew, make_parts
from index.errors import CollectionError
from index.storage.manifest import (
    MANIFEST_FILE,
    REJECTS_FILE,
    Manifest,
    SegmentEntry,
    hash_files,
    read_manifest,
    write_manifest,
)
from index.storage.segment import EF_SEARCH, FLAT, HNSW, write_segment
from models.bundle import Json
from models.command import progress, run_command
from models.cpu import cpu_budget
from models.encoder import Encoder, open_encoder
from models.errors import UsageError
from models.files import atomic_directory, publish_directory
from models.image_folder import FolderSource
from models.images import ImageSource, open_source

FLAT_MAX_COUNT = 20_000
"""Up to here `auto` searches every vector: some milliseconds a query, and always exact."""

BATCHES_PER_PART = 16

log = logging.getLogger("horace.index")


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Embed the images of a source and make a collection of them."""

    images: str
    """The images: a folder (or folder:PATH), tar shards (or wds:PATTERN), idx:IMAGES[,LABELS],
    or fashion-mnist[:train|:test]."""
    encoder: str
    """The encoder: a bundle's directory, or horace://host:port/model."""
    out: Path
    """The collection's directory, to be made."""
    name: str | None = None
    """The collection's name; that of its directory where none is given."""
    index: Literal["auto", "flat", "hnsw"] = "auto"
    """flat searches every vector; hnsw is approximate; auto takes flat up to 20,000 images."""
    metadata: Path | None = None
    """A CSV or parquet file with a column `key`; its other columns are stored with the images."""
    batch_size: int = 64
    """Images encoded at once."""
    replace: bool = False
    """Replace the collection that stands at --out."""
    restart: bool = False
    """Drop what an unfinished build of --out has embedded, instead of going on from it."""
    json: bool = False
    """Print the summary as JSON."""

    def __post_init__(self) -> None:
        """Check what can be checked without opening anything."""
        if not self.target.name:
            raise UsageError("--out", expected="a directory with a name", found=str(self.out))
        if not 1 <= self.batch_size <= 65536:
            raise UsageError("--batch-size", expected="1 to 65536", found=str(self.batch_size))

    @property
    def target(self) -> Path:
        """The collection's directory, absolute and with a name even for `--out .`."""
        return Path(os.path.abspath(self.out))


@dataclass(frozen=True, kw_only=True)
class BuildSummary:
    """What a build did.

    Attributes:
        collection: its directory.
        name: its name.
        fingerprint: of the encoder.
        index: FAISS factory string, or `Flat`.
        images: vectors in the collection.
        rejects: images that could not be used.
        reused: images whose vectors an earlier, unfinished run had made.
        embed_s: seconds for embedding the others.
        index_s: seconds for writing the collection and its index.
        metadata: how images and rows of `--metadata` met; None where none was given.
    """

    collection: str
    name: str
    fingerprint: str
    index: str
    images: int
    rejects: int
    reused: int
    embed_s: float
    index_s: float
    metadata: Mapping[str, Json] | None


def main(options: BuildOptions) -> None:
    """Build the collection and say what came of it."""
    summary = build(options)
    if options.json:
        print(json.dumps(dataclasses.asdict(summary), indent=2))
        return
    print(
        f"{summary.collection}: {summary.images} images, {summary.index}, "
        f"encoder {summary.fingerprint[:12]}"
    )
    embedded = summary.images - summary.reused
    rate = f" ({embedded / summary.embed_s:.0f}/s)" if embedded and summary.embed_s > 0 else ""
    print(
        f"embedded {embedded} in {summary.embed_s:.1f} s{rate}, reused {summary.reused}, "
        f"rejected {summary.rejects}; collection and index written in {summary.index_s:.1f} s"
    )
    if summary.metadata is not None:
        print(JoinReport.from_json(summary.metadata))
    if summary.rejects:
        print(f"the rejected images and why: {Path(summary.collection) / REJECTS_FILE}")


def build(options: BuildOptions) -> BuildSummary:
    """Build the collection, going on from an unfinished run of the same options.

    Raises:
        HoraceError: source, encoder or target are not usable; what was embedded is kept.
    """
    source = open_source(options.images)
    metadata = None if options.metadata is None else Metadata(options.metadata)
    with closing(open_encoder(options.encoder, threads=ENCODE_THREADS)) as encoder:
        if isinstance(source, FolderSource) and source.ignored:
            log.info("%s: %d files that are no images are passed over", source.uri, source.ignored)
        key = RunKey(
            source=source.uri,
            source_count=source.count(),
            fingerprint=encoder.fingerprint,
            dim=encoder.dim,
            batch_size=options.batch_size,
            part_size=options.batch_size * BATCHES_PER_PART,
        )
        try:
            return _build(options, key, source, encoder, metadata)
        except OSError as error:
            raise CollectionError(
                str(options.out),
                expected="a directory that can be written, with room for the collection",
                found=os.strerror(error.errno) if error.errno else str(error),
                mend="make room or choose another --out; the same command goes on from here",
            ) from error


def _build(
    options: BuildOptions,
    key: RunKey,
    source: ImageSource,
    encoder: Encoder,
    metadata: Metadata | None,
) -> BuildSummary:
    """Embed what is missing, write the collection, put it in its place."""
    out = options.target
    finished = _find_finished(out)
    if finished is not None and _is_same(finished, options, key, metadata):
        log.info("%s was finished by an earlier run, which was killed before it could say so", out)
        with PartStore(out, key, restart=True):
            return _summary(out, finished)
    _check_target(out, replace=options.replace)
    restart = options.restart or finished is not None  # the parts are in that collection
    with PartStore(out, key, restart=restart) as store, _resumable(store):
        kept = [part.start for part in store.finished]
        if kept:
            log.info("reusing %d images in %d finished parts of %s", store.n_images, len(kept), out)
        embed_s = _embed_missing(options, store, source, encoder)
        store.settle()
        _check_images(store)
        reused = sum(map(store.count_images, kept))
        start_s = time.monotonic()
        with atomic_directory(store.directory / "collection") as directory:
            manifest = _write_collection(directory, options, encoder, store, metadata)
            times = {"embed_s": embed_s, "index_s": time.monotonic() - start_s}
            report = {**manifest.build, "reused": reused, **times}
            manifest = dataclasses.replace(manifest, build=report)
            write_manifest(directory, manifest)
        publish_directory(store.directory / "collection", out, replace=options.replace)
        store.discard()
    return _summary(out, manifest)


@contextmanager
def _resumable(store: PartStore) -> Iterator[None]:
    """Tell who interrupts the build what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        kept = f"{store.n_images} images are embedded and kept; the same command goes on from there"
        raise KeyboardInterrupt(*([kept] if store.finished else [])) from None


def _embed_missing(
    options: BuildOptions, store: PartStore, source: ImageSource, encoder: Encoder
) -> float:
    """Embed every record that no part covers yet; give the seconds that it took."""
    key, start_s = store.key, time.monotonic()
    total = None if key.source_count is None else key.source_count - store.n_records
    crew = choose_crew(cpu_budget(), is_remote="://" in options.encoder)
    batches = store.missing(source.records())
    with closing(make_parts(batches, encoder, store, crew=crew)) as made:
        for _ in progress(made, what="embedding", total=total, size=int):
            pass
    return time.monotonic() - start_s


def _check_images(store: PartStore) -> None:
    """Refuse a source without one good image."""
    if store.n_images == 0:
        rejects = store.rejects
        first = f", the first: {rejects[0].key}: {rejects[0].message}" if rejects else ""
        raise CollectionError(
            store.key.source,
            expected="at least one image that can be used",
            found=f"{len(rejects)} rejected{first}",
            mend="check the images; the parts are dropped by --restart",
        )


def _write_collection(
    directory: Path,
    options: BuildOptions,
    encoder: Encoder,
    store: PartStore,
    metadata: Metadata | None,
) -> Manifest:
    """Write every file of the collection but the manifest, which is returned."""
    factory = choose_factory(options.index, store.n_images)
    entry = SegmentEntry(
        name="000000",
        count=store.n_images,
        factory=factory,
        parameters={} if factory == FLAT else {"efSearch": EF_SEARCH},
    )
    log.info("writing %d vectors, index %s", entry.count, factory)
    blocks, schema = store.blocks(), PART_ROW_SCHEMA
    if metadata is not None:
        blocks = join_blocks(metadata, blocks)
        schema = pa.schema([*schema, *metadata.columns])
    try:
        names = write_segment(directory, entry, blocks, encoder.dim, schema=schema)
    except RuntimeError as error:  # faiss's own, for a file that it cannot write
        raise OSError(None, str(error).splitlines()[0]) from error
    lines = [json.dumps(dataclasses.asdict(reject)) + "\n" for reject in store.rejects]
    (directory / REJECTS_FILE).write_text("".join(lines))
    uri = options.encoder
    return Manifest(
        name=options.name or options.target.name,
        fingerprint=encoder.fingerprint,
        dim=encoder.dim,
        encoder=uri if "://" in uri else str(Path(uri).resolve()),
        preprocessing=dict(encoder.preprocessing.to_json()),
        sources={store.key.source: entry.count},
        segments=(entry,),
        files=hash_files(directory, [*names, REJECTS_FILE]),
        versions={
            "faiss": faiss.__version__,
            "numpy": np.__version__,
            "pyarrow": pa.__version__,
            "python": platform.python_version(),
        },
        build={
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "run_id": store.run_id,
            "run": store.key.to_json(),
            "rejects": len(store.rejects),
            "metadata": None if metadata is None else metadata.report().to_json(),
        },
    )


def choose_factory(index: Literal["auto", "flat", "hnsw"], count: int) -> str:
    """Turn the option and the number of images into a FAISS factory string."""
    if index == "auto":
        index = "flat" if count <= FLAT_MAX_COUNT else "hnsw"
    return FLAT if index == "flat" else HNSW


def _check_target(out: Path, *, replace: bool) -> None:
    """Leave alone what exists, unless it is a collection and may be replaced."""
    if not out.exists() and not out.is_symlink():
        return
    if not (out / MANIFEST_FILE).is_file():
        raise UsageError(
            f"--out {out}",
            expected="a new directory, or a collection to replace",
            found="something else of that name",
            mend="choose another name",
        )
    if not replace:
        raise UsageError(
            f"--out {out}",
            expected="a new directory",
            found="a collection",
            mend="choose another name, or replace it with --replace",
        )


def _find_finished(out: Path) -> Manifest | None:
    """Read the collection whose run was killed between its last two steps; None if none was."""
    run_id = read_run_id(out)
    if run_id is None or not (out / MANIFEST_FILE).is_file():
        return None
    try:
        manifest = read_manifest(out)
    except CollectionError:
        return None
    return manifest if manifest.build.get("run_id") == run_id else None


def _is_same(
    manifest: Manifest, options: BuildOptions, key: RunKey, metadata: Metadata | None
) -> bool:
    """Tell whether a collection is what these options would build."""
    joined = cast(Mapping[str, Json] | None, manifest.build.get("metadata"))
    return (
        manifest.build.get("run") == key.to_json()
        and manifest.name == (options.name or options.target.name)
        and (joined and joined["sha256"]) == (metadata and metadata.sha256)
        and manifest.segments[0].factory == choose_factory(options.index, manifest.count)
    )


def _summary(out: Path, manifest: Manifest) -> BuildSummary:
    """Take the summary from the manifest's build report."""
    report = cast(dict[str, Any], manifest.build)
    return BuildSummary(
        collection=str(out),
        name=manifest.name,
        fingerprint=manifest.fingerprint,
        index=manifest.segments[0].factory,
        images=manifest.count,
        rejects=report["rejects"],
        reused=report["reused"],
        embed_s=report["embed_s"],
        index_s=report["index_s"],
        metadata=report.get("metadata"),
    )


if __name__ == "__main__":
    sys.exit(run_command(BuildOptions, main, prog="python -m index.build"))
