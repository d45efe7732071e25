"""Certificates made for a test, and a system that opens no file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import trustme

from serve.security.tls import TlsOptions
from serve.server import Server


@dataclass
class Pki:
    """An authority for the server, one for its callers, and the files of both."""

    folder: Path
    server_ca: trustme.CA
    client_ca: trustme.CA

    @property
    def options(self) -> TlsOptions:
        """TLS for everyone."""
        return TlsOptions(cert=str(self.folder / "cert.pem"), key=str(self.folder / "key.pem"))

    @property
    def mutual(self) -> TlsOptions:
        """TLS for callers with a certificate."""
        return TlsOptions(
            cert=self.options.cert, key=self.options.key, client_ca=str(self.folder / "ca.pem")
        )

    def issue(self, ca: trustme.CA | None = None) -> None:
        """Write a new certificate of the server, and the authority of its callers."""
        issued = (ca or self.server_ca).issue_cert("localhost", "127.0.0.1")
        chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
        (self.folder / "cert.pem").write_bytes(chain)
        (self.folder / "key.pem").write_bytes(issued.private_key_pem.bytes())
        (self.folder / "ca.pem").write_bytes(self.client_ca.cert_pem.bytes())

    def channel(
        self, server: Server, ca: trustme.CA | None = None, client: trustme.CA | None = None
    ) -> grpc.aio.Channel:
        """Connect anew to a server that `ca` vouches for.

        Args:
            server: in this process.
            ca: whom the caller trusts; the server's authority where None.
            client: whose certificate the caller shows; none where None.
        """
        pair: tuple[bytes | None, bytes | None] = (None, None)
        if client is not None:
            issued = client.issue_cert("app@example.org", common_name="app one")
            chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
            pair = (issued.private_key_pem.bytes(), chain)
        trusted = (ca or self.server_ca).cert_pem.bytes()
        return grpc.aio.secure_channel(
            f"localhost:{server.port}",
            grpc.ssl_channel_credentials(trusted, *pair),
            options=[("grpc.use_local_subchannel_pool", 1)],  # a handshake of its own
        )


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    """Authorities and files."""
    pki = Pki(tmp_path, trustme.CA(), trustme.CA())
    pki.issue()
    return pki
