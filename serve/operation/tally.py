"""What is counted of each model, each version of it, and each method: numbers, no names.

Rules:
    The number of series is bounded by configuration and never by traffic: models and keys
    beyond a bound share the name `other`, retired versions are forgotten, the newest last.
    Nothing that a caller may write freely is a label; neither is its address.
    A model's histograms outlive its versions; what Triton counts by version is by version.

Source: https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/metrics.html
for what its counters mean; text-embeddings-inference#271 for what unbounded labels do.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serve.errors import DeadlineError, InternalError, QueueFullError
from serve.job import Embedded
from serve.operation.histogram import SECONDS, SIZES, Histogram, Notes
from serve.operation.observer import Call

OTHER = "other"
"""The name that all share who come after the bound."""

MAX_MODELS = 64
"""Names of models that have series of their own."""

MAX_KEYS = 100
"""Names of API keys that have."""

KEPT_VERSIONS = 4
"""Versions of one model that have; more do only while they are served."""

REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
"""Triton's reasons why a request failed, in its spelling."""


def triton_reason(error: BaseException) -> str:
    """Give Triton's word for why a request failed."""
    if isinstance(error, QueueFullError | DeadlineError):
        return "REJECTED"
    if isinstance(error, asyncio.CancelledError):
        return "CANCELED"
    return "BACKEND" if isinstance(error, InternalError) else "OTHER"


@dataclass(eq=False)
class ModelHistograms:
    """Of one model, whatever its version.

    Attributes:
        total: seconds from a request's coming to the engine until it has its vectors.
        decode: seconds from there until its last image was decoded.
        queue: the longest that one of its images waited for the encoder, in seconds.
        inference: seconds of the encoder, a batch.
        batch: images, a batch.
        faults: images that had none of their own vectors, by why.
    """

    total: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    decode: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    queue: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    inference: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    batch: Histogram = field(default_factory=lambda: Histogram(SIZES))
    faults: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False)
class VersionCounts:
    """What Triton counts of one version of a model; times in microseconds, a request."""

    requests: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    images: int = 0
    batches: int = 0
    request_us: float = 0.0
    queue_us: float = 0.0
    decode_us: float = 0.0
    inference_us: float = 0.0
    output_us: float = 0.0


class ModelTally:
    """Hears of the work of one version of a model, and counts it."""

    def __init__(self, histograms: ModelHistograms, lock: threading.Lock) -> None:
        """Count into `histograms`, which the model's versions share, under their `lock`."""
        self.counts = VersionCounts()
        self.histograms = histograms
        self._requests: Notes[tuple[float, float, float, float]]
        self._requests = Notes(self._fold_requests, lock)
        self._batches: Notes[tuple[int, float]] = Notes(self._fold_batches, lock)
        self._failures: Notes[str] = Notes(self.counts.failures.update, lock)
        self._faults: Notes[str] = Notes(histograms.faults.update, lock)

    def __repr__(self) -> str:
        return f"<ModelTally {self.counts!r}>"

    def answered(self, embedded: Embedded, total_s: float) -> None:
        """Note a request that has its vectors, and its images that have none."""
        note = (total_s, embedded.decode_s, embedded.queue_s, embedded.inference_s)
        self._requests.add(note)
        if len(embedded.vectors_ND) < len(embedded.errors):
            for error in filter(None, embedded.errors):
                self._faults.add(error.fault.value)

    def failed(self, error: BaseException, images: int, total_s: float) -> None:
        """Note a request that has none."""
        self._failures.add(triton_reason(error))

    def computed(self, images: int, inference_s: float, *, failed: bool = False) -> None:
        """Note a batch; one that failed is counted with its requests."""
        if not failed:
            self._batches.add((images, inference_s))

    def fold(self) -> None:
        """Count what was noted; the lock is held."""
        for notes in (self._requests, self._batches, self._failures, self._faults):
            notes.fold()

    def _fold_requests(self, notes: list[tuple[float, float, float, float]]) -> None:
        """Count requests: into the model's histograms, and as Triton does."""
        total, decode, queue, inference = np.array(notes).T
        self.histograms.total.add(total)
        self.histograms.decode.add(decode)
        self.histograms.queue.add(queue)
        counts = self.counts
        counts.requests += len(notes)
        counts.request_us += _micros(total)
        counts.decode_us += _micros(decode)
        counts.queue_us += _micros(queue)
        counts.inference_us += _micros(inference)
        counts.output_us += _micros(np.maximum(0.0, total - decode - queue - inference))

    def _fold_batches(self, notes: list[tuple[int, float]]) -> None:
        """Count batches."""
        images, inference = np.array(notes).T
        self.histograms.batch.add(images)
        self.histograms.inference.add(inference)
        self.counts.batches += len(notes)
        self.counts.images += int(images.sum())


class ModelTallies:
    """The tallies of all models, as many as there may be."""

    def __init__(self, *, served: Callable[[], Iterable[tuple[str, str]]]) -> None:
        """Start empty.

        Args:
            served: the names and versions that run, offered or not yet; others are retired.
        """
        self._served = served
        self.lock = threading.Lock()
        self.models: dict[str, ModelHistograms] = {}
        self.versions: dict[tuple[str, str], ModelTally] = {}  # the oldest first

    def __repr__(self) -> str:
        return f"<ModelTallies {list(self.versions)}>"

    def watch(self, name: str, version: str) -> ModelTally:
        """Give the tally of one version of a model, its own or that of all others."""
        served = set(self._served())
        with self.lock:
            if name not in self.models and len(self.models) >= MAX_MODELS:
                self._forget_a_model({name for name, _ in served})
            if name not in self.models and len(self.models) >= MAX_MODELS:
                name = version = OTHER
            if (name, version) not in self.versions:
                self._forget_versions(name, served)
                histograms = self.models.setdefault(name, ModelHistograms())
                self.versions[name, version] = ModelTally(histograms, self.lock)
            return self.versions[name, version]

    def fold(self) -> None:
        """Count what was noted; the lock is held."""
        for tally in self.versions.values():
            tally.fold()

    def _forget_a_model(self, served: Set[str]) -> None:
        """Forget the oldest model that is not served, if there is one."""
        retired = [name for name in self.models if name not in served and name != OTHER]
        for name in retired[:1]:
            del self.models[name]
            for pair in [pair for pair in self.versions if pair[0] == name]:
                del self.versions[pair]

    def _forget_versions(self, name: str, served: Set[tuple[str, str]]) -> None:
        """Make room for a version: forget the oldest that are not served."""
        versions = [pair for pair in self.versions if pair[0] == name]
        excess = max(0, len(versions) - KEPT_VERSIONS + 1)
        for pair in [pair for pair in versions if pair not in served][:excess]:
            self.versions.pop(pair).fold()  # the model's histograms keep what it noted


def _micros(seconds: NDArray[np.float64]) -> float:
    """Add up, in microseconds."""
    return float(seconds.sum()) * 1e6


class CallTally:
    """Counts calls by method and code, and by key and code."""

    def __init__(self, *, keyed: bool) -> None:
        """Start with none.

        Args:
            keyed: whether a call's client is the name of an API key, and counted.
        """
        self._keyed = keyed
        self.calls: Counter[tuple[str, str]] = Counter()
        self.by_key: Counter[tuple[str, str]] = Counter()
        self.seconds: dict[str, Histogram] = {}
        self.search = Histogram(SECONDS)
        self.turned_away: Counter[str] = Counter()
        self.lock = threading.Lock()
        self._keys: set[str] = set()
        self._notes: Notes[tuple[str, str, str, float, float]] = Notes(self._fold, self.lock)
        self._refusals: Notes[str] = Notes(self.turned_away.update, self.lock)

    def __repr__(self) -> str:
        return f"<CallTally {dict(self.calls)}>"

    def add(self, call: Call, total_s: float) -> None:
        """Note a call that is over."""
        self._notes.add((call.method, call.code.name, call.client, total_s, call.search_s))

    def turn_away(self, code: str) -> None:
        """Note a call that was refused before a service saw it."""
        self._refusals.add(code)

    def fold(self) -> None:
        """Count what was noted; the lock is held."""
        self._notes.fold()
        self._refusals.fold()

    def _fold(self, notes: list[tuple[str, str, str, float, float]]) -> None:
        """Count calls; only those that were answered tell how long an answer takes."""
        seconds: dict[str, list[float]] = {}
        for method, code, client, total_s, _ in notes:
            self.calls[method, code] += 1
            if self._keyed and client:
                self.by_key[self._known(client), code] += 1
            if code == "OK":
                seconds.setdefault(method, []).append(total_s)
        for method, values in seconds.items():
            self.seconds.setdefault(method, Histogram(SECONDS)).add(values)
        if searches := [search_s for *_, search_s in notes if search_s]:
            self.search.add(searches)

    def _known(self, key: str) -> str:
        """Give the name under which a key is counted."""
        if key not in self._keys and len(self._keys) >= MAX_KEYS:
            return OTHER
        self._keys.add(key)
        return key
