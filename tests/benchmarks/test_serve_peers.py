import os
import sys
from pathlib import Path

import pytest

from benchmarks.peers import loads, servers
from benchmarks.peers.loads import Load, Target, Timed, measure
from benchmarks.peers.processes import BenchmarkError
from benchmarks.serve_peers import CASES, Measurements, bars


def test_a_bar_shows_how_far_its_rounds_are_apart(tmp_path):
    """Ratios are of the same round; a peer that was never measured has none."""
    (case,) = (case for case in CASES if case.name == "light-tensor-1")
    kept = Measurements(tmp_path / "measurements.jsonl", fresh=True)
    figures = {"p99_ms": 1.0, "server_cpu_ms_a_request": 1.0}
    for number, (ours, theirs) in enumerate([(100, 100), (300, 200), (100, 200)]):
        kept.add(case.name, "horace-kserve", "c64", number, {"requests_per_s": ours, **figures})
        kept.add(case.name, "triton", "c64", number, {"requests_per_s": theirs, **figures})
    held = bars(case, kept)["horace-kserve"]
    assert held["times triton's rate at c64"] == {"min": 0.5, "median": 1.0, "max": 1.5}
    assert not [name for name in held if "mosec" in name]


def test_answers_that_the_server_does_not_count_are_errors(monkeypatch):
    """Of gRPC the client sees the HTTP status alone; an open loop says how often it asked."""
    monkeypatch.setattr(loads, "machine_cpu_s", lambda: 0.0)
    monkeypatch.setitem(
        loads.CLIENTS, "h2load", lambda *_: Timed(requests=9, rate=3.0, p50_ms=1.0, p99_ms=1.0)
    )
    counts = iter([100, 108, 200, 209])
    target = Target(url="server", count=lambda: next(counts))
    with pytest.raises(BenchmarkError, match="expected 9 answers, found 8 by the server's count"):
        measure("h2load", target, Load(), os.getpid())
    figures = measure("h2load", target, Load(rate=4.0), os.getpid())
    assert (figures["requests"], figures["asked_per_s"]) == (9.0, 4.0)


def test_shared_memory_of_a_server_that_was_killed_is_removed(tmp_path, monkeypatch):
    """As the Python backend of a Triton leaves it."""

    def leave_region(setting, home):
        argv = [sys.executable, "-c", "import sys, time; open(sys.argv[1], 'w'); time.sleep(99)"]
        return [*argv, f"/dev/shm/{servers.regions_of(setting.port)}region"], {}

    def region(url):
        return Path("/dev/shm", servers.regions_of(url.rpartition(":")[2]) + "region")

    monkeypatch.setitem(servers.COMMANDS, "triton", leave_region)
    monkeypatch.setitem(servers.ANSWERS, "triton", lambda url: region(url).exists)
    with servers.serve("triton", tmp_path, "tensor", images=1, home=tmp_path) as running:
        assert region(running.url).exists()
    assert not region(running.url).exists()
