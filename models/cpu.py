"""How many CPUs this process may really use, how its work shares them, and what they are.

A container's CPU limit is not what `os.cpu_count` says: ONNX Runtime, faiss and Python
size their pools to the host and are then throttled (onnxruntime#29510). Every pool of
Horace is sized from `cpu_budget` instead.

Source: the Linux kernel's cgroup-v2 documentation (`cpu.max`) and, for version 1,
`cpu.cfs_quota_us` and `cpu.cfs_period_us`.
"""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
SELF_CGROUP = Path("/proc/self/cgroup")
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class CpuShares:
    """Threads for the two kinds of work that one CPU budget pays for."""

    decode_threads: int
    inference_threads: int


def cpu_budget(root: Path = CGROUP_ROOT, self_cgroup: Path = SELF_CGROUP) -> int:
    """Count the CPUs that affinity and cgroup limits leave to this process, at least 1."""
    allowed = len(os.sched_getaffinity(0))
    limits = [_quota_cpus(folder) for folder in cgroup_folders(root, self_cgroup, "cpu")]
    quota = min((limit for limit in limits if limit is not None), default=math.inf)
    return max(1, min(allowed, math.ceil(quota) if quota < math.inf else allowed))


def cgroup_folders(root: Path, self_cgroup: Path, controller: str) -> list[Path]:
    """List the folders whose limits hold for this process: its own and all above it."""
    folders = [root, root / controller]
    try:
        lines = self_cgroup.read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        parts = Path(path.lstrip("/")).parts
        folders += [base.joinpath(*parts[: n + 1]) for n in range(len(parts))]
    return folders


def share_cpus(budget: int) -> CpuShares:
    """Split `budget` CPUs between decoding and inference.

    Inference may use all of them: it dominates for every encoder but the smallest, and its
    threads do not spin while they wait (see `models.runtime`). Decoding has half as many,
    so that a burst of images never takes more than a third of the runnable threads. Where
    several models are served they share the inference threads, each with at least one.
    """
    return CpuShares(decode_threads=max(1, budget // 2), inference_threads=budget)


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """Give the processor's name and family as Linux has them, or its architecture.

    The family tells apart what clouds call by one name, such as `AMD EPYC`.
    """
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    name, family = fields.get("model name", platform.machine()), fields.get("cpu family")
    return name if family is None else f"{name} (family {family})"


def _quota_cpus(folder: Path) -> float | None:
    """Read one folder's limit in CPUs; None where it sets none."""
    try:
        v2 = folder / "cpu.max"
        if v2.exists():
            quota, period = v2.read_text().split()
            return None if quota == "max" else int(quota) / int(period)
        quota_us = int((folder / "cpu.cfs_quota_us").read_text())
        period_us = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota_us / period_us if quota_us > 0 else None
