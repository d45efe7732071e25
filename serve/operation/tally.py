"""What is counted of each model, each version of it, and each method: numbers, no names.

Metrics show it, and KServe's ModelStatistics what it has of versions.

Rules:
    Every request and batch counts, whichever protocol it came by.
    The number of series is bounded by configuration and never by traffic: models and keys
    beyond a bound share the name `other`, retired versions are forgotten, the newest last.
    Nothing that a caller may write freely is a label; neither is its address.
    A model's histograms outlive its versions; what Triton counts by version is by version.
    Every version that runs has its counts, also where its model's series is `other`.

Source: https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/metrics.html
for what its counters mean; text-embeddings-inference#271 for what unbounded labels do.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

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
    """What Triton counts of one version of a model.

    Attributes:
        last_s: when a request got its vectors last, in seconds since 1970.
        requests: that got their vectors.
        request_s: of these, from arrival to the vectors; in seconds added up, as are the next four.
        decode_s: until their images were decoded.
        queue_s: the longest waits of their images.
        inference_s: the encoder, each request's batches.
        output_s: the rest.
        failures: requests that got none, by Triton's reasons.
        failed_s: of these, from arrival to their end.
        batches: computed, by how many images they had.
        batches_s: the encoder's time for those.
    """

    last_s: float = 0.0
    requests: int = 0
    request_s: float = 0.0
    decode_s: float = 0.0
    queue_s: float = 0.0
    inference_s: float = 0.0
    output_s: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    failed_s: float = 0.0
    batches: Counter[int] = field(default_factory=Counter)
    batches_s: dict[int, float] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """Images computed."""
        return sum(size * count for size, count in self.batches.items())


class ModelTally:
    """Hears of the work of one version of a model, and counts it."""

    def __init__(
        self,
        histograms: ModelHistograms,
        lock: threading.Lock,
        *,
        others: VersionCounts | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Count from now on.

        Args:
            histograms: which the model's versions share.
            lock: guards all that is counted.
            others: what models without series of their own count into, too, where this is one.
            clock: seconds since 1970.
        """
        self.counts = VersionCounts()
        self.is_other = others is not None
        self.histograms = histograms
        self._clock = clock
        self._counted = (self.counts,) if others is None else (self.counts, others)
        self._requests: Notes[tuple[float, float, float, float]]
        self._requests = Notes(self._fold_requests, lock)
        self._batches: Notes[tuple[int, float]] = Notes(self._fold_batches, lock)
        self._failures: Notes[tuple[str, float]] = Notes(self._fold_failures, lock)
        self._faults: Notes[str] = Notes(histograms.faults.update, lock)

    def __repr__(self) -> str:
        return f"<ModelTally {self.counts!r}>"

    def answered(self, embedded: Embedded, total_s: float) -> None:
        """Note a request that has its vectors, and its images that have none."""
        note = (total_s, embedded.decode_s, embedded.queue_s, embedded.inference_s)
        self.counts.last_s = self._clock()
        self._requests.add(note)
        if len(embedded.vectors_ND) < len(embedded.errors):
            for error in filter(None, embedded.errors):
                self._faults.add(error.fault.value)

    def failed(self, error: BaseException, images: int, total_s: float) -> None:
        """Note a request that has none."""
        self._failures.add((triton_reason(error), total_s))

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
        output = np.maximum(0.0, total - decode - queue - inference)
        sums_s = [float(times.sum()) for times in (total, decode, queue, inference, output)]
        for counts in self._counted:
            counts.requests += len(notes)
            counts.request_s += sums_s[0]
            counts.decode_s += sums_s[1]
            counts.queue_s += sums_s[2]
            counts.inference_s += sums_s[3]
            counts.output_s += sums_s[4]

    def _fold_batches(self, notes: list[tuple[int, float]]) -> None:
        """Count batches."""
        images, inference = np.array(notes).T
        self.histograms.batch.add(images)
        self.histograms.inference.add(inference)
        for counts in self._counted:
            for size, seconds in notes:
                counts.batches[size] += 1
                counts.batches_s[size] = counts.batches_s.get(size, 0.0) + seconds

    def _fold_failures(self, notes: list[tuple[str, float]]) -> None:
        """Count requests that have no vectors."""
        for counts in self._counted:
            for reason, seconds in notes:
                counts.failures[reason] += 1
                counts.failed_s += seconds


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
        self._others: VersionCounts | None = None

    def __repr__(self) -> str:
        return f"<ModelTallies {list(self.versions)}>"

    def watch_model(self, name: str, version: str) -> ModelTally:
        """Give the tally of one version of a model."""
        served = set(self._served())
        with self.lock:
            if (name, version) not in self.versions:
                self._forget_versions(name, served)
                self.versions[name, version] = self._make_tally(name, served)
            return self.versions[name, version]

    @contextmanager
    def reading(self, *pairs: tuple[str, str]) -> Iterator[None]:
        """Bring the counts of versions up to date, of all unless some are named.

        No request or batch is counted within the context.
        """
        with self.lock:
            for pair in pairs or self.versions:
                if pair in self.versions:
                    self.versions[pair].fold()
            yield

    def find(self, name: str, version: str) -> VersionCounts | None:
        """Find the counts of one version of a model; see `reading`."""
        tally = self.versions.get((name, version))
        return None if tally is None else tally.counts

    def series(self) -> dict[tuple[str, str], VersionCounts]:
        """Give the counts by model and version, or together by `other`; see `reading`."""
        named = {pair: tally.counts for pair, tally in self.versions.items() if not tally.is_other}
        return named if self._others is None else {**named, (OTHER, OTHER): self._others}

    def _make_tally(self, name: str, served: Set[tuple[str, str]]) -> ModelTally:
        """Make a tally, with series of its model's own or those of all others."""
        if name not in self.models and len(self.models) >= MAX_MODELS:
            self._forget_a_model({name for name, _ in served})
        if name in self.models or len(self.models) < MAX_MODELS:
            return ModelTally(self.models.setdefault(name, ModelHistograms()), self.lock)
        self._others = self._others or VersionCounts()
        for pair in [pair for pair, tally in self.versions.items() if tally.is_other]:
            if pair not in served:
                self.versions.pop(pair).fold()
        histograms = self.models.setdefault(OTHER, ModelHistograms())
        return ModelTally(histograms, self.lock, others=self._others)

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
