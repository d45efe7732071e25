"""Holds a port for processes that will share it.

A port that is bound with SO_REUSEPORT may be bound again by any process of the same user, so
gRPC would share a stranger's traffic and say nothing. So the port is tried alone first, as
for a single server, and then held by a socket that does not listen: the kernel gives it no
connection, and it keeps the number while workers come and go.

Source: socket(7), SO_REUSEPORT; https://lwn.net/Articles/542629/
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from serve.errors import StartError
from serve.front.port import check_address, refuse_address


@contextlib.contextmanager
def held_port(host: str, port: int) -> Iterator[int]:
    """Hold `host:port` within a context, and give its number, which 0 leaves to the system.

    Raises:
        StartError: there is no address, or not one of this machine's, or the port is taken.
    """
    host = check_address(host, port)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    with contextlib.ExitStack() as sockets:
        for family, kind, protocol, _, address in found:
            try:
                holder = sockets.enter_context(socket.socket(family, kind, protocol))
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                holder.bind((address[0], port, *address[2:]))
            except OSError as error:
                raise _taken_meanwhile(host, port) from error
            port = int(holder.getsockname()[1])
        yield port


def _taken_meanwhile(host: str, port: int) -> StartError:
    """Say that another was faster."""
    return refuse_address(host, port, "one that was taken meanwhile", "start again")
