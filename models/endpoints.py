"""Which of several servers a request goes to: policy alone, no thread, socket or clock in it.

Rules:
    A request goes to the endpoint with the least in flight, and among equals to the one that
    was used least recently.
    An endpoint that fails is ejected, for longer with every failure in a row; then one
    request tries it, and only its success brings it back.
    Where all are ejected, the one that may return first is tried: an ejection never refuses
    what could be served.

Source: the outlier ejection of Envoy, and its backoff in multiples of a base time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

MAX_PORT = (1 << 16) - 1
BASE_EJECTION_S = 0.25
MAX_EJECTION_S = 30.0


def has_port(address: str) -> bool:
    """Tell whether `host:port` has one from 1 to 65535: of larger ones gRPC takes the low bits."""
    port = address.rpartition(":")[2]
    return port.isascii() and port.isdecimal() and len(port) < 6 and 1 <= int(port) <= MAX_PORT


@dataclass(eq=False, slots=True)
class Endpoint:
    """One server.

    Attributes:
        address: as host:port.
        in_flight: requests that it has now.
        failures: since its last success.
        ejected_until_s: when it may be tried again.
        used: the number of the request that it was given last.
    """

    address: str
    in_flight: int = 0
    failures: int = 0
    ejected_until_s: float = 0.0
    used: int = 0

    def __repr__(self) -> str:
        state = f"failed {self.failures}x" if self.failures else "well"
        return f"<Endpoint {self.address} {state} in_flight={self.in_flight}>"


class Endpoints:
    """The servers of one model. Not safe for threads: its owner holds a lock around it."""

    def __init__(self, addresses: Sequence[str]) -> None:
        """Start with all of them trusted."""
        self.all = tuple(Endpoint(address) for address in addresses)
        self._requests = 0

    def __repr__(self) -> str:
        return f"<Endpoints {list(self.all)}>"

    def take(self, now_s: float, *, tried: Collection[Endpoint] = ()) -> Endpoint:
        """Choose the endpoint of a request, which counts as in flight until it is given back.

        Args:
            now_s: the time.
            tried: those on which this request has failed; taken only where there is no other.
        """
        fresh = [endpoint for endpoint in self.all if endpoint not in tried] or self.all
        usable = [endpoint for endpoint in fresh if _is_usable(endpoint, now_s)]
        if usable:
            chosen = min(usable, key=lambda e: (e.in_flight, e.used))
        else:
            chosen = min(self.all, key=lambda e: (e.ejected_until_s, e.in_flight))
        self._requests += 1
        chosen.used = self._requests
        chosen.in_flight += 1
        return chosen

    def has_other(self, now_s: float, *, tried: Collection[Endpoint]) -> bool:
        """Whether an endpoint may be tried now on which a request has not failed."""
        return any(_is_usable(e, now_s) for e in self.all if e not in tried)

    def give_back(self, endpoint: Endpoint) -> None:
        """Take back an endpoint whose request says nothing about it."""
        endpoint.in_flight -= 1

    def succeeded(self, endpoint: Endpoint) -> None:
        """Trust an endpoint that has answered."""
        endpoint.in_flight -= 1
        endpoint.failures = 0
        endpoint.ejected_until_s = 0.0

    def failed(self, endpoint: Endpoint, now_s: float) -> bool:
        """Eject an endpoint that has failed; whether it was trusted until now.

        Requests that were under way when it failed count once.
        """
        endpoint.in_flight -= 1
        if endpoint.failures and now_s < endpoint.ejected_until_s:
            return False
        endpoint.failures += 1
        ejection_s = min(MAX_EJECTION_S, BASE_EJECTION_S * 2.0 ** min(endpoint.failures - 1, 16))
        endpoint.ejected_until_s = now_s + ejection_s
        return endpoint.failures == 1

    def wait_s(self, now_s: float) -> float:
        """Say how long until an endpoint may be tried; 0 where one may be now."""
        if any(_is_usable(endpoint, now_s) for endpoint in self.all):
            return 0.0
        return max(0.0, min(endpoint.ejected_until_s for endpoint in self.all) - now_s)


def _is_usable(endpoint: Endpoint, now_s: float) -> bool:
    """Whether an endpoint may be given a request: trusted, or due for one that tries it."""
    if not endpoint.failures:
        return True
    return now_s >= endpoint.ejected_until_s and not endpoint.in_flight
