"""perf_analyzer itself, as it comes from Triton."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow  # fetches 60 MB by pip and apt-get the first time
def test_perf_analyzer_measures_this_server(tmp_path):
    """Over gRPC, streams and shared memory, with the server's own statistics in its report."""
    argv = [
        sys.executable, "-m", "benchmarks.perf_analyzer", "--rounds", "1", "--concurrencies", "4",
        "--measurement-interval-s", "1", "--out", str(tmp_path / "report.json"),
    ]  # fmt: skip
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    modes = json.loads((tmp_path / "report.json").read_text())["modes"]
    assert set(modes) == {"grpc", "streaming", "shared_memory"}
    for mode in modes.values():
        assert mode["4"]["requests_per_s"] > 0
        assert mode["4"]["server_compute_infer_ms"] > 0
