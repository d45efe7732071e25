"""Prometheus: what the server has counted, laid out when somebody asks.

Rules:
    The registry is the server's own; nothing is global, so that two servers in one process
    count apart.
    What Triton counts has Triton's name, unit and labels, so that its dashboards work.
    Beside it stand histograms in seconds, under `horace_`, by model.
    To lay out is the scraper's cost: the gauges are read then, and hold no lock of the
    engines for longer than one look.

Source: https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/metrics.html
and https://prometheus.io/docs/instrumenting/exposition_formats/ (text, 0.0.4).
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import grpc
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from models.cpu import CGROUP_ROOT, SELF_CGROUP, cgroup_folders
from serve.operation.families import (
    MAX_LISTED,
    call_families,
    load_families,
    model_gauges,
    model_histograms,
    triton_counters,
)
from serve.operation.observer import Call
from serve.operation.state import ServerState
from serve.operation.tally import CallTally, ModelTallies

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics(Collector):
    """An `Observer` that counts calls, and gives all that is counted to Prometheus."""

    def __init__(self, source: ServerState, *, models: ModelTallies, keyed: bool = False) -> None:
        """Count from now on.

        Args:
            source: the state of the server.
            models: its account of its models.
            keyed: whether callers are the names of API keys, and counted by them; those of
                certificates and addresses are too many.
        """
        self._source = source
        self._models = models
        self._calls = CallTally(keyed=keyed)
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def __repr__(self) -> str:
        return f"<Metrics {self._models!r} {self._calls!r}>"

    # An observer.

    def answered(self, call: Call, total_s: float) -> None:
        """Count a call."""
        self._calls.add(call, total_s)

    def turned_away(self, code: grpc.StatusCode) -> None:
        """Count a call that no service saw."""
        self._calls.turn_away(code.name)

    # A collector.

    def render(self) -> bytes:
        """Lay everything out as text."""
        return as_triton_types_it(generate_latest(self.registry))

    def collect(self) -> Iterator[Metric]:
        """Give every metric family."""
        with self._models.reading():
            versions = self._models.series()
            families = [*triton_counters(versions), *model_histograms(self._models.models)]
        with self._calls.lock:
            self._calls.fold()
            families += call_families(self._calls)
        yield from families
        yield from model_gauges(list(self._source.models())[:MAX_LISTED])
        yield from load_families(self._source.loads(), self._source.reloads())
        yield from self._server_gauges()

    def _server_gauges(self) -> Iterator[Metric]:
        """Give what concerns the whole server."""
        images = GaugeMetricFamily(
            "horace_collection_images", "Images in it.", labels=["collection"]
        )
        for name, count in list(self._source.collections())[:MAX_LISTED]:
            images.add_metric([name], count)
        yield images
        throttled_s = cpu_throttled_s()
        if throttled_s is not None:
            yield CounterMetricFamily(
                "horace_cpu_throttled_seconds", "Taken away by the CPU limit.", throttled_s
            )
        active, ready = self._source.active(), self._source.ready()
        yield GaugeMetricFamily("horace_calls_active", "Calls under way.", active)
        size = self._source.message_bytes()
        yield GaugeMetricFamily("horace_message_bytes", "Of messages of calls under way.", size)
        yield GaugeMetricFamily("horace_ready", "Whether the server says that it serves.", ready)
        yield GaugeMetricFamily("process_threads", "Threads of the process.", count_threads())
        build = InfoMetricFamily("horace_build", "What runs here.")
        build.add_metric([], build_info())
        yield build


def as_triton_types_it(text: bytes) -> bytes:
    """Call Triton's counters counters: their names lack the `_total` that the library expects."""
    return re.sub(rb"(?m)^(# TYPE nv_\w+) untyped$", rb"\1 counter", text)


def cpu_throttled_s(root: Path = CGROUP_ROOT, self_cgroup: Path = SELF_CGROUP) -> float | None:
    """Say how long the cgroup of this process was kept from its CPUs; None where unknown."""
    for folder in reversed(cgroup_folders(root, self_cgroup, "cpu")):
        try:
            lines = (folder / "cpu.stat").read_text().splitlines()
        except OSError:
            continue
        found = dict(line.split() for line in lines)
        if "throttled_usec" in found:  # version 2
            return int(found["throttled_usec"]) / 1e6
        if "throttled_time" in found:  # version 1, in nanoseconds
            return int(found["throttled_time"]) / 1e9
    return None


def count_threads() -> int:
    """Count this process's threads, those of its libraries included; 0 where nobody says."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 0


def build_info() -> dict[str, str]:
    """Say which versions run here."""
    found = {"python": platform.python_version()}
    for name, package in (("version", "horace"), ("grpcio", "grpcio"), ("numpy", "numpy")):
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
