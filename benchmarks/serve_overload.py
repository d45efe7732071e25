"""Goodput at three times the capacity, and what is computed for callers that have gone.

A server (`python -m serve`, in a process of its own) is called by client processes over gRPC on
the same machine: first in a closed loop, whose throughput is the peak; then in an open loop,
Poisson arrivals at `--overload` times the peak, every request with a deadline, for `--seconds`;
then in a closed loop again, since a machine may have become slower meanwhile. The order is peak,
overload, peak; the peak compared with is the higher one.

Goodput is images of replies that came within their deadline, a second, over the windows of
one second but the first two. The clients write frames (`benchmarks.frames`), so that they take
as little as may be of the cores. In the cases `shared` they have the same cores as the server,
and what three times as many calls cost them is missing there: it is not at the peak. In the
cases `pinned` the server has the first half of the cores and the clients the others, in every
phase. `cpu_s` has what both took.

Of what the server computed the replies account for all but `computed_for_nobody`: images of
requests whose caller has no reply. By the server's own count none of them was begun for a
caller that had gone (a batch holds nobody who was cancelled or whose deadline had passed);
`abandoned` of them were running when the caller went. The rest lost their way between the
batch and the caller.

Run from the root: `python -m benchmarks.serve_overload --out
benchmarks/results/serve_overload.json`, about 100 s for each of `--cases`. A case that is run
again takes the place of what the file has of it; each says by which command, where and on what.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import platform
import random
import re
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from benchmarks.frames import connect
from benchmarks.measuring import command_line
from benchmarks.peers.bundles import make_bundle
from benchmarks.peers.processes import cpu_s
from benchmarks.served import Served
from models.command import run_command
from models.cpu import cpu_budget, cpu_name
from models.errors import HoraceError, UsageError
from models.wire import image_to_wire
from protos import horace_pb2 as pb

EMBED = "/horace.v1.Horace/Embed"
SHAPES = {"small": (28, 28, 1), "large": (224, 224, 3)}
SETTLING_S = 2
"""Windows of the open loop that are left out: the queue fills and the forecast learns."""

TICK_S = 0.002
"""How often the open loop looks what is due: a client of thousands of calls a second that woke
for each would cost as much as the server that refuses them."""

OPTIONS = ("seconds", "peak_seconds", "overload", "clients", "serve")
"""What a run says of the options that it was made with."""

PATIENCE_S = 60.0
"""How long the server may take to start, and a call without a deadline to be answered."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of load.

    Attributes:
        is_pinned: whether clients and server have cores of their own.
        encoder: which of `benchmarks.peers.bundles`.
        images: a request.
        concurrency: requests under way in the closed loop, of all clients together.
        deadline_ms: of every request of the open loop.
    """

    is_pinned: bool
    encoder: str = "small"
    images: int = 1
    concurrency: int = 64
    deadline_ms: float = 500.0

    @property
    def name(self) -> str:
        """Cores, encoder, images."""
        return f"{'pinned' if self.is_pinned else 'shared'}-{self.encoder}-{self.images}"


CASES = tuple(
    Case(is_pinned=is_pinned, **case)
    for is_pinned in (True, False)
    for case in (
        {"images": 1},
        {"images": 4, "concurrency": 16},
        {"images": 16, "concurrency": 8},
        {"encoder": "large", "concurrency": 8, "deadline_ms": 2000.0},
    )
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Overload a server, and compare what it still does with what it can do."""

    cases: tuple[str, ...] = tuple(case.name for case in CASES)
    """Which, as CORES-ENCODER-IMAGES; each is a run of its own, against a fresh server."""

    seconds: float = 60.0
    """How long the overload lasts."""

    peak_seconds: float = 15.0
    """How long each of the closed loops lasts."""

    overload: float = 3.0
    """Arrivals in the open loop, as a multiple of the peak."""

    clients: int = 2
    """Client processes."""

    serve: str = ""
    """More options for `python -m serve`, as one string: `--serve="--max-calls 256"`."""

    home: Path = Path("artifacts/bench/peers")
    """Where the bundle of the large encoder is kept."""

    out: Path | None = None
    """Where to write the figures as JSON."""

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            UsageError: there is no such case.
        """
        known = [case.name for case in CASES]
        for name in set(self.cases) - set(known):
            raise UsageError("--cases", expected=" or ".join(known), found=name)


@dataclass
class Tally:
    """What one client saw.

    Attributes:
        codes: how often each status code came.
        good: requests answered OK within the deadline, by whole seconds since the start.
        latencies_s: of the requests answered OK, from sending to the reply.
        refused_s: of those refused, the same.
        late_s: how far behind its own schedule the client sent, a request each.
        cpu_s: its CPU time.
    """

    codes: Counter[str] = field(default_factory=Counter)
    good: Counter[int] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    retry_hints: int = 0
    cpu_s: float = 0.0

    def add(self, other: Tally) -> None:
        """Take in what another client saw."""
        self.codes += other.codes
        self.good += other.good
        self.latencies_s += other.latencies_s
        self.refused_s += other.refused_s
        self.late_s += other.late_s
        self.retry_hints += other.retry_hints
        self.cpu_s += other.cpu_s


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one client process is to do.

    Attributes:
        address: where the server is.
        images: of each request.
        shape: of each image, (H, W, C).
        seconds: for how long.
        concurrency: requests under way; 0 for an open loop.
        rate: arrivals a second of the open loop.
        deadline_s: of each request; None for none.
        seed: of the arrivals and the images.
    """

    address: str
    images: int
    shape: tuple[int, int, int]
    seconds: float
    concurrency: int = 0
    rate: float = 0.0
    deadline_s: float | None = None
    seed: int = 0


class Client:
    """One client process's calls."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.tally = Tally()
        self.started_s = time.monotonic()
        self.timeout_s = load.deadline_s or PATIENCE_S

    async def run(self) -> None:
        """Make the calls of the load, and wait until all are over."""
        load = self.load
        message = payload(load.shape, load.images, load.seed)
        self.frames = await connect(
            load.address, EMBED, message, timeout_s=self.timeout_s, on_end=self.end
        )
        self.started_s = time.monotonic()
        if load.concurrency:
            for _ in range(load.concurrency):
                self.frames.call()
        else:
            await self.open_loop()
        await self.frames.idle.wait()
        self.frames.close()

    def end(self, code: str, seconds: float, told: bool) -> None:
        """Note how a call ended; in a closed loop make the next."""
        tally, since_s = self.tally, time.monotonic() - self.started_s
        tally.codes[code] += 1
        tally.retry_hints += told
        if code != "OK":
            tally.refused_s.append(seconds)
        else:
            tally.latencies_s.append(seconds)
            if seconds <= self.timeout_s:
                tally.good[int(since_s)] += 1
        if self.load.concurrency and since_s < self.load.seconds:
            self.frames.call()

    async def open_loop(self) -> None:
        """Send at random moments, whatever becomes of it; what is due in a tick goes together."""
        rng = random.Random(self.load.seed)
        due_s = 0.0
        while (due_s := due_s + rng.expovariate(self.load.rate)) < self.load.seconds:
            while (wait_s := due_s - (time.monotonic() - self.started_s)) > 0:
                await asyncio.sleep(max(wait_s, TICK_S))
            self.tally.late_s.append(-wait_s)
            self.frames.call()
            if len(self.tally.late_s) % 32 == 0:
                await asyncio.sleep(0)  # replies are read even where the schedule is behind


def payload(shape: tuple[int, int, int], images: int, seed: int) -> bytes:
    """A serialised request of random pixels, (H, W, C) each."""
    pixels = np.random.default_rng(seed).integers(0, 256, (images, *shape), dtype=np.uint8)
    request = pb.EmbedRequest(images=[image_to_wire(one) for one in pixels])
    return request.SerializeToString()


def client_process(pipe: Connection, cores: set[int]) -> None:
    """Do what comes down the pipe, and send back what was seen, until told to stop."""
    os.sched_setaffinity(0, cores)
    while (load := pipe.recv()) is not None:
        client = Client(load)
        before_s = time.process_time()
        asyncio.run(client.run())
        client.tally.cpu_s = time.process_time() - before_s
        pipe.send(client.tally)


class Clients:
    """The client processes, which stay for all phases of a case."""

    def __init__(self, count: int, cores: set[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=client_process, args=(theirs, cores), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, address: str, case: Case, seconds: float, *, rate: float = 0.0) -> Tally:
        """Run one phase on all of them: open where a rate is given, else closed."""
        count = len(self.pipes)
        for seed, pipe in enumerate(self.pipes):
            pipe.send(
                Load(
                    address=address,
                    images=case.images,
                    shape=SHAPES[case.encoder],
                    seconds=seconds,
                    concurrency=0 if rate else -(-case.concurrency // count),
                    rate=rate / count,
                    deadline_s=case.deadline_ms / 1e3 if rate else None,
                    seed=seed,
                )
            )
        total = Tally()
        for pipe in self.pipes:
            total.add(pipe.recv())
        return total

    def close(self) -> None:
        """End them."""
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join()


@contextmanager
def serving(arguments: Sequence[str], cores: set[int]) -> Iterator[Served]:
    """Run a server on some cores until the block ends."""
    ours = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as folder:
        os.sched_setaffinity(0, cores)  # which a child has, too
        try:
            server = Served(Path(folder), *arguments)
        finally:
            os.sched_setaffinity(0, ours)
        try:
            yield server
        finally:
            server.stop()


def main(options: Options) -> None:
    """Measure, print, and write the result."""
    runs = {} if options.out is None else read_runs(options.out)
    asked = asdict(options)
    for case in CASES:
        if case.name not in options.cases:
            continue
        runs[case.name] = {
            "command": command_line(),
            "hardware": {"cpu": cpu_name(), "cpus": cpu_budget()},
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("grpcio", "pygrpc-native", "onnxruntime")},
            },
            "load_average_before": round(os.getloadavg()[0], 1),
            "options": {name: asked[name] for name in OPTIONS},
            **measure(options, case),
        }
        print(json.dumps({case.name: runs[case.name]}, indent=2), flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"runs": runs}, indent=2) + "\n")


def read_runs(file: Path) -> dict[str, dict[str, object]]:
    """Give the runs that a file has."""
    runs: dict[str, dict[str, object]] = (
        json.loads(file.read_text())["runs"] if file.exists() else {}
    )
    return runs


def divide_cores(case: Case) -> tuple[set[int], set[int]]:
    """Give the cores of the server and of the clients.

    Raises:
        HoraceError: there is one, which two cannot have for themselves.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not case.is_pinned:
        return set(cores), set(cores)
    if len(cores) < 2:
        raise HoraceError(f"case {case.name}", expected="at least 2 cores", found="1")
    return set(cores[: len(cores) // 2]), set(cores[len(cores) // 2 :])


def measure(options: Options, case: Case) -> dict[str, object]:
    """Measure one case with clients of its own."""
    servers, others = divide_cores(case)
    clients = Clients(options.clients, others)
    bundle = make_bundle(case.encoder, options.home)
    arguments = ["--bundle", str(bundle), *shlex.split(options.serve)]
    try:
        with serving(arguments, servers) as server:
            return call_server(server, clients, options, case)
    finally:
        clients.close()


def call_server(
    server: Served, clients: Clients, options: Options, case: Case
) -> dict[str, object]:
    """Measure peak, overload, and peak again on one server."""
    address, images = server.address, case.images
    closed = clients.run(address, case, options.peak_seconds)
    first = per_second(closed, options.peak_seconds, images)
    rate = options.overload * statistics.mean(first) / images
    before, before_cpu_s = server.metrics(), cpu_s(server.process.pid)
    tally = clients.run(address, case, options.seconds, rate=rate)
    time.sleep(case.deadline_ms / 1e3)  # what still runs ends
    counted = {
        name: round(value - before.get(name, 0))
        for name, value in server.metrics().items()
        if value != before.get(name, 0) and name.startswith("horace_")
    }
    server_cpu_s = cpu_s(server.process.pid) - before_cpu_s
    server_rss_mib = peak_rss_mib(server.process.pid)
    again = clients.run(address, case, options.peak_seconds)
    second = per_second(again, options.peak_seconds, images)
    peak = max(statistics.mean(first), statistics.mean(second))
    good = per_second(tally, options.seconds, images)
    computed = counter(counted, "horace_computed_images_total")
    return {
        "peak_images_s": {"before": spread(first), "after": spread(second)},
        "offered_images_s": round(sum(tally.codes.values()) * images / options.seconds, 1),
        "asked_images_s": round(rate * images, 1),
        "goodput_images_s": spread(good),
        "goodput_of_peak": round(statistics.mean(good) / peak, 4),
        "replies": dict(tally.codes),
        "accepted_ms": percentiles(tally.latencies_s),
        "deadline_ms": case.deadline_ms,
        "refused_ms": percentiles(tally.refused_s),
        "refusals_with_retry_after": tally.retry_hints,
        "client_behind_ms": percentiles(tally.late_s),
        "computed_images": computed,
        "computed_for_nobody": computed - tally.codes["OK"] * images,
        "abandoned_images": counter(counted, "horace_abandoned_images_total"),
        "queue_ended": {
            found[1]: value
            for name, value in counted.items()
            if name.startswith("horace_queue_ended_total")
            and (found := re.search(r'why="(\w+)"', name))
        },
        "cpu_s": {"server": round(server_cpu_s, 2), "clients": round(tally.cpu_s, 2)},
        "server_peak_rss_mib": round(server_rss_mib, 1),
        "bench_peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def peak_rss_mib(pid: int) -> float:
    """Give the most memory that a process has had."""
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def per_second(tally: Tally, seconds: float, images: int) -> list[float]:
    """Give the good images of each whole second, less the first ones."""
    windows = range(SETTLING_S, max(int(seconds), SETTLING_S + 1))
    return [float(tally.good[second] * images) for second in windows]


def counter(counted: dict[str, int], name: str) -> int:
    """Add up a counter over its labels."""
    return sum(value for key, value in counted.items() if key.split("{")[0] == name)


def spread(values: list[float]) -> dict[str, float]:
    """Mean, median, quartiles and number of values."""
    low, middle, high = np.percentile(values, (25, 50, 75)).tolist()
    return {
        "mean": round(statistics.mean(values), 1),
        "median": middle,
        "quartile_1": low,
        "quartile_3": high,
        "n": len(values),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """The usual ones, in milliseconds."""
    if not seconds:
        return {}
    values = np.percentile(np.asarray(seconds) * 1e3, (50, 90, 99, 100)).round(2).tolist()
    return dict(zip(("p50", "p90", "p99", "max"), values, strict=True)) | {"n": len(seconds)}


if __name__ == "__main__":
    sys.exit(run_command(Options, main, prog="python -m benchmarks.serve_overload"))
