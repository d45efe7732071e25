"""`index.build --sync`: bring a collection up to date with one of its sources.

Only what is new or changed is embedded; what moved keeps its vector, what is gone is dropped.
What is to be done is decided by `index.building.sync_plan`, and done by `sync_writing`.

Rules:
    Every write goes through the collection's writer, whole or not at all, and what is written is
    not done again: a sync that was killed goes on when the same command is run again, and those
    who search meanwhile see the collection of some moment in between.
    What is gone is dropped last, so that a moved image is never missing.
    Vectors are as the collection compares them: of unit length for cosines, else the encoder's own.
    Only rows of the source are touched; a source that the collection does not know is added.
    Metadata stays with its image; a table that is given again has the last word.
    Another encoder is refused before anything is read.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from index.building.dry_run import measure_rate
from index.building.metadata import Metadata
from index.building.part_set import RecordBatch
from index.building.pipeline import Crew
from index.building.sync_plan import MENDED_ELSEWHERE, Stored, SyncPlan, plan_sync
from index.building.sync_rows import RowMaker, with_digest
from index.building.sync_scan import Scan, scan_source
from index.building.sync_state import (
    SyncState,
    read_rejects,
    read_state,
    rejects_file,
    write_state,
)
from index.building.sync_summary import SyncSummary
from index.building.sync_writing import SyncWriting
from index.collection import Collection, id_of
from index.embed import split
from index.storage.manifest import REJECTS_FILE
from index.storage.rows import DIGEST
from index.storage.writer import CollectionWriter
from models.command import progress
from models.encoder import Encoder
from models.errors import UsageError
from models.image_folder import FolderSource
from models.image_source import ImageRecord, ImageSource

log = logging.getLogger("horace.index")


@dataclass(frozen=True, kw_only=True)
class SyncSettings:
    """How to bring a collection up to date.

    Attributes:
        batch_size: images encoded at once.
        crew: how many batches are at work.
        checksum: whether to read and hash every file, whatever its times say.
        moved_from: the URI by which the collection knows the source, where it has another now.
        metadata: a table to join; what is stored stays where None.
    """

    batch_size: int
    crew: Crew
    checksum: bool = False
    moved_from: str | None = None
    metadata: Metadata | None = None


def sync_collection(
    writer: CollectionWriter, source: ImageSource, encoder: Encoder, settings: SyncSettings
) -> SyncSummary:
    """Bring a collection up to date with a source.

    Args:
        writer: of the collection.
        source: one that it knows, or another to be added.
        encoder: the collection's, opened with `pipeline.ENCODE_THREADS`.
        settings: how.

    Raises:
        FingerprintMismatchError: the collection is another encoder's.
        HoraceError: source or encoder failed; what was written is kept.
    """
    writer.collection.require(encoder.fingerprint)
    try:
        return _Sync(writer.collection, source, encoder, settings, writer).run()
    except KeyboardInterrupt:
        kept = "what was embedded is in the collection; the same command goes on from there"
        raise KeyboardInterrupt(kept) from None


def plan_collection(
    collection: Collection, source: ImageSource, encoder: Encoder, settings: SyncSettings
) -> SyncSummary:
    """Tell what `sync_collection` would do, and embed a sample to tell how long that takes.

    Nothing is written, and a writer may be at work.

    Raises:
        FingerprintMismatchError: the collection is another encoder's.
        HoraceError: the source failed.
    """
    collection.require(encoder.fingerprint)
    return _Sync(collection, source, encoder, settings).run()


@dataclass
class _Sync:
    """One sync at work: what was there when it began, and what has come of it so far."""

    collection: Collection
    source: ImageSource
    encoder: Encoder
    settings: SyncSettings
    writer: CollectionWriter | None = None
    """None where nothing is to be changed."""

    def __post_init__(self) -> None:
        self.path = Path(self.collection.path)
        self.uri = self.source.uri
        self.table = with_digest(self.collection.table())
        self.ids = self.collection.ids
        mine = {self.uri, *self._moved_from()}
        is_own_N = pc.is_in(self.table["source"], value_set=pa.array(list(mine), pa.string()))
        self.own_rows = np.flatnonzero(is_own_N.to_numpy())
        self.keys = cast(list[str], self.table["key"].to_pylist())
        self.rows = RowMaker(
            table=self.table,
            uri=self.uri,
            is_folder=isinstance(self.source, FolderSource),
            metadata=self.settings.metadata,
        )

    def _moved_from(self) -> set[str]:
        """Name the source as the collection knows it, of which a path may have been given.

        Raises:
            UsageError: the collection knows neither that nor the present source.
        """
        given = self.settings.moved_from
        if given is None:
            return set()
        path = given.removeprefix("folder:")
        named = {given, f"folder:{os.path.abspath(os.path.expanduser(path))}"}
        known = cast(list[str], pc.unique(self.table["source"]).to_pylist())
        if known and not named & set(known) and self.uri not in known:  # it may be done already
            raise UsageError(
                "--moved-from", expected=f"one of {', '.join(sorted(known))}", found=given
            )
        return named

    def run(self) -> SyncSummary:
        """Look, decide, write."""
        start_s = time.monotonic()
        state = self._read_state()
        scan = self._scan(state)
        metadata = self.settings.metadata
        if metadata is not None and scan.seen:
            metadata.meet([one.key for one in scan.seen])
            metadata.require_met(scan.seen[0].key)
        plan = self._plan(scan, state)
        scan_s, start_s = time.monotonic() - start_s, time.monotonic()
        updated, updated_rows = self._find_updated(plan)
        plan.updated, n_unchanged = len(updated), len(plan.unchanged) - len(updated)
        if self.writer is not None:
            is_settled = partial(scan.is_settled, self.source)
            done = SyncWriting(self.writer, self.collection, plan, self.rows, is_settled)
            done.write_updated(updated, updated_rows)
            done.write_reused()
            if plan.embed:
                done.embed(self._batches(plan), self.encoder, self.settings.crew)
            done.drop()
            self.writer.compact()
            self._write_state(scan, plan, done.digests)
            embedded, embed_s = done.embedded, time.monotonic() - start_s
        else:
            embedded, embed_s = len(plan.embed), self._estimate_s(plan)
        return SyncSummary(
            collection=str(self.path),
            source=self.uri,
            fingerprint=self.encoder.fingerprint,
            images=(self.writer or self).collection.count,
            new=plan.new,
            changed=plan.changed,
            moved=plan.moved,
            gone=plan.gone,
            updated=plan.updated,
            unchanged=n_unchanged,
            unreadable=len(plan.retained),
            rejected=len(plan.rejects),
            log=str(rejects_file(self.path, self.uri)),
            embedded=embedded,
            read=scan.n_read,
            scan_s=scan_s,
            embed_s=embed_s,
            metadata=None if metadata is None else metadata.report().to_json(),
            dry_run=self.writer is None,
        )

    def _read_state(self) -> SyncState:
        """Give what is remembered; of a source that was only built, its rejects."""
        state = read_state(self.path, self.uri)
        run = cast(dict[str, object], self.collection.manifest.build.get("run") or {})
        if not rejects_file(self.path, self.uri).exists() and run.get("source") == self.uri:
            state = SyncState(stamps=state.stamps, rejects=read_rejects(self.path / REJECTS_FILE))
        return state

    def _scan(self, state: SyncState) -> Scan:
        """List the source, and hash what is not known by its stamp."""
        scan = Scan()
        known = {} if self.settings.checksum else state.stamps
        need_digests = bool(len(self.own_rows) or state.rejects)
        looking = scan_source(self.source, scan, known, need_digests=need_digests)
        with closing(looking):
            for _ in progress(looking, what="comparing", total=self.source.count(), size=int):
                pass
        return scan

    def _plan(self, scan: Scan, state: SyncState) -> SyncPlan:
        """Decide what becomes of every image."""
        digests = cast(list[str | None], self.table[DIGEST].to_pylist())
        by_digest: dict[str, int] = {}
        for row, digest in enumerate(digests):
            if digest is not None:
                by_digest.setdefault(digest, row)
        holders = dict(zip(self.ids.tolist(), [""] * len(self.keys), strict=True))
        holders |= {int(self.ids[row]): self.keys[row] for row in self.own_rows}
        taken = {
            one.key for one in scan.seen if holders.setdefault(id_of(one.key), one.key) != one.key
        }
        return plan_sync(
            scan.seen,
            {self.keys[row]: Stored(row, digests[row]) for row in self.own_rows.tolist()},
            by_digest=by_digest,
            taken=taken,
            rejected={
                reject.key: reject
                for reject in state.rejects.values()
                if reject.fault not in MENDED_ELSEWHERE
            },
        )

    def _find_updated(self, plan: SyncPlan) -> tuple[pa.Table, list[int]]:
        """Find the unchanged images whose label, metadata or source is another now."""
        pairs = plan.unchanged
        settings = self.settings
        if self.rows.is_folder and settings.metadata is None and settings.moved_from is None:
            pairs = []  # keys are the same, and nothing else can be another
        return self.rows.find_updated([one for one, _ in pairs], [row for _, row in pairs])

    def _estimate_s(self, plan: SyncPlan) -> float:
        """Say how long it takes to embed what is to be embedded, by a sample of it."""
        if not plan.embed:
            return 0.0
        _, rate = measure_rate(self._batches(plan), self.encoder, self.settings.crew)
        return len(plan.embed) / rate if rate else 0.0

    def _batches(self, plan: SyncPlan) -> Iterator[RecordBatch]:
        """Give the records to embed in batches."""
        size = self.settings.batch_size
        for number, records in enumerate(split(self._wanted(plan), size)):
            yield RecordBatch(size * number, records)

    def _wanted(self, plan: SyncPlan) -> Iterator[ImageRecord]:
        """Give the records to embed, of each key the first."""
        waiting = set(plan.embed)
        for record in self.source.records():
            if record.key in waiting:
                waiting.remove(record.key)
                yield record

    def _write_state(self, scan: Scan, plan: SyncPlan, embedded: Mapping[str, str]) -> None:
        """Remember stamps and rejects for the next time; it is no loss if that fails."""
        digests = {one.key: one.digest for one in scan.seen}
        digests |= embedded
        stamps = {
            key: (stamp, digest)
            for key, stamp in scan.stamps.items()
            if (digest := digests.get(key)) is not None
        }
        try:
            write_state(self.path, self.uri, stamps, plan.rejects)
        except OSError as error:
            log.warning("%s: the next sync will read every file again: %s", self.uri, error)
