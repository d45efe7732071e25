"""Decides whether a failed call is tried again, and when: policy alone.

Rules:
    Only what may pass by itself is tried again: a server that does not answer, stops, or has
    no room now. Every call of Horace can be repeated without harm.
    Waits grow exponentially and are drawn at random from zero up, so that callers that were
    refused together do not come back together. A server that says how long to wait is obeyed:
    the wait is at least that, and a server that says not to come back is left alone.
    A server that has replied is waited for until the deadline: it may be starting anew. One that
    never has is soon given up: it may be a wrong address.
    A wait that would pass the deadline is not begun.
    Retries are a share of the calls, and some a second: beyond a burst there are no more of
    them than that, so that a server in trouble is not buried under them.

Sources: "Exponential Backoff and Jitter", AWS Architecture Blog, 2015 (full jitter); Finagle's
`RetryBudget`; gRPC proposal A6 (push-back).
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import grpc

from models.errors import UsageError

RETRIED = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.CANCELLED,  # a stopping gRPC server ends so what it has not looked at
    }
)

UNKNOWN_ATTEMPTS = 6
"""Calls of a server that never replied, by default: they wait for 1.6 s, on average."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often and how fast.

    Attributes:
        attempts: calls at most, the first included; None for as many as the deadline allows, but
            6 while the server has never replied.
        initial_s: the longest wait before the second attempt.
        multiplier: how much longer each next wait may be.
        max_s: the longest wait of all, unless the server asks for more.
        share: retries that each call earns, such as 0.2 for one in five.
        burst: retries that may come at once, as when a server dies with many calls in it.
        per_s: retries that each second earns: who calls seldom may retry, too.
    """

    attempts: int | None = None
    initial_s: float = 0.1
    multiplier: float = 2.0
    max_s: float = 2.0
    share: float = 0.2
    burst: int = 100
    per_s: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what no policy can mean.

        Raises:
            UsageError: a value is too small.
        """
        least = {"attempts": 1, "multiplier": 1}
        for name in ("attempts", "initial_s", "multiplier", "max_s", "share", "burst", "per_s"):
            value = getattr(self, name)
            if name == "attempts" and value is None:
                continue
            if not value >= least.get(name, 0):
                expected = f"at least {least.get(name, 0)}"
                raise UsageError(f"RetryPolicy.{name}", expected=expected, found=str(value))

    def wait_s(
        self,
        code: grpc.StatusCode,
        *,
        failures: int,
        has_replied: bool,
        remaining_s: float,
        rng: random.Random,
        retry_after_s: float | None = None,
    ) -> float | None:
        """Say how long to wait before the next attempt; None where there is none.

        Args:
            code: how the last attempt ended.
            failures: attempts so far, at least 1.
            has_replied: whether the server ever has.
            remaining_s: until the deadline.
            rng: what the wait is drawn from.
            retry_after_s: what the server asked for; negative where it asked to be left alone.
        """
        most = self.attempts or (math.inf if has_replied else UNKNOWN_ATTEMPTS)
        if code not in RETRIED or failures >= most:
            return None
        if retry_after_s is not None and retry_after_s < 0:
            return None
        longest_s = self.max_s
        with suppress(OverflowError):  # after a thousand failures
            longest_s = min(longest_s, self.initial_s * self.multiplier ** (failures - 1))
        wait_s = (retry_after_s or 0.0) + rng.uniform(0.0, longest_s)
        return wait_s if wait_s < remaining_s else None


class RetryBudget:
    """Counts what retries a client may still make. Safe to use from several threads."""

    def __init__(self, policy: RetryPolicy, clock: Callable[[], float]) -> None:
        """Start full: a burst is allowed from the first call on."""
        self._policy = policy
        self._clock = clock
        self._lock = threading.Lock()
        self._left = float(policy.burst)
        self._counted_s = clock()

    def __repr__(self) -> str:
        return f"<RetryBudget {self._left:.1f} of {self._policy.burst} left>"

    def earn(self) -> None:
        """Count a call, which earns its share of a retry."""
        with self._lock:
            self._add(self._policy.share)

    def spend(self) -> bool:
        """Take one retry; whether there was one left."""
        with self._lock:
            now_s = self._clock()
            self._add((now_s - self._counted_s) * self._policy.per_s)
            self._counted_s = now_s
            if self._left < 1:
                return False
            self._left -= 1
            return True

    def _add(self, retries: float) -> None:
        """Add to what is left, up to a burst."""
        self._left = min(float(self._policy.burst), self._left + retries)
