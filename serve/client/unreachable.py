"""Says how to mend a connection that did not come about, by what gRPC says of it.

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

REFUSED = "Connection refused"

NO_CONNECTION = "last error: "
"""What gRPC says before the reason why no connection came about."""

TLS_CAUSES = (
    (
        "CERTIFICATE_VERIFY_FAILED",
        "its certificate is not trusted: --tls-ca FILE, in Python ClientTls(ca=FILE)",
    ),
    (
        "Hostname Verification Check failed",
        "its certificate is for another name: --tls-name, in Python ClientTls(server_name=NAME)",
    ),
    ("WRONG_VERSION_NUMBER", "the server may speak no TLS: connect without"),
)

CLOSED = ("Socket closed", "Connection reset by peer")
WANTS_TLS = "the server may want TLS: --tls or --tls-ca FILE, in Python tls=ClientTls(ca=FILE)"
WANTS_CERTIFICATE = "the server may want a certificate of yours: --tls-cert FILE and --tls-key FILE"


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
    for sign, mend in TLS_CAUSES:
        if sign in reason:
            return mend
    if not has_replied and any(sign in reason for sign in CLOSED):
        return WANTS_CERTIFICATE if by_tls else WANTS_TLS
    return None
