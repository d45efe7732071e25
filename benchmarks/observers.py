"""What it costs a request to be observed: prometheus_client's metrics against notes.

One request is five values for histograms and eight for counters, as `serve.operation` keeps them.
Candidates take turns within every repeat. CPU time of one thread, so that others' load should
not count.

Run from the root: `python -m benchmarks.observers --out benchmarks/results/observers.json`
(a few seconds).
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import grpc
import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram

from benchmarks.measuring import command_line, turns
from models.command import run_command
from models.cpu import cpu_name
from serve.job import Embedded
from serve.operation.histogram import FOLD_EVERY, SECONDS, Notes
from serve.operation.observer import Call
from serve.operation.tally import CallTally, ModelHistograms, ModelTally

VALUES = (0.001, 0.002, 0.004, 0.008, 3.0)
COUNTERS = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare ways to observe a request."""

    repeats: int = 20
    """How often every candidate has its turn."""

    requests: int = 5000
    """Requests that a candidate observes in a turn."""

    out: Path | None = None
    """Where to write the figures as JSON."""


def with_library() -> Callable[[], None]:
    """Observe with prometheus_client's own metrics, their labels bound beforehand."""
    registry = CollectorRegistry()
    histograms = [
        Histogram(f"h{n}", "t", ["m"], buckets=SECONDS, registry=registry).labels("a")
        for n in range(len(VALUES))
    ]
    counters = [
        Counter(f"c{n}", "t", ["m"], registry=registry).labels("a") for n in range(COUNTERS)
    ]

    def observe() -> None:
        for histogram, value in zip(histograms, VALUES, strict=True):
            histogram.observe(value)
        for counter in counters:
            counter.inc(3.0)

    return observe


def with_append() -> Callable[[], None]:
    """Append only: what the one who observes pays between folds."""
    notes: Notes[tuple[float, ...]] = Notes(lambda _: None, threading.Lock())
    return lambda: notes.add(VALUES)


def with_tally() -> Callable[[], None]:
    """All that `serve.operation` does of a request and its batch, folding included."""
    tally = ModelTally(ModelHistograms(), threading.Lock())
    calls = CallTally(keyed=True)
    call = Call(method="Embed", arrived_s=0.0, client="key", code=grpc.StatusCode.OK)
    embedded = Embedded(
        vectors_ND=np.zeros((3, 4), np.float32),
        errors=[None] * 3,
        decode_s=0.001,
        queue_s=0.002,
        inference_s=0.004,
    )

    def observe() -> None:
        tally.answered(embedded, 0.008)
        tally.computed(3, 0.004)
        calls.add(call, 0.009)

    return observe


CANDIDATES = {
    "prometheus_client": with_library,
    "append alone": with_append,
    "serve.operation, all": with_tally,
}


def measure(options: Options) -> dict[str, list[float]]:
    """Give microseconds a request, one figure a turn."""
    observers = {name: make() for name, make in CANDIDATES.items()}
    micros: dict[str, list[float]] = {name: [] for name in observers}
    for repeat in range(options.repeats):
        for name, observe in turns(observers.items(), repeat):
            started_s = time.thread_time()
            for _ in range(options.requests):
                observe()
            micros[name].append((time.thread_time() - started_s) / options.requests * 1e6)
    return micros


def main(options: Options) -> None:
    """Measure, print, write."""
    micros = measure(options)
    rows = {}
    for name, values in micros.items():
        low, middle, high = statistics.quantiles(values, n=4)
        rows[name] = {"median_us": middle, "quartiles_us": [low, high]}
        print(f"{name:24} {middle:7.2f} us ({low:.2f}-{high:.2f})")
    if options.out:
        report = {
            "command": command_line(),
            "cpu": cpu_name(),
            "python": sys.version.split()[0],
            "prometheus_client": version("prometheus-client"),
            "fold_every": FOLD_EVERY,
            "repeats": options.repeats,
            "requests": options.requests,
            "micros_a_request": rows,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(Options, main, prog="python -m benchmarks.observers"))
