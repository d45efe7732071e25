"""Decides whether a failed call is tried again, and when: policy alone.

Rules:
    Only what may pass by itself is tried again: a server that does not answer, stops, or has
    no room now. Every call of Horace can be repeated without harm.
    Waits grow exponentially and are drawn at random from zero up, so that callers that were
    refused together do not come back together.
    A wait that would pass the deadline is not begun.

Source: "Exponential Backoff and Jitter", AWS Architecture Blog, 2015 (full jitter).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import grpc

RETRIED = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.CANCELLED,  # a stopping gRPC server ends so what it has not looked at
    }
)


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often and how fast.

    Attributes:
        attempts: calls at most, the first included.
        initial_s: the longest wait before the second attempt.
        multiplier: how much longer each next wait may be.
        max_s: the longest wait of all.
    """

    attempts: int = 6
    initial_s: float = 0.1
    multiplier: float = 2.0
    max_s: float = 2.0

    def wait_s(
        self, code: grpc.StatusCode, *, failures: int, remaining_s: float, rng: random.Random
    ) -> float | None:
        """Say how long to wait before the next attempt; None where there is none.

        Args:
            code: how the last attempt ended.
            failures: attempts so far, at least 1.
            remaining_s: until the deadline.
            rng: what the wait is drawn from.
        """
        if code not in RETRIED or failures >= self.attempts:
            return None
        longest_s = min(self.max_s, self.initial_s * self.multiplier ** (failures - 1))
        wait_s = rng.uniform(0.0, longest_s)
        return wait_s if wait_s < remaining_s else None
