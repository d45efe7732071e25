from __future__ import annotations

import pytest

from serve.workers.place import WorkerPlace


def test_alone_by_default():
    """One process shares nothing and has everything."""
    alone = WorkerPlace()
    assert not alone.shares_ports
    assert (alone.own_port(9090), alone.share_of(4), str(alone)) == (9090, 4, "server")


@pytest.mark.parametrize(
    ("cpus", "count", "shares"), [(4, 2, [2, 2]), (5, 3, [2, 2, 1]), (1, 2, [1, 1])]
)
def test_workers_split_the_budget(cpus, count, shares):
    """Together they have all of it, and none has nothing."""
    places = [WorkerPlace(index=n, count=count) for n in range(count)]
    assert [place.share_of(cpus) for place in places] == shares
    assert [place.own_port(9090) for place in places] == [9090 + n for n in range(count)]
    assert {place.own_port(0) for place in places} == {0}
    assert [str(place) for place in places] == [f"worker {n}" for n in range(count)]
