"""Which segments are merged, and what index the merged one gets.

Rules:
    Segments that are small, or have many dead rows, are merged; a large one is left alone, so
    that to add a little never rebuilds a lot.
    Nothing here touches a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from index.ann.kinds import FLAT, FLAT_MAX_COUNT, HNSW, default_parameters
from index.storage.manifest import SegmentEntry

DEAD_SHARE = 0.2
"""Of a segment's rows, from which it is written anew."""

SMALL_SHARE = 1 / 8
"""Of all living rows, up to which a segment is small."""


def choose_segments(entries: Sequence[SegmentEntry], *, all: bool = False) -> list[str]:
    """Name the segments to merge; none where there is nothing to gain."""
    living = sum(entry.count - entry.dead for entry in entries)
    small = max(FLAT_MAX_COUNT, SMALL_SHARE * living)
    chosen = [
        entry
        for entry in entries
        if all or entry.dead >= DEAD_SHARE * entry.count or entry.count - entry.dead < small
    ]
    gains = len(chosen) > 1 or any(
        entry.dead and (all or entry.dead >= DEAD_SHARE * entry.count) for entry in chosen
    )
    return [entry.name for entry in chosen] if gains else []


def choose_index(
    count: int, merged: Sequence[SegmentEntry], others: Sequence[SegmentEntry]
) -> tuple[str, Mapping[str, int]]:
    """Give the factory and the search parameters of a merged segment.

    Flat where it is small, else what the largest of the merged has. Where those are Flat because
    they were small, what the largest of the other segments has; HNSW where none has an index.
    """
    if count <= FLAT_MAX_COUNT:
        return FLAT, {}
    largest = max(merged, key=lambda entry: entry.count)
    if largest.factory == FLAT and largest.count <= FLAT_MAX_COUNT:
        indexed = [entry for entry in (*merged, *others) if entry.factory != FLAT]
        if not indexed:
            return HNSW, default_parameters(HNSW)
        largest = max(indexed, key=lambda entry: entry.count)
    return largest.factory, largest.parameters
