"""`python -m index.build`: embed the images of a source and make a collection of them.

Rules:
    Decoding, encoding and writing go on at the same time, see `index.building.pipeline`.
    Memory holds a few batches and two parts, whatever the size of the source, while it embeds.
    Then it holds the index, which grows with the source: a graph is built on a second copy of
    all vectors. Where the source says how many, that is held against the machine's memory first.
    A build that was killed goes on where it stood when the same command is run again, and
    ends in the same files as one that was not: finished parts are never embedded twice.
    An image that cannot be used, or whose key another has, is written to `rejects.jsonl` and
    counted, never fatal. A source that is away, or storage that fails, ends the build.
    Metadata is joined by key as the rows are written, so that it stands beside its own vector.
    The collection appears whole, by a rename; a replaced one stays readable to those who
    have it open.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import TypeVar, cast

from index.ann.kinds import FLAT
from index.ann.tuning import plan as choose_kinds
from index.building.assemble import check_memory, choose_factory, write_collection
from index.building.dry_run import BuildPlan, plan_build
from index.building.filling import Filling, fill_store, resumable
from index.building.metadata import Metadata
from index.building.options import BuildOptions as BuildOptions
from index.building.part_file import RunKey
from index.building.part_set import PartSet
from index.building.parts import PartStore, parts_directory, read_run_id, refuse_foreign
from index.building.pipeline import ENCODE_THREADS, Crew, choose_crew
from index.building.summary import BuildSummary, summarise
from index.building.sync import SyncSettings, plan_collection, sync_collection
from index.building.sync_summary import SyncSummary
from index.building.target import check_target, find_finished
from index.building.tuned import tune_built
from index.collection import Collection
from index.errors import CollectionError, SourceChangedError, mend_of
from index.storage.manifest import MANIFEST_FILE, Manifest, write_manifest
from index.storage.publishing import put_in_place
from index.storage.writer import CollectionWriter
from models.bundle import Json
from models.command import run_command, shown
from models.cpu import cpu_budget
from models.encoder import Encoder, open_encoder
from models.errors import HoraceError, UsageError, reason_of
from models.files import atomic_directory
from models.images import ImageSource, describe_ignored, open_source

BATCHES_PER_PART = 16

log = logging.getLogger("horace.index")


def main(options: BuildOptions) -> None:
    """Build the collection and say what came of it."""
    did: BuildPlan | BuildSummary | SyncSummary
    work = sync if options.sync else plan if options.dry_run else build
    did = work(options)
    if options.json:
        print(json.dumps(dataclasses.asdict(did), indent=2))
    else:
        print(did)


def build(options: BuildOptions) -> BuildSummary:
    """Build the collection, going on from an unfinished run of the same options.

    Raises:
        HoraceError: source, encoder or target are not usable; what was embedded is kept.
    """
    work = _build if options.store is None else _build_in_milvus
    with _opened(options) as (source, encoder, key):
        metadata = _read_metadata(options, source)
        try:
            return work(options, key, source, encoder, metadata)
        except OSError as error:
            raise _cannot_write(options, error) from error


def _cannot_write(options: BuildOptions, error: OSError) -> CollectionError:
    """Say why the collection cannot be written, and what would help against that."""
    if error.errno == errno.ENAMETOOLONG:
        expected = "a name to which .parts can be added"
        mend = "choose a shorter --out"
    else:
        expected = "a directory that can be written, with room for the collection"
        mend = f"{mend_of(error)} or choose another --out; the same command goes on from here"
    return CollectionError(str(options.out), expected=expected, found=reason_of(error), mend=mend)


def sync(options: BuildOptions) -> BuildPlan | SyncSummary:
    """Bring a collection up to date with its source; build it where there is none.

    Raises:
        HoraceError: source, encoder or collection are not usable; what was written is kept.
    """
    if not (options.target / MANIFEST_FILE).is_file():
        if options.dry_run:
            return _first(plan, options)
        return SyncSummary.of_build(_first(build, options), open_source(options.images).uri)
    with ExitStack() as stack:
        source, encoder, key = stack.enter_context(_opened(options))
        if options.dry_run:
            writer, collection = None, stack.enter_context(Collection.open(options.target))
        else:
            writer = stack.enter_context(CollectionWriter.open(options.target))
            collection = writer.collection
            _tidy(options, key)
        name = collection.name
        if options.name not in (None, name):
            raise UsageError("--name", expected=f"{name}, as it is called", found=str(options.name))
        schema = collection.schema
        settings = SyncSettings(
            batch_size=options.batch_size,
            crew=_crew(options),
            checksum=options.checksum,
            moved_from=options.moved_from,
            metadata=None if options.metadata is None else Metadata(options.metadata, schema),
        )
        if writer is None:
            return plan_collection(collection, source, encoder, settings)
        return sync_collection(writer, source, encoder, settings)


Did = TypeVar("Did", BuildPlan, BuildSummary)


def _first(work: Callable[[BuildOptions], Did], options: BuildOptions) -> Did:
    """Build what there is to sync, anew where the images are others since that was killed."""
    try:
        return work(options)
    except SourceChangedError:
        log.warning(
            "%s has other images than when this build was broken off: it begins anew",
            options.images,
        )
        anew = dataclasses.replace(
            options, sync=False, checksum=False, moved_from=None, restart=True
        )  # none of the three goes with --restart
        return work(anew)


def _tidy(options: BuildOptions, key: RunKey) -> None:
    """Remove the parts of a collection whose build was killed when it was in its place."""
    if find_finished(options.target) is None:
        return
    try:
        with PartStore(options.target, key, restart=True):
            log.info("%s: what its build left beside it is gone", options.target)
    except (OSError, HoraceError) as error:  # nothing that the sync needs
        log.warning("%s: what its build left beside it stays: %s", options.target, error)


def plan(options: BuildOptions) -> BuildPlan:
    """Say what `build` would do; nothing is written.

    Raises:
        HoraceError: as `build` would.
    """
    check_target(options.target, replace=options.replace, is_locked=False)
    refuse_foreign(parts_directory(options.target))
    with _opened(options) as (source, encoder, key):
        parts = PartSet(parts_directory(options.target), key, restart=options.restart)
        count = key.source_count
        _read_metadata(options, source)
        _check_memory(options, key)
        fixed = options.recall is None and (options.index != "auto" or count is not None)
        return plan_build(
            parts,
            parts.missing(source.records()),
            encoder,
            crew=_crew(options),
            factory=choose_factory(options.index, count or 0) if fixed else None,
            goal=options.goal,
        )


@contextmanager
def _opened(options: BuildOptions) -> Iterator[tuple[ImageSource, Encoder, RunKey]]:
    """Open the source and the encoder, and say what decides the parts."""
    source = open_source(options.images)
    _require_text(source.uri)
    with closing(open_encoder(options.encoder, threads=ENCODE_THREADS)) as encoder:
        if ignored := describe_ignored(source):
            log.info("%s: %s", source.uri, shown(ignored))
        key = RunKey(
            source=source.uri,
            source_count=source.count(),
            fingerprint=encoder.fingerprint,
            dim=encoder.dim,
            batch_size=options.batch_size,
            part_size=options.batch_size * BATCHES_PER_PART,
        )
        yield source, encoder, key


def _require_text(uri: str) -> None:
    """Refuse a source whose rows could not say where they are from: parquet holds text.

    Raises:
        UsageError: its name is no UTF-8.
    """
    if any(unicodedata.category(c) == "Cs" for c in uri):
        raise UsageError(
            f"--images {uri!r}",
            expected="a name in UTF-8",
            found="another",
            mend="rename it, or name it by a link",
        )


def _build(
    options: BuildOptions,
    key: RunKey,
    source: ImageSource,
    encoder: Encoder,
    metadata: Metadata | None,
) -> BuildSummary:
    """Embed what is missing, write the collection, put it in its place."""
    out = options.target
    finished = None if options.restart and options.replace else find_finished(out)
    if finished is not None and _is_same(finished, options, key, metadata):
        log.info("%s was finished by an earlier run, which was killed before it could say so", out)
        with PartStore(out, key, restart=True):
            return summarise(out, finished)
    check_target(out, replace=options.replace)
    _check_memory(options, key)
    restart = options.restart or finished is not None  # the parts are in that collection
    with PartStore(out, key, restart=restart) as store, resumable(store):
        reused, embed_s = fill_store(store, source, encoder, _filling(options))
        start_s = time.monotonic()
        with atomic_directory(store.directory / "collection") as directory:
            manifest = write_collection(
                directory,
                store,
                encoder,
                name=options.title,
                uri=options.encoder,
                factory=FLAT if options.goal else choose_factory(options.index, store.n_images),
                metadata=metadata,
            )
            times = {"embed_s": embed_s, "index_s": time.monotonic() - start_s}
            report = {**manifest.build, "reused": reused, **times}
            manifest = dataclasses.replace(manifest, build=report)
            write_manifest(directory, manifest)
            if options.goal is not None:
                manifest = tune_built(directory, options.goal)
        put_in_place(store.directory / "collection", out, replace=options.replace)
        store.discard()
    return summarise(out, manifest)


def _build_in_milvus(
    options: BuildOptions,
    key: RunKey,
    source: ImageSource,
    encoder: Encoder,
    metadata: Metadata | None,
) -> BuildSummary:
    """Embed what is missing, and have Milvus keep it."""
    from index.milvus.building import check_place, drop_unnamed, publish

    run_id = None if options.restart else read_run_id(options.target)
    check_place(options.milvus, run_id, index=options.index, replace=options.replace)
    give_up = partial(drop_unnamed, options.milvus)
    with (
        PartStore(options.target, key, restart=options.restart, give_up=give_up) as store,
        resumable(store),
    ):
        reused, embed_s = fill_store(store, source, encoder, _filling(options))
        summary = publish(
            options.milvus,
            store,
            encoder,
            uri=options.encoder,
            index=options.index,
            metadata=metadata,
            reused=reused,
            embed_s=embed_s,
            replace=options.replace,
        )
        store.discard()
    return summary


def _read_metadata(options: BuildOptions, source: ImageSource) -> Metadata | None:
    """Read the table that is to be joined, and see that it is of these images."""
    if options.metadata is None:
        return None
    metadata = Metadata(options.metadata)
    metadata.require_known(source)
    return metadata


def _check_memory(options: BuildOptions, key: RunKey) -> None:
    """Look whether the index can be built, before hours of embedding."""
    if key.source_count is None:
        return
    if options.goal is not None:
        choose_kinds(key.source_count, key.dim, options.goal)
    else:
        check_memory(choose_factory(options.index, key.source_count), key.source_count, key.dim)


def _crew(options: BuildOptions) -> Crew:
    """Say how many batches are at work."""
    return choose_crew(cpu_budget(), options.encoder, requests=options.requests)


def _filling(options: BuildOptions) -> Filling:
    """Say who makes the parts."""
    return Filling(
        images=options.images,
        encoder=options.encoder,
        engine=options.engine,
        actors=options.actors,
        processes=options.processes,
        crew=_crew(options),
    )


def _is_same(
    manifest: Manifest, options: BuildOptions, key: RunKey, metadata: Metadata | None
) -> bool:
    """Tell whether a collection is what these options would build."""
    joined = cast(Mapping[str, Json] | None, manifest.build.get("metadata"))
    return (
        manifest.build.get("run") == key.to_json()
        and manifest.name == options.title
        and (joined and joined["sha256"]) == (metadata and metadata.sha256)
        and len(manifest.segments) == 1
        and (
            manifest.segments[0].factory == choose_factory(options.index, manifest.count)
            if options.recall is None
            else manifest.tuning.get("recall") == options.recall
        )
    )


if __name__ == "__main__":
    sys.exit(run_command(BuildOptions, main, prog="python -m index.build"))
