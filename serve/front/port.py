"""Tries the address to listen on, and says in one line why it cannot be had.

gRPC itself reports a port in use as a number among others, and binds `localhost` when one of
its addresses is free. So every address is tried with a plain socket first.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

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


def check_address(host: str, port: int, *, shared: bool = False) -> str:
    """Make sure that `host:port` can be listened on; give the host as sockets write it.

    Args:
        host: an address or a name, IPv6 with or without brackets.
        port: the number; 0 for any.
        shared: whether other processes of ours may listen there too.

    Raises:
        StartError: there is no address, or not one of this machine's, or the port is taken.
    """
    if not host:
        raise StartError("--host", expected="an address", found="none", mend=OTHER_ADDRESS)
    host = host.removeprefix("[").removesuffix("]")
    _try_addresses(host, port, shared=shared)
    return host


def join_address(host: str, port: int) -> str:
    """Write an address as gRPC reads it, with IPv6 in brackets."""
    host = host.removeprefix("[").removesuffix("]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can call an address."""
    host = host.removeprefix("[").removesuffix("]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _try_addresses(host: str, port: int, *, shared: bool) -> None:
    """Bind every address of `host` for a moment."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise refuse_address(host, port, "no address of that name") from error
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if shared:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                probe.bind(address)
                if not shared:  # else a caller of the others might be given to us
                    probe.listen(1)
        except OSError as error:
            number = error.errno or 0
            reason, mend = _REASONS.get(number, (os.strerror(number), OTHER_ADDRESS))
            raise refuse_address(host, port, reason, mend) from error


def refuse_address(host: str, port: int, found: str, mend: str = OTHER_ADDRESS) -> StartError:
    """Say why an address cannot be had."""
    return StartError(
        f"port {join_address(host, port)}", expected="a free port", found=found, mend=mend
    )
