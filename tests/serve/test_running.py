from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from serve import running
from serve.config import ServeOptions
from serve.errors import InternalError
from serve.running import ECHO_S, Orders, announce, orders_by_signal, run_server
from serve.server import Server

ROOT = Path(__file__).parents[2]


async def hear(orders, *numbers: int) -> list[str]:
    """Signal this process, and give the orders to stop that came of it."""
    for number in (*numbers, signal.SIGHUP):  # signals are heard in their order
        os.kill(os.getpid(), number)
    await asyncio.wait_for(orders.reloads.get(), 60)
    return [orders.stops.get_nowait() for _ in range(orders.stops.qsize())]


def test_a_reader_of_stdout_that_has_gone_is_no_reason_not_to_serve(monkeypatch, caplog):
    """The ready line goes to the log then."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", closefd=False) as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        announce("horace serving on [::]:50051")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)
    assert caplog.messages == ["horace serving on [::]:50051; stdout: Broken pipe"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_and_its_echo_are_one(number):
    """`timeout` signals a process and then its group: nothing is cut off for it."""
    now_s = 0.0

    async def main():
        nonlocal now_s
        orders = orders_by_signal(clock=lambda: now_s)
        assert await hear(orders, number) == [number.name]
        now_s += ECHO_S * 0.9
        assert await hear(orders, number) == []
        now_s += ECHO_S * 0.9  # an echo has echoes, too
        assert await hear(orders, number) == []
        now_s += ECHO_S * 1.1
        assert await hear(orders, number) == [number.name]

    asyncio.run(main())


def test_orders_to_reload_that_come_while_one_waits_are_one():
    """However many signals come; and the next one after it was taken is another."""

    async def main():
        orders = orders_by_signal()
        for _ in range(3):
            assert await hear(orders, *[signal.SIGHUP] * 100) == []
            assert orders.reloads.empty()

    asyncio.run(main())


def test_another_signal_is_no_echo():
    """Ctrl-C right after SIGTERM cuts off."""

    async def main():
        orders = orders_by_signal(clock=lambda: 0.0)
        assert await hear(orders, signal.SIGTERM, signal.SIGINT) == ["SIGTERM", "SIGINT"]

    asyncio.run(main())


def test_an_order_that_comes_as_the_start_ends_is_not_lost(fake, caplog):
    """The signal of a process manager that has changed its mind just then."""
    caplog.set_level(logging.INFO, "horace.serve")
    options = ServeOptions(port=0, bundle=("fake://fake",))

    async def main():
        server, orders = Server(options, open_model=lambda *_, **__: fake), Orders()
        start = server.start

        async def start_and_hear() -> None:
            await start()
            orders.stops.put_nowait("SIGTERM")

        server.start = start_and_hear
        serving = run_server(server, orders, drain_s=10, on_ready=lambda: None)
        await asyncio.wait_for(serving, 60)

    asyncio.run(main())
    assert "stopping on SIGTERM" in caplog.text
    assert fake.closed


def test_a_signal_after_the_end_does_not_change_it():
    """The interpreter takes itself apart then; what was drained ends with its own status."""
    code = (
        "import asyncio, os, signal\n"
        "from serve.running import orders_by_signal, run_to_the_end\n"
        "async def work():\n"
        "    orders_by_signal()\n"
        "run_to_the_end(work())\n"
        "for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):\n"
        "    os.kill(os.getpid(), number)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=120)
    assert done.returncode == 0


def test_a_server_that_reads_no_more_ends_badly(fake, monkeypatch, caplog):
    """After a drain: whoever minds the process, such as a supervisor, starts another."""
    monkeypatch.setattr(running, "LOOK_EVERY_S", 0.001)
    caplog.set_level(logging.INFO, "horace.serve")
    options = ServeOptions(port=0, bundle=("fake://fake",), frontend="native")

    async def main():
        server = Server(options, open_model=lambda *_, **__: fake)

        def lose_receiver() -> None:
            server._front._receiver = threading.Thread(target=print)  # never started

        await run_server(server, Orders(), drain_s=10, on_ready=lose_receiver)

    with pytest.raises(InternalError, match=r"^server: expected one that lives, found a thread"):
        asyncio.run(main())
    assert "stopping on the loss of a thread that nothing replaces" in caplog.text
    assert fake.closed
