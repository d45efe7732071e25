"""Which segments are merged, and what index the merged one gets.

Rules:
    Segments that are small, or have many dead rows, are merged; a large one is left alone, so
    that to add a little never rebuilds a lot.
    What was a delta is Flat until it is merged, however large it is: together with others of its
    kind it gets an index. Only a large segment that somebody made Flat stays so.
    An index of more lists than there are rows to merge is made with as many as those call for.
    Nothing here touches a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from index.ann.candidates import list_count
from index.ann.kinds import FLAT, FLAT_MAX_COUNT, HNSW, default_parameters, parse_kind
from index.storage.manifest import SegmentEntry

DEAD_SHARE = 0.2
"""Of a segment's rows, from which it is written anew."""

SMALL_SHARE = 1 / 8
"""Of all living rows, up to which a segment is small."""


def choose_segments(
    entries: Sequence[SegmentEntry], *, all: bool = False, index: str | None = None
) -> list[str]:
    """Name the segments to merge; none where there is nothing to gain.

    Args:
        entries: of the collection.
        all: whether to merge every one.
        index: the factory that somebody asks for, where somebody does.
    """
    small = max(FLAT_MAX_COUNT, SMALL_SHARE * sum(map(_living, entries)))
    has_index = any(entry.factory == index for entry in entries)
    chosen, gains = [], False
    for entry in entries:
        is_large = _living(entry) > FLAT_MAX_COUNT
        is_dying = entry.dead >= DEAD_SHARE * entry.count
        is_other = index not in (None, entry.factory) and (is_large or all or not has_index)
        if all or is_dying or is_other or _living(entry) < small or _is_unchosen(entry):
            chosen.append(entry.name)
            drops = entry.dead > 0 and (all or is_dying)
            gains |= drops or is_other or (is_large and _is_unchosen(entry))
    return chosen if gains or len(chosen) > 1 else []


def choose_index(
    count: int, merged: Sequence[SegmentEntry], others: Sequence[SegmentEntry]
) -> tuple[str, Mapping[str, int]]:
    """Give the factory and the search parameters of a merged segment.

    Flat where it is small, else what the largest has of the merged ones whose index was chosen,
    or else of the others; HNSW where nobody chose any.
    """
    if count <= FLAT_MAX_COUNT:
        return FLAT, {}
    for group in (merged, others):
        if chosen := [entry for entry in group if not _is_unchosen(entry)]:
            largest = max(chosen, key=lambda entry: entry.count)
            return _with_fitting_lists(largest.factory, count), largest.parameters
    return HNSW, default_parameters(HNSW)


def _with_fitting_lists(factory: str, count: int) -> str:
    """Give the factory, with fewer lists where it has more than there are rows.

    The search parameters stay: as many probes of fewer lists read more rows, not less.
    """
    if factory == FLAT or parse_kind(factory).lists <= count:
        return factory
    return re.sub(r"IVF\d+", f"IVF{list_count(count)}", factory)


def _is_unchosen(entry: SegmentEntry) -> bool:
    """Tell whether a segment is Flat because it was small or a delta, and not by a choice."""
    return entry.factory == FLAT and (entry.is_provisional or entry.count <= FLAT_MAX_COUNT)


def _living(entry: SegmentEntry) -> int:
    """Count the rows that are alive."""
    return entry.count - entry.dead
