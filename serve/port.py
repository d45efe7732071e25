"""Takes the address to listen on, or tries it, and says in one line why it cannot be had.

gRPC itself reports a port in use as a number among others, and binds `localhost` when one of
its addresses is free. So every address is tried with a plain socket first.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from contextlib import ExitStack

from models.errors import reason_of
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
    # Of a port that is shared, a caller of the others might be given to one who listens.
    for probe in bind_all(host, port, shared=shared, listens=not shared):
        probe.close()
    return _bare(host)


def bind_all(
    host: str, port: int, *, shared: bool = False, listens: bool = True
) -> list[socket.socket]:
    """Bind every address of `host`, all to one port.

    Args:
        host: see `check_address`.
        port: the number; 0 leaves it to the system.
        shared: whether other processes of ours may bind it too.
        listens: whether connections are taken from now on.

    Raises:
        StartError: see `check_address`.
    """
    if not host:
        raise StartError("--host", expected="an address", found="none", mend=OTHER_ADDRESS)
    host = _bare(host)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise refuse_address(host, port, "no address of that name") from error
    v6_alone = any(family == socket.AF_INET for family, *_ in found)
    with ExitStack() as opened:
        sockets: list[socket.socket] = []
        for family, _, _, _, (address, _, *scope) in dict.fromkeys(found):
            try:
                # Named, the protocol is that of each connection, and asyncio sets TCP_NODELAY.
                one = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
                sockets.append(opened.enter_context(one))
                if listens:  # else the port would be free to all who set it, too
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if shared:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if family == socket.AF_INET6:  # that of every interface is also one of IPv4
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(v6_alone))
                one.bind((address, port, *scope))
                if listens:
                    one.listen()
            except OSError as error:
                reason, mend = _REASONS.get(error.errno or 0, (reason_of(error), OTHER_ADDRESS))
                raise refuse_address(host, port, reason, mend) from error
            port = one.getsockname()[1]
        opened.pop_all()
    return sockets


def join_address(host: str, port: int) -> str:
    """Write an address as gRPC reads it, with IPv6 in brackets."""
    host = _bare(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can call an address."""
    host = _bare(host)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def refuse_address(host: str, port: int, found: str, mend: str = OTHER_ADDRESS) -> StartError:
    """Say why an address cannot be had."""
    return StartError(
        f"port {join_address(host, port)}", expected="a free port", found=found, mend=mend
    )


def _bare(host: str) -> str:
    """Write an address without the brackets of IPv6."""
    return host.removeprefix("[").removesuffix("]")
