from __future__ import annotations

import asyncio
import threading

import pytest

from serve.errors import InternalError
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
        assert repr(pool) == "<ThreadPool <Crew one 1/1 threads>, 1 waiting>"
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


def test_a_task_that_hangs_is_reported_and_its_thread_replaced():
    """Who waits for it is told; the pool has as many threads as before."""
    trouble = []
    pool = ThreadPool(threads=1, name="one", on_trouble=lambda: trouble.append(1))
    gate, entered = threading.Event(), threading.Event()

    async def main():
        hanging = asyncio.create_task(pool.run(lambda: (entered.set(), gate.wait(30))))
        assert await asyncio.to_thread(entered.wait, 120)
        for _ in range(2):
            pool.look(elapsed_s=1.0, limit_s=0.5)
        with pytest.raises(InternalError, match="lost a thread that was at this request"):
            await hanging
        assert await pool.run(lambda: "still here") == "still here"

    asyncio.run(main())
    assert trouble == [1]
    gate.set()
    assert pool.close()


def test_a_task_that_takes_its_thread_along_is_reported():
    """The next task runs on another thread."""
    pool = ThreadPool(threads=1, name="one")

    def die():
        raise SystemExit

    async def main():
        with pytest.raises(InternalError, match="lost a thread"):
            await pool.run(die)
        assert await pool.run(lambda: "still here") == "still here"

    asyncio.run(main())
    assert pool.close()


def test_work_in_pieces_hangs_where_one_piece_does(pool):
    """However long all of them take, and after one that hung the rest is left."""
    pieces = []
    gate, hangs = threading.Event(), threading.Event()

    def work(on_piece):
        for _ in range(4):
            pool.look(elapsed_s=1.0, limit_s=1.5)
            on_piece()
        pieces.append("four")
        hangs.set()
        assert gate.wait(120)
        on_piece()
        pieces.append("five")

    async def main():
        hanging = asyncio.create_task(pool.run_in_pieces(work))
        assert await asyncio.to_thread(hangs.wait, 120)
        for _ in range(3):
            pool.look(elapsed_s=1.0, limit_s=1.5)
        with pytest.raises(InternalError, match="lost a thread"):
            await hanging
        gate.set()

    asyncio.run(main())
    assert pool.close()
    assert pieces == ["four"]


def test_work_in_pieces_that_nobody_waits_for_ends_with_a_piece(pool):
    """Its thread is free for who still waits."""
    pieces = []
    gate, entered = threading.Event(), threading.Event()

    def work(on_piece):
        entered.set()
        assert gate.wait(120)
        on_piece()
        pieces.append("one more")

    async def main():
        leaving = asyncio.create_task(pool.run_in_pieces(work))
        assert await asyncio.to_thread(entered.wait, 120)
        leaving.cancel()
        await asyncio.wait([leaving])
        gate.set()
        assert await pool.run(lambda: "next") == "next"

    asyncio.run(main())
    assert pieces == []


def test_what_waits_says_how_long_a_newcomer_would(pool):
    """Going by the tasks of late, so that a refusal can say when to come back."""
    assert pool.wait_s is None
    gate = hold(pool)
    pool._task_s = 0.5
    pool.submit(lambda: None)
    pool.submit(lambda: None)
    assert pool.wait_s == 1.0
    gate.set()
