from __future__ import annotations

import asyncio
import math
import threading
from dataclasses import replace

import pytest

from models.errors import EncoderError, EncoderUnavailableError, HoraceError, UsageError
from serve.crew import Crew
from serve.errors import InternalError
from serve.recovery import Recovery
from serve.watchdog import Pulse, Watchdog, WatchdogOptions, is_stuck


def looks(pulse, seconds):
    """What each look at a thread says, with a limit of one second."""
    return [is_stuck(pulse, elapsed_s=elapsed_s, limit_s=1.0) for elapsed_s in seconds]


def test_one_piece_of_work_may_take_its_time_up_to_a_limit():
    """Counted from the look that first saw it."""
    assert looks(Pulse(beat=1), [0.4] * 4) == [False, False, False, True]


def test_who_waits_is_not_stuck():
    """However long there is nothing to do."""
    assert looks(Pulse(beat=2), [0.4] * 10) == [False] * 10


def test_who_goes_on_is_not_stuck():
    """Every piece of work is a beginning."""
    pulse = Pulse(beat=1)
    assert looks(pulse, [0.4] * 3) == [False] * 3
    pulse.beat += 2
    assert looks(pulse, [0.4] * 3) == [False] * 3


class Seen:
    """Something to look after that notes how long it was alone."""

    def __init__(self, error=None):
        self.seen, self.error, self.enough = [], error, threading.Event()

    def look(self, *, elapsed_s, limit_s):
        """Note it, and fail if asked to."""
        self.seen.append(elapsed_s)
        if len(self.seen) >= 3:
            self.enough.set()
        if self.error:
            raise self.error


def test_a_process_that_was_stopped_has_no_stuck_threads_for_it():
    """Of an hour between two looks no more counts than twice the interval."""
    now = [0.0]
    watchdog = Watchdog(WatchdogOptions(), clock=lambda: now[0])
    watchdog.watch(seen := Seen())
    for now[0] in (1.0, 3601.0, 3602.5):
        watchdog.look()
    assert seen.seen == [1.0, 2.0, 1.5]


@pytest.mark.usefixtures("vigilant")
@pytest.mark.parametrize("frontend", ["grpcio"])  # what it does not touch
@pytest.mark.parametrize("stuck_s", [60, 0])
def test_a_load_or_a_close_that_hangs_keeps_nothing_else_from_being_opened(serving, fake, stuck_s):
    """Its thread is replaced after a time of its own, which is longer than that of a batch."""
    options = WatchdogOptions(stuck_s=stuck_s, opening_s=0.2)
    gate = threading.Event()

    async def main():
        async with serving(fake, watchdog=options) as server:
            for pool in (server._opening_pool, server._disposal_pool):
                hanging = pool.run(lambda: gate.wait(120))
                with pytest.raises(InternalError, match="has lost a thread"):
                    await asyncio.wait_for(hanging, 60)
                assert await asyncio.wait_for(pool.run(lambda: "opened"), 60) == "opened"
                assert pool.alive
            gate.set()  # or closing waits for them

    try:
        asyncio.run(main())
    finally:
        gate.set()


@pytest.mark.parametrize(("stuck_s", "limit_s"), [(60, 60), (0, math.inf)])
def test_what_has_a_limit_of_its_own_is_held_to_that(stuck_s, limit_s):
    """All else to the limit of the options, of which 0 is none."""
    watchdog = Watchdog(WatchdogOptions(stuck_s=stuck_s))
    limits = []

    class Limited(Seen):
        def look(self, *, elapsed_s, limit_s):
            limits.append(limit_s)

    patient, other = Limited(), Limited()
    watchdog.watch(patient, limit_s=900)
    watchdog.watch(other)
    watchdog.look()
    assert sorted(limits) == sorted([limit_s, 900])


def test_what_fails_to_be_looked_at_hides_nothing_else(caplog):
    """A fault of one is logged, and the others are looked at."""
    watchdog = Watchdog(WatchdogOptions())
    broken, sound = Seen(RuntimeError("no")), Seen()
    watchdog.watch(broken)
    watchdog.watch(sound)
    watchdog.look()
    assert len(broken.seen) == len(sound.seen) == 1
    assert "looking after" in caplog.text


def test_what_is_not_used_any_more_is_not_kept():
    """A model that was swapped out is not kept in memory by its watchdog."""
    watchdog = Watchdog(WatchdogOptions())
    watchdog.watch(Seen())
    assert repr(watchdog) == "<Watchdog not running, 0 watched>"


@pytest.mark.usefixtures("vigilant")
def test_it_looks_at_intervals_until_it_is_closed():
    """On a thread of its own."""
    watchdog = Watchdog(WatchdogOptions())
    watchdog.watch(seen := Seen())
    watchdog.start()
    assert seen.enough.wait(30)
    watchdog.close()
    assert "not running" in repr(watchdog)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"stuck_s": -1}, "--watchdog.stuck-s: expected 0 to 86400, found -1"),
        ({"opening_s": 0}, "--watchdog.opening-s: expected 0.01 to 86400, found 0"),
        ({"silent_s": -1}, "--watchdog.silent-s: expected 0 to 86400, found -1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, line):
    """One line says what may be asked for."""
    with pytest.raises(UsageError, match=f"^{line}$"):
        WatchdogOptions(**options)


def test_a_thread_that_ends_unseen_is_replaced_at_the_next_look():
    """Whatever ended it, and even if nobody said so."""
    lost, trouble, gate = [], [], threading.Event()
    crew = Crew(
        lambda member: gate.wait(30),
        size=2,
        name="crew",
        on_lost=lost.append,
        on_trouble=lambda: trouble.append(1),
    )
    member = crew._members[0]
    member.thread = threading.Thread(target=print)  # never started: it is not alive
    crew.look(elapsed_s=1.0, limit_s=9.0)
    assert lost == [member]
    assert trouble == [1]
    assert repr(crew) == "<Crew crew 2/2 threads>"
    crew.dismiss()
    gate.set()
    assert crew.join(30)


def test_trouble_is_over_when_a_probe_has_passed_that_began_after_it(caplog):
    """Not ready from the first trouble on; failing probes are tried again; one line each."""
    outcomes = [ValueError("no vector"), ValueError("no vector"), None, None]
    changes, probes = [], []

    async def main():
        async def probe():
            probes.append(1)
            outcome = outcomes.pop(0)
            if len(outcomes) == 1:
                recovery.note_trouble()  # while the third probe runs: it proves nothing
            if outcome is not None:
                raise outcome

        recovery = Recovery(probe, on_change=lambda: changes.append(recovery.in_trouble), every_s=0)
        assert repr(recovery) == "<Recovery well, 0 so far>"
        recovery.note_trouble()
        assert repr(recovery) == "<Recovery in trouble, 1 so far>"
        await recovery._probing
        assert not recovery.in_trouble

    asyncio.run(main())
    assert len(probes) == 4
    assert changes == [True, True, False]
    assert caplog.text.count("not ready yet: ValueError: no vector") == 1


def test_a_server_that_stops_probes_no_more():
    """A probe that hangs does not outlive its server."""

    async def main():
        async def probe():
            await asyncio.Event().wait()

        recovery = Recovery(probe, on_change=lambda: None)
        recovery.note_trouble()
        recovery.close()
        with pytest.raises(asyncio.CancelledError):
            await (last := recovery._probing)
        recovery.note_trouble()
        assert recovery._probing is last

    asyncio.run(main())


def test_a_model_whose_servers_are_away_keeps_no_other_from_being_served(serving, fake):
    """After trouble with a thread the others' images go through; a dead fleet is not asked."""
    near, far = (replace(fake, name=name, batches=[], failures=[]) for name in ("near", "far"))

    async def main():
        async with serving(near, far) as server:
            (model,) = (model for model in server.catalog.offered if model.encoder is far)
            model.engine.reachable = False
            await server._probe()
            assert len(near.batches) == 1
            assert not far.batches
            model.engine.reachable = True
            far.failures.extend([EncoderUnavailableError("its servers")] * 1000)
            await server._probe()  # it is found out now, which is the other recovery's matter
            assert not model.engine.reachable
            near.failures.append(EncoderError("broken"))
            with pytest.raises(HoraceError):
                await server._probe()

    asyncio.run(main())


@pytest.mark.parametrize("frontend", ["grpcio"])  # what it does not touch
def test_a_remote_model_that_is_unloaded_is_not_said_to_answer(
    serving, fake, monkeypatch, caplog, eventually
):
    """Its servers are away; what is asked for no more keeps nobody waiting."""
    caplog.set_level("INFO", "horace.serve")
    monkeypatch.setattr("serve.server.REACH_EVERY_S", 0.01)

    async def main():
        async with serving(fake, replace(fake, name="far"), model_control=True) as server:
            far = server.catalog.model("far")
            far.encoder.failures = [EncoderUnavailableError("its servers")] * 1000
            with pytest.raises(HoraceError):
                await server._ask(far)
            await eventually(lambda: "remote models: not ready yet" in caplog.text)
            await server.lifecycle.unload("far")
            await eventually(lambda: "remote models: all that are served answer" in caplog.text)
            assert "ready again" not in caplog.text

    asyncio.run(main())
