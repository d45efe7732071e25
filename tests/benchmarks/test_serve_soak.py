"""A short run of the benchmark: every kind of request, on each front end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serve_hostile import THREADS_MORE
from benchmarks.serve_soak import KINDS, PARTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("frontend", ["native", "grpcio"])
def test_mixed_requests_are_answered_and_leave_nothing(frontend, tmp_path):
    """Cancelled and late ones among them: in the end nothing is held, no thread is left over."""
    out = tmp_path / "result.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.serve_soak", "--frontend", frontend,
            "--requests", "800", "--callers", "8", "--looks", "1", "--out", str(out),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    result = json.loads(out.read_text())
    verdict = result["verdict"]
    for what in ("memory grows less than 1%", "threads are flat", "descriptors are flat"):
        del verdict[what]  # says something after many thousands
    assert all(verdict.values()), (result["first"], done.stderr[-3000:])
    first, last = result["samples"][PARTS // 10 - 1], result["samples"][-1]
    assert last["threads"] <= first["threads"] + THREADS_MORE
    assert set(result["kinds"]) == set(KINDS)
    assert result["begun"] == 800
