import os
import platform

import pytest

from models.cpu import cpu_budget, cpu_name, share_cpus

HOST = len(os.sched_getaffinity(0))


@pytest.fixture
def cgroup(tmp_path):
    """Give a function that lays out a cgroup file system and asks for the budget."""

    def budget(files: dict[str, str], membership: str = "0::/app/worker\n") -> int:
        for name, text in files.items():
            file = tmp_path / "cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (tmp_path / "self").write_text(membership)
        return cpu_budget(tmp_path / "cgroup", tmp_path / "self")

    return budget


def test_without_limits_the_affinity_counts(cgroup):
    """`max` is no limit."""
    assert cgroup({"cpu.max": "max 100000\n"}) == HOST


def test_a_limit_of_half_a_cpu_is_one_thread(cgroup):
    """A fraction is rounded up: less than one thread cannot work."""
    assert cgroup({"cpu.max": "50000 100000\n"}) == 1


def test_a_limit_above_the_process_holds_for_it(cgroup):
    """The parent's quota bounds the child that has none."""
    files = {"app/cpu.max": "100000 100000\n", "app/worker/cpu.max": "max 100000\n"}
    assert cgroup(files) == 1


def test_version_1_quota_is_read(cgroup):
    """The older hierarchy keeps quota and period in two files, -1 for none."""
    files = {"cpu/x/cpu.cfs_quota_us": "100000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}
    assert cgroup(files, "4:cpu:/x\n3:memory:/y\n") == 1
    unlimited = {"cpu/x/cpu.cfs_quota_us": "-1\n"}
    assert cgroup(unlimited, "4:cpu:/x\n") == HOST


def test_a_limit_above_the_host_gives_the_host(cgroup):
    """A generous quota makes no CPUs."""
    assert cgroup({"cpu.max": "6400000 100000\n"}) == HOST


def test_without_a_cgroup_file_system_the_affinity_counts(tmp_path):
    """Elsewhere than in Linux containers there is nothing to read."""
    assert cpu_budget(tmp_path / "none", tmp_path / "neither") == HOST


@pytest.mark.parametrize(("budget", "decode", "inference"), [(1, 1, 1), (2, 1, 2), (8, 4, 8)])
def test_shares(budget, decode, inference):
    """Inference may use the budget, decoding half of it, neither less than one thread."""
    shares = share_cpus(budget)
    assert (shares.decode_threads, shares.inference_threads) == (decode, inference)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cpu family\t: 26\nmodel name\t: AMD EPYC\nflags : a\n", "AMD EPYC (family 26)"),
        ("model name : Cortex: A76\n", "Cortex: A76"),
        ("processor : 0\n", platform.machine()),
        (None, platform.machine()),
    ],
)
def test_the_processor_is_named_as_far_as_it_is_known(tmp_path, text, name):
    """With its family, which tells apart what clouds call alike; else the architecture."""
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert cpu_name(tmp_path / "cpuinfo") == name
