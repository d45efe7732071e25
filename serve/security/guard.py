"""Decides who may call and how much: one guard for gRPC on either front end, and for HTTP.

Rules:
    Where there are keys, every method wants one, also a method that there is not; but for
    grpc.health.v1, so that a probe needs none, and reflection where it is left open.
    A refusal says what would do, and never what was there.
    A stream has its key looked for again at each message: one that is taken back ends it.
    What a call costs is charged when its message has been read, and before anything is done
    for it; a refused call costs nothing.

`authorise` is a pure function of the method, the metadata and the keys. A `Guard` joins it
with the accounts of the callers. It reads no message: who asks says how many images there are.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from serve.errors import RETRY_AFTER_S, QueueFullError, UnauthenticatedError
from serve.security.buckets import Ledger, Quota
from serve.security.caller import certificate_subject, host_of
from serve.security.ring import ApiKey, KeyRing

log = logging.getLogger("horace.serve")

HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection."

HOW_TO_SEND = "as metadata `authorization: Bearer KEY` or `x-api-key: KEY`"

LOG_REFUSALS_EVERY_S = 10.0
"""A line a call would let anyone fill the log."""

Metadata = Sequence[tuple[str, str | bytes]]


def authorise(
    method: str, metadata: Metadata, ring: KeyRing | None, *, open_reflection: bool = False
) -> ApiKey | None:
    """Give the key that opens a method; None where none is needed.

    Args:
        method: as `/package.Service/Method`, or a path of HTTP.
        metadata: names in lower case, and values.
        ring: the keys; None where everyone may call.
        open_reflection: whether reflection needs none.

    Raises:
        UnauthenticatedError: there is no key, or another.
    """
    if ring is None or is_open(method, open_reflection=open_reflection):
        return None
    tokens = list(tokens_in(metadata))
    for token in tokens:
        if (key := ring.find(token)) is not None:
            return key
    found = "one that it does not know" if tokens else "none"
    raise UnauthenticatedError(
        "API key", expected=f"a key of this server {HOW_TO_SEND}", found=found
    )


def is_open(method: str, *, open_reflection: bool = False) -> bool:
    """Whether a method may be called without a key."""
    return method.startswith(HEALTH) or (open_reflection and method.startswith(REFLECTION))


def tokens_in(metadata: Metadata) -> Iterator[str]:
    """Give what may be a key: the first of each of the two headers."""
    bearer = api_key = None
    for name, value in metadata:
        if not isinstance(value, str):
            continue
        if name == "authorization" and bearer is None:
            scheme, _, token = value.partition(" ")
            if scheme.lower() == "bearer":
                bearer = token.strip()
        elif name == "x-api-key" and api_key is None:
            api_key = value.strip()
    yield from filter(None, (bearer, api_key))


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A call that was let in.

    Attributes:
        client: who makes it.
        quota: what its caller may ask for.
        key: what opened it; None where none was needed.
    """

    client: str
    quota: Quota
    key: ApiKey | None = None


class Guard:
    """Lets calls in, and keeps account of their callers. Belongs to one thread."""

    def __init__(
        self,
        *,
        ring: Callable[[], KeyRing | None] = lambda: None,
        open_reflection: bool = False,
        quota: Quota | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with no caller.

        Args:
            ring: gives the keys of the moment; None where everyone may call.
            open_reflection: whether reflection needs no key.
            quota: of every caller that has none of its own; unlimited where None.
            clock: monotonic seconds.
        """
        self._ring = ring
        self._open_reflection = open_reflection
        self._quota = quota or Quota()
        self._clock = clock
        self._ledger = Ledger()
        self._refused = 0
        self._logged_s = -LOG_REFUSALS_EVERY_S
        self._unlogged = 0

    def __repr__(self) -> str:
        return f"<Guard {self._ring()!r} {self._ledger!r} unauthenticated={self._refused}>"

    def authorise(self, method: str, metadata: Metadata) -> ApiKey | None:
        """Let a call in by its key; see the function of this name, and `count_stranger`.

        Raises:
            UnauthenticatedError: there is no key, or another.
        """
        return authorise(method, metadata, self._ring(), open_reflection=self._open_reflection)

    def name(
        self, key: ApiKey | None, *, peer: str, auth_context: Mapping[str, Iterable[bytes]]
    ) -> Pass:
        """Say who makes a call that was let in, and what it may ask for.

        Args:
            key: what `authorise` gave.
            peer: the caller's address as gRPC writes it.
            auth_context: what TLS found out about it.
        """
        if key is not None:
            return Pass(client=key.name, quota=key.quota(self._quota), key=key)
        client = certificate_subject(auth_context) or host_of(peer)
        return Pass(client=client, quota=self._quota)

    def renew(self, entered: Pass) -> Pass:
        """Let a stream go on, by what the keys of the moment say of the one that opened it.

        Raises:
            UnauthenticatedError: it is not among them any more.
        """
        ring = self._ring()
        if entered.key is None or ring is None:
            return entered
        key = ring.find_digest(entered.key.digest)
        if key is None:
            raise UnauthenticatedError(
                "API key of this stream",
                expected="one that the server still knows",
                found="one that was taken back",
                mend="open another with another key",
            )
        return Pass(client=key.name, quota=key.quota(self._quota), key=key)

    def recognise(self, method: str, metadata: Metadata, *, peer: str) -> str | None:
        """Name the caller of a call that would be let in for nothing, over a plain connection.

        None for one that would be refused, counted or charged: it is let in by the methods
        that do so.
        """
        try:
            key = self.authorise(method, metadata)
        except UnauthenticatedError:
            return None
        quota = self._quota if key is None else key.quota(self._quota)
        if quota.is_rated or quota.calls < math.inf:
            return None
        return host_of(peer) if key is None else key.name

    def under_way(self, entered: Pass) -> AbstractContextManager[None]:
        """Count a call as open while in the context.

        Raises:
            QueueFullError: on entering; its caller has as many open as it may.
        """
        return nullcontext() if entered.quota.calls == math.inf else self._counted(entered)

    @contextmanager
    def _counted(self, entered: Pass) -> Iterator[None]:
        """See `under_way`."""
        quota = entered.quota
        end = self._ledger.begin(entered.client, quota, self._clock())
        if end is None:
            raise QueueFullError(
                "calls of this caller that are open at once",
                expected=f"at most {quota.calls:g}",
                found="one more",
                mend="wait for one of them",
                retry_after_s=RETRY_AFTER_S,
            )
        try:
            yield
        finally:
            end()

    def charge(self, entered: Pass, *, images: int = 0) -> None:
        """Charge what a request costs.

        Raises:
            QueueFullError: its caller asks for more a second than it may.
        """
        if retry_after_s := self.wait_s(entered, images=images):
            quota = entered.quota
            waits_s = self._ledger.waits_s(
                entered.client, quota, requests=1, images=images, now_s=self._clock()
            )
            rates = (f"{quota.requests_per_s:g} requests", f"{quota.images_per_s:g} images")
            passed = [rate for rate, wait_s in zip(rates, waits_s, strict=True) if wait_s]
            raise QueueFullError(
                "rate of this caller",
                expected=f"at most {' and '.join(passed or rates)} a second",
                found="more",
                mend=f"come back in {retry_after_s:.3g} s",
                retry_after_s=retry_after_s,
            )

    def wait_s(self, entered: Pass, *, images: int = 0) -> float:
        """Charge what a request costs and give 0; or nothing, and give the seconds to wait."""
        if not entered.quota.is_rated:
            return 0.0
        client, now_s = entered.client, self._clock()
        return self._ledger.spend(client, entered.quota, requests=1, images=images, now_s=now_s)

    def count_stranger(self, method: str, *, peer: str) -> None:
        """Count a call that `authorise` refused, and log it unless one was logged just now."""
        self._refused += 1
        self._unlogged += 1
        now_s = self._clock()
        if now_s - self._logged_s >= LOG_REFUSALS_EVERY_S:
            log.warning(
                "calls without a key of ours: %d refused, the last of %r from %s",
                self._unlogged,
                method[:100],
                host_of(peer),
            )
            self._logged_s, self._unlogged = now_s, 0
