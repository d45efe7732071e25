from __future__ import annotations

import random

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import UsageError
from serve.client.retry import RetryBudget, RetryPolicy

BUSY = grpc.StatusCode.RESOURCE_EXHAUSTED
GONE = grpc.StatusCode.UNAVAILABLE


@given(st.integers(1, 5000), st.floats(0, 100), st.floats(0, 50), st.randoms())
def test_waits_are_within_their_bounds(failures, remaining_s, retry_after_s, rng):
    """Never sooner than the server asks, never past the deadline, never too long beyond."""
    wait_s = RetryPolicy().wait_s(
        BUSY,
        failures=failures,
        has_replied=True,
        remaining_s=remaining_s,
        rng=rng,
        retry_after_s=retry_after_s,
    )
    assert wait_s is None or retry_after_s <= wait_s <= min(retry_after_s + 2.0, remaining_s)


@pytest.mark.parametrize(
    ("attempts", "has_replied", "most"),
    [(None, False, 6), (None, True, 5000), (1, True, 1), (9, False, 9), (9, True, 9)],
)
def test_a_policy_allows_so_many_attempts(attempts, has_replied, most):
    """Exactly those it names; naming none, few until the server has replied, then any number."""
    waits = [
        RetryPolicy(attempts=attempts).wait_s(
            GONE, failures=n, has_replied=has_replied, remaining_s=9, rng=random.Random(0)
        )
        for n in range(1, 5000)
    ]
    assert [wait_s is not None for wait_s in waits] == [n < most for n in range(1, 5000)]


def test_who_is_asked_to_stay_away_does():
    """A negative push-back means never."""
    wait_s = RetryPolicy().wait_s(
        BUSY,
        failures=1,
        has_replied=True,
        remaining_s=9,
        rng=random.Random(0),
        retry_after_s=-1,
    )
    assert wait_s is None


@pytest.mark.parametrize("burst", [0, 1, 10])
def test_retries_are_a_share_of_the_calls(burst):
    """However many fail: a burst, and from then on one in five."""
    budget = RetryBudget(RetryPolicy(share=0.2, burst=burst, per_s=0), clock=lambda: 0.0)
    spent = 0
    for _ in range(1000):
        budget.earn()
        spent += budget.spend()
    least = 0 if burst == 0 else 190  # without room for one retry there are none
    assert least <= spent <= burst + 200


def test_who_calls_seldom_earns_by_the_second():
    """An empty budget fills up with time, to the burst and no further."""
    now_s = 0.0
    budget = RetryBudget(RetryPolicy(share=0, burst=2, per_s=0.5), clock=lambda: now_s)
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    now_s = 2.0
    assert [budget.spend() for _ in range(2)] == [True, False]
    now_s = 1000.0
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    assert repr(budget) == "<RetryBudget 0.0 of 2 left>"


@pytest.mark.parametrize("name", ["attempts", "initial_s", "multiplier", "share", "burst"])
def test_a_policy_that_cannot_be_meant_is_refused(name):
    """By name, in one line."""
    with pytest.raises(UsageError, match=rf"RetryPolicy\.{name}: expected at least [01], found -1"):
        RetryPolicy(**{name: -1})
