"""Memory as a container has it: its limit, what it holds, and the machine's own."""

import subprocess
import sys
from pathlib import Path

import pytest

from models.memory import free_memory_bytes, memory_bytes, settle_memory

MEMINFO = "MemTotal: 4000 kB\nMemFree: 1 kB\nMemAvailable: 3000 kB\n"
PLENTY = "9223372036854771712"


def lay_out(root: Path, files: dict[str, str]) -> tuple[Path, Path, Path]:
    """Write files below a cgroup root; give it, `/proc/self/cgroup` and `/proc/meminfo`."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    own, meminfo = root / "self", root / "meminfo"
    own.write_text("3:memory:/docker/a\n0::/slice/a\n")
    meminfo.write_text(MEMINFO)
    return root, own, meminfo


def test_without_a_limit_it_is_the_kernels(tmp_path: Path) -> None:
    """`max`, no file, and the huge figure of version 1 are no limits."""
    root, own, meminfo = lay_out(
        tmp_path, {"memory.max": "max\n", "memory/memory.limit_in_bytes": PLENTY}
    )
    assert free_memory_bytes(root, own, meminfo) == 3000 * 1024
    assert memory_bytes(root, own) > 2**28


def test_what_a_container_holds_is_not_free_but_its_files_are(tmp_path: Path) -> None:
    """The tightest cgroup above this process counts, less its anonymous memory."""
    root, own, meminfo = lay_out(
        tmp_path,
        {
            "slice/memory.max": "9000\n",
            "slice/a/memory.max": "5000\n",
            "slice/a/memory.stat": "anon 1500\nfile 3000\n",
        },
    )
    assert memory_bytes(root, own) == 5000
    assert free_memory_bytes(root, own, meminfo) == 3500


def test_version_1_counts_too(tmp_path: Path) -> None:
    """The controller's own hierarchy, with `total_rss` for what is held."""
    root, own, meminfo = lay_out(
        tmp_path,
        {
            "memory/docker/a/memory.limit_in_bytes": "7000",
            "memory/docker/a/memory.stat": "cache 10\ntotal_rss 8000\n",
        },
    )
    assert memory_bytes(root, own) == 7000
    assert free_memory_bytes(root, own, meminfo) == 0


RESIDENT = """
import os, sys
import numpy as np
from models.memory import settle_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

if sys.argv[1] == "fixed":
    assert settle_memory()
np.ones(24 << 20, np.uint8)  # from which glibc would learn
before, small, large = resident(), [], []
for _ in range(40):
    large.append(np.ones(1 << 20, np.uint8))
    small.append(bytes(1000))
del large
print((resident() - before) >> 20)
"""


def test_large_blocks_are_given_back_between_small_ones_that_stay():
    """After it what was taken for pictures is the system's again, at once."""
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, "fixed"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 4


FAULTS = """
import resource, sys, threading
from models.memory import settle_memory

if sys.argv[1] == "settled":
    assert settle_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def take_and_give():
    before = faults()
    for _ in range(100):
        blocks = [bytes(120_000) for _ in range(8)]
        del blocks
    print(faults() - before)

thread = threading.Thread(target=take_and_give)  # in a heap of its own, as the server's are
thread.start()
thread.join()
"""


def test_small_blocks_are_kept_for_those_who_need_them_next():
    """A message and its pixels do not come from the system page by page, every time."""

    def faults(how):
        run = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)

    assert faults("settled") < 2000 < faults("as it is")


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_MMAP_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.top_pad=131072")],
)
def test_the_operators_own_setting_of_the_allocator_stands(monkeypatch, name, value):
    """Who has set glibc's sizes in the environment knows why."""
    monkeypatch.setenv(name, value)
    assert not settle_memory()
