"""Says why a connection did not come about, and how to mend it, by what gRPC says of it.

Rules:
    Only what ends a handshake is known here: of a port that refuses nothing more is said than
    that it does, and what ends a connection that was there says nothing of how it was made.
    A connection that closes may be a server's that wants another handshake, until one has
    replied: then it is one that died.
    A name may have several addresses, of which gRPC tells one: what an address with a server
    says counts for more than that another has none.

Source: the texts of gRPC 1.81 to 1.85, which are no contract; where they change, the advice is
that for a server that does not answer.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

REFUSED = "Connection refused"

NO_CONNECTION = "last error: "
"""What gRPC says before the reason why no connection came about."""

BEFORE_IT = re.compile("^(?:[A-Z_]+: )?(?:ipv[46]:)?")
"""The code and the kind of address that gRPC puts before a reason."""

NO_ADDRESS = re.compile(r"errors resolving .*\[field:hostname lookup error:(.*)\]", re.DOTALL)
"""What gRPC says of a name that nobody knows."""

CAUSES = (
    (
        "CERTIFICATE_VERIFY_FAILED",
        "its certificate is not trusted: --tls-ca FILE, in Python ClientTls(ca=FILE)",
    ),
    (
        "Hostname Verification Check failed",
        "its certificate is for another name: --tls-name, in Python ClientTls(server_name=NAME)",
    ),
    ("WRONG_VERSION_NUMBER", "the server may speak no TLS: connect without"),
    ("http1.x server", "that is a port of HTTP: call the one of gRPC, 50051 by default"),
)

CLOSED = ("Socket closed", "Connection reset by peer")
WANTS_TLS = "the server may want TLS: --tls or --tls-ca FILE, in Python tls=ClientTls(ca=FILE)"
WANTS_CERTIFICATE = "the server may want a certificate of yours: --tls-cert FILE and --tls-key FILE"


def why(details: str) -> str:
    """Give the reason out of what gRPC says of a call without a connection, for people.

    The text itself where it says nothing of one.
    """
    if unknown := NO_ADDRESS.fullmatch(details):
        return unknown[1]
    _, found, reason = details.partition(NO_CONNECTION)
    if not found:
        return details
    reason = BEFORE_IT.sub("", reason).replace("Failed to connect to remote host: ", "")
    return unquote(reason)


def handshake_mend(details: str, *, by_tls: bool, has_replied: bool) -> str | None:
    """Say what may mend a handshake that failed; None where the failure is no such one.

    Args:
        details: what gRPC says of the call.
        by_tls: whether this client connects by TLS.
        has_replied: whether this client has had a reply from the server.
    """
    _, found, reason = details.partition(NO_CONNECTION)
    if not found:
        return None
    for sign, mend in CAUSES:
        if sign in reason:
            return mend
    if not has_replied and any(sign in reason for sign in CLOSED):
        return WANTS_CERTIFICATE if by_tls else WANTS_TLS
    return None
