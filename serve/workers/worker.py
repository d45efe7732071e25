"""One of several processes: a server that obeys its supervisor instead of signals.

Rules:
    Orders come over the pipe, so that a signal to the whole process group, which the
    supervisor passes on besides, is not taken for a second one: SIGINT is ignored, and
    SIGTERM drains however often it comes. Only the supervisor's word cuts off.
    A supervisor that is gone (the pipe ends) is an order to drain.
    It is answered from the event loop, when it asks: whether that turns is what it wants to know.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from multiprocessing.connection import Connection

from models.errors import HoraceError, UsageError
from serve.config import ServeOptions
from serve.operation.logs import set_up_logs
from serve.running import HELD_SIGNALS, Orders, ready_line, run_server, run_to_the_end
from serve.server import Server
from serve.workers.messages import Answer, Failed, Order, Ready, Report
from serve.workers.place import WorkerPlace

log = logging.getLogger("horace.serve")

FAILED = 1
"""Exit status of a worker that has told its supervisor why."""


def run_worker(options: ServeOptions, place: WorkerPlace, pipe: Connection) -> None:
    """Serve until told to stop; the target of a process.

    Raises:
        SystemExit: with status 1, where the server could not start or cut calls off.
    """
    logging.basicConfig()
    logging.getLogger("horace").setLevel(logging.INFO)
    logging.captureWarnings(True)
    set_up_logs(options.log, worker=place.index)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run_to_the_end(_serve(options, place, pipe))
    except HoraceError as error:
        _report(pipe, Failed(line=str(error), bad_use=isinstance(error, UsageError)))
        raise SystemExit(FAILED) from error


async def _serve(options: ServeOptions, place: WorkerPlace, pipe: Connection) -> None:
    """Serve, and report when ready."""
    orders = _orders_by_pipe(pipe)
    server = Server(options, place=place)

    await run_server(
        server,
        orders,
        drain_s=options.drain_s,
        on_ready=lambda: _report(pipe, Ready(line=ready_line(server))),
    )


def _orders_by_pipe(pipe: Connection) -> Orders:
    """Take orders from the supervisor; from signals, those that do no harm twice."""
    orders = Orders()
    loop = asyncio.get_running_loop()
    told: set[str] = set()

    def stop_once(name: str) -> None:
        if not told:
            orders.stops.put_nowait(name)
        told.add(name)

    def read() -> None:
        """Pass on the supervisor's next order; its end is an order to stop."""
        try:
            order = pipe.recv()
        except (EOFError, OSError):
            loop.remove_reader(pipe.fileno())
            stop_once("the end of the supervisor")
            return
        match order:
            case Order.STOP:
                stop_once("the supervisor's order")
            case Order.CUT_OFF:
                stop_once("the supervisor's order")
                orders.stops.put_nowait("the supervisor's second order")
            case Order.RELOAD:
                orders.reload("the supervisor's order")
            case Order.ANSWER:
                _report(pipe, Answer())

    loop.add_reader(pipe.fileno(), read)
    loop.add_signal_handler(signal.SIGTERM, stop_once, signal.SIGTERM.name)
    loop.add_signal_handler(signal.SIGHUP, orders.reload, signal.SIGHUP.name)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)
    return orders


def _report(pipe: Connection, report: Report) -> None:
    """Tell the supervisor, if it is still there."""
    with contextlib.suppress(OSError):
        pipe.send(report)
