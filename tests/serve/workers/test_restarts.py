from __future__ import annotations

from serve.workers.restarts import LONGEST_DELAY_S, Restarts


def test_who_dies_young_waits_longer_each_time():
    """A fault of every start does not keep the machine busy; one grown old starts afresh."""
    restarts = Restarts()
    assert [restarts.delay_s(1.0) for _ in range(4)] == [0.1, 0.2, 0.4, 0.8]
    assert repr(restarts) == "<Restarts deaths=4 young=4>"
    assert restarts.delay_s(3600.0) == 0.0
    assert restarts.delay_s(1.0) == 0.1
    assert max(restarts.delay_s(1.0) for _ in range(50)) == LONGEST_DELAY_S
