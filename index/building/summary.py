"""What a build did, for people and for machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from index.building.metadata import JoinReport
from index.storage.manifest import REJECTS_FILE, Manifest
from models.bundle import Json
from models.command import counted, per_second


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
        log: the file that says which and why.
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
    log: str
    reused: int
    embed_s: float
    index_s: float
    metadata: Mapping[str, Json] | None

    def __str__(self) -> str:
        embedded = self.images - self.reused
        is_timed = embedded and self.embed_s > 0
        rate = f" ({per_second(embedded / self.embed_s)})" if is_timed else ""
        lines = [
            f"{self.collection}: {counted(self.images, 'image')}, {self.index}, "
            f"encoder {self.fingerprint[:12]}",
            f"embedded {embedded} in {self.embed_s:.1f} s{rate}, reused {self.reused}, "
            f"rejected {self.rejects}; collection and index written in {self.index_s:.1f} s",
        ]
        if self.metadata is not None:
            lines.append(str(JoinReport.from_json(self.metadata)))
        if self.rejects:
            lines.append(f"the rejected images and why: {self.log}")
        return "\n".join(lines)


def summarise(out: Path, manifest: Manifest) -> BuildSummary:
    """Take the summary from the manifest's build report."""
    report = cast(dict[str, Any], manifest.build)
    return BuildSummary(
        collection=str(out),
        name=manifest.name,
        fingerprint=manifest.fingerprint,
        index=manifest.segments[0].factory,
        images=manifest.count,
        rejects=report["rejects"],
        log=str(out / REJECTS_FILE),
        reused=report["reused"],
        embed_s=report["embed_s"],
        index_s=report["index_s"],
        metadata=report["metadata"],
    )
