"""Who calls: the name that queues, limits, logs and traces know a caller by.

Rules:
    A caller is what could be checked, the surest first: the name of its API key, else the
    subject of the certificate that it showed, else the address that it calls from, without
    the port, since one program may open many connections.
    A name is text of our own making or of a certificate that our authority signed; an id
    that the caller chose is kept only where it is short and printable, since it is logged.
    A key itself is never part of a caller.

The guard (`serve.security.guard`) knows the name of the key, and leaves it in `CURRENT` for
the task that answers the call. Calls behind the native front end that it hands on to grpcio
come over a socket of this machine, and share one address.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import Protocol
from urllib.parse import unquote

REQUEST_ID_KEY = "x-request-id"

MAPPED = "::ffff:"
"""How an address of IPv4 begins where it is written as one of IPv6 (RFC 4291, section 2.5.5.2)."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


CURRENT: ContextVar[str | None] = ContextVar("horace_caller", default=None)
"""The caller of the call that this task answers, once the guard has let it in."""


class CallContext(Protocol):
    """What is asked of a servicer's context; either front end's has it."""

    def peer(self) -> str:
        """Give the address of the other side as gRPC writes it."""

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """Give what TLS found out about the other side."""


def caller_of(context: CallContext) -> str:
    """Name who makes a call; cheap, and never fails."""
    if (current := CURRENT.get()) is not None:
        return current
    return certificate_subject(context.auth_context()) or host_of(context.peer())


def certificate_subject(auth_context: Mapping[str, Iterable[bytes]]) -> str:
    """Give the subject of the caller's certificate; its first other name where it has none."""
    if len(auth_context) <= 2:  # an insecure connection has two entries
        return ""
    for key in ("x509_subject", "x509_common_name", "x509_subject_alternative_name"):
        for value in auth_context.get(key, ()):
            if value:
                return value.decode(errors="replace")
    return ""


@lru_cache(maxsize=1024)  # a connection makes many calls
def host_of(peer: str) -> str:
    """Give the address in what gRPC calls a peer: without its kind, port and escapes.

    One of IPv4 that came to a socket of IPv6, as those for every interface are, is one of IPv4:
    grpcio calls it so, other doors do not.
    """
    kind, _, address = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return kind or "unknown"
    host, _, _ = address.rpartition(":")
    bare = unquote(host).removeprefix("[").removesuffix("]")
    return (bare.removeprefix(MAPPED) if "." in bare else bare) or "unknown"


def request_id_of(metadata: Sequence[tuple[str, str | bytes]]) -> str:
    """Give the id that a caller put into its metadata, if it is one that can be logged."""
    for key, value in metadata:
        if key == REQUEST_ID_KEY:
            return value if isinstance(value, str) and _REQUEST_ID.fullmatch(value) else ""
    return ""
