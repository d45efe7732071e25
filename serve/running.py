"""The life of one server process: start it, say so, obey, drain, end.

Rules:
    Orders come from signals or from a supervisor; here they are names in two queues.
    The first order to stop drains, the second cuts off at once. One that comes before the
    server is ready ends it then and there.
    A server that lives no more, as `/healthz` of the metrics port says it, is stopped, and the
    end is no good one: whoever minds the process starts another. An event loop that hangs
    does not find that out.
    Orders to reload that come while one waits are one with it, and a moment lies between two: a
    hook that signals once a file is no load.
    A signal that comes again within a moment is its echo, not a second order: `timeout` and
    process managers signal a process and then its whole group.
    Once the end has come no signal makes another of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from models.command import let_go_of_stdout
from models.errors import reason_of
from models.memory import settle_memory
from serve.errors import InternalError, UnavailableError
from serve.server import Server

log = logging.getLogger("horace.serve")


HELD_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
"""What a process is started with blocked, or blocks first of all, and lets through once it can
handle it."""

ECHO_S = 0.25
"""The longest between a signal and its echo; nobody presses Ctrl-C twice so fast."""

BETWEEN_RELOADS_S = 0.25
"""The least between the end of a reload and the next."""

DEATH = "the loss of a thread that nothing replaces"
"""Who orders the stop of a server that is not alive."""

LOOK_EVERY_S, DEATH_LOOKS = 10.0, 6
"""How often it is asked whether it is, and how often in a row the answer is no by then: as the
probe of `deploy/kubernetes/deployment.yaml` has it."""


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a process has been told, each by the name of who told it.

    Attributes:
        stops: to drain; a second one, to cut off.
        reloads: to read everything again; at most one waits.
    """

    stops: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    reloads: asyncio.Queue[str] = field(default_factory=partial(asyncio.Queue, maxsize=1))

    def reload(self, name: str) -> None:
        """Order a reload, unless one is ordered and not begun: that will see the same files."""
        with contextlib.suppress(asyncio.QueueFull):
            self.reloads.put_nowait(name)


def run_to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` in the main thread, and ignore signals from then on: the process ends.

    Else one more would kill it while the interpreter takes itself apart, and a drain in which
    every call was answered would look like none.
    """
    try:
        asyncio.run(work)
    finally:
        for number in HELD_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def orders_by_signal(*, clock: Callable[[], float] = time.monotonic) -> Orders:
    """Take orders from SIGTERM and SIGINT, and from SIGHUP."""
    orders = Orders()
    loop = asyncio.get_running_loop()
    heard_s: dict[str, float] = {}

    def stop(name: str) -> None:
        now_s = clock()
        if now_s - heard_s.get(name, -math.inf) >= ECHO_S:
            orders.stops.put_nowait(name)
        heard_s[name] = now_s

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number.name)
    loop.add_signal_handler(signal.SIGHUP, orders.reload, signal.SIGHUP.name)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)
    return orders


async def run_server(
    server: Server, orders: Orders, *, drain_s: float, on_ready: Callable[[], None]
) -> None:
    """Serve until told to stop, and until the calls under way are answered.

    Args:
        server: not started yet.
        orders: what it obeys.
        drain_s: how long calls under way may take after the order to stop.
        on_ready: called once the server serves.

    Raises:
        HoraceError: the server cannot start.
        UnavailableError: calls were cut off.
        InternalError: the server lived no more, by its own account.
    """
    settle_memory()
    if not await _start(server, orders.stops):
        return
    reloading = asyncio.create_task(_reload(server, orders.reloads))
    watching = asyncio.create_task(_watch_life(server, orders.stops))
    on_ready()
    log.info("stopping on %s", why := await orders.stops.get())
    reloading.cancel()
    watching.cancel()
    await _drain(server, orders.stops, drain_s)
    if why == DEATH:
        raise InternalError("server", expected="one that lives", found="a thread that is lost")
    log.info("stopped; every call was answered, %d in all", server.calls.accepted)


def announce(line: str) -> None:
    """Print a line; that nobody reads it is no reason not to serve."""
    try:
        print(line, flush=True)
    except OSError as error:
        let_go_of_stdout()
        log.warning("%s; stdout: %s", line, reason_of(error))


def ready_line(server: Server) -> str:
    """Say where and what a server serves, for people and for scripts."""
    models = ",".join(server.catalog.models) or "none"
    collections = ",".join(server.catalog.collections) or "none"
    http = f" http={server.http.url}" if server.http.url else ""
    return f"horace serving on {server.address} models={models} collections={collections}{http}"


def cut_off(calls: int, why: str) -> UnavailableError:
    """Say that the drain did not end well."""
    return UnavailableError(
        "drain",
        expected="every call under way answered",
        found=f"{calls} cut off after {why}",
        mend="allow more time with --drain-s",
    )


async def _start(server: Server, stops: asyncio.Queue[str]) -> bool:
    """Start unless told to stop first; whether the server is ready."""
    starting = asyncio.create_task(server.start())
    stopping = asyncio.create_task(stops.get())
    await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
    if starting.done():
        if stopping.done():  # both came at once; the order is obeyed as one that comes now
            stops.put_nowait(stopping.result())
        stopping.cancel()
        await starting
        return True
    log.info("stopping on %s, before the server was ready", stopping.result())
    starting.cancel()
    await asyncio.wait([starting])
    return False


async def _drain(server: Server, stops: asyncio.Queue[str], drain_s: float) -> None:
    """Answer what is under way, unless that takes too long or a second order comes."""
    draining = asyncio.create_task(server.drain(limit_s=drain_s))
    again = asyncio.create_task(stops.get())
    await asyncio.wait([draining, again], return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        calls = server.unfinished
        draining.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await draining
        await server.kill()
        if calls:
            raise cut_off(calls, f"a second signal, {again.result()}")
        return
    again.cancel()
    if calls := draining.result():
        raise cut_off(calls, f"that {drain_s:g} s were over")


async def _watch_life(server: Server, stops: asyncio.Queue[str]) -> None:
    """Order a stop once the server has not been alive for a while, until cancelled."""
    looks = 0
    while looks < DEATH_LOOKS:
        await asyncio.sleep(LOOK_EVERY_S)
        looks = 0 if await server.operation.alive() else looks + 1
    stops.put_nowait(DEATH)


async def _reload(server: Server, reloads: asyncio.Queue[str]) -> None:
    """Read everything again at every order, until cancelled."""
    while True:
        log.info("reloading on %s", await reloads.get())
        await server.reloads.run()
        await asyncio.sleep(BETWEEN_RELOADS_S)
