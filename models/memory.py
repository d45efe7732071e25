"""How much memory this process may have, and how much of it is left.

A container's limit is not what `/proc/meminfo` says.

Source: the Linux kernel's documentation of cgroup v2 (`memory.max`, `memory.stat`) and, for
version 1, `memory.limit_in_bytes`.
"""

from __future__ import annotations

import os
from pathlib import Path

from models.cpu import CGROUP_ROOT, SELF_CGROUP, cgroup_folders

MEMINFO = Path("/proc/meminfo")


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
