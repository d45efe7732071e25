"""Which server a command talks to, and how: the options that all commands share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from models.errors import UsageError
from serve.client.arguments import check_target, check_timeout
from serve.client.async_client import AsyncClient
from serve.client.blocking import Client
from serve.client.connection import ClientTls
from serve.client.retry import RetryPolicy

KEY_VARIABLE = "HORACE_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """A server and the way to it."""

    server: str = "localhost:50051"
    """The server, as HOST:PORT; where HOST has several addresses, each is called in turn."""
    timeout_s: float = 60.0
    """How long one operation may take, with its retries."""
    api_key_file: Path | None = None
    """A file with the API key; where not given, the variable HORACE_API_KEY has it, if any. A
    key on a command line would be seen by everybody on the machine."""
    tls: bool = False
    """Connect by TLS, with the authorities of this system; the options below imply it."""
    tls_ca: Path | None = None
    """PEM file of the authorities that may vouch for the server."""
    tls_cert: Path | None = None
    """PEM file of this client's own certificate chain, for mutual TLS."""
    tls_key: Path | None = None
    """PEM file of its private key."""
    tls_name: str | None = None
    """The name in the server's certificate, where it is not that of the address."""

    def __post_init__(self) -> None:
        """Check what can be checked without a server.

        Raises:
            UsageError: a value makes no sense.
        """
        check_timeout(self.timeout_s)
        check_target("--server", self.server)

    def connect(self) -> Client:
        """Make a blocking client.

        Raises:
            UsageError: a file cannot be read.
        """
        return Client(
            self.server,
            tls=self._tls(),
            api_key=self._api_key(),
            timeout_s=self.timeout_s,
        )

    def connect_async(self, *, retry: RetryPolicy | None = None) -> AsyncClient:
        """Make a client of the running event loop.

        Raises:
            UsageError: a file cannot be read.
        """
        return AsyncClient(
            self.server,
            tls=self._tls(),
            api_key=self._api_key(),
            timeout_s=self.timeout_s,
            retry=retry,
        )

    def _tls(self) -> ClientTls | None:
        """Give what TLS needs, where it is asked for."""
        asked = (self.tls_ca, self.tls_cert, self.tls_key, self.tls_name)
        if not self.tls and not any(asked):
            return None
        return ClientTls(
            ca=self.tls_ca, cert=self.tls_cert, key=self.tls_key, server_name=self.tls_name
        )

    def _api_key(self) -> str | None:
        """Read the key."""
        if self.api_key_file is None:
            return os.environ.get(KEY_VARIABLE) or None
        try:
            return self.api_key_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            found = getattr(error, "strerror", None) or "no text"
            raise UsageError(
                f"--api-key-file {self.api_key_file}", expected="a file with a key", found=found
            ) from error
