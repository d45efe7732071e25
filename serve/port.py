"""Takes the port to listen on, or says in one line why it cannot be had.

gRPC itself reports a port in use as a number among others, and binds `localhost` when one of
its addresses is free. So every address is tried with a plain socket first.
"""

from __future__ import annotations

import errno
import os
import socket

import grpc

from serve.errors import StartError

OTHER_ADDRESS = "listen on 127.0.0.1 or 0.0.0.0 with --host, or on another --port"

_REASONS = {
    errno.EADDRINUSE: (
        "one in use",
        "stop the process that listens there, or choose another with --port (0: any)",
    ),
    errno.EACCES: ("one that only root may take", "choose a port of 1024 or above with --port"),
    errno.EADDRNOTAVAIL: ("no such address on this machine", OTHER_ADDRESS),
}


def take_port(server: grpc.aio.Server, host: str, port: int) -> int:
    """Have `server` listen on `host:port`; give the port, which 0 leaves to the system.

    Raises:
        StartError: there is no address, or not one of this machine's, or the port is taken.
    """
    if not host:
        raise StartError("--host", expected="an address", found="none", mend=OTHER_ADDRESS)
    host = host.removeprefix("[").removesuffix("]")
    _try_addresses(host, port)
    address = join_address(host, port)
    try:
        taken = server.add_insecure_port(address)
    except RuntimeError as error:  # gRPC's own refusal, such as a race for the port
        raise _refusal(host, port, "gRPC's refusal to listen there", OTHER_ADDRESS) from error
    return int(taken)


def join_address(host: str, port: int) -> str:
    """Write an address as gRPC reads it, with IPv6 in brackets."""
    host = host.removeprefix("[").removesuffix("]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _try_addresses(host: str, port: int) -> None:
    """Bind every address of `host` for a moment."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise _refusal(host, port, "no address of that name", OTHER_ADDRESS) from error
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen(1)
        except OSError as error:
            number = error.errno or 0
            reason, mend = _REASONS.get(number, (os.strerror(number), OTHER_ADDRESS))
            raise _refusal(host, port, reason, mend) from error


def _refusal(host: str, port: int, found: str, mend: str) -> StartError:
    """Say why an address cannot be had."""
    return StartError(
        f"port {join_address(host, port)}", expected="a free port", found=found, mend=mend
    )
