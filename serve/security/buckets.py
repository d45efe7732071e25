"""How much one caller may ask for: token buckets and calls under way, as pure policy.

Rules:
    There is no clock in here: who asks says what time it is, and is told how long to wait.
    A bucket fills at its rate up to a burst. What asks for more than a burst holds is let
    through by a full one, which then owes the rest: the rate holds over time, and nothing
    is too large to be ever served.
    What is refused costs nothing, neither of its two buckets.
    What was spent stays spent when limits change: who has them changed gets no burst by it.
    A caller that has no call under way and full buckets is forgotten: memory is for those
    that ask, however many addresses they come from.

Source: the token bucket of RFC 2697, with debt in place of colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

MIN_SWEEP = 1024
"""Accounts below which nobody looks for idle ones."""

ROUNDING = 1e-9
"""Of a token: who waits as long as it was told is not told to wait again."""


@dataclass(frozen=True, kw_only=True)
class Quota:
    """What one caller may ask for; infinity is no limit.

    Attributes:
        requests_per_s: requests, and messages of streams.
        images_per_s: images, and queries or their examples.
        calls: calls and streams that are open at once.
        burst_s: how long a caller that was idle may go above the rates: a bucket holds as
            much as its rate gives in this time, and at least one.
    """

    requests_per_s: float = math.inf
    images_per_s: float = math.inf
    calls: float = math.inf
    burst_s: float = 1.0

    @property
    def is_rated(self) -> bool:
        """Whether there is any limit a second."""
        return self.requests_per_s < math.inf or self.images_per_s < math.inf


class Bucket:
    """Tokens of one kind for one caller; full at first, but for what was spent before."""

    def __init__(
        self, rate_per_s: float, capacity: float, now_s: float, level: float = math.inf
    ) -> None:
        self._rate_per_s = rate_per_s
        self._capacity = capacity
        self._level = min(level, capacity)
        self._filled_s = now_s

    def __repr__(self) -> str:
        return f"<Bucket {self._level:g}/{self._capacity:g} +{self._rate_per_s:g}/s>"

    def wait_s(self, amount: float, now_s: float) -> float:
        """Give the seconds until `amount` can be taken; 0 where it can be now."""
        self._fill(now_s)
        missing = min(amount, self._capacity) - self._level
        return missing / self._rate_per_s if missing > ROUNDING else 0.0

    def take(self, amount: float) -> None:
        """Take what `wait_s` has just let through."""
        self._level -= amount

    def level(self, now_s: float) -> float:
        """Give the tokens that are left; below 0 where some are owed."""
        self._fill(now_s)
        return self._level

    def is_full(self, now_s: float) -> bool:
        """Whether it is as if it had never been used."""
        return self.level(now_s) >= self._capacity

    def _fill(self, now_s: float) -> None:
        """Add what has come since the last look; a clock that goes back adds nothing."""
        passed_s = max(0.0, now_s - self._filled_s)
        self._level = min(self._capacity, self._level + passed_s * self._rate_per_s)
        self._filled_s = max(self._filled_s, now_s)


class Account:
    """One caller's calls under way and its buckets."""

    def __init__(self, quota: Quota, now_s: float) -> None:
        self.calls = 0
        self._requests: Bucket | None = None
        self._images: Bucket | None = None
        self.set_quota(quota, now_s)

    def __repr__(self) -> str:
        return f"<Account calls={self.calls} requests={self._requests} images={self._images}>"

    def set_quota(self, quota: Quota, now_s: float) -> None:
        """Hold to other limits; what was spent stays so, and calls under way stay counted."""
        self.quota = quota
        self._requests = _remake(self._requests, quota.requests_per_s, quota.burst_s, now_s)
        self._images = _remake(self._images, quota.images_per_s, quota.burst_s, now_s)

    def spend(self, requests: float, images: float, now_s: float) -> float:
        """Take both amounts and give 0, or take nothing and give the seconds to wait."""
        wait_s = max(self.waits_s(requests, images, now_s))
        if not wait_s:
            for bucket, amount in ((self._requests, requests), (self._images, images)):
                if bucket is not None:
                    bucket.take(amount)
        return wait_s

    def waits_s(self, requests: float, images: float, now_s: float) -> tuple[float, float]:
        """Give the seconds to wait for each of the two; nothing is taken."""
        wanted = ((self._requests, requests), (self._images, images))
        of_requests, of_images = (
            0.0 if bucket is None or not amount else bucket.wait_s(amount, now_s)
            for bucket, amount in wanted
        )
        return of_requests, of_images

    def is_idle(self, now_s: float) -> bool:
        """Whether forgetting it changes nothing."""
        buckets = (self._requests, self._images)
        return not self.calls and all(b is None or b.is_full(now_s) for b in buckets)


def _remake(old: Bucket | None, rate_per_s: float, burst_s: float, now_s: float) -> Bucket | None:
    """Make the bucket of a rate in place of another; none where there is no limit."""
    if rate_per_s == math.inf:
        return None
    level = math.inf if old is None else old.level(now_s)
    return Bucket(rate_per_s, max(1.0, rate_per_s * burst_s), now_s, level)


class Ledger:
    """The accounts of all callers. Belongs to one thread."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._sweep_at = MIN_SWEEP

    def __len__(self) -> int:
        return len(self._accounts)

    def __repr__(self) -> str:
        calls = sum(account.calls for account in self._accounts.values())
        return f"<Ledger callers={len(self._accounts)} calls={calls}>"

    def begin(self, client: str, quota: Quota, now_s: float) -> Callable[[], None] | None:
        """Count a call as under way; give what ends it, or None where there are too many."""
        account = self._account(client, quota, now_s)
        if account.calls >= quota.calls:
            return None
        account.calls += 1
        ended = False

        def end() -> None:
            nonlocal ended
            account.calls -= not ended
            ended = True

        return end

    def spend(
        self, client: str, quota: Quota, *, requests: float, images: float, now_s: float
    ) -> float:
        """Take what a request costs and give 0, or take nothing and give the seconds to wait."""
        return self._account(client, quota, now_s).spend(requests, images, now_s)

    def waits_s(
        self, client: str, quota: Quota, *, requests: float, images: float, now_s: float
    ) -> tuple[float, float]:
        """Give the seconds to wait for requests and for images; nothing is taken."""
        return self._account(client, quota, now_s).waits_s(requests, images, now_s)

    def _account(self, client: str, quota: Quota, now_s: float) -> Account:
        """Give a caller's account, which holds to this quota from now on."""
        account = self._accounts.get(client)
        if account is None:
            self._sweep(now_s)
            account = self._accounts[client] = Account(quota, now_s)
        elif account.quota != quota:
            account.set_quota(quota, now_s)
        return account

    def _sweep(self, now_s: float) -> None:
        """Forget the idle, each time that there are twice as many accounts as were left."""
        if len(self._accounts) >= self._sweep_at:
            self._accounts = {
                client: account
                for client, account in self._accounts.items()
                if not account.is_idle(now_s)
            }
            self._sweep_at = max(MIN_SWEEP, 2 * len(self._accounts))
