"""`python -m serve`: serve until told to stop.

Rules:
    One line on stdout says that the server is ready and where; logs go to stderr.
    SIGTERM or SIGINT drains: not ready, calls under way are answered, exit status 0. After
    `--drain-s` what is left is cut off, and the exit status is 1; a second signal cuts off
    at once. A signal before the server is ready ends it with exit status 0.
    SIGHUP reads again what is served: bundles, collections, certificates, keys. What is
    refused is logged, and what was there stays.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from models.command import run_command
from serve.config import ServeOptions
from serve.errors import UnavailableError
from serve.operation.logs import set_up_logs
from serve.server import Server

log = logging.getLogger("horace.serve")


def main(options: ServeOptions) -> None:
    """Serve until a signal comes and the calls under way are answered.

    Raises:
        HoraceError: the server cannot start.
        UnavailableError: calls were cut off.
    """
    asyncio.run(_serve(options))


async def _serve(options: ServeOptions) -> None:
    """Start, say so, wait for a signal, drain."""
    set_up_logs(options.log)
    server = Server(options)
    signals = _listen_for(signal.SIGTERM, signal.SIGINT)
    hangups = _listen_for(signal.SIGHUP)
    if not await _start(server, signals):
        return
    reloading = asyncio.create_task(_reload_on(hangups, server))
    print(_ready_line(server), flush=True)
    log.info("stopping on %s", await signals.get())
    reloading.cancel()
    draining = asyncio.create_task(server.drain(limit_s=options.drain_s))
    again = asyncio.create_task(signals.get())
    await asyncio.wait([draining, again], return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        cut_off = server.calls.active
        draining.cancel()
        await server.kill()
        raise _cut_off(cut_off, f"a second signal, {again.result()}")
    again.cancel()
    if cut_off := draining.result():
        raise _cut_off(cut_off, f"that {options.drain_s:g} s were over")
    log.info("stopped; every call was answered")


async def _start(server: Server, signals: asyncio.Queue[str]) -> bool:
    """Start unless a signal comes first; whether the server is ready."""
    starting = asyncio.create_task(server.start())
    stopping = asyncio.create_task(signals.get())
    await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
    if starting.done():
        stopping.cancel()
        await starting
        return True
    log.info("stopping on %s, before the server was ready", stopping.result())
    starting.cancel()
    await asyncio.wait([starting])
    return False


async def _reload_on(signals: asyncio.Queue[str], server: Server) -> None:
    """Read everything again at every signal, until cancelled."""
    while True:
        log.info("reloading on %s", await signals.get())
        await server.reloads.run()


def _listen_for(*numbers: signal.Signals) -> asyncio.Queue[str]:
    """Queue the names of signals."""
    names: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in numbers:
        loop.add_signal_handler(number, names.put_nowait, number.name)
    return names


def _ready_line(server: Server) -> str:
    """Say where and what this serves, for people and for scripts."""
    models = ",".join(server.catalog.models)
    collections = ",".join(server.catalog.collections) or "none"
    http = f" http={server.http.url}" if server.http.url else ""
    return f"horace serving on {server.address} models={models} collections={collections}{http}"


def _cut_off(calls: int, why: str) -> UnavailableError:
    """Say that the drain did not end well."""
    return UnavailableError(
        "drain",
        expected="every call under way answered",
        found=f"{calls} cut off after {why}",
        mend="allow more time with --drain-s",
    )


if __name__ == "__main__":
    sys.exit(run_command(ServeOptions, main, prog="python -m serve"))
