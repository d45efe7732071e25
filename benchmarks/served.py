"""A server process for benchmarks, and what the system and its own metrics say of it.

`python -m serve` on a free port, with its metrics on another. What it holds comes from its
metrics; what it takes (memory, threads, descriptors) from `/proc`, its workers' not included.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from platform import platform, python_version

from benchmarks.measuring import command_line
from models.bundle import Json
from models.cpu import cpu_budget, cpu_name
from serve.errors import ServeError

READY = "horace serving on "
HELD = ("horace_held_images", "horace_held_bytes", "nv_inference_pending_request_count")
"""Gauges of every model that are zero where nothing is held for anybody."""

PATIENCE_S = 60.0


class ServedError(ServeError):
    """A server that did not do what a benchmark needs of it."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a server takes at a moment.

    Attributes:
        done: how much of the work was done by then.
        seconds: since the first sample.
        resident_mib: memory.
        threads: of the process.
        descriptors: that it has open.
    """

    done: int
    seconds: float
    resident_mib: float
    threads: int
    descriptors: int


class Served:
    """`python -m serve` in a process of its own, ready."""

    def __init__(self, folder: Path, *arguments: str, port: int = 0) -> None:
        """Start it, and wait until it is ready.

        Args:
            folder: where its log goes.
            arguments: its options, but for the ports.
            port: of gRPC; a free one where 0.

        Raises:
            ServedError: it did not start.
        """
        self._log = folder / f"server-{time.monotonic_ns()}.log"
        metrics_port = free_port()
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serve", "--port", str(port), "--metrics.port",
                 str(metrics_port), "--metrics.host", "127.0.0.1", *arguments],
                stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith(READY):
            self.process.kill()
            raise ServedError("server", expected="one that is ready", found=self.log)
        self.address = line.split()[3]
        self._metrics = f"http://127.0.0.1:{metrics_port}/metrics"
        self._began_s = time.monotonic()

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self._log.read_text(errors="replace")

    @property
    def is_alive(self) -> bool:
        """Whether the process is there."""
        return self.process.poll() is None

    def sample(self, done: int, *, looks: int) -> Sample:
        """Say what it takes now; its descriptors are the fewest of so many looks."""
        proc = Path(f"/proc/{self.process.pid}")
        pages = int((proc / "statm").read_text().split()[1])
        return Sample(
            done=done,
            seconds=round(time.monotonic() - self._began_s, 2),
            resident_mib=round(pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20), 2),
            threads=len(os.listdir(proc / "task")),
            descriptors=min(_count_slowly(proc / "fd", looks)),  # our own last may be closing
        )

    def metrics(self) -> dict[str, float]:
        """Give its metrics, by name with labels."""
        with urllib.request.urlopen(self._metrics, timeout=PATIENCE_S) as reply:
            lines = reply.read().decode().splitlines()
        values = (line.rsplit(" ", 1) for line in lines if line and line[0] != "#")
        return {name: float(value) for name, value in values}

    def gauges(self) -> dict[str, float]:
        """Give its metrics, those of several labels summed."""
        totals: dict[str, float] = {}
        for name, value in self.metrics().items():
            name = name.partition("{")[0]
            totals[name] = totals.get(name, 0.0) + value
        return totals

    def settle(self, timeout_s: float = PATIENCE_S) -> dict[str, float]:
        """Wait until it holds nothing for anybody; give what it held at the last look."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            gauges = self.gauges()
            held = {name: gauges.get(name, 0.0) for name in (*HELD, "horace_calls_active")}
            if not any(held.values()) or time.monotonic() > deadline_s:
                return held
            time.sleep(0.05)

    def stop(self) -> int:
        """Have it drain, and give its exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def kill(self) -> None:
        """End it, if it is there."""
        if self.is_alive:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def _count_slowly(folder: Path, looks: int) -> Iterator[int]:
    """Count the entries of a folder so many times, with a pause between them."""
    for look in range(looks):
        if look:
            time.sleep(0.02)
        yield len(os.listdir(folder))


def free_port() -> int:
    """Find a port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(*distributions: str) -> dict[str, Json]:
    """Name the versions and the hardware that a result depends on."""
    versions: dict[str, Json] = {name: version(name) for name in ("grpcio", *distributions)}
    return {
        "command": command_line(),
        "hardware": f"{cpu_name()}, {cpu_budget()} CPUs",
        "system": platform(),
        "python": python_version(),
        "versions": versions,
    }
