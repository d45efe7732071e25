"""What a sync did: for people as text, for machines as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from index.building.metadata import JoinReport
from index.building.summary import BuildSummary
from index.storage.manifest import REJECTS_FILE
from models.bundle import Json
from models.command import counted


@dataclass(frozen=True, kw_only=True)
class SyncSummary:
    """What a sync did, or would do.

    Attributes:
        collection: its directory.
        source: what it was brought up to date with.
        fingerprint: of the encoder.
        images: vectors in the collection, of all sources.
        new: images that it did not have.
        changed: images whose bytes are others now.
        moved: images that had another key.
        gone: images that the source has no more.
        updated: images of which only label, metadata or source are others now.
        unchanged: images that stay as they are.
        unreadable: images that cannot be read now and stay as they are.
        rejected: images that cannot be used.
        log: the file that says which and why.
        embedded: images that went through the encoder.
        read: images that were read to be hashed.
        scan_s: seconds for finding out.
        embed_s: seconds for doing it; of a dry run those for embedding, as a sample took.
        metadata: how images and rows of `--metadata` met; None where none was given.
        dry_run: whether nothing was changed.
    """

    collection: str
    source: str
    fingerprint: str
    images: int
    new: int
    changed: int
    moved: int
    gone: int
    updated: int
    unchanged: int
    unreadable: int
    rejected: int
    log: str
    embedded: int
    read: int
    scan_s: float
    embed_s: float
    metadata: Mapping[str, Json] | None
    dry_run: bool

    def __str__(self) -> str:
        facts = (
            f"{self.new} new, {self.changed} changed, {self.moved} moved, {self.gone} gone, "
            f"{self.unchanged} unchanged, {self.rejected} rejected"
        )
        if self.dry_run:
            facts += " before"  # of new images nobody knows until they are embedded
        if self.updated:
            facts += f", {self.updated} with other labels or metadata"
        if self.unreadable:
            facts += f", {self.unreadable} that cannot be read now and stay"
        did = "to embed" if self.dry_run else "embedded"
        lines = (
            f"{self.source}: {facts}\n{self.collection}: {counted(self.images, 'image')}; "
            f"read {self.read} in {self.scan_s:.1f} s, {did} {self.embedded}"
        )
        if self.dry_run:
            takes = f" in about {self.embed_s:.1f} s" if self.embedded else ""
            lines += f"{takes}; nothing was changed"
        else:
            lines += f" in {self.embed_s:.1f} s"
        if self.metadata is not None:
            lines += f"\n{JoinReport.from_json(self.metadata)}"
        if self.rejected and not self.dry_run:
            lines += f"\nthe rejected images and why: {self.log}"
        return lines

    @classmethod
    def of_build(cls, built: BuildSummary, source: str) -> SyncSummary:
        """Tell of a collection that was not there and was built as a sync would leave it."""
        return cls(
            collection=built.collection,
            source=source,
            fingerprint=built.fingerprint,
            images=built.images,
            new=built.images,
            changed=0,
            moved=0,
            gone=0,
            updated=0,
            unchanged=0,
            unreadable=0,
            rejected=built.rejects,
            log=str(Path(built.collection) / REJECTS_FILE),
            embedded=built.images - built.reused,
            read=0,
            scan_s=0.0,
            embed_s=built.embed_s,
            metadata=built.metadata,
            dry_run=False,
        )
