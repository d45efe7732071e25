"""Which segments are merged, and what index the merged one gets.

Rules:
    Segments that are small, or have many dead rows, are merged; a large one is left alone, so
    that to add a little never rebuilds a lot.
    What was a delta is Flat until it is merged, however large it is: together with others of its
    kind it gets an index. Only a large segment that somebody made Flat stays so.
    An index of lists that was chosen for another number of rows is made with as many as these
    call for, and searches look into no smaller share of them. Nobody has measured its recall.
    A graph that only a GPU builds is built as HNSW of as many links where there is none.
    Nothing here touches a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from index.ann.candidates import list_count
from index.ann.kinds import (
    FLAT,
    FLAT_MAX_COUNT,
    HNSW,
    NPROBE,
    can_build_cagra,
    default_parameters,
    parse_kind,
)
from index.storage.manifest import SegmentEntry

DEAD_SHARE = 0.2
"""Of a segment's rows, from which it is written anew."""

SMALL_SHARE = 1 / 8
"""Of all living rows, up to which a segment is small."""


def choose_segments(entries: Sequence[SegmentEntry], *, all: bool = False) -> list[str]:
    """Name the segments to merge; none where there is nothing to gain.

    Args:
        entries: of the collection.
        all: whether to merge every one.
    """
    small = max(FLAT_MAX_COUNT, SMALL_SHARE * sum(map(_living, entries)))
    chosen, gains = [], False
    for entry in entries:
        is_large = _living(entry) > FLAT_MAX_COUNT
        is_dying = entry.dead >= DEAD_SHARE * entry.count
        if all or is_dying or _living(entry) < small or _is_unchosen(entry):
            chosen.append(entry.name)
            drops = entry.dead > 0 and (all or is_dying)
            gains |= drops or (is_large and _is_unchosen(entry))
    return chosen if gains or len(chosen) > 1 else []


def choose_index(
    count: int, merged: Sequence[SegmentEntry], every: Sequence[SegmentEntry]
) -> tuple[str, Mapping[str, int]]:
    """Give the factory and the search parameters of a merged segment.

    Flat where it is small, else what the largest has of the merged ones whose index was chosen,
    or else of every segment there is; HNSW where nobody chose any.
    """
    if count <= FLAT_MAX_COUNT:
        return FLAT, {}
    for group in (merged, every):
        if chosen := [entry for entry in group if not _is_unchosen(entry)]:
            largest = max(chosen, key=lambda entry: entry.count)
            return _fitting(largest, count)
    return HNSW, default_parameters(HNSW)


def _fitting(entry: SegmentEntry, count: int) -> tuple[str, Mapping[str, int]]:
    """Give a segment's factory and search parameters, fit for so many rows and for this machine.

    As many probes of fewer lists read more rows; of more lists there are more probes.
    """
    if entry.factory == FLAT:
        return FLAT, entry.parameters
    kind, lists = parse_kind(entry.factory), list_count(count)
    if kind.is_cagra and not can_build_cagra():
        return f"HNSW{kind.links}", entry.parameters
    if kind.family != "lists" or (lists == list_count(entry.count) and kind.lists <= count):
        return entry.factory, entry.parameters
    nprobe = entry.parameters.get("nprobe", NPROBE)
    nprobe = min(lists, max(nprobe, math.ceil(nprobe * lists / kind.lists)))
    factory = entry.factory.replace(f"IVF{kind.lists},", f"IVF{lists},")
    return factory, {**entry.parameters, "nprobe": nprobe}


def _is_unchosen(entry: SegmentEntry) -> bool:
    """Tell whether a segment is Flat because it was small or a delta, and not by a choice."""
    return entry.factory == FLAT and (entry.is_provisional or entry.count <= FLAT_MAX_COUNT)


def _living(entry: SegmentEntry) -> int:
    """Count the rows that are alive."""
    return entry.count - entry.dead
