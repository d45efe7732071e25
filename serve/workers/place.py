"""Where one process stands among those that share a port and a CPU budget.

What listens on a port of its own for the whole server (metrics) takes that number plus
`index`, so that every worker can be asked; what shares its port (gRPC, HTTP) binds it with
SO_REUSEPORT where `shares_ports` says so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WorkerPlace:
    """One of `count` workers; the only one by default.

    Attributes:
        index: 0 to count - 1.
        count: how many workers there are.
    """

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"worker {self.index}" if self.shares_ports else "server"

    @property
    def shares_ports(self) -> bool:
        """Whether others listen on the same ports."""
        return self.count > 1

    def own_port(self, port: int) -> int:
        """Give this worker's own port, of a number for the whole server; 0 stays 0."""
        return port + self.index if port else 0

    def share_of(self, cpus: int) -> int:
        """Give this worker's part of a CPU budget, at least 1."""
        return max(1, cpus // self.count + (self.index < cpus % self.count))


ALONE = WorkerPlace()
"""The place of the only process."""
