"""Segments that stand for others: those merged into one, and one with another index.

Rules:
    A merge works on a snapshot, and writes go on meanwhile; what they killed is dead in the
    merged segment, too.
    Rows that are only asked for as one segment are merged aside: the collection is searched as
    before until somebody has an index of them.
    An index that somebody made is opened, and so checked, before a manifest names it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.storage.compaction import choose_index
from index.storage.manifest import SegmentEntry, hash_files
from index.storage.publishing import NewSegment, checked, write_aside, write_parts
from index.storage.segment import FLAT, SEGMENTS, Segment, open_segment, segment_files
from index.storage.snapshot import Part, Snapshot
from index.storage.store import Store
from models.files import sync


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Every living row of a collection, in one segment.

    Attributes:
        part: that segment, searched exactly where it is no segment of the collection.
        merged: the parts that it stands for; itself where it was the only one.
    """

    part: Part
    merged: Sequence[Part]

    @property
    def segment(self) -> Segment:
        """Its rows."""
        return self.part.segment


def merge(store: Store, merged: Sequence[Part], *, name: str) -> NewSegment:
    """Write the living rows of segments as one; nothing names it yet.

    Args:
        store: the collection.
        merged: those segments.
        name: of the new one.
    """
    entries = [part.segment.entry for part in merged]
    count = sum(part.count for part in merged)
    factory, parameters = choose_index(count, entries, store.manifest.segments)
    return write_parts(store, merged, name=name, factory=factory, parameters=parameters)


def still_alive(merged: Sequence[Part], now: Snapshot) -> NDArray[np.bool_]:
    """Tell which rows of a merged segment were not killed while it was written.

    Of a part that is gone all were: nobody else merged meanwhile.
    """
    parts = {part.segment.entry.name: part for part in now.parts}
    still = []
    for part in merged:
        there = parts.get(part.segment.entry.name)
        alive_N = None if there is None else there.alive_N
        if alive_N is None:
            alive_N = np.full(part.segment.entry.count, there is not None)
        still.append(alive_N if part.alive_N is None else alive_N[part.alive_N])
    return np.concatenate(still)


def is_whole(parts: Sequence[Part]) -> bool:
    """Tell whether parts, of which none is the delta, are one, all of whose rows are alive."""
    return len(parts) == 1 and not parts[0].dead


@contextmanager
def whole_aside(store: Store, parts: Sequence[Part], *, name: str) -> Iterator[Whole]:
    """Write the living rows of parts as a segment that is there in this block, and named nowhere.

    Args:
        store: the collection.
        parts: all of them.
        name: of the segment.
    """
    new = write_aside(store, parts, name=name, factory=FLAT, parameters={})
    try:
        manifest = replace(store.manifest, files=new.files)
        segment = open_segment(store.path, manifest, new.entry, verify=False)
        yield Whole(part=Part(segment=segment, alive_N=None, count=new.entry.count), merged=parts)
    finally:
        shutil.rmtree(store.path / SEGMENTS / name, ignore_errors=True)


def with_index(
    store: Store, part: Part, file: Path | None, *, name: str, factory: str,
    parameters: Mapping[str, int],
) -> NewSegment:  # fmt: skip
    """Write a segment with another index, and the same rows, not copied where that can be.

    Args:
        store: the collection.
        part: the segment.
        file: a FAISS index of its rows, in their order; None for `Flat`.
        name: of the new segment.
        factory: of the index.
        parameters: its search parameters.

    Raises:
        CollectionError: the file is not an index of this kind over these rows.
    """
    entry = SegmentEntry(
        name=name, count=part.segment.entry.count, factory=factory, parameters=dict(parameters)
    )
    assert (file is None) == (factory == FLAT), f"{factory} in {file}"
    folder = store.path / SEGMENTS / name
    try:
        for source in segment_files(replace(part.segment.entry, factory=FLAT)):
            _link(store.path / source, folder / Path(source).name)
        if file is not None:
            shutil.copyfile(file, folder / "index.faiss")
        for one in (*folder.iterdir(), folder, folder.parent):
            sync(one)
        new = NewSegment(entry=entry, files=hash_files(store.path, segment_files(entry)))
        return checked(store, new)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has one name a file."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
