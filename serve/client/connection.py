"""How a client reaches its server: address, TLS, API key; and the channel that comes of it.

Rules:
    Certificates and key are read when the client is made: a file that is missing is an error
    there, in one line, and not of the first call.
    The API key travels as `authorization: Bearer KEY` with every call, and stands in no
    message and no repr.
    Connections live on keepalive pings; gRPC's own retries are off, `RetryPolicy` decides.
    A name with several addresses is several servers, and calls take turns among them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import grpc

from models.errors import UsageError, reason_of
from serve.client.arguments import check_target, check_text, describe

Metadata: TypeAlias = tuple[tuple[str, str], ...]
File: TypeAlias = str | PathLike[str]

CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", -1),  # the server bounds its replies
    ("grpc.max_send_message_length", -1),  # and says what it takes
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # by which grpcio 1.85 goes, a minute where not given
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.enable_retries", 0),  # `RetryPolicy` decides
    ("grpc.lb_policy_name", "round_robin"),  # or one pod of a headless Service gets every call
    ("grpc.initial_reconnect_backoff_ms", 100),
    # gRPC's name for the least time that an attempt to connect has: with 100 ms a handshake
    # of TLS with a busy server was given up. What is refused is tried again as fast as ever.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

VISIBLE_ASCII = re.compile(r"[!-~]+")
"""What the value of a header may be, without spaces."""


@dataclass(frozen=True, kw_only=True)
class ClientTls:
    """TLS to the server, and what this client proves itself with, where it is asked to.

    Attributes:
        ca: PEM file of the authorities that may vouch for the server; the system's where None.
        cert: PEM file of this client's certificate chain, for mutual TLS.
        key: PEM file of its private key; goes with `cert`.
        server_name: the name in the server's certificate, where it is not that of the address.
    """

    ca: File | None = None
    cert: File | None = None
    key: File | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        """Refuse half a pair.

        Raises:
            UsageError: there is a certificate without a key, or a key without a certificate.
        """
        check_text("server_name", self.server_name)
        if (self.cert is None) != (self.key is None):
            found = "cert alone" if self.key is None else "key alone"
            raise UsageError("client certificate", expected="cert and key", found=found)

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files.

        Raises:
            UsageError: one cannot be read, or holds nothing of its kind.
        """
        return grpc.ssl_channel_credentials(
            root_certificates=_read_pem("ca", self.ca, "CERTIFICATE"),
            certificate_chain=_read_pem("cert", self.cert, "CERTIFICATE"),
            private_key=_read_pem("key", self.key, "PRIVATE KEY"),
        )

    @property
    def channel_options(self) -> tuple[tuple[str, int | str], ...]:
        """Give what the channel has to know beside the credentials."""
        if self.server_name is None:
            return ()
        return (("grpc.ssl_target_name_override", self.server_name),)


@dataclass(frozen=True, kw_only=True)
class Connection:
    """One server and how it is reached.

    Attributes:
        target: `host:port`, or another name that gRPC resolves, such as `dns:///host:port`.
        tls: how the connection is secured; in the clear where None.
        api_key: who calls; nobody in particular where None.
    """

    target: str
    tls: ClientTls | None = None
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Refuse a target that names no port, what is no `ClientTls`, and a key for no header.

        Raises:
            UsageError: it is one of them; the key itself is not shown.
        """
        check_target("target", self.target)
        if self.tls is not None and not isinstance(self.tls, ClientTls):
            raise UsageError("tls", expected="a ClientTls, or None", found=describe(self.tls))
        key = self.api_key
        if key is not None and not (isinstance(key, str) and VISIBLE_ASCII.fullmatch(key)):
            raise UsageError(
                "api_key",
                expected="visible ASCII without spaces",
                found="something else",
                mend="look for a space in it, or a line break at its end",
            )

    @property
    def metadata(self) -> Metadata:
        """Give what goes with every call."""
        return () if self.api_key is None else (("authorization", f"Bearer {self.api_key}"),)

    def open_channel(self) -> grpc.Channel:
        """Make a blocking channel; nothing is sent yet.

        Raises:
            UsageError: a certificate or key cannot be read.
        """
        if self.tls is None:
            return grpc.insecure_channel(self.target, options=CHANNEL_OPTIONS)
        options = (*CHANNEL_OPTIONS, *self.tls.channel_options)
        return grpc.secure_channel(self.target, self.tls.credentials(), options=options)

    def open_async_channel(self) -> grpc.aio.Channel:
        """Make a channel of the running event loop; nothing is sent yet.

        Raises:
            UsageError: a certificate or key cannot be read.
        """
        if self.tls is None:
            return grpc.aio.insecure_channel(self.target, options=CHANNEL_OPTIONS)
        options = (*CHANNEL_OPTIONS, *self.tls.channel_options)
        return grpc.aio.secure_channel(self.target, self.tls.credentials(), options=options)


def _read_pem(name: str, file: File | None, kind: str) -> bytes | None:
    """Read a PEM file that holds something of this kind.

    Raises:
        UsageError: it cannot be read, or holds nothing of the kind.
    """
    if file is None:
        return None
    expected = f"a PEM file with a {kind}"
    try:
        pem = Path(file).read_bytes()
    except OSError as error:
        found = reason_of(error)
        raise UsageError(f"{name} {os.fspath(file)}", expected=expected, found=found) from error
    if f"{kind}-----".encode() not in pem:
        raise UsageError(f"{name} {os.fspath(file)}", expected=expected, found="none in there")
    return pem
