"""What an index weighs in memory while it is built and while it is searched.

Rules:
    Memory is what a process must hold: a mapped file's pages are not counted, since the system
    takes them back when it needs room. Builders give their pages back as they go, so that the
    whole resident size stays near the figures here.
    Estimates are upper bounds for what FAISS's containers grow to, not averages: a test builds
    every kind and holds what that took against them.
"""

from __future__ import annotations

import mmap
from typing import cast

import numpy as np
from numpy.typing import NDArray

from index.ann.kinds import Kind
from models.errors import UsageError

ROW_OVERHEAD = 16
"""Bytes a node of a graph has beside its links: its level and the place of its links."""

ID_BYTES = 8
GROWTH = 2.0
"""FAISS's containers double when they are full: while they move they hold the old and the new,
and at the end they may be half empty."""

BUILD_BLOCK = 16384
"""Vectors added to an index at a time; a constant, since it decides HNSW's insertion order."""

POINTS_A_LIST = 64
"""Vectors that the centre of a list is learnt from. FAISS warns below 39; above 64 the recall of
ours did not move."""

MIN_SAMPLE = 16384
"""Vectors that codes are learnt from, at least, where there are as many."""


def search_bytes(kind: Kind, count: int, dim: int) -> int:
    """Give the bytes that an opened index holds."""
    code = count * (0 if kind.codec == "Flat" else kind.code_bytes(dim))
    if kind.family == "graph":
        return code + count * (4 * (2 * kind.links) + 4 * kind.links // 16 + ROW_OVERHEAD)
    padding = kind.lists * 31 * kind.code_bytes(dim) if kind.is_fast_scan else 0
    tables = kind.lists * dim * 4 + (dim * dim * 4 if kind.rotates else 0)
    grown = GROWTH if kind.is_fast_scan else 1.0  # its tables are of powers of two
    return int(grown * (code + padding)) + count * ID_BYTES + tables + 4 * 16 * dim


def build_bytes(kind: Kind, count: int, dim: int) -> int:
    """Give the bytes that building holds at its peak."""
    block = 3 * min(count, BUILD_BLOCK) * dim * 4
    if kind.family == "graph":
        vectors = count * dim * 4 if kind.codec == "Flat" else 0  # FAISS builds on its own copy
        links = count * 4 * 2 * kind.links
        return search_bytes(kind, count, dim) + vectors + links + block
    lists = kind.lists * 31 * kind.code_bytes(dim) if kind.is_fast_scan else 0
    stored = GROWTH * (count * (kind.code_bytes(dim) + ID_BYTES) + lists)
    sample = 2 * sample_rows(kind, count) * dim * 4  # FAISS's k-means takes a copy
    return int(stored) + max(sample, block) + 2 * kind.lists * dim * 4


def sample_rows(kind: Kind, count: int) -> int:
    """Say how many vectors an index learns from."""
    return min(count, max(MIN_SAMPLE, POINTS_A_LIST * kind.lists))


def release_pages(vectors_ND: NDArray[np.float32], start: int, stop: int) -> None:
    """Let the system take back the pages of rows of a memory map; nothing else happens.

    Arrays that are no whole memory map are left alone.
    """
    mapped = getattr(vectors_ND, "_mmap", None)
    base = getattr(vectors_ND, "offset", None)
    if mapped is None or base is None or vectors_ND.base is not mapped:
        return
    row_bytes = vectors_ND.strides[0]
    shift = int(base) % mmap.ALLOCATIONGRANULARITY  # numpy maps from a page's beginning
    first = (shift + start * row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    last = shift + stop * row_bytes
    cast(mmap.mmap, mapped).madvise(mmap.MADV_DONTNEED, first, last - first)


def as_size(size_bytes: float) -> str:
    """Say `1.5 GB`, as people write it."""
    for unit, power in (("GB", 3), ("MB", 2), ("kB", 1)):
        if size_bytes >= 1000**power:
            return f"{size_bytes / 1000**power:.3g} {unit}"
    return f"{size_bytes:.0f} bytes"


def parse_size(text: str) -> int:
    """Read `500MB`, `1.5GiB` or a number of bytes.

    Raises:
        UsageError: it is no size.
    """
    units = {"": 1} | {
        f"{prefix}{unit}": base**power
        for power, prefix in enumerate(("", "k", "m", "g", "t"))
        for unit, base in (("", 1000), ("b", 1000), ("ib", 1024))
    }
    number = text.strip().lower().rstrip("bikmgt ")
    unit = text.strip().lower()[len(number) :].strip()
    try:
        size = float(number) * units[unit]
        if not 1 <= size < 1 << 62:
            raise ValueError
    except (ValueError, KeyError):
        raise UsageError(
            "memory", expected="a size such as 500MB, 2GiB or 1000000", found=repr(text)
        ) from None
    return int(size)
