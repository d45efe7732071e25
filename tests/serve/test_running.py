from __future__ import annotations

import asyncio
import os
import signal

import pytest

from serve.running import ECHO_S, orders_by_signal


async def hear(orders, *numbers: int) -> list[str]:
    """Signal this process, and give the orders to stop that came of it."""
    for number in (*numbers, signal.SIGHUP):  # signals are heard in their order
        os.kill(os.getpid(), number)
    await asyncio.wait_for(orders.reloads.get(), 60)
    return [orders.stops.get_nowait() for _ in range(orders.stops.qsize())]


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


def test_another_signal_is_no_echo():
    """Ctrl-C right after SIGTERM cuts off."""

    async def main():
        orders = orders_by_signal(clock=lambda: 0.0)
        assert await hear(orders, signal.SIGTERM, signal.SIGINT) == ["SIGTERM", "SIGINT"]

    asyncio.run(main())
