"""Calls a server, closed or open loop, with clients written in C or C++, and times it.

Rules:
    gRPC with tensors is called by Triton's perf_analyzer, HTTP by wrk. h2load calls where
    those cannot: gRPC with JPEGs or with Horace's own messages, and HTTP at a given rate.
    One connection of up to `concurrency` calls for gRPC, `concurrency` connections for HTTP.
    An open loop has 64 calls at most under way: what a server does not keep up with waits.
    Latency counts from sending, so above capacity its figures are those of the closed loop.
    gRPC has its errors in trailers, which h2load does not read: where a server counts what it
    has answered, a client that counts more has counted errors, and the measurement is void.
    h2load's beat is that of a connection, 10 ms or what is between two calls, where that is
    more: of gRPC it sends all that is due in 10 ms at once, of HTTP one call on each of 16
    connections; above capacity on 64. perf_analyzer spreads its calls out.
    CPU is counted over the whole load, of the server's processes and of the client apart. A
    measurement during which anything else took over a twentieth of the CPUs is made again.
"""

from __future__ import annotations

import re
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fetch_perf_analyzer import fetch_perf_analyzer
from benchmarks.peers.processes import BenchmarkError, cpu_s, machine_cpu_s
from models.cpu import cpu_budget

WINDOWS = 3
"""perf_analyzer measures in windows and wants three that agree; here any three do."""

MOST_UNDER_WAY = 64

OTHERS = 0.05
"""Of the CPUs, what anything but server and client may take while they are measured."""

TRIES = 4


@dataclass(frozen=True, kw_only=True)
class Load:
    """How hard to call: `concurrency` at once, or `rate` a second where that is given."""

    concurrency: int = MOST_UNDER_WAY
    rate: float | None = None
    seconds: float = 4.0

    @property
    def whole_seconds(self) -> int:
        """How long, for clients that count in seconds."""
        return max(1, round(self.seconds))


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where to call and with what.

    Attributes:
        url: host and port.
        path: of the method, for everything but perf_analyzer.
        body: file with the body of a request; perf_analyzer makes its own.
        shape: of the tensor, for perf_analyzer alone.
        model: as the server calls it, for perf_analyzer alone.
        batch: images a request, for perf_analyzer alone.
        content_type: of the body.
        count: gives how many requests the server has answered with vectors, where it counts them.
    """

    url: str
    path: str = ""
    body: Path | None = None
    shape: Sequence[int] = ()
    model: str = ""
    batch: int = 1
    content_type: str = "application/octet-stream"
    count: Callable[[], int] | None = None


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What a client measured: requests in all, requests a second, latencies."""

    requests: int
    rate: float
    p50_ms: float
    p99_ms: float


def measure(client: str, target: Target, load: Load, server_pid: int) -> dict[str, float]:
    """Call a server for a while; give rates, latencies and CPU a request.

    Raises:
        BenchmarkError: calls failed, by the client or by the server's own count, or the machine
            is never quiet.
    """

    def call() -> dict[str, float]:
        counted = target.count() if target.count else 0
        server_s, client_s = cpu_s(server_pid), children_cpu_s()
        timed = CLIENTS[client](target, load)
        requests = target.count() - counted if target.count else timed.requests
        server_s, client_s = cpu_s(server_pid) - server_s, children_cpu_s() - client_s
        if requests < max(1, timed.requests):
            raise BenchmarkError(
                f"{client} at {target.url}",
                expected=f"{max(1, timed.requests)} answers",
                found=f"{requests} by the server's count",
            )
        asked = {} if load.rate is None else {"asked_per_s": load.rate}
        return {
            **asked,
            "requests_per_s": timed.rate,
            "p50_ms": timed.p50_ms,
            "p99_ms": timed.p99_ms,
            "server_cpu_ms_a_request": 1e3 * server_s / requests,
            "client_cpu_ms_a_request": 1e3 * client_s / requests,
            "requests": float(requests),
        }

    return measure_alone(call, lambda: cpu_s(server_pid) + children_cpu_s())


def measure_alone(
    work: Callable[[], dict[str, float]], own_cpu_s: Callable[[], float]
) -> dict[str, float]:
    """Do some work again until nothing else was in the way.

    Args:
        work: gives its figures.
        own_cpu_s: gives the CPU seconds that are its own.

    Returns:
        The figures, and the share of the CPUs that went elsewhere.

    Raises:
        BenchmarkError: the machine is never quiet.
    """
    for _ in range(TRIES):
        started_s, own_s, all_s = time.monotonic(), own_cpu_s(), machine_cpu_s()
        figures = work()
        others_s = machine_cpu_s() - all_s - (own_cpu_s() - own_s)
        share = others_s / (time.monotonic() - started_s) / cpu_budget()
        if share <= OTHERS:
            return figures | {"others_share_of_cpus": max(0.0, share)}
    raise BenchmarkError(
        "this machine",
        expected=f"others to take at most {OTHERS:.0%} of its CPUs",
        found=f"{share:.0%} in {TRIES} tries",
    )


def call_with_perf_analyzer(target: Target, load: Load) -> Timed:
    """Call ModelInfer with tensors of perf_analyzer's own making."""
    tool = fetch_perf_analyzer()
    argv = [
        str(tool.binary),
        "-i", "grpc", "-u", target.url, "-m", target.model, "-b", str(target.batch),
        "-p", str(int(1e3 * load.seconds / WINDOWS)), "-r", str(WINDOWS), "-s", "100000",
    ]  # fmt: skip
    if target.shape:
        argv += ["--shape", "images:" + ",".join(map(str, target.shape))]
    if load.rate is None:
        argv += ["--concurrency-range", str(load.concurrency)]
    else:
        argv += ["--request-rate-range", f"{load.rate:.1f}", "--max-threads", str(MOST_UNDER_WAY)]
    text = _run(argv, tool.environment)
    return Timed(
        requests=int(_find(r"Request count: (\d+)", text)),
        rate=float(_find(r"Throughput: ([\d.]+)", text)) / target.batch,
        p50_ms=float(_find(r"p50 latency: (\d+)", text)) / 1e3,
        p99_ms=float(_find(r"p99 latency: (\d+)", text)) / 1e3,
    )


def call_with_wrk(target: Target, load: Load) -> Timed:
    """POST a body over and over on `concurrency` connections."""
    assert target.body is not None
    assert load.rate is None, "wrk has no rates"
    script = (
        f'wrk.method = "POST"\nwrk.headers["Content-Type"] = "{target.content_type}"\n'
        f'local file = io.open("{target.body}", "rb")\nwrk.body = file:read("*a")\nfile:close()\n'
    )
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as lua:
        lua.write(script)
        lua.flush()
        text = _run([
            "wrk", "--threads", "1", "--connections", str(load.concurrency),
            "--duration", f"{load.whole_seconds}s", "--latency", "--timeout", "60s",
            "--script", lua.name, f"http://{target.url}{target.path}",
        ])  # fmt: skip
    if (failures := re.search(r"(Non-2xx.*|Socket errors.*)", text)) is not None:
        raise BenchmarkError(f"wrk at {target.url}", expected="answers", found=failures[1])
    return Timed(
        requests=int(_find(r"(\d+) requests in", text)),
        rate=float(_find(r"Requests/sec:\s+([\d.]+)", text)),
        p50_ms=_milliseconds(_find(r"(?m)^ +50% +(\S+)", text)),
        p99_ms=_milliseconds(_find(r"(?m)^ +99% +(\S+)", text)),
    )


def call_with_h2load(target: Target, load: Load, *, is_grpc: bool = True) -> Timed:
    """Send a body over and over: calls of one connection for gRPC, connections for HTTP/1.1."""
    assert target.body is not None
    concurrency = load.concurrency
    connections, calls = (1, concurrency) if is_grpc else (concurrency, 1)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "requests.tsv")
        argv = [
            "h2load", "--duration", str(load.whole_seconds), "--warm-up-time", "0",
            "--clients", str(connections), "--max-concurrent-streams", str(calls),
            "--data", str(target.body), "--log-file", str(log),
            "--header", f"content-type: {target.content_type}",
        ]  # fmt: skip
        argv += ["--header", "te: trailers"] if is_grpc else ["--h1"]
        if load.rate is not None:
            argv += ["--rps", f"{load.rate / connections:g}"]
        started_s = time.monotonic()
        text = _run([*argv, f"http://{target.url}{target.path}"])
        wall_s = time.monotonic() - started_s
        rows = [line.split("\t") for line in log.read_text().splitlines()]
    latencies_ms = sorted(int(row[2]) / 1e3 for row in rows if row[1] == "200")
    if len(latencies_ms) < 2 or len(latencies_ms) < len(rows):
        found = f"{len(latencies_ms)} of {len(rows)}: " + _find(r"(status codes: .*)", text)
        raise BenchmarkError(f"h2load at {target.url}", expected="answers", found=found)
    centiles = statistics.quantiles(latencies_ms, n=100)
    return Timed(
        requests=len(latencies_ms),
        rate=len(latencies_ms) / min(wall_s, load.whole_seconds),
        p50_ms=centiles[49],
        p99_ms=centiles[98],
    )


def call_over_http(target: Target, load: Load) -> Timed:
    """Call HTTP/1.1: wrk where it can, h2load at a rate."""
    if load.rate is None:
        return call_with_wrk(target, load)
    return call_with_h2load(target, load, is_grpc=False)


def warm_up(client: str, target: Target, concurrency: int) -> None:
    """Call for a second, unmeasured: batchers that learn have learnt, pages are in memory."""
    load = Load(concurrency=concurrency, seconds=1)
    with suppress(BenchmarkError):  # nothing answered within a second is no failure yet
        call_with_h2load(target, load, is_grpc=client != "http")


CLIENTS: dict[str, Callable[[Target, Load], Timed]] = {
    "perf_analyzer": call_with_perf_analyzer,
    "h2load": call_with_h2load,
    "http": call_over_http,
}


def _run(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a client; give what it says.

    Raises:
        BenchmarkError: it failed.
    """
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        found = (done.stdout + done.stderr).strip().splitlines()[-3:]
        raise BenchmarkError(argv[0], expected="exit status 0", found=" | ".join(found))
    return done.stdout + done.stderr


def _find(pattern: str, text: str) -> str:
    """Give the part of a client's output that a pattern names.

    Raises:
        BenchmarkError: it is not there.
    """
    match = re.search(pattern, text)
    if match is None:
        raise BenchmarkError("output of the client", expected=pattern, found=text[-400:])
    return match[1]


def _milliseconds(text: str) -> float:
    """Read wrk's times.

    Raises:
        BenchmarkError: it has none, since nothing was answered.
    """
    match = re.fullmatch(r"([\d.]+)(us|ms|s|m)", text)
    if match is None:
        raise BenchmarkError("latency by wrk", expected="a time", found=text)
    return float(match[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}[match[2]]


def children_cpu_s() -> float:
    """Give the CPU seconds of the children that have ended: of the clients."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
