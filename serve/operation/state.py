"""The present state of a server, as metrics and probes read it from another thread.

Rules:
    Nothing here waits for the event loop but `turns`, whose matter that is.
    The dictionaries that are read belong to the loop: they are copied in one step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from serve.calls import Calls
from serve.catalog import Catalog, ServedModel
from serve.health import Health
from serve.in_flight import InFlight
from serve.lifecycle.sources import LoadStatistics
from serve.reloading import ReloadStatistics
from serve.tickets import BatcherStatistics

LOOP_TIMEOUT_S = 5.0
"""How long the event loop may be busy before it counts as stuck."""


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """One version of a model that is served now."""

    name: str
    version: str
    fingerprint: str
    dim: int
    alive: bool
    statistics: BatcherStatistics


class ServerState:
    """Reads a server's catalogue, calls and health."""

    def __init__(
        self,
        catalog: Catalog,
        calls: Calls,
        health: Health,
        *,
        served: Callable[[], Iterable[tuple[str, str]]],
        loads: Callable[[], Mapping[str, LoadStatistics]],
        reloads: Callable[[], ReloadStatistics],
        in_flight: InFlight,
        lives: Callable[[], bool],
    ) -> None:
        """Read these; they belong to the server.

        `served` names the versions that run, those that are about to be offered included;
        `lives` says whether every thread is there that nothing else replaces.
        """
        self.served = served
        self.lives = lives
        self._in_flight = in_flight
        self.loads = loads
        self.reloads = reloads
        self._catalog = catalog
        self._calls = calls
        self._health = health

    def __repr__(self) -> str:
        return f"<ServerState {self._health!r} {self._calls!r} {self._catalog!r}>"

    def models(self) -> Iterable[ModelState]:
        """Give the state of every version that callers reach.

        One that was replaced under its number, and that a collection keeps, shares the series of
        the one in its place: of that are the values, and it is alive where both are.
        """
        series: dict[tuple[str, str], list[ServedModel]] = {}
        for model in self._catalog.running:
            series.setdefault((model.name, model.version), []).append(model)
        return [_state_of(models) for models in series.values()]

    def collections(self) -> Iterable[tuple[str, int]]:
        """Give the name of each collection and how many images it holds."""
        served = list(self._catalog.collections.values())
        return [(one.name, one.collection.count) for one in served]

    def active(self) -> int:
        """Count the calls under way."""
        return self._calls.active

    def message_bytes(self) -> int:
        """Count the bytes of their messages."""
        return self._in_flight.bytes

    def ready(self) -> bool:
        """Say whether the server serves."""
        return self._health.serving


def _state_of(models: Sequence[ServedModel]) -> ModelState:
    """Look at those of one name and version, the one that is offered first."""
    model = models[0]
    return ModelState(
        name=model.name,
        version=model.version,
        fingerprint=model.encoder.fingerprint,
        dim=model.encoder.dim,
        alive=all(one.engine.alive for one in models),
        statistics=model.engine.statistics(),
    )


async def turns(loop: asyncio.AbstractEventLoop, *, within_s: float = LOOP_TIMEOUT_S) -> bool:
    """Say whether another thread's event loop still runs what it is given."""

    async def nothing() -> None:
        return

    work = nothing()
    try:
        done = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))
        await asyncio.wait_for(done, within_s)
    except (TimeoutError, RuntimeError):  # stuck, or closed
        work.close()
        return False
    return True
