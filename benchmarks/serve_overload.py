"""Goodput at three times the capacity, and what is computed for callers that have gone.

A server (`python -m serve` with the encoder that ships, in a process of its own) is called by
client processes over gRPC on the same machine: first in a closed loop, whose throughput is
the peak; then in an open loop, Poisson arrivals at `--overload` times the peak, every request
with a deadline, for `--seconds`; then in a closed loop again, since a machine may have become
slower meanwhile. The order is peak, overload, peak; the peak compared with is the higher one.

Goodput is images of replies that came within their deadline, a second, over the windows of
one second but the first two. The clients send and read bytes: no message is built or parsed,
so that they take as little as may be of the cores that they share with the server. What that
costs is reported as CPU-seconds of both sides.

Of what the server computed the replies account for all but `computed_for_nobody`: images of
requests whose caller has no reply. By the server's own count none of them was begun for a
caller that had gone (a batch holds nobody who was cancelled or whose deadline had passed);
`abandoned` of them were running when the caller went. The rest lost their way between the
batch and the caller.

Run from the root: `python -m benchmarks.serve_overload --out
benchmarks/results/serve_overload.json`, about 100 s for each of `--images`.
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
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

import grpc
import numpy as np

from models.command import run_command
from models.cpu import cpu_budget, cpu_name
from models.errors import HoraceError
from models.wire import image_to_wire
from protos import horace_pb2 as pb

EMBED = "/horace.v1.Horace/Embed"
SETTLING_S = 2
"""Windows of the open loop that are left out: the queue fills and the forecast learns."""

PATIENCE_S = 60.0
"""How long the server may take to start, and a call without a deadline to be answered."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Overload a server, and compare what it still does with what it can do."""

    images: tuple[int, ...] = (1, 4, 16)
    """Images a request; each is a run of its own, against a fresh server. With one, what the
    clients cost is a large part of the cores that they share with the server: see `cpu_s`."""

    seconds: float = 60.0
    """How long the overload lasts."""

    peak_seconds: float = 15.0
    """How long each of the closed loops lasts."""

    overload: float = 3.0
    """Arrivals in the open loop, as a multiple of the peak."""

    deadline_ms: float = 500.0
    """Deadline of every request of the open loop."""

    concurrency: int = 64
    """Requests under way in the closed loop, of all clients together; fewer where they
    have many images, but at least 8."""

    clients: int = 2
    """Client processes."""

    serve: str = ""
    """More options for `python -m serve`, as one string: `--serve="--max-calls 256"`."""

    out: Path | None = None
    """Where to write the figures as JSON."""


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
        seconds: for how long.
        concurrency: requests under way; 0 for an open loop.
        rate: arrivals a second of the open loop.
        deadline_s: of each request; None for none.
        seed: of the arrivals and the images.
    """

    address: str
    images: int
    seconds: float
    concurrency: int = 0
    rate: float = 0.0
    deadline_s: float | None = None
    seed: int = 0


class Client:
    """One client process's calls."""

    def __init__(self, load: Load, channel: grpc.aio.Channel) -> None:
        self.load = load
        self.tally = Tally()
        self.payload = payload(load.images, load.seed)
        self.call = channel.unary_unary(EMBED)
        self.started_s = time.monotonic()

    async def send(self) -> None:
        """Make one call and note how it ended."""
        sent_s = time.monotonic()
        timeout_s = self.load.deadline_s or PATIENCE_S
        try:
            await self.call(self.payload, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            now_s = time.monotonic()
            self.tally.codes[error.code().name] += 1
            self.tally.refused_s.append(now_s - sent_s)
            keys = {key for key, _ in error.trailing_metadata() or ()}
            self.tally.retry_hints += "retry-after-ms" in keys
            return
        now_s = time.monotonic()
        self.tally.codes["OK"] += 1
        self.tally.latencies_s.append(now_s - sent_s)
        if now_s - sent_s <= timeout_s:
            self.tally.good[int(now_s - self.started_s)] += 1

    async def closed_loop(self) -> None:
        """Keep as many requests under way as asked for."""

        async def loop() -> None:
            while time.monotonic() - self.started_s < self.load.seconds:
                await self.send()

        await asyncio.gather(*[loop() for _ in range(self.load.concurrency)])

    async def open_loop(self) -> None:
        """Send at random moments, whatever becomes of it."""
        rng = random.Random(self.load.seed)
        calls: set[asyncio.Task[None]] = set()
        due_s = 0.0
        while (due_s := due_s + rng.expovariate(self.load.rate)) < self.load.seconds:
            while (wait_s := due_s - (time.monotonic() - self.started_s)) > 0:
                await asyncio.sleep(wait_s)
            self.tally.late_s.append(-wait_s)
            calls.add(task := asyncio.create_task(self.send()))
            task.add_done_callback(calls.discard)
            if len(self.tally.late_s) % 32 == 0:
                await asyncio.sleep(0)  # replies are read even where the schedule is behind
        await asyncio.gather(*calls)


def payload(images: int, seed: int) -> bytes:
    """A serialised request of random pixels of the shipped encoder's size."""
    pixels = np.random.default_rng(seed).integers(0, 256, (images, 28, 28, 1), dtype=np.uint8)
    request = pb.EmbedRequest(images=[image_to_wire(one) for one in pixels])
    return request.SerializeToString()


def client_process(pipe: Connection) -> None:
    """Do what comes down the pipe, and send back what was seen, until told to stop."""

    async def run(load: Load) -> Tally:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(load.address, options=options) as channel:
            await channel.channel_ready()
            client = Client(load, channel)
            before_s = time.process_time()
            await (client.closed_loop() if load.concurrency else client.open_loop())
            client.tally.cpu_s = time.process_time() - before_s
            return client.tally

    while (load := pipe.recv()) is not None:
        pipe.send(asyncio.run(run(load)))


class Clients:
    """The client processes, which stay for all phases."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=client_process, args=(theirs,), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, address: str, options: Options, images: int, *, rate: float = 0.0) -> Tally:
        """Run one phase on all of them: open where a rate is given, else closed."""
        count = len(self.pipes)
        concurrency = max(8, options.concurrency // images)
        for seed, pipe in enumerate(self.pipes):
            pipe.send(
                Load(
                    address=address,
                    images=images,
                    seconds=options.seconds if rate else options.peak_seconds,
                    concurrency=0 if rate else -(-concurrency // count),
                    rate=rate / count,
                    deadline_s=options.deadline_ms / 1e3 if rate else None,
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


class ServerProcess:
    """`python -m serve` on free ports, and what it says of itself."""

    def __init__(self, arguments: str) -> None:
        """Start it and wait until it is ready.

        Raises:
            HoraceError: it did not start.
        """
        command = [sys.executable, "-m", "serve", "--port", "0", "--metrics.port", "0"]
        self.process = subprocess.Popen(
            [*command, *shlex.split(arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        assert self.process.stdout is not None
        log = []
        for line in self.process.stderr:
            log.append(line)
            if found := re.search(r"http://\S+/metrics", line):
                self.metrics = found[0]
                break
        else:
            raise HoraceError("the server did not start", found="".join(log[-5:]))
        Thread(target=self.process.stderr.read, daemon=True).start()  # or it would fill up
        self.address = self.process.stdout.readline().split()[3]

    def counters(self) -> dict[str, float]:
        """Give what it has counted, by name with labels."""
        with urllib.request.urlopen(self.metrics, timeout=PATIENCE_S) as reply:
            lines = reply.read().decode().splitlines()
        values = (line.rsplit(" ", 1) for line in lines if line and line[0] != "#")
        return {name: float(value) for name, value in values}

    def cpu_s(self) -> float:
        """Give its CPU time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_rss_mib(self) -> float:
        """Give the most memory that it has had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+)", status)
        assert found
        return int(found[1]) / 1024

    def stop(self) -> int:
        """Stop it as its operator would."""
        self.process.terminate()
        return self.process.wait(PATIENCE_S)


@contextmanager
def serving(arguments: str) -> Iterator[ServerProcess]:
    """A server for the time of a context."""
    server = ServerProcess(arguments)
    try:
        yield server
    finally:
        server.stop()


def main(options: Options) -> None:
    """Measure, print, and write the result."""
    report: dict[str, object] = {
        "command": shlex.join(["python", "-m", "benchmarks.serve_overload", *sys.argv[1:]]),
        "hardware": {"cpu": cpu_name(), "cpus": cpu_budget()},
        "load_average_before": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("grpcio", "pygrpc-native", "onnxruntime")},
        },
        "options": {name: value for name, value in asdict(options).items() if name != "out"},
        "runs": {},
    }
    clients = Clients(options.clients)
    try:
        for images in options.images:
            result = measure(clients, options, images)
            report["runs"][f"{images} images a request"] = result
            print(json.dumps({images: result}, indent=2), flush=True)
    finally:
        clients.close()
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2, default=str) + "\n")


def measure(clients: Clients, options: Options, images: int) -> dict[str, object]:
    """Measure peak, overload, and peak again on one server."""
    with serving(options.serve) as server:
        address = server.address
        first = per_second(clients.run(address, options, images), options.peak_seconds, images)
        rate = options.overload * statistics.median(first) / images
        before, before_cpu_s = server.counters(), server.cpu_s()
        tally = clients.run(address, options, images, rate=rate)
        time.sleep(options.deadline_ms / 1e3)  # what still runs ends
        counted = {
            name: round(value - before.get(name, 0))
            for name, value in server.counters().items()
            if value != before.get(name, 0) and name.startswith("horace_")
        }
        server_cpu_s = server.cpu_s() - before_cpu_s
        peak_rss_mib = server.peak_rss_mib()
        second = per_second(clients.run(address, options, images), options.peak_seconds, images)
    peak = max(statistics.median(first), statistics.median(second))
    good = per_second(tally, options.seconds, images)
    computed = counter(counted, "horace_computed_images_total")
    return {
        "peak_images_s": {"before": spread(first), "after": spread(second)},
        "offered_images_s": round(sum(tally.codes.values()) * images / options.seconds, 1),
        "asked_images_s": round(rate * images, 1),
        "goodput_images_s": spread(good),
        "goodput_of_peak": round(statistics.median(good) / peak, 4),
        "replies": dict(tally.codes),
        "accepted_ms": percentiles(tally.latencies_s),
        "deadline_ms": options.deadline_ms,
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
        "server_peak_rss_mib": round(peak_rss_mib, 1),
        "bench_peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def per_second(tally: Tally, seconds: float, images: int) -> list[float]:
    """Give the good images of each whole second, less the first ones."""
    windows = range(SETTLING_S, max(int(seconds), SETTLING_S + 1))
    return [float(tally.good[second] * images) for second in windows]


def counter(counted: dict[str, int], name: str) -> int:
    """Add up a counter over its labels."""
    return sum(value for key, value in counted.items() if key.split("{")[0] == name)


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and number of values."""
    low, middle, high = np.percentile(values, (25, 50, 75)).tolist()
    return {"median": middle, "quartile_1": low, "quartile_3": high, "n": len(values)}


def percentiles(seconds: list[float]) -> dict[str, float]:
    """The usual ones, in milliseconds."""
    if not seconds:
        return {}
    values = np.percentile(np.asarray(seconds) * 1e3, (50, 90, 99, 100)).round(2).tolist()
    return dict(zip(("p50", "p90", "p99", "max"), values, strict=True)) | {"n": len(seconds)}


if __name__ == "__main__":
    sys.exit(run_command(Options, main, prog="python -m benchmarks.serve_overload"))
