"""What every front end is: a server for servicers, an address, a start and a stop."""

from __future__ import annotations

from typing import Literal, Protocol

import grpc

FrontKind = Literal["auto", "native", "grpcio"]


class Front(Protocol):
    """One gRPC server of one process. Belongs to one event loop."""

    @property
    def server(self) -> grpc.aio.Server:
        """What `add_XServicer_to_server` and reflection take; before `start`."""

    @property
    def alive(self) -> bool:
        """Whether calls are read, or can be once it starts; also while it stops."""

    def listen(
        self, host: str, port: int, credentials: grpc.ServerCredentials | None = None
    ) -> int:
        """Take a port, and give its number, which 0 leaves to the system; before `start`.

        Args:
            host: an address of this machine, or a name of one.
            port: the number; 0 for any.
            credentials: TLS; plain where None.

        Raises:
            StartError: the port cannot be had, or not with TLS on this front end.
        """

    async def start(self) -> None:
        """Answer calls from now on."""

    async def stop(self, grace_s: float | None) -> None:
        """Take no more calls, and cut off after `grace_s` those that are under way.

        Idempotent; also of a front that never started.
        """
