from __future__ import annotations

import asyncio
import errno
import importlib.util
import itertools
import logging
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

from models.errors import UsageError
from serve.config import ServeOptions
from serve.errors import StartError, UnavailableError
from serve.running import Orders
from serve.watchdog import Pulse, WatchdogOptions
from serve.workers import supervisor as module
from serve.workers.messages import Order
from serve.workers.supervisor import Supervisor

FAKES = Path(__file__).with_name("fake_workers.py")


@pytest.fixture
def supervise(monkeypatch, tmp_path, caplog):
    """A coroutine function: mind two fake workers, with a script that gives the orders."""
    spec = importlib.util.spec_from_file_location("fake_workers", FAKES)
    fakes = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fake_workers", fakes)
    monkeypatch.syspath_prepend(FAKES.parent)  # the processes import it, too
    spec.loader.exec_module(fakes)
    monkeypatch.setattr(module, "run_worker", fakes.fake_worker)
    monkeypatch.setattr(module, "GRACE_S", 60.0)  # a busy machine may take that long to spawn them
    monkeypatch.setenv("FAKE_PLACE", str(tmp_path))
    caplog.set_level(logging.INFO, "horace.serve")

    def run(
        behaviour: str, script=None, *, early: bool = False, silent_s: float = 60.0, **more
    ) -> tuple[list[str], Supervisor]:
        monkeypatch.setenv("FAKE_WORKERS", behaviour)

        async def main():
            ready, lines, orders = asyncio.Event(), [], Orders()

            def on_ready(line: str) -> None:
                lines.append(line)
                ready.set()

            if early:
                orders.stops.put_nowait("SIGTERM")
            watchdog = WatchdogOptions(silent_s=silent_s)
            options = ServeOptions(port=0, workers=2, drain_s=0, watchdog=watchdog)
            minding = Supervisor(options, on_ready=on_ready, **more)
            running = asyncio.create_task(minding.run(orders))
            if script is not None:
                await asyncio.wait(
                    [running, asyncio.create_task(ready.wait())],
                    return_when=asyncio.FIRST_COMPLETED,
                )
                await script(minding, orders)
            await running
            return lines, minding

        return asyncio.run(main())

    return run


async def stop(_: Supervisor, orders: Orders) -> None:
    """One order to stop."""
    orders.stops.put_nowait("SIGTERM")


def test_all_ready_is_told_once_and_all_end(supervise):
    """The line is a worker's; afterwards no process is left."""
    lines, minding = supervise("good", stop)
    assert lines == ["serving on port True"]
    assert repr(minding) == "<Supervisor stopping worker 0 dead, worker 1 dead>"


def test_a_worker_that_dies_is_followed_by_another(supervise, caplog, eventually):
    """With its last words in the log; the ready line does not come again."""

    async def script(minding, orders):
        orders.reloads.put_nowait("SIGHUP")
        await eventually(lambda: "worker 1 serves again" in caplog.text)
        assert repr(minding) == "<Supervisor worker 0 ready, worker 1 ready>"
        orders.stops.put_nowait("SIGTERM")

    lines, _ = supervise("one dies later", script)
    assert len(lines) == 1
    assert "worker 1 ended with status 4: a reason; another follows in 0.1 s" in caplog.text


def test_one_that_dies_of_starting_waits_longer_each_time(supervise, caplog, eventually):
    """However long its starts take: an hour each, by this clock."""
    hours = itertools.count(step=3600.0)

    async def script(minding, orders):
        minding._workers[1].process.kill()
        await eventually(lambda: "follows in 0.2 s" in caplog.text)
        await stop(minding, orders)

    supervise("one cannot start again", script, clock=lambda: next(hours), silent_s=0)
    assert "worker 1 died of SIGKILL; another follows in 0.0 s" in caplog.text
    assert "worker 1 ended with status 3; another follows in 0.1 s" in caplog.text


@pytest.mark.parametrize("what", ["Pipe", "Process"])
def test_a_process_that_cannot_be_started_is_tried_again(
    supervise, monkeypatch, caplog, eventually, what
):
    """The others serve meanwhile, and nothing is left open of what failed."""

    async def script(minding, orders):
        make, failures = getattr(minding._spawn, what), [OSError(errno.EMFILE, "too many files")]

        def fail_once(*args, **options):
            if failures:
                raise failures.pop()
            return make(*args, **options)

        monkeypatch.setattr(minding._spawn, what, fail_once)
        minding._workers[1].process.kill()
        await eventually(lambda: "worker 1 serves again" in caplog.text)
        assert not failures
        assert repr(minding) == "<Supervisor worker 0 ready, worker 1 ready>"
        orders.stops.put_nowait("SIGTERM")

    supervise("good", script)
    assert "cannot be started: [Errno 24] too many files; another follows in 0.2 s" in caplog.text


def test_an_order_to_reload_reaches_all(supervise, tmp_path, eventually):
    """Each of the two has it."""

    async def script(minding, orders):
        orders.reloads.put_nowait("SIGHUP")
        await eventually(lambda: all((tmp_path / f"reloads-{n}").exists() for n in (0, 1)))
        await stop(minding, orders)

    supervise("good", script)


def test_bad_use_is_told_in_the_workers_words(supervise):
    """It is bad use for the whole command, too."""
    with pytest.raises(UsageError, match=r"^--this: expected that$"):
        supervise("bad use")


def test_a_worker_without_words_ends_the_start(supervise, caplog):
    """The others are stopped, and the line says how it ended."""
    with pytest.raises(
        StartError, match=r"^worker 1: expected one that becomes ready, found one that ended with"
    ):
        supervise("one dies")
    assert "stopping 2 workers on the end of worker 1 before all were ready" in caplog.text


def test_a_process_that_cannot_be_started_ends_the_start(supervise, monkeypatch):
    """In one line; the worker before it is not left behind."""
    spawn, started = multiprocessing.get_context("spawn"), []
    make = spawn.Process

    def fail_second(*args, **options):
        if started:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        started.append(make(*args, **options))
        return started[0]

    monkeypatch.setattr(spawn, "Process", fail_second)
    with pytest.raises(StartError) as error:
        supervise("good")
    assert str(error.value) == (
        "worker 1: expected a process of its own, found Resource temporarily unavailable; "
        "ask for fewer --workers, or allow more processes and descriptors"
    )
    started[0].join()
    assert started[0].exitcode == -signal.SIGKILL


def test_a_second_order_cuts_off(supervise, tmp_path, eventually):
    """The drain takes its time; the second order ends it, and that is no good end."""

    async def script(minding, orders):
        await stop(minding, orders)
        await eventually((tmp_path / "told").exists)
        await stop(minding, orders)

    with pytest.raises(UnavailableError) as error:
        supervise("stubborn", script)
    assert str(error.value) == "worker 0: drain: 2 cut off; worker 1: drain: 2 cut off"


def test_what_does_not_end_is_killed(supervise, monkeypatch):
    """Beyond the drain and some grace nobody is waited for."""
    monkeypatch.setattr(module, "GRACE_S", 0.1)
    why = "worker 0 was killed, since it had not ended in time; worker 1 was killed, since it had"
    with pytest.raises(UnavailableError, match=why):
        supervise("deaf", stop)


@pytest.fixture
def asking(monkeypatch):
    """Workers are asked a hundred times a second whether they are there."""
    monkeypatch.setattr(module, "ASK_EVERY_S", 0.01)


@pytest.mark.usefixtures("asking")
def test_a_worker_that_hangs_is_killed_and_followed_by_another(supervise, caplog, eventually):
    """The log says why it was killed, not only that it died of a signal."""

    async def script(minding, orders):
        orders.reloads.put_nowait("SIGHUP")
        await eventually(lambda: "worker 1 serves again" in caplog.text)
        await stop(minding, orders)

    supervise("one hangs", script, silent_s=1.0)
    why = "its event loop had not answered for 1 s"
    assert f"worker 1 is killed: {why}" in caplog.text
    assert f"worker 1 was killed, since {why}; another follows in" in caplog.text
    assert "worker 0 is killed" not in caplog.text


def test_the_sleep_of_the_supervisor_is_no_silence_of_workers(supervise, caplog):
    """A machine that was suspended: nobody could answer, and the next answer comes in time."""
    hours = itertools.count(step=3600.0)

    async def script(minding, orders):
        worker = minding._workers[1]
        worker.pulse = Pulse(beat=1, seen_beat=1)  # was asked before
        minding._ask_all()
        assert worker.pulse.seen_s == 2 * module.ASK_EVERY_S
        await stop(minding, orders)

    supervise("good", script, clock=lambda: next(hours))
    assert "is killed" not in caplog.text


def test_a_worker_that_reads_no_orders_holds_up_nobody(supervise, caplog, tmp_path, eventually):
    """Its pipe is full: the other has its orders, and the stop does not wait for it."""

    async def script(minding, orders):
        os.kill(minding._workers[0].process.pid, signal.SIGSTOP)
        for _ in range(2000):
            minding._tell(minding._workers[0], Order.RELOAD)
        minding._handle("reload", None, "SIGHUP")
        await eventually((tmp_path / "reloads-1").exists)
        await stop(minding, orders)
        await stop(minding, orders)
        await eventually(lambda: "worker 1 dead" in repr(minding))
        minding._handle("overdue", None, None)

    with pytest.raises(UnavailableError, match="worker 0 was killed, since it had not ended"):
        supervise("good", script)


def test_who_drains_is_not_killed_for_silence(supervise, caplog, tmp_path, eventually):
    """It has a limit of its own."""

    async def script(minding, orders):
        await stop(minding, orders)
        await eventually((tmp_path / "told").exists)
        minding._workers[1].pulse = Pulse(beat=1, seen_beat=1, seen_s=3600.0)  # since ever
        minding._ask_all()
        await stop(minding, orders)

    with pytest.raises(UnavailableError, match="drain: 2 cut off"):
        supervise("stubborn", script)
    assert "is killed" not in caplog.text


def test_who_starts_may_be_silent_for_as_long_as_a_model_may_take(
    supervise, caplog, tmp_path, eventually
):
    """Then it is killed and followed, as one that serves is much sooner."""

    async def script(minding, orders):
        worker = minding._workers[1]
        worker.process.kill()
        await eventually((tmp_path / "start-1").exists)
        for seen_s in (890.0, 900.0):
            assert "is killed" not in caplog.text
            worker.pulse = Pulse(beat=1, seen_beat=1, seen_s=seen_s)
            minding._asked_s = minding._clock() - 1.0
            minding._ask_all()
        await eventually(lambda: "worker 1 serves again" in caplog.text)
        await stop(minding, orders)

    supervise("one hangs as it starts again", script)
    assert "worker 1 is killed: its event loop had not answered for 900 s" in caplog.text


def test_an_order_before_they_are_ready_ends_well(supervise):
    """Nothing was accepted, so nothing is lost, and nothing is announced."""
    lines, _ = supervise("good", early=True)
    assert lines == []
