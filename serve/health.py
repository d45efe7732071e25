"""The health service of gRPC (grpc.health.v1): Check and Watch.

Rules:
    Serving is said only after every model has computed a real image through the whole
    pipeline; draining and a crashed model say not serving.
    The empty name, the overall health, and each service's name are known; Check of another
    name is NOT_FOUND, Watch of another is SERVICE_UNKNOWN, as the protocol has it.
    Who watches needs no key, so watchers are bounded, all together and of one address; one
    more is RESOURCE_EXHAUSTED, with the time after which to try again.
    A Watch ends when the server has drained, and no sooner: what routes requests by it
    hears that the server goes, and the drain does not wait for it.

grpcio's own servicer is not used: when one of two watchers leaves, it forgets the other.

Source: https://github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.errors import QueueFullError, retry_metadata, to_status
from serve.security.caller import host_of

Status = health_pb2.HealthCheckResponse

MAX_WATCHES = 64
"""That are open at once; the default limit of calls is sixteen times as many."""

MAX_WATCHES_A_HOST = 16
"""Callers over a socket of this machine (`unix`) share the whole instead: the native front end
hands every Watch on over one."""

RETRY_WATCH_S = 10.0

SERVICE_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class Health(health_pb2_grpc.HealthServicer):
    """Tells whether the server serves. Belongs to one event loop."""

    def __init__(self, services: Sequence[str]) -> None:
        """Start as not serving.

        Args:
            services: full names that callers may ask about, beside the empty name.
        """
        self._services = {"", *services}
        self._serving = False
        self._closed = False
        self._watchers: Counter[str] = Counter()
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Health {'serving' if self._serving else 'not serving'}>"

    @property
    def serving(self) -> bool:
        """Whether the server says that it serves."""
        return self._serving

    def set_serving(self, serving: bool) -> None:
        """Say so to all who ask or watch."""
        self._serving = serving
        self._tell()

    def close(self) -> None:
        """End every Watch."""
        self._closed = True
        self._tell()

    async def Check(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[
            health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        ],
    ) -> health_pb2.HealthCheckResponse:
        """Answer how a service is now."""
        if request.service not in self._services:
            known = ", ".join(sorted(filter(None, self._services)))
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service: expected {known} or none")
        return self._status(request.service)

    async def Watch(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[
            health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        ],
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Answer how a service is now, and again whenever that changes."""
        host = host_of(context.peer())
        if (error := self._refuse_watcher(host)) is not None:
            await context.abort(*to_status(error), retry_metadata(error))
        last: health_pb2.HealthCheckResponse | None = None
        with self._watching(host):
            while True:
                changed = self._changed
                status = self._status(request.service)
                if status != last:
                    yield status
                    last = status
                elif self._closed:
                    return
                else:
                    await changed.wait()

    def _refuse_watcher(self, host: str) -> QueueFullError | None:
        """Say why there is no place for another Watch from an address; None where there is."""
        most_a_host = MAX_WATCHES if host == "unix" else MAX_WATCHES_A_HOST
        if self._watchers.total() < MAX_WATCHES and self._watchers[host] < most_a_host:
            return None
        return QueueFullError(
            "health watches",
            expected=f"at most {MAX_WATCHES}, and {MAX_WATCHES_A_HOST} of one address",
            found="one more",
            mend="ask by Check",
            retry_after_s=RETRY_WATCH_S,
        )

    @contextmanager
    def _watching(self, host: str) -> Iterator[None]:
        """Count a Watch while in the context."""
        self._watchers[host] += 1
        try:
            yield
        finally:
            self._watchers[host] -= 1
            if not self._watchers[host]:
                del self._watchers[host]

    def _status(self, service: str) -> health_pb2.HealthCheckResponse:
        """Say how one service is."""
        if service not in self._services:
            return Status(status=Status.SERVICE_UNKNOWN)
        return Status(status=Status.SERVING if self._serving else Status.NOT_SERVING)

    def _tell(self) -> None:
        """Wake every watcher once; the next change has an event of its own."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
