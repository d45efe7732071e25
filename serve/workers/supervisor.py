"""Starts the workers, minds them, passes on what it is told, and ends when they have ended.

Rules:
    The port is taken first and alone (`ports`); the supervisor itself never listens.
    All workers must become ready once; one that cannot, or that the system cannot start, ends
    the start with its own error.
    After that a worker that dies is started again, at once or after a while (`restarts`),
    and again where the system cannot start it; meanwhile the others serve.
    A worker is asked now and again whether its event loop turns, until all are to stop. One that
    does not answer for too long is killed, and followed like one that died; one that starts has
    as long as the opening of a model, since it answers nothing before its libraries are loaded.
    Only time in which the supervisor itself ran counts (`serve.watchdog`): a machine that slept
    has no silent workers.
    The first order to stop drains every worker, the second cuts them off; one that does not
    end then is killed. The end is good if every worker's was.
    Nothing is waited for, and least of all a worker that reads its orders no more.
    One event at a time: deaths, reports, orders and timers are read from one queue.

Source: the pre-fork servers (nginx, gunicorn), whose master process does the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import multiprocessing
import select
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Literal

from models.errors import HoraceError, UsageError, reason_of
from serve.config import ServeOptions
from serve.errors import StartError, UnavailableError
from serve.running import BETWEEN_RELOADS_S, HELD_SIGNALS, Orders
from serve.watchdog import Pulse, is_stuck
from serve.workers.messages import Answer, Failed, Order, Ready, Report
from serve.workers.place import WorkerPlace
from serve.workers.ports import held_port
from serve.workers.restarts import Restarts
from serve.workers.worker import run_worker

log = logging.getLogger("horace.serve")

GRACE_S = 10.0
"""How long a worker may take to end beyond the drain before it is killed."""

ASK_EVERY_S = 1.0
"""How often workers are asked whether they are there; one question at a time, so that no pipe
fills up with them."""

OnReady = Callable[[str], None]


@dataclass(kw_only=True, eq=False)
class Worker:
    """One place among the workers, and the process that has it.

    Attributes:
        ready_s: since when it serves; None where it starts.
        pulse: whether the process owes an answer, and for how long it has.
        killed_why: why the supervisor has killed it; empty where it has not.
    """

    place: WorkerPlace
    process: SpawnProcess | None = None
    pipe: Connection | None = None
    ready_s: float | None = None
    pulse: Pulse = field(default_factory=Pulse)
    last_words: Failed | None = None
    killed_why: str = ""
    restarts: Restarts = field(default_factory=Restarts)

    def __str__(self) -> str:
        return str(self.place)

    @property
    def is_ready(self) -> bool:
        """Whether it serves."""
        return self.ready_s is not None


Event = tuple[
    Literal["report", "died", "restart", "ask", "stop", "reload", "overdue"], Worker | None, object
]


class Supervisor:
    """Minds the workers of one server. Belongs to one event loop."""

    def __init__(
        self,
        options: ServeOptions,
        *,
        on_ready: OnReady,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            options: of every worker.
            on_ready: called once, when all serve, with the line that says where and what.
            clock: monotonic seconds.
        """
        self._options = options
        self._on_ready = on_ready
        self._clock = clock
        self._workers = [
            Worker(place=WorkerPlace(index=n, count=options.workers))
            for n in range(options.workers)
        ]
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._spawn = multiprocessing.get_context("spawn")
        self._announced = False
        self._stops = 0
        self._asked_s = 0.0
        self._start_error: HoraceError | None = None
        self._bad_ends: list[str] = []

    def __repr__(self) -> str:
        states = ", ".join(_state(worker) for worker in self._workers)
        return f"<Supervisor {'stopping ' if self._stops else ''}{states}>"

    async def run(self, orders: Orders) -> None:
        """Serve until told to stop, and until every worker has ended.

        Raises:
            HoraceError: a worker cannot start.
            UnavailableError: calls were cut off; each worker's reason.
        """
        with contextlib.ExitStack() as ports:
            self._options = _with_ports(self._options, ports)
            listeners = [
                asyncio.create_task(self._forward("stop", orders.stops)),
                asyncio.create_task(
                    self._forward("reload", orders.reloads, pause_s=BETWEEN_RELOADS_S)
                ),
            ]
            try:
                for worker in self._workers:
                    self._start_first(worker)
                self._ask_later()
                while any(worker.process for worker in self._workers) or not self._stops:
                    self._handle(*await self._events.get())
            finally:
                for listener in listeners:
                    listener.cancel()
                self._kill_all("the supervisor ends")
        if self._start_error is not None:
            raise self._start_error
        if self._bad_ends:
            raise UnavailableError("; ".join(sorted(self._bad_ends)))
        log.info("stopped; every worker has drained")

    # Events.

    async def _forward(
        self, kind: Literal["stop", "reload"], orders: asyncio.Queue[str], *, pause_s: float = 0.0
    ) -> None:
        """Turn orders into events, with a pause after each."""
        while True:
            self._events.put_nowait((kind, None, await orders.get()))
            await asyncio.sleep(pause_s)

    def _handle(self, kind: str, worker: Worker | None, what: object) -> None:
        """Do what an event asks for."""
        match kind, worker:
            case "report", Worker():
                self._hear(worker, what)
            case "died", Worker():
                self._bury(worker)
            case "restart", Worker():
                if not self._stops:
                    self._start_again(worker)
            case "ask", _:
                self._ask_all()
            case "reload", _:
                log.info("reloading on %s", what)
                self._tell_all(Order.RELOAD)
            case "stop", _:
                self._stop(str(what))
            case "overdue", _:
                self._kill_all("it had not ended in time")

    def _hear(self, worker: Worker, report: object) -> None:
        """Take a worker's report."""
        if isinstance(report, Failed):
            worker.last_words = report
            return
        if isinstance(report, Answer):
            worker.pulse.beat += 1
            return
        assert isinstance(report, Ready)
        worker.ready_s, worker.pulse.seen_s = self._clock(), 0.0
        if self._announced:
            log.info("%s serves again", worker)
        elif all(other.is_ready for other in self._workers) and not self._stops:
            self._announced = True
            self._on_ready(report.line)

    def _ask_later(self) -> None:
        """Ask all workers whether they are there after a while, if that is wanted."""
        if self._options.watchdog.silent_s:
            self._asked_s = self._clock()
            self._put_later(ASK_EVERY_S, "ask")

    def _ask_all(self) -> None:
        """Ask all whether they are there, and kill those that have not answered."""
        elapsed_s = min(self._clock() - self._asked_s, 2 * ASK_EVERY_S)
        watchdog = self._options.watchdog
        if self._stops:
            return
        for worker in self._workers:
            if worker.process is None or worker.killed_why:
                continue
            limit_s = watchdog.silent_s
            if not worker.is_ready:
                limit_s = max(limit_s, watchdog.opening_s)
            if is_stuck(worker.pulse, elapsed_s=elapsed_s, limit_s=limit_s):
                why = f"its event loop had not answered for {limit_s:g} s"
                log.error("%s is killed: %s", worker, why)
                _kill(worker, why)
            elif not worker.pulse.works:
                worker.pulse.beat += 1
                self._tell(worker, Order.ANSWER)
        self._ask_later()

    def _bury(self, worker: Worker) -> None:
        """See to it that a dead worker is followed by another, or that this ends."""
        process, worker.process = worker.process, None
        assert process is not None
        process.join()
        self._drop_pipe(worker)
        how, words = _how(process.exitcode, worker.killed_why), worker.last_words
        lived_s = 0.0 if worker.ready_s is None else self._clock() - worker.ready_s
        worker.ready_s, worker.last_words, worker.killed_why = None, None, ""
        if self._stops:
            if process.exitcode:
                self._bad_ends.append(f"{worker}: {words.line}" if words else f"{worker} {how}")
        elif not self._announced:
            self._start_error = _start_error(worker, how, words)
            self._stop(f"the end of {worker} before all were ready")
        else:
            why = f"{how}: {words.line}" if words else how
            self._follow(worker, why, lived_s=lived_s)

    def _follow(self, worker: Worker, why: str, *, lived_s: float) -> None:
        """Have another process in a worker's place, after a while."""
        delay_s = worker.restarts.delay_s(lived_s)
        log.error("%s %s; another follows in %.1f s", worker, why, delay_s)
        self._put_later(delay_s, "restart", worker)

    def _stop(self, why: str) -> None:
        """Drain, or cut off what drains."""
        self._stops += 1
        log.info("stopping %d workers on %s", self._options.workers, why)
        self._tell_all(Order.STOP if self._stops == 1 else Order.CUT_OFF)
        limit_s = GRACE_S + (self._options.drain_s if self._stops == 1 else 0.0)
        self._put_later(limit_s, "overdue")

    def _put_later(
        self,
        delay_s: float,
        kind: Literal["ask", "restart", "overdue"],
        worker: Worker | None = None,
    ) -> None:
        """Have an event after a while."""
        event: Event = (kind, worker, None)
        asyncio.get_running_loop().call_later(delay_s, self._events.put_nowait, event)

    # Processes.

    def _start(self, worker: Worker) -> None:
        """Start a process in a worker's place.

        Raises:
            OSError: the system has no process, memory or descriptors to spare.
        """
        ours, theirs = self._spawn.Pipe()
        with theirs, contextlib.ExitStack() as undo:
            undo.enter_context(ours)
            process = self._spawn.Process(
                target=run_worker,
                args=(self._options, worker.place, theirs),
                name=f"horace {worker}",
                daemon=True,
            )
            with _signals_held():
                process.start()
            undo.pop_all()
        worker.process, worker.pipe = process, ours
        worker.pulse = Pulse()
        loop = asyncio.get_running_loop()
        loop.add_reader(ours.fileno(), self._read, worker)
        loop.add_reader(process.sentinel, self._notice, worker, process.sentinel)

    def _start_first(self, worker: Worker) -> None:
        """Start the first process in a worker's place.

        Raises:
            StartError: the system has nothing to spare for it.
        """
        try:
            self._start(worker)
        except OSError as error:
            raise StartError(
                str(worker),
                expected="a process of its own",
                found=reason_of(error),
                mend="ask for fewer --workers, or allow more processes and descriptors",
            ) from error

    def _start_again(self, worker: Worker) -> None:
        """Start a process in a dead worker's place, or try later: the others serve."""
        try:
            self._start(worker)
        except OSError as error:
            self._follow(worker, f"cannot be started: {error}", lived_s=0.0)

    def _read(self, worker: Worker) -> None:
        """Read one report, or notice that there will be none any more."""
        assert worker.pipe is not None
        try:
            report: Report = worker.pipe.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(worker.pipe.fileno())
            return
        self._events.put_nowait(("report", worker, report))

    def _notice(self, worker: Worker, sentinel: int) -> None:
        """Notice a death, once; what it has said before comes first."""
        asyncio.get_running_loop().remove_reader(sentinel)
        while worker.pipe is not None and worker.pipe.poll():
            try:
                self._events.put_nowait(("report", worker, worker.pipe.recv()))
            except (EOFError, OSError):
                break
        self._events.put_nowait(("died", worker, None))

    def _tell_all(self, order: Order) -> None:
        """Give every worker an order."""
        for worker in self._workers:
            self._tell(worker, order)

    def _tell(self, worker: Worker, order: Order) -> None:
        """Give a worker an order, if it is still there and has not left too many unread."""
        if worker.pipe is not None and _has_room(worker.pipe):
            with contextlib.suppress(OSError):
                worker.pipe.send(order)

    def _drop_pipe(self, worker: Worker) -> None:
        """Close our end of a worker's pipe."""
        assert worker.pipe is not None
        asyncio.get_running_loop().remove_reader(worker.pipe.fileno())
        worker.pipe.close()
        worker.pipe = None

    def _kill_all(self, why: str) -> None:
        """Kill every process that has not ended."""
        for worker in self._workers:
            _kill(worker, why)


def _with_ports(options: ServeOptions, ports: contextlib.ExitStack) -> ServeOptions:
    """Hold the ports that the workers will share, and write down which they are."""
    port = ports.enter_context(held_port(options.host, options.port))
    http = options.http
    if http.port is not None:
        held = ports.enter_context(held_port(http.host or options.host, http.port))
        http = dataclasses.replace(http, port=held)
    return dataclasses.replace(options, port=port, http=http)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Start processes that hold back signals until they have handlers (`run_worker`)."""
    resource_tracker.ensure_running()  # it lets signals through again, so it goes first
    held = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _has_room(pipe: Connection) -> bool:
    """Whether to write to a pipe takes no time: one who reads no more holds up nobody."""
    poll = select.poll()
    poll.register(pipe.fileno(), select.POLLOUT)
    return bool(poll.poll(0))


def _kill(worker: Worker, why: str) -> None:
    """Kill a worker's process, if it has not ended; why, its end will tell."""
    if worker.process is not None and worker.process.is_alive():
        worker.killed_why = worker.killed_why or why
        worker.process.kill()


def _state(worker: Worker) -> str:
    """Say how a worker is."""
    if worker.process is None:
        return f"{worker} dead"
    return f"{worker} {'ready' if worker.is_ready else 'starting'}"


def _how(exit_code: int | None, killed_why: str) -> str:
    """Say how a process ended; why, where we have killed it."""
    if exit_code == -signal.SIGKILL and killed_why:
        return f"was killed, since {killed_why}"
    if exit_code is not None and exit_code < 0:
        return f"died of {signal.Signals(-exit_code).name}"
    return f"ended with status {exit_code}"


def _start_error(worker: Worker, how: str, words: Failed | None) -> HoraceError:
    """Say why a worker could not start, in its own words where it had some."""
    if words is not None:
        return UsageError(words.line) if words.bad_use else StartError(words.line)
    return StartError(str(worker), expected="one that becomes ready", found=f"one that {how}")
