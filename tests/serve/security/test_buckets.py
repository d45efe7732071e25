from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.security.buckets import MIN_SWEEP, Bucket, Ledger, Quota


def test_a_full_bucket_gives_its_burst_and_then_its_rate():
    """Five at once, and a sixth when it has come."""
    bucket = Bucket(rate_per_s=2.0, capacity=5.0, now_s=0.0)
    for _ in range(5):
        assert bucket.wait_s(1, 0.0) == 0
        bucket.take(1)
    assert bucket.wait_s(1, 0.0) == 0.5
    assert bucket.wait_s(1, 0.5) == 0


def test_more_than_a_burst_is_owed():
    """A request of 100 images at 10 a second is served, and the next one waits for it."""
    bucket = Bucket(rate_per_s=10.0, capacity=10.0, now_s=0.0)
    assert bucket.wait_s(100, 0.0) == 0
    bucket.take(100)
    assert bucket.wait_s(1, 0.0) == pytest.approx(9.1)
    assert bucket.wait_s(100, 1.0) == pytest.approx(9.0)


def test_a_clock_that_goes_back_gives_nothing():
    """Time is what the caller says, but never twice."""
    bucket = Bucket(rate_per_s=1.0, capacity=1.0, now_s=10.0)
    bucket.take(1)
    assert bucket.wait_s(1, 5.0) == 1
    assert bucket.wait_s(1, 10.5) == 0.5


@given(
    rate=st.floats(0.01, 1e4),
    burst_s=st.floats(0.001, 10),
    asks=st.lists(st.tuples(st.floats(0, 5), st.integers(1, 2000)), max_size=60),
)
def test_never_more_than_the_burst_and_the_rate(rate, burst_s, asks):
    """Whoever asks, when, for how much: up to any grant, what came before it kept the rate."""
    ledger, quota = Ledger(), Quota(images_per_s=rate, burst_s=burst_s)
    capacity = max(1.0, rate * burst_s)
    now_s, granted = 0.0, 0
    for pause_s, images in asks:
        now_s += pause_s
        wait_s = ledger.spend("a", quota, requests=1, images=images, now_s=now_s)
        if wait_s == 0:
            needed = min(images, capacity)
            assert granted + needed <= (capacity + rate * now_s) * (1 + 1e-9) + 1e-6
            granted += images


@given(rate=st.floats(0.01, 1e4), amount=st.integers(1, 5000))
def test_who_waits_as_long_as_it_was_told_gets_in(rate, amount):
    """The time to come back is the right one: not before it, and not later."""
    ledger, quota = Ledger(), Quota(images_per_s=rate, burst_s=1 / rate)
    assert ledger.spend("a", quota, requests=1, images=amount, now_s=0.0) == 0
    wait_s = ledger.spend("a", quota, requests=1, images=amount, now_s=0.0)
    assert wait_s > 0
    assert ledger.spend("a", quota, requests=1, images=amount, now_s=wait_s * 0.99) > 0
    assert ledger.spend("a", quota, requests=1, images=amount, now_s=wait_s) == 0


def test_what_is_refused_costs_nothing():
    """A request that the images' rate refuses takes nothing of the requests'."""
    ledger, quota = Ledger(), Quota(requests_per_s=2, images_per_s=10)
    assert ledger.spend("a", quota, requests=1, images=10, now_s=0.0) == 0
    for _ in range(5):
        assert ledger.spend("a", quota, requests=1, images=10, now_s=0.0) == 1.0
    assert ledger.spend("a", quota, requests=1, images=0, now_s=0.0) == 0


def test_callers_do_not_pay_for_one_another():
    """Every name has an account of its own."""
    ledger, quota = Ledger(), Quota(requests_per_s=1)
    assert ledger.spend("a", quota, requests=1, images=0, now_s=0.0) == 0
    assert ledger.spend("a", quota, requests=1, images=0, now_s=0.0) == 1
    assert ledger.spend("b", quota, requests=1, images=0, now_s=0.0) == 0


def test_calls_under_way_are_bounded_and_end_once():
    """Ending a call twice frees one place."""
    ledger, quota = Ledger(), Quota(calls=2)
    first, second = (ledger.begin("a", quota, 0.0) for _ in range(2))
    assert ledger.begin("a", quota, 0.0) is None
    assert repr(ledger) == "<Ledger callers=1 calls=2>"
    first()
    first()
    assert ledger.begin("a", quota, 0.0) is not None
    assert ledger.begin("a", quota, 0.0) is None
    second()
    assert ledger.begin("a", quota, 0.0) is not None


def test_a_new_quota_holds_at_once_and_keeps_the_calls():
    """A reload of the key file changes limits; calls under way stay counted."""
    ledger = Ledger()
    end = ledger.begin("a", Quota(calls=1), 0.0)
    assert ledger.begin("a", Quota(calls=1), 0.0) is None
    assert ledger.begin("a", Quota(calls=2), 0.0) is not None
    assert ledger.begin("a", Quota(calls=2), 0.0) is None
    end()
    assert ledger.begin("a", Quota(calls=2), 0.0) is not None


def test_a_new_quota_gives_back_nothing_that_was_spent():
    """However often it changes, also in debt; what has come until then was of the old rate."""
    ledger, slow, fast = Ledger(), Quota(images_per_s=1), Quota(images_per_s=10)

    def wait_s(quota: Quota, now_s: float) -> float:
        return ledger.spend("a", quota, requests=1, images=1, now_s=now_s)

    assert ledger.spend("a", fast, requests=1, images=20, now_s=0.0) == 0
    for _ in range(3):
        assert wait_s(slow, 0.0) == pytest.approx(11)
        assert wait_s(fast, 0.0) == pytest.approx(1.1)
    assert wait_s(slow, 1.0) == pytest.approx(1)
    assert wait_s(fast, 5.0) == 0
    assert wait_s(fast, 5.0) == pytest.approx(0.1), "a lower burst was all it had"


def test_limits_that_were_none_begin_with_full_buckets():
    """Nobody has counted what was spent without them."""
    ledger = Ledger()
    for quota in (Quota(calls=1), Quota(requests_per_s=1)):
        assert ledger.spend("a", quota, requests=1, images=0, now_s=0.0) == 0
    assert ledger.spend("a", Quota(requests_per_s=1), requests=1, images=0, now_s=0.0) == 1


def test_callers_that_are_idle_are_forgotten():
    """Half a million addresses, each once: memory is for those of the last moments."""
    ledger, quota = Ledger(), Quota(requests_per_s=10, burst_s=1.0)
    end = ledger.begin("stays", quota, 0.0)
    for n in range(20 * MIN_SWEEP):
        ledger.spend(f"address {n}", quota, requests=1, images=0, now_s=float(n))
    assert len(ledger) <= MIN_SWEEP
    assert repr(ledger).endswith("calls=1>")
    end()


def test_no_limit_is_no_bucket():
    """Infinity never waits, however much is asked."""
    ledger = Ledger()
    assert not Quota().is_rated
    assert ledger.spend("a", Quota(), requests=1e9, images=1e9, now_s=0.0) == 0
    assert ledger.begin("a", Quota(calls=math.inf), 0.0) is not None
