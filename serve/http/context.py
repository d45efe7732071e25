"""What a servicer sees of a call that came over HTTP: the face of gRPC's context.

It has what servicers of this house ask of a context, and nothing beside.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import grpc

from serve.calls import AcceptedEarly
from serve.errors import RETRY_KEYS
from serve.http.faults import Aborted
from serve.security.caller import REQUEST_ID_KEY, request_id_of

Metadata = Sequence[tuple[str, str | bytes]]


class HttpContext(AcceptedEarly):
    """One call over HTTP. Belongs to one event loop.

    Attributes:
        deadline_s: on the clock; none until it is set.
        request_id: what the caller calls it in a header, where that can be logged; else one
            of our own.
        is_with_service: whether a service has the call, and keeps account of it.
    """

    def __init__(
        self,
        *,
        headers: Iterable[tuple[str, str]],
        peer: tuple[str, int] | None,
        clock: Callable[[], float],
        auth_context: Mapping[str, Iterable[bytes]] | None,
    ) -> None:
        """Describe a call.

        Args:
            headers: names in lower case.
            peer: host and port of the caller.
            clock: monotonic seconds.
            auth_context: what TLS found out about the caller.
        """
        given = tuple(headers)
        self.request_id = request_id_of(given) or secrets.token_hex(8)
        others = (header for header in given if header[0] != REQUEST_ID_KEY)
        self._headers = (*others, (REQUEST_ID_KEY, self.request_id))
        self._peer = peer
        self.deadline_s = math.inf
        self.is_with_service = False
        self._clock = clock
        self._auth_context = auth_context or {}

    def take_name(self, name: str) -> None:
        """Call it as its body does, if a header can carry that."""
        self.request_id = request_id_of(((REQUEST_ID_KEY, name),)) or self.request_id

    def time_remaining(self) -> float | None:
        """Give the seconds until the deadline; None where there is none."""
        if math.isinf(self.deadline_s):
            return None
        return max(0.0, self.deadline_s - self._clock())

    def invocation_metadata(self) -> Metadata:
        """Give the headers."""
        return self._headers

    def peer(self) -> str:
        """Give the caller's address as gRPC writes it."""
        if self._peer is None:
            return "unknown"
        host, port = self._peer
        return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """Give what TLS found out about the caller."""
        return self._auth_context

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()
    ) -> NoReturn:
        """End the call.

        Raises:
            Aborted: always.
        """
        raise Aborted(code, details, _retry_after_s(trailing_metadata))


def _retry_after_s(metadata: Metadata) -> float | None:
    """Read when a servicer wants to be called again."""
    for key, value in metadata:
        if key == RETRY_KEYS[0]:
            return float(value) / 1e3
    return None
