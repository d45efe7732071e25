"""`python -m serve`: serve until told to stop.

Rules:
    One line on stdout says that the server is ready and where; logs go to stderr.
    SIGTERM or SIGINT drains: not ready, calls under way are answered, exit status 0. After
    `--drain-s` what is left is cut off, and the exit status is 1; a second signal cuts off
    at once. A signal before the server is ready ends it with exit status 0, also one that comes
    while this is loaded, which takes a second: it waits for who can handle it.
    SIGHUP reads again what is served: bundles, collections, certificates, keys. What is
    refused is logged, and what was there stays.
    With `--workers` the same holds of all of them together: one line when all are ready, and
    exit status 0 when all have drained; see `serve.workers`.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":  # until `orders_by_signal`; also as process 1, which loses it otherwise
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})

from models.command import run_command
from serve.config import ServeOptions
from serve.operation.logs import set_up_logs
from serve.running import announce, orders_by_signal, ready_line, run_server, run_to_the_end
from serve.server import Server
from serve.workers.supervisor import Supervisor


def main(options: ServeOptions) -> None:
    """Serve until a signal comes and the calls under way are answered.

    Raises:
        HoraceError: the server cannot start.
        UnavailableError: calls were cut off.
    """
    set_up_logs(options.log)
    run_to_the_end(_serve(options) if options.workers == 1 else _supervise(options))


async def _serve(options: ServeOptions) -> None:
    """Serve in this process."""
    server = Server(options)
    await run_server(
        server,
        orders_by_signal(),
        drain_s=options.drain_s,
        on_ready=lambda: announce(ready_line(server)),
    )


async def _supervise(options: ServeOptions) -> None:
    """Serve in several processes, and mind them in this one."""
    supervisor = Supervisor(
        options, on_ready=lambda line: announce(f"{line} workers={options.workers}")
    )
    await supervisor.run(orders_by_signal())


if __name__ == "__main__":
    sys.exit(run_command(ServeOptions, main, prog="python -m serve"))
