"""TLS of the server: its certificate, its callers' authority, and their change without restart.

Rules:
    A certificate is taken only with the key that belongs to it, and an authority only if it
    is one: what the files hold is tried with OpenSSL before gRPC sees it.
    A changed certificate holds for every handshake after it; connections that are open keep
    the one they began with, and no call notices.
    Where an authority for callers is given, a caller without a certificate of its making
    does not get past the handshake, with no exception for health.

It does not look at dates: a certificate that has run out is refused by the callers.

Source: gRPC's `dynamic_ssl_server_credentials`, which asks for the certificate of each handshake.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass

import grpc

from models.errors import UsageError
from serve.errors import StartError
from serve.security.files import Reloadable, UnreadableError, read_file


@dataclass(frozen=True, kw_only=True)
class TlsOptions:
    """TLS on the gRPC port; PEM files, read again when they change."""

    cert: str | None = None
    """Certificate of the server, with those between it and its authority; TLS is on where given."""

    key: str | None = None
    """The private key of it, without a password."""

    client_ca: str | None = None
    """Authority whose certificates callers must show (mTLS); no caller gets in without one."""

    def __post_init__(self) -> None:
        """Check that what belongs together is together.

        Raises:
            UsageError: it is not.
        """
        if (self.cert is None) != (self.key is None):
            missing = "--tls.key" if self.key is None else "--tls.cert"
            raise UsageError(missing, expected="a file beside the other of the two", found="none")
        if self.client_ca is not None and self.cert is None:
            raise UsageError("--tls.client-ca", expected="--tls.cert and --tls.key", found="none")

    @property
    def is_on(self) -> bool:
        """Whether there is TLS."""
        return self.cert is not None


@dataclass(frozen=True, kw_only=True)
class Certificates:
    """What TLS files hold, found to fit; PEM."""

    chain: bytes
    key: bytes
    client_ca: bytes | None

    def __repr__(self) -> str:
        return f"<Certificates{' with an authority for callers' if self.client_ca else ''}>"


class Tls:
    """The credentials of a port, and the files behind them."""

    def __init__(self, options: TlsOptions) -> None:
        """Read the files.

        Raises:
            StartError: they are not right.
        """
        assert options.cert is not None
        assert options.key is not None
        cert, key, client_ca = options.cert, options.key, options.client_ca
        paths = [path for path in (cert, key, client_ca) if path is not None]
        self.files: Reloadable[Certificates] = Reloadable(
            "TLS certificate", paths, lambda: read_certificates(cert, key, client_ca)
        )
        self._given = self.files.value
        self.credentials = grpc.dynamic_ssl_server_credentials(
            _configuration(self._given),
            self._fetch,  # type: ignore[arg-type]  # the stubs do not know of None
            require_client_authentication=client_ca is not None,
        )

    def __repr__(self) -> str:
        return f"<Tls {self.files.value!r}>"

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Give gRPC the certificate for its next handshake; None where it has it already.

        gRPC calls this from threads of its own, once a handshake.
        """
        current = self.files.value
        if current is self._given:
            return None
        self._given = current
        return _configuration(current)


def _configuration(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
    """Write certificates as gRPC takes them."""
    return grpc.ssl_server_certificate_configuration(
        [(certificates.key, certificates.chain)], root_certificates=certificates.client_ca
    )


def read_certificates(cert: str, key: str, client_ca: str | None) -> Certificates:
    """Read the files of TLS, and try them.

    Raises:
        UnreadableError: one cannot be read; a pipe is not waited for.
        StartError: they do not belong together, or they changed meanwhile.
    """
    certificates = _read(cert, key, client_ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # never ask on a terminal
    except (ssl.SSLError, ValueError, OSError) as error:
        raise _kind_of(error)(
            f"--tls.cert {cert} and --tls.key {key}",
            expected="a certificate in PEM and its private key, without a password",
            found=_reason_of_pair(error, certificates),
        ) from error
    if client_ca is not None:
        try:
            context.load_verify_locations(cafile=client_ca)
        except (ssl.SSLError, ValueError, OSError) as error:
            raise _kind_of(error)(
                f"--tls.client-ca {client_ca}",
                expected="certificates of authorities in PEM",
                found=_reason(error),
            ) from error
    if _read(cert, key, client_ca) != certificates:
        raise StartError("TLS certificate", expected="files at rest", found="files being written")
    return certificates


def _read(cert: str, key: str, client_ca: str | None) -> Certificates:
    """Read the files."""
    return Certificates(
        chain=read_file(f"--tls.cert {cert}", cert),
        key=read_file(f"--tls.key {key}", key),
        client_ca=None
        if client_ca is None
        else read_file(f"--tls.client-ca {client_ca}", client_ca),
    )


def _kind_of(error: Exception) -> type[StartError]:
    """Tell a file that OpenSSL could not open from one that it opened and refused."""
    is_unread = isinstance(error, OSError) and not isinstance(error, ssl.SSLError)
    return UnreadableError if is_unread else StartError


def _reason_of_pair(error: Exception, found: Certificates) -> str:
    """Say why a certificate and a key are no pair, also where OpenSSL says `PEM lib` alone."""
    if b"CERTIFICATE-----" not in found.chain:
        return "no certificate in the first"
    if b"PRIVATE KEY-----" not in found.key:
        return "no private key in the second"
    if isinstance(error, ssl.SSLError) and error.reason is None:
        return "one with a password, or one that is damaged"
    return _reason(error)


def _reason(error: Exception) -> str:
    """Say what OpenSSL or the system says, in words."""
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    return str(reason).lower().replace("_", " ") or "neither"
