"""Puts together what the operator asked for: metrics and their port, traces, the request log.

Rules:
    What is not asked for is not imported. The work of models is counted all the same: KServe
    tells of it, too.
    The observer is there before anything is served; the port opens before the models do, so
    that a start that takes long can be watched, and closes after the drain.
    Each of several workers has its own port and counts for itself.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING

from serve.operation.logs import RequestLog
from serve.operation.observer import Observer, Observers
from serve.operation.options import LogOptions, MetricsOptions, TracingOptions
from serve.operation.state import ServerState, turns
from serve.operation.tally import ModelTallies
from serve.port import join_address
from serve.workers.place import WorkerPlace

if TYPE_CHECKING:
    from serve.operation.endpoint import Endpoint
    from serve.operation.metrics import Metrics

log = logging.getLogger("horace.serve")


class Operation:
    """What an operator sees of one server: `start` it, `close` it."""

    def __init__(
        self,
        *,
        metrics: MetricsOptions,
        tracing: TracingOptions,
        logs: LogOptions,
        state: ServerState,
        place: WorkerPlace,
        keyed: bool,
    ) -> None:
        """Make the observers; no port is open yet.

        Args:
            metrics: what is asked of the metrics.
            tracing: of traces.
            logs: of the log.
            state: the server's.
            place: where this process stands among its workers.
            keyed: whether callers have API keys, by whose names they are counted.

        Raises:
            StartError: traces are asked for and cannot be made here.
        """
        self._options = metrics
        self._place = place
        self._state = state
        self._closing = ExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._metrics: Metrics | None = None
        self._endpoint: Endpoint | None = None
        self.address = ""
        """Where the metrics port listens, as host:port; empty where there is none."""
        self.models = ModelTallies(served=state.served)
        observers: list[Observer] = [RequestLog(logs)]
        if metrics.port is not None:
            from serve.operation.metrics import Metrics

            self._metrics = Metrics(state, keyed=keyed, models=self.models)
            observers.append(self._metrics)
        if tracing.endpoint is not None:
            from serve.operation.tracing import Tracer

            tracer = Tracer(tracing)
            self._closing.callback(tracer.close)
            observers.append(tracer)
        self.observer: Observer = Observers(observers)

    def __repr__(self) -> str:
        return f"<Operation {self.address or 'without a port'} {self.observer!r}>"

    def start(self) -> None:
        """Open the port, if one is asked for; call from the server's event loop.

        Raises:
            StartError: the port cannot be had.
        """
        self._loop = asyncio.get_running_loop()
        if self._options.port is None:
            return
        from serve.operation.endpoint import Endpoint, listen_on

        listeners = listen_on(self._options.host, self._place.own_port(self._options.port))
        self.address = join_address(self._options.host, listeners[0].getsockname()[1])
        self._endpoint = Endpoint(self, listeners)
        self._closing.callback(self._endpoint.close)
        log.info("metrics on http://%s/metrics", self.address)

    def look(self, *, elapsed_s: float, limit_s: float) -> None:
        """Have a port whose thread has died answer again; see `serve.watchdog`."""
        if self._endpoint is not None:
            self._endpoint.revive()

    def close(self) -> None:
        """Close the port and send the last traces."""
        self._closing.close()

    # The pages.

    async def metrics(self) -> bytes:
        """Lay out the metrics."""
        return self._metrics.render() if self._metrics else b""

    async def alive(self) -> bool:
        """Say whether the server's loop turns, and it has the threads that it needs."""
        return self._state.lives() and await self._turns()

    async def ready(self) -> bool:
        """Say whether the server serves; one whose loop hangs answers nobody."""
        return self._state.ready() and await self._turns()

    async def _turns(self) -> bool:
        """Say whether the server's loop turns."""
        return self._loop is not None and await turns(self._loop)
