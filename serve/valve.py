"""Turns calls away at the door that a busy event loop could not answer in time.

Rules:
    Every call takes several turns of the event loop: one to begin, one or more to go on when
    its images are computed. How long a turn takes now is measured by a timer, and by how much
    that is overdue. One long turn is no load: the machine may have stood still, and what is over
    refuses nobody. Two are.
    A call whose deadline is nearer than a few such turns is refused before it is parsed, which
    costs a small part of what refusing it later does. Without this a server of small requests
    spends all of its time on refusals once it is called several times as often as it can
    answer.
    A call without a deadline is never turned away here, and none is while turns are short.

The policy is `Valve.refuses`; `LoopLag` measures.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeAlias

from serve.errors import DeadlineError

TURNS = 4.0
"""Turns of the loop that a call must have time for: to begin, to be computed, to be answered,
and one for what comes between."""

EVERY_S = 0.05
"""How often a turn is measured."""

SHORT_S = 0.005
"""A turn that is no longer turns nobody away: timers are not exact."""


class LoopLag:
    """How long a turn of the running event loop takes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Measure nothing before `start`."""
        self._clock = clock
        self._due_s = float("inf")
        self._last_s = self._before_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<LoopLag {self.seconds * 1e3:.1f} ms>"

    @property
    def seconds(self) -> float:
        """What two turns took at least, of the last two measured and the one overdue now."""
        return sorted((self._before_s, self._last_s, self._clock() - self._due_s))[1]

    def start(self) -> None:
        """Measure from now on, on the running loop."""
        self._due_s = self._clock() + EVERY_S
        self._timer = asyncio.get_running_loop().call_later(EVERY_S, self._measure)

    def stop(self) -> None:
        """Measure no more."""
        self._due_s = float("inf")
        self._last_s = self._before_s = 0.0
        if self._timer is not None:
            self._timer.cancel()

    def _measure(self) -> None:
        """Note how late this is."""
        late_s = self._clock() - self._due_s
        self.start()
        self._before_s, self._last_s = self._last_s, late_s


Refuses: TypeAlias = Callable[[float | None], DeadlineError | None]
"""Says why a call is turned away that has so many seconds left, or None."""


def never(_: float | None) -> None:
    """Turn nobody away."""


class Valve:
    """Decides who is turned away."""

    def __init__(self, lag: LoopLag) -> None:
        """Go by `lag`."""
        self._lag = lag
        self.turned_away = 0

    def __repr__(self) -> str:
        return f"<Valve {self._lag!r}, {self.turned_away} turned away>"

    def refuses(self, remaining_s: float | None) -> DeadlineError | None:
        """Say why a call is turned away that has so long; None where it is not."""
        if remaining_s is None or (turn_s := self._lag.seconds) < SHORT_S:
            return None
        if remaining_s > TURNS * turn_s:
            return None
        self.turned_away += 1
        error = DeadlineError(
            "deadline",
            expected=f"over {TURNS * turn_s * 1e3:.0f} ms while this server is so busy",
            found=f"{max(0.0, remaining_s) * 1e3:.0f} ms",
            mend="allow more time, or try elsewhere",
        )
        error.retry_after_s = TURNS * turn_s  # what the loop has to do now is done by then
        return error
