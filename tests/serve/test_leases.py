from __future__ import annotations

from serve.leases import Hold, Lease


def test_what_is_leased_is_closed_after_its_last_lease():
    """Retired with two users: neither the first nor the retiring closes it, the last does."""
    closed = []
    hold = Hold(lambda: closed.append("closed"))
    with Lease("thing", hold) as thing:
        assert thing == "thing"
        with Lease("thing", hold):
            hold.retire()
            assert repr(hold) == "<Hold retired users=2>"
        assert closed == []
    assert closed == ["closed"]
    assert repr(hold) == "<Hold closed users=0>"


def test_what_nobody_uses_is_closed_when_it_is_retired():
    """Retiring it again changes nothing."""
    closed = []
    hold = Hold(lambda: closed.append("closed"))
    with Lease("thing", hold):
        pass
    assert repr(hold) == "<Hold open users=0>"
    hold.retire()
    hold.retire()
    assert closed == ["closed"]


def test_closing_is_handed_to_whoever_may_block():
    """The loop that ends a lease does not close; what it hands over is run once."""
    closed, waiting = [], []
    hold = Hold(lambda: closed.append("closed"), dispose=waiting.append)
    hold.retire()
    assert (closed, len(waiting)) == ([], 1)
    waiting.pop()()
    hold.close()
    assert (closed, waiting) == (["closed"], [])


def test_an_owner_closes_what_is_still_used():
    """The lease that ends afterwards finds it closed, and leaves it so."""
    closed = []
    hold = Hold(lambda: closed.append("closed"))
    with Lease("thing", hold):
        hold.close()
        hold.retire()
    assert closed == ["closed"]
