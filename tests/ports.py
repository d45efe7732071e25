"""Ports for servers of other processes, which cannot be told to take any.

They lie below the range from which the kernel gives ports to whoever connects, so that one
that was free a moment ago is not taken by a client meanwhile.
"""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

LOWEST, HIGHEST = 20_000, 30_000


def free_port(neighbours: int = 0) -> int:
    """Find a port of 127.0.0.1 that nobody listens on, and as many free ones after it."""
    while True:
        port = random.randrange(LOWEST, HIGHEST)
        try:
            with ExitStack() as probes:
                for n in range(neighbours + 1):
                    probe = probes.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", port + n))
                return port
        except OSError:
            continue
