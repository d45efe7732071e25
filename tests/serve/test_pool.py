from __future__ import annotations

import asyncio
import threading

import pytest

from serve.pool import ThreadPool


@pytest.fixture
def pool():
    """A pool of one thread."""
    pool = ThreadPool(threads=1, name="one")
    yield pool
    pool.close()


def hold(pool):
    """Occupy the pool's only thread until the event is set."""
    gate, entered = threading.Event(), threading.Event()
    pool.submit(lambda: (entered.set(), gate.wait(30)))
    assert entered.wait(30)
    return gate


def test_work_gives_its_result_or_its_error(pool):
    """As if it had been called on the spot."""

    async def main():
        assert await pool.run(lambda: 6 * 7) == 42
        with pytest.raises(ZeroDivisionError):
            await pool.run(lambda: 1 / 0)

    asyncio.run(main())


def test_a_task_that_raises_is_logged_and_the_thread_goes_on(pool, caplog):
    """A fault of ours does not take the pool along."""

    async def main():
        pool.submit(lambda: 1 / 0)
        assert await pool.run(lambda: "still here") == "still here"

    asyncio.run(main())
    assert "a task of one-0 failed" in caplog.text


def test_work_cancelled_before_its_turn_never_runs(pool):
    """Nobody waits for it."""
    ran = []

    async def main():
        gate = hold(pool)
        waiting = asyncio.create_task(pool.run(lambda: ran.append(1)))
        await asyncio.sleep(0)
        assert pool.waiting == 1
        assert repr(pool) == "<ThreadPool one-0 1 threads, 1 waiting>"
        waiting.cancel()
        gate.set()
        await pool.run(lambda: None)

    asyncio.run(main())
    assert ran == []


def test_closing_tells_whether_every_thread_ended():
    """A stuck task is reported, not waited for."""
    pool = ThreadPool(threads=1, name="stuck")
    gate = hold(pool)
    assert not pool.close(timeout_s=0.01)
    gate.set()
    assert pool.close()
