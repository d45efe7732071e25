"""Finds the connections of this process whose callers have not received what was written to them.

The system takes a reply long before its caller has it: for a slow link it holds megabytes. They
are lost if the connection is closed meanwhile and its caller says anything more, as HTTP/2 does.

Source: tcp(7), SIOCOUTQ: the bytes that were written and are not acknowledged.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import termios
from collections.abc import Collection

FEW_BYTES = 4 << 10
"""No reply to wait for: last words to a caller whose machine may be gone, as of a watch of health.
They leave soon, or never. Linux holds more while a program has more to send (tcp_wmem)."""


def count_unsent(ports: Collection[int]) -> int:
    """Count the connections at this process's `ports` that have much to receive.

    None are found where no descriptor is left to look with: a stop must not fail of it.
    """
    try:
        descriptors = list(map(int, os.listdir("/proc/self/fd")))
    except OSError:
        return 0
    return sum(_unsent_bytes(number, ports) > FEW_BYTES for number in descriptors)


def _unsent_bytes(descriptor: int, ports: Collection[int]) -> int:
    """Give what one has to receive; 0 for what is no connection at these ports."""
    try:
        connection = socket.socket(fileno=descriptor)
    except OSError:  # no socket, or closed meanwhile
        return 0
    try:
        is_inet = connection.family in (socket.AF_INET, socket.AF_INET6)
        if not is_inet or connection.getsockname()[1] not in ports:
            return 0
        return int.from_bytes(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:  # it listens
        return 0
    finally:
        connection.detach()  # it is its owner's to close
