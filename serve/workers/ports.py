"""Holds a port for processes that will share it.

A port that is bound with SO_REUSEPORT may be bound again by any process of the same user, so
gRPC would share a stranger's traffic and say nothing. So the port is tried alone first, as
for a single server, and then held by a socket that does not listen: the kernel gives it no
connection, and it keeps the number while workers come and go.

Source: socket(7), SO_REUSEPORT; https://lwn.net/Articles/542629/
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from serve.port import bind_all, check_address


@contextlib.contextmanager
def held_port(host: str, port: int) -> Iterator[int]:
    """Hold `host:port` within a context, and give its number, which 0 leaves to the system.

    Raises:
        StartError: there is no address, or not one of this machine's, or the port is taken.
    """
    check_address(host, port)
    holders = bind_all(host, port, shared=True, listens=False)
    try:
        yield int(holders[0].getsockname()[1])
    finally:
        for holder in holders:
            holder.close()
