"""Decides how long to wait before a worker that died is started again: pure policy.

A worker that has served a while is started again at once. One that dies young waits twice as
long each time, so that a fault that comes at every start does not keep the machine busy with
starting, however long a start takes.
"""

from __future__ import annotations

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 30.0

YOUNG_S = 10.0
"""Who dies before this age, counted from when it was ready, has probably died of starting."""


class Restarts:
    """The deaths of one worker."""

    def __init__(self) -> None:
        """Start with none."""
        self.deaths = 0
        self._young = 0

    def __repr__(self) -> str:
        return f"<Restarts deaths={self.deaths} young={self._young}>"

    def delay_s(self, lived_s: float) -> float:
        """Count a death at that age, 0 of one that was never ready, and say how long to wait."""
        self.deaths += 1
        if lived_s >= YOUNG_S:
            self._young = 0
            return 0.0
        self._young += 1
        return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self._young - 1, 20))
