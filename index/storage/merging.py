"""Segments that stand for others: those merged into one, and one with another index.

Rules:
    A merge works on a snapshot, and writes go on meanwhile; what they killed is dead in the
    merged segment, too.
    An index that somebody made is opened, and so checked, before a manifest names it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.ann.kinds import default_parameters
from index.storage.compaction import choose_index
from index.storage.manifest import hash_files
from index.storage.publishing import NewSegment, checked, write_parts
from index.storage.segment import FLAT, SEGMENTS, segment_files
from index.storage.snapshot import Part, Snapshot
from index.storage.store import Store
from models.errors import UsageError
from models.files import sync


def merge(
    store: Store, merged: Sequence[Part], *, name: str, index: str | None = None
) -> NewSegment:
    """Write the living rows of segments as one; nothing names it yet.

    Args:
        store: the collection.
        merged: those segments.
        name: of the new one.
        index: its factory; the collection's own where None.
    """
    entries = [part.segment.entry for part in merged]
    others = [entry for entry in store.manifest.segments if entry not in entries]
    factory, parameters = choose_index(sum(part.count for part in merged), entries, others)
    if index is not None and index != factory:
        factory, parameters = index, default_parameters(index)
    return write_parts(store, merged, name=name, factory=factory, parameters=parameters)


def still_alive(merged: Sequence[Part], now: Snapshot) -> NDArray[np.bool_] | None:
    """Tell which rows of a merged segment were not killed while it was written; None where all."""
    parts = {part.segment.entry.name: part for part in now.parts}
    still = []
    for part in merged:
        alive_N = parts[part.segment.entry.name].alive_N
        if alive_N is None:
            alive_N = np.ones(part.segment.entry.count, np.bool_)
        still.append(alive_N if part.alive_N is None else alive_N[part.alive_N])
    alive_N = np.concatenate(still)
    return None if alive_N.all() else alive_N


def whole_segment(store: Store) -> Part:
    """Give the only part of a collection, all of whose rows are alive.

    Raises:
        UsageError: there are several, deleted rows, or rows in no segment yet.
    """
    parts = store.snapshot.parts
    if len(parts) != 1 or not parts[0].segment.entry.name or parts[0].dead:
        dead = sum(part.dead for part in parts)
        raise UsageError(
            f"collection {store.path}",
            expected="one segment without deleted rows",
            found=f"{len(parts)} parts, {dead} rows deleted",
            mend="merge them with compact(all=True)",
        )
    return parts[0]


def with_index(
    store: Store, part: Part, file: Path | None, *, name: str, factory: str,
    parameters: Mapping[str, int],
) -> NewSegment:  # fmt: skip
    """Write a segment with another index, and the same rows without copying them.

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
    entry = replace(part.segment.entry, name=name, factory=factory, parameters=dict(parameters))
    assert (file is None) == (factory == FLAT), f"{factory} in {file}"
    folder = store.path / SEGMENTS / name
    try:
        for source in segment_files(replace(part.segment.entry, factory=FLAT)):
            os.link(store.path / source, folder / Path(source).name)
        if file is not None:
            shutil.copyfile(file, folder / "index.faiss")
        for one in (*folder.iterdir(), folder, folder.parent):
            sync(one)
        new = NewSegment(entry=entry, files=hash_files(store.path, segment_files(entry)))
        return checked(store, new)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
