"""How much memory this process may have, how much of it is left, and how it is given back.

A container's limit is not what `/proc/meminfo` says.

Source: the Linux kernel's documentation of cgroup v2 (`memory.max`, `memory.stat`) and, for
version 1, `memory.limit_in_bytes`; mallopt(3) of glibc.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

from models.cpu import CGROUP_ROOT, SELF_CGROUP, cgroup_folders

MEMINFO = Path("/proc/meminfo")

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Of glibc's malloc.h: from how much free memory at its end on a heap is cut, how much more than
it needs it has, and from which size on a block is the system's own."""

LARGE_BLOCK_BYTES = 256 << 10
"""At 1 MiB resident memory still crept up in the benchmark named below."""

PAD_BYTES = 1 << 20
"""At 2 MiB resident memory still crept up there, too."""


def memory_bytes(root: Path = CGROUP_ROOT, self_cgroup: Path = SELF_CGROUP) -> int:
    """Give all the memory that machine and cgroups ever let this process have."""
    limits = [limit for limit, _ in _limits(root, self_cgroup)]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits])


def free_memory_bytes(
    root: Path = CGROUP_ROOT, self_cgroup: Path = SELF_CGROUP, meminfo: Path = MEMINFO
) -> int:
    """Give the memory that is left now: by the kernel, and below each cgroup's limit.

    What a cgroup holds of files can be given back, so only its anonymous memory counts.
    """
    free = next(
        int(line.split()[1]) * 1024
        for line in meminfo.read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    left = [limit - _anonymous_bytes(folder) for limit, folder in _limits(root, self_cgroup)]
    return max(0, min([free, *left]))


def settle_memory() -> bool:
    """Have the allocator give large blocks back to the system when they are freed, and keep others.

    glibc does so at first, but learns from the first large block that is freed to keep those
    of its size in its heaps, where they lie between small ones that stay: a process that
    decodes now a stamp and now a poster grows by and by. With a fixed threshold a server has
    210 MB after 3,000 hostile inputs, without it 300 MB and rising (benchmarks/serve_hostile.py).
    The price is a page fault each 4 KiB. What is smaller, such as a message, its pixels or the
    rows of a decoder, would have that price, too, since glibc cuts a heap back whenever 128 KiB
    are free at its end: so more is left there.

    Returns:
        Whether it does: not where another allocator or the operator's own setting rules.
    """
    return set_allocator({M_MMAP_THRESHOLD: LARGE_BLOCK_BYTES, M_TOP_PAD: PAD_BYTES})


def set_allocator(values: Mapping[int, int]) -> bool:
    """Set parameters of glibc's allocator; give whether that was done.

    It is not where the process has another allocator, or where the operator has set sizes of
    glibc's.
    """
    is_set = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    if is_set or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl and others have no such thing
        return False
    return all([mallopt(parameter, value) for parameter, value in values.items()])


def _limits(root: Path, self_cgroup: Path) -> list[tuple[int, Path]]:
    """Read the limits that hold for this process, in bytes, and the folders that set them."""
    limits = []
    for folder in cgroup_folders(root, self_cgroup, controller="memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                limits.append((int((folder / name).read_text()), folder))
            except (OSError, ValueError):  # no such file, or its limit is `max`
                continue
    return limits


def _anonymous_bytes(folder: Path) -> int:
    """Read what a cgroup holds that no file is behind; 0 where it does not say."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    amounts = dict(line.split() for line in lines)
    return int(amounts.get("anon", amounts.get("total_rss", 0)))
