"""What each version of a model has done, as ModelStatistics reports it.

Rules:
    Every request and batch counts, whichever protocol it came by.
    A request is noted, and counted with many others later (`serve.operation.histogram`).
    Every version that runs is remembered, and a few of each model that do not any more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from serve.job import Embedded
from serve.operation.histogram import Notes
from serve.operation.observer import Nobody

KEPT_VERSIONS = 8
"""Versions of one model, the newest, whose counts are kept whether they are served or not."""


@dataclass(slots=True)
class Duration:
    """How often something was done, and how long it took in all."""

    count: int = 0
    total_s: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one more."""
        self.count += 1
        self.total_s += seconds


@dataclass(slots=True)
class Counts:
    """What one version of one model has done.

    Attributes:
        last_s: when a request was answered last, in seconds since 1970.
        images: that left the encoder with vectors.
        success: requests that got their vectors, from arrival to reply.
        fail: requests that got none.
        queue: of the first, the time in the queue.
        decode: until their images were decoded.
        inference: in the encoder.
        output: from the encoder to the reply.
        batches: by their size, with the encoder's time.
    """

    last_s: float = 0.0
    images: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    decode: Duration = field(default_factory=Duration)
    inference: Duration = field(default_factory=Duration)
    output: Duration = field(default_factory=Duration)
    batches: dict[int, Duration] = field(default_factory=dict)


class ModelCounts:
    """Hears of the work of one version of one model; may be told by several threads."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        """Start at nothing; `clock` gives seconds since 1970."""
        self._clock = clock
        self._lock = threading.Lock()
        self._counts = Counts()
        self._answered: Notes[tuple[float, float, float, float]] = Notes(self._fold, self._lock)

    def __repr__(self) -> str:
        return f"<ModelCounts {self._counts!r}>"

    def answered(self, embedded: Embedded, total_s: float) -> None:
        """Note a request that got its vectors."""
        self._counts.last_s = self._clock()
        self._answered.add((embedded.decode_s, embedded.queue_s, embedded.inference_s, total_s))

    def failed(self, error: BaseException, images: int, total_s: float) -> None:
        """Count a request that got none."""
        with self._lock:
            self._counts.fail.add(total_s)

    def computed(self, images: int, inference_s: float, *, failed: bool = False) -> None:
        """Count a batch; one that failed is counted with its requests."""
        if failed:
            return
        with self._lock:
            self._counts.images += images
            self._counts.batches.setdefault(images, Duration()).add(inference_s)

    @contextmanager
    def read(self) -> Iterator[Counts]:
        """Give the counts, up to date; they do not change within the context."""
        with self._lock:
            self._answered.fold()
            yield self._counts

    def _fold(self, notes: list[tuple[float, float, float, float]]) -> None:
        """Count requests."""
        counts = self._counts
        for decode_s, queue_s, inference_s, total_s in notes:
            counts.success.add(total_s)
            counts.decode.add(decode_s)
            counts.queue.add(queue_s)
            counts.inference.add(inference_s)
            counts.output.add(max(0.0, total_s - decode_s - queue_s - inference_s))


class Statistics(Nobody):
    """The counts of every model: an observer of engines, and deaf to calls."""

    def __init__(self, *, served: Callable[[], Iterable[tuple[str, str]]]) -> None:
        """Start with none.

        Args:
            served: the names and versions that run, offered or not yet; others are retired.
        """
        self._served = served
        self._counts: dict[tuple[str, str], ModelCounts] = {}  # the oldest first

    def __repr__(self) -> str:
        return f"<Statistics {list(self._counts)}>"

    def watch_model(self, name: str, version: str) -> ModelCounts:
        """Give the counts of one version of a model; make room for them among the retired."""
        counts = self._counts.pop((name, version), None) or ModelCounts()
        versions = [pair for pair in self._counts if pair[0] == name]
        excess = max(0, len(versions) - KEPT_VERSIONS + 1)
        served = set(self._served())
        for pair in [pair for pair in versions if pair not in served][:excess]:
            del self._counts[pair]
        self._counts[name, version] = counts
        return counts

    def find(self, name: str, version: str) -> ModelCounts | None:
        """Find the counts of one version of a model."""
        return self._counts.get((name, version))
