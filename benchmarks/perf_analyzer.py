"""Triton's perf_analyzer against Horace's KServe port: gRPC, streaming, shared memory.

A server is started as people start it, with the encoder that ships, and called with one image
a request at several concurrencies in each mode. What is written is what perf_analyzer reports,
under names with units, and the CPU that the server took. Client and server share the machine.

perf_analyzer measures windows until three in a row agree; here any three do, so that a noisy
machine yields a report, too: how far they agree is for several runs to say.
Run from the root, on a quiet machine:
`python -m benchmarks.perf_analyzer --out benchmarks/results/perf_analyzer.json`.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import tritonclient.grpc

from benchmarks.fetch_perf_analyzer import CLIENT, PerfAnalyzer, fetch_perf_analyzer
from benchmarks.measuring import turns
from benchmarks.peers.processes import BenchmarkError, cpu_s
from benchmarks.served import Served, environment
from models.bundle import SHIPPED_BUNDLE, Json, read_bundle
from models.command import progress, run_command
from models.errors import UsageError

WINDOWS = 3
TRIALS = 10
"""Windows after which perf_analyzer gives up: one in which it was kept from measuring counts."""

MODES: dict[str, tuple[str, ...]] = {
    "grpc": (),
    "streaming": ("--streaming", "--async"),
    "shared_memory": ("--shared-memory=system",),
}

COLUMNS = {
    "requests_per_s": ("Inferences/Second", 1.0),
    "average_ms": ("Avg latency", 1e-3),
    "p50_ms": ("p50 latency", 1e-3),
    "p90_ms": ("p90 latency", 1e-3),
    "p95_ms": ("p95 latency", 1e-3),
    "p99_ms": ("p99 latency", 1e-3),
    "server_queue_ms": ("Server Queue", 1e-3),
    "server_compute_input_ms": ("Server Compute Input", 1e-3),
    "server_compute_infer_ms": ("Server Compute Infer", 1e-3),
    "server_compute_output_ms": ("Server Compute Output", 1e-3),
}
"""What becomes of the columns of perf_analyzer's table, whose times are in microseconds."""


@dataclass(frozen=True, kw_only=True)
class PerfAnalyzerOptions:
    """Call Horace's KServe port with perf_analyzer."""

    bundle: Path = SHIPPED_BUNDLE
    """Bundle to serve."""

    concurrencies: tuple[int, ...] = (1, 16, 64)
    """Requests that are under way at once."""

    modes: tuple[str, ...] = tuple(MODES)
    """How tensors travel: grpc, streaming, shared_memory."""

    rounds: int = 3
    """How often everything is measured; medians are reported, with the extremes."""

    measurement_interval_s: float = 3.0
    """Length of each of the three windows of a measurement."""

    frontend: str = "auto"
    """The server's front end: auto, native or grpcio."""

    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        """Check the names of the modes.

        Raises:
            UsageError: one is not known.
        """
        if unknown := set(self.modes) - set(MODES):
            raise UsageError("--modes", expected=", ".join(MODES), found=", ".join(unknown))


def main(options: PerfAnalyzerOptions) -> None:
    """Measure, print, and write the result."""
    analyzer = fetch_perf_analyzer()
    report: dict[str, Json] = {
        **environment("pygrpc-native", "onnxruntime", "numpy"),
        "perf_analyzer": f"of {CLIENT}",
        "encoder": read_bundle(options.bundle).name,
        "frontend": options.frontend,
        "images_a_request": 1,
        "rounds": options.rounds,
        "windows_a_round": WINDOWS,
        "measurement_interval_s": options.measurement_interval_s,
        "modes": dict(measure(options, analyzer)),
    }
    print(json.dumps(report, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def measure(
    options: PerfAnalyzerOptions, analyzer: PerfAnalyzer
) -> Iterator[tuple[str, dict[str, Json]]]:
    """Measure every mode at every concurrency, round by round."""
    cases = [(mode, count) for mode in options.modes for count in options.concurrencies]
    found: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in cases}
    rounds = [case for number in range(options.rounds) for case in turns(cases, number)]
    arguments = ("--bundle", str(options.bundle), "--frontend", options.frontend)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        server = Served(Path(folder), *arguments)
        stack.callback(server.kill)
        for mode, count in progress(rounds, what="perf_analyzer", total=len(rounds), unit="run"):
            pid, address = server.process.pid, server.address
            before = answered(address), cpu_s(pid)
            row = call(analyzer, address, options, mode, count, Path(folder))
            requests, taken_s = answered(address) - before[0], cpu_s(pid) - before[1]
            row["server_cpu_ms_a_request"] = 1e3 * taken_s / requests
            found[mode, count].append(row)
    for mode in options.modes:
        yield mode, {str(count): summarise(found[mode, count]) for count in options.concurrencies}


def summarise(rows: Sequence[dict[str, float]]) -> Json:
    """Give the median of every figure, and the extremes of the rate."""
    summary: dict[str, Json] = {
        name: round(statistics.median(row[name] for row in rows), 4) for name in rows[0]
    }
    rates = [row["requests_per_s"] for row in rows]
    summary["requests_per_s_of_rounds"] = [round(rate, 1) for rate in rates]
    return summary


def call(
    analyzer: PerfAnalyzer,
    address: str,
    options: PerfAnalyzerOptions,
    mode: str,
    concurrency: int,
    folder: Path,
) -> dict[str, float]:
    """Run perf_analyzer once; give the row of its table.

    Raises:
        BenchmarkError: it failed.
    """
    table = folder / "table.csv"
    argv = [
        str(analyzer.binary), "-m", read_bundle(options.bundle).name, "-u", address, "-i", "grpc",
        "--concurrency-range", str(concurrency), "-b", "1", *MODES[mode],
        "-p", str(round(1e3 * options.measurement_interval_s)), "-r", str(TRIALS), "-s", "100000",
        "-f", str(table), "--verbose-csv",
    ]  # fmt: skip
    table.unlink(missing_ok=True)
    done = subprocess.run(
        argv, env=dict(analyzer.environment), capture_output=True, text=True, check=False
    )
    if done.returncode or not table.is_file():
        lines = (done.stdout + done.stderr).strip().splitlines()[-3:]
        raise BenchmarkError(
            f"perf_analyzer, {mode} at {concurrency}", expected="a report", found=" | ".join(lines)
        )
    with table.open() as file:
        (row,) = csv.DictReader(file)
    return {name: float(row[column]) * scale for name, (column, scale) in COLUMNS.items()}


def answered(address: str) -> int:
    """Give how many requests a server has answered, those of the client's warm-up included."""
    with tritonclient.grpc.InferenceServerClient(address) as client:
        counted = client.get_inference_statistics()
    return sum(model.inference_stats.success.count for model in counted.model_stats)


if __name__ == "__main__":
    sys.exit(run_command(PerfAnalyzerOptions, main, prog="python -m benchmarks.perf_analyzer"))
