"""TLS of HTTP: the certificates of gRPC's port, and their change without restart.

Rules:
    A changed certificate, or a changed authority for callers, holds for every handshake after
    it, also for one that would resume a session from before; open connections keep what they
    began with.
    Where an authority for callers is given, a caller without a certificate of its making does
    not get past the handshake.

A caller's certificate is told to the services as gRPC tells it, so that one caller has one name
on both ports.

Each set of certificates has a context of its own, with its own keys for tickets and its own
cache of sessions. To change the context within a handshake (`sni_callback`) is not enough: what
was handed out before the change is resumed by the context that the handshake began with.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from serve.security.files import Reloadable
from serve.security.tls import Certificates

CALLER_STATE = "caller"
"""The part of a request's state that holds what `describe_caller` gave."""

SHORT_NAMES = {
    "commonName": "CN",
    "countryName": "C",
    "domainComponent": "DC",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "stateOrProvinceName": "ST",
    "userId": "UID",
}
"""The parts of a subject that have a short name; the others keep OpenSSL's long one."""


def make_context(files: Reloadable[Certificates]) -> ssl.SSLContext:
    """Make a context that always has the certificates of the moment."""
    return _Current(files)


class _Current(ssl.SSLContext):
    """Gives every connection to a context of the certificates of the moment."""

    _files: Reloadable[Certificates]
    _certificates: Certificates
    _context: ssl.SSLContext

    def __new__(cls, files: Reloadable[Certificates]) -> _Current:
        """Take the certificates that there are now."""
        made = super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)
        made._files, made._certificates = files, files.value
        made._context = _context_of(files.value)
        return made

    def __init__(self, files: Reloadable[Certificates]) -> None:
        """Leave the making to `__new__`, as the class above does."""

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        """Begin a connection; asyncio's are all made by this."""
        if (certificates := self._files.value) is not self._certificates:
            self._context = _context_of(certificates)  # or it is tried again by the next one
            self._certificates = certificates
        return self._context.wrap_bio(*args, **options)


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


def describe_caller(connection: ssl.SSLObject | None) -> Mapping[str, Iterable[bytes]]:
    """Give what a handshake found out about a caller, under the names that gRPC has for it."""
    certificate: Any = None if connection is None else connection.getpeercert()  # nested tuples
    if not certificate:
        return {}
    names = [pair for part in certificate.get("subject", ()) for pair in part]
    others = (value for _, value in certificate.get("subjectAltName", ()))
    texts = [value.encode() for value in others if isinstance(value, str)]  # a DirName is none
    return {
        "transport_security_type": [b"ssl"],
        "x509_subject": [write_name(names).encode()] if names else [],
        "x509_common_name": [value.encode() for name, value in names if name == "commonName"],
        "x509_subject_alternative_name": texts,
    }


def write_name(names: Iterable[tuple[str, str]]) -> str:
    """Write a subject as OpenSSL does: the last part first, special characters escaped.

    Source: RFC 2253, section 2.
    """
    parts = [f"{SHORT_NAMES.get(name, name)}={_escape(value)}" for name, value in names]
    return ",".join(reversed(parts))


def _escape(value: str) -> str:
    """Escape a value of a name."""
    written = "".join(_escape_byte(byte) for byte in value.encode())
    if written[:1] in (" ", "#"):
        written = "\\" + written
    return written[:-1] + "\\ " if written.endswith(" ") else written


def _escape_byte(byte: int) -> str:
    """Escape one byte of UTF-8."""
    letter = chr(byte)
    if letter in ',+"\\<>;':
        return "\\" + letter
    return letter if 0x20 <= byte < 0x7F else f"\\{byte:02X}"


@contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """Give bytes a path in memory: OpenSSL's module reads keys from files only."""
    descriptor = os.memfd_create("horace-tls")
    try:
        os.write(descriptor, data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
