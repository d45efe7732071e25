"""TLS of HTTP: the certificates of gRPC's port, and their change without restart.

Rules:
    A changed certificate, or a changed authority for callers, holds for every handshake after
    it; open connections keep what they began with.
    Where an authority for callers is given, a caller without a certificate of its making does
    not get past the handshake.

OpenSSL asks a callback for the context of each handshake; it is there for server names, and
is asked also where a caller sends none.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from serve.security.files import Reloadable
from serve.security.tls import Certificates


def make_context(files: Reloadable[Certificates]) -> ssl.SSLContext:
    """Make a context that always has the certificates of the moment."""
    current, context = files.value, _context_of(files.value)
    front = _context_of(current)

    def choose(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        nonlocal current, context
        if files.value is not current:
            current = files.value
            context = _context_of(current)
        connection.context = context

    front.sni_callback = choose
    return front


def _context_of(certificates: Certificates) -> ssl.SSLContext:
    """Make a context of certificates that were found to fit."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    with _as_file(certificates.chain) as chain, _as_file(certificates.key) as key:
        context.load_cert_chain(chain, key, password=lambda: "")  # never ask on a terminal
    if certificates.client_ca is not None:
        context.load_verify_locations(cadata=certificates.client_ca.decode("ascii", "ignore"))
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """Give bytes a path in memory: OpenSSL's module reads keys from files only."""
    descriptor = os.memfd_create("horace-tls")
    try:
        os.write(descriptor, data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
