"""Looks after the threads that work: `is_stuck` decides, `Watchdog` asks at intervals.

Workers are looked after by their supervisor, by the same `is_stuck`.

Rules:
    A thread counts as stuck once it has been seen at the same piece of work for longer than a
    limit. The time counted is that between looks, each at most twice the interval: a process
    that was stopped, or a machine that slept, has no stuck threads for it.
    A thread that waits for work is never stuck.
    What is watched mends itself (`serve.crew`); whoever is no longer in use is forgotten.
    Nothing that goes wrong while one is looked at keeps the others from being looked at.

It does not watch the event loop: what asks for health hears nothing if that hangs, and neither
does the supervisor of several workers (`serve.workers`).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

from models.errors import UsageError

log = logging.getLogger("horace.serve")

EVERY_S = 1.0
"""How often the threads are looked at."""


@dataclass(frozen=True, kw_only=True)
class WatchdogOptions:
    """When a thread is taken for stuck."""

    stuck_s: float = 60.0
    """How long a batch, a few images to decode, or a piece of a search may take before its thread
    is replaced and its callers are told; 0: as long as they like."""

    opening_s: float = 900.0
    """How long opening or closing one model or collection may take before its thread is replaced,
    so that the next can be opened; engines for GPUs are built for minutes. A worker that starts
    may not answer for as long."""

    silent_s: float = 60.0
    """How long the event loop of a worker that serves may not answer before the process is killed
    and replaced; 0: all may for as long as they like, as while one is looked into with a debugger.
    For --workers."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: one makes no sense.
        """
        for name, least, most in (
            ("stuck_s", 0, 86400),
            ("opening_s", 0.01, 86400),
            ("silent_s", 0, 86400),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                option = "--watchdog." + name.replace("_", "-")
                raise UsageError(option, expected=f"{least} to {most}", found=str(value))


@dataclass(eq=False, slots=True)
class Pulse:
    """What a thread shows of itself, and what was seen of it; of a worker, whether it answers.

    Attributes:
        beat: odd while it works; it counts up with every beginning and every end, and by two
            with every piece between. To answer is a worker's work.
        seen_beat: what that was at the last look.
        seen_s: how long it has been seen at this beat.
    """

    beat: int = 0
    seen_beat: int = 0
    seen_s: float = 0.0

    @property
    def works(self) -> bool:
        """Whether it is at a piece of work."""
        return self.beat % 2 == 1


def is_stuck(pulse: Pulse, *, elapsed_s: float, limit_s: float) -> bool:
    """Look at a thread; whether it has been at one piece of work for too long.

    Args:
        pulse: the thread's; what is seen of it is noted there.
        elapsed_s: since the last look.
        limit_s: how long one piece may take.
    """
    beat = pulse.beat
    if beat != pulse.seen_beat or not pulse.works:
        pulse.seen_beat, pulse.seen_s = beat, 0.0
        return False
    pulse.seen_s += elapsed_s
    return pulse.seen_s > limit_s


class Watched(Protocol):
    """Something with threads."""

    def look(self, *, elapsed_s: float, limit_s: float) -> None:
        """Replace threads that have died or hang, and tell whom it concerns."""


class Watchdog:
    """A thread that looks after others until it is closed."""

    def __init__(
        self, options: WatchdogOptions, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Watch nothing yet; `start` it."""
        self._options = options
        self._clock = clock
        self._watched: WeakKeyDictionary[Watched, float] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._last_s = clock()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __repr__(self) -> str:
        state = "running" if self._thread.is_alive() else "not running"
        return f"<Watchdog {state}, {len(self._watched)} watched>"

    def watch(self, watched: Watched, *, limit_s: float | None = None) -> None:
        """Look after this, too, as long as anybody else refers to it.

        Args:
            watched: what has threads.
            limit_s: how long one piece of its work may take; as the options say where None.
        """
        if limit_s is None:
            limit_s = self._options.stuck_s or math.inf
        with self._lock:
            self._watched[watched] = limit_s

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> None:
        """Look at everything once."""
        now_s = self._clock()
        elapsed_s = min(now_s - self._last_s, 2 * EVERY_S)
        self._last_s = now_s
        with self._lock:
            watched = list(self._watched.items())
        for one, limit_s in watched:
            try:
                one.look(elapsed_s=elapsed_s, limit_s=limit_s)
            except Exception:
                log.exception("looking after %r failed", one)

    def _run(self) -> None:
        """Look at intervals."""
        while not self._closing.wait(EVERY_S):
            self.look()
