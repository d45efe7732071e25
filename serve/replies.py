"""Brings results from the threads of an engine to the event loop of those who wait for them.

Rules:
    All requests that a batch completes reach the event loop in one call.
    How long that takes, until the replies have left, is measured with every delivery, and on
    request where there are none: where everything is refused, nothing else would tell that
    replies are quick again.
    A loop that has ended has nobody who waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from serve.job import Job, answer, tell_admitted

log = logging.getLogger("horace.serve")


class Replies:
    """The way back of one engine's jobs; any thread may use it."""

    def __init__(self, clock: Callable[[], float], note: Callable[[float], None]) -> None:
        """Take a clock, and who is told, on an event loop, how long a reply has taken."""
        self._clock = clock
        self._note = note
        self._is_measuring = False

    def deliver(self, jobs: Sequence[Job], error: Exception | None = None) -> None:
        """Answer jobs with their results, or with an error."""
        if jobs:
            self._post(jobs, self._answer, jobs, error, self._clock())

    def admitted(self, jobs: Sequence[Job]) -> None:
        """Let jobs go on that have waited in line."""
        self._post(jobs, tell_admitted, jobs)

    def measure(self, loop: asyncio.AbstractEventLoop) -> None:
        """Learn, on `loop`, how long a reply would take now; nothing where that is under way."""
        if not self._is_measuring:
            self._is_measuring = True
            loop.call_soon(loop.call_soon, self._end, self._clock())

    def _answer(self, jobs: Sequence[Job], error: Exception | None, posted_s: float) -> None:
        """Answer jobs; what follows in the loop's next turn are their replies, and then the end."""
        answer(jobs, error)
        jobs[0].loop.call_soon(self._end, posted_s)

    def _end(self, posted_s: float) -> None:
        """Note how long it has taken."""
        self._is_measuring = False
        self._note(self._clock() - posted_s)

    def _post(self, jobs: Sequence[Job], call: Callable[..., None], *arguments: object) -> None:
        """Have the event loop of `jobs` call."""
        try:
            jobs[0].loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop is closed: nobody waits
            log.debug("the event loop ended before %d requests", len(jobs))
