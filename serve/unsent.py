"""Finds the connections of this process whose callers have not received what was written to them.

The system takes a reply long before its caller has it: for a slow link it holds megabytes. They
are lost if the connection is closed meanwhile and its caller says anything more, as HTTP/2 does.

Source: tcp(7), SIOCOUTQ: the bytes that were written and are not acknowledged.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import termios
from collections.abc import Collection, Iterator

FEW_BYTES = 4 << 10
"""No reply to wait for: last words to a caller whose machine may be gone, as of a watch of health.
They leave soon, or never. Linux holds more while a program has more to send (tcp_wmem)."""


def count_unsent(ports: Collection[int]) -> int:
    """Count the connections at this process's `ports` that have much to receive.

    None are found where no descriptor is left to look with: a stop must not fail of it.
    """
    return sum(1 for _ in _unsent(ports))


def cut_off_unsent(ports: Collection[int]) -> None:
    """End those connections, which who has opened them closes then.

    What ends a call is written after all that was written before: of a caller who reads no more
    gRPC waits for the end of its keepalive.
    """
    for connection in _unsent(ports):
        with contextlib.suppress(OSError):  # ended meanwhile
            connection.shutdown(socket.SHUT_RDWR)


def _unsent(ports: Collection[int]) -> Iterator[socket.socket]:
    """Give the connections at some ports that have much to receive; each until the next."""
    try:
        descriptors = list(map(int, os.listdir("/proc/self/fd")))
    except OSError:
        return
    for descriptor in descriptors:
        try:
            connection = socket.socket(fileno=descriptor)
        except OSError:  # no socket, or closed meanwhile
            continue
        try:
            if _unsent_bytes(connection, ports) > FEW_BYTES:
                yield connection
        finally:
            connection.detach()  # it is its owner's to close


def _unsent_bytes(connection: socket.socket, ports: Collection[int]) -> int:
    """Give what one has to receive; 0 for what is no connection at these ports."""
    try:
        is_inet = connection.family in (socket.AF_INET, socket.AF_INET6)
        if not is_inet or connection.getsockname()[1] not in ports:
            return 0
        return int.from_bytes(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:  # it listens
        return 0
