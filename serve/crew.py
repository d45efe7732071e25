"""A fixed number of threads at one kind of work; those that die or hang are replaced.

Rules:
    Whatever ends a thread, another takes its place; what it was at is reported as lost, so
    that whoever waits for it is told.
    A thread that hangs cannot be ended. It is given up: its work is reported as lost, and
    another takes its place, as long as no more hang than the crew has members; beyond that
    the crew is short. One that comes back finds itself given up and ends, and where the
    crew is short a new one takes the place.
    Members that were given up change nothing any more: they ask `given_up` under the lock of
    whoever they work for.
    Threads are daemons: nothing stuck here keeps the process from ending.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from serve.watchdog import Pulse, is_stuck

log = logging.getLogger("horace.serve")


class Member:
    """One thread of a crew.

    Attributes:
        name: the thread's.
        pulse: what the watchdog looks at.
        work: what it is at; None while it waits.
        given_up: whether it died or hangs, and is counted on no more.
        hangs: whether it hangs.
    """

    __slots__ = ("given_up", "hangs", "name", "pulse", "thread", "work")

    def __init__(self, name: str) -> None:
        self.name = name
        self.pulse = Pulse()
        self.work: Any = None
        self.given_up = self.hangs = False
        self.thread: threading.Thread | None = None

    def __repr__(self) -> str:
        state = "given up" if self.given_up else "at work" if self.pulse.works else "waiting"
        return f"<Member {self.name} {state}>"

    def begin(self, work: object) -> None:
        """Note that it is at `work` now."""
        self.work = work
        self.pulse.beat += 1

    def go_on(self) -> None:
        """Note that a piece of its work is done, and that it is at the next."""
        self.pulse.beat += 2

    def end(self) -> None:
        """Note that it waits for more."""
        self.pulse.beat += 1
        self.work = None


class Crew:
    """Threads that run `work`, each with itself as the argument, until closed."""

    def __init__(
        self,
        work: Callable[[Member], None],
        *,
        size: int,
        name: str,
        on_lost: Callable[[Member], None],
        on_trouble: Callable[[], None],
    ) -> None:
        """Start the threads, called `name`-0, `name`-1 and so on.

        Args:
            work: returns when the crew is closed, or when its member was given up.
            size: how many threads.
            name: how they are called.
            on_lost: told of a member that died or was given up, before it is replaced; what it
                was at is in `work`.
            on_trouble: told after that.
        """
        self.size = size
        self.name = name
        self._work = work
        self._on_lost = on_lost
        self._on_trouble = on_trouble
        self._lock = threading.Lock()
        self._members: list[Member] = []
        self._hanging: set[Member] = set()
        self._started = 0
        self._closing = False
        self._fill()

    def __repr__(self) -> str:
        hanging = f", {len(self._hanging)} hanging" if self._hanging else ""
        return f"<Crew {self.name} {len(self._members)}/{self.size} threads{hanging}>"

    @property
    def present(self) -> int:
        """How many members there are that do not hang."""
        return len(self._members)

    def dismiss(self) -> None:
        """Replace nobody any more: `work` is about to return."""
        with self._lock:
            self._closing = True

    def join(self, timeout_s: float | None) -> bool:
        """Wait for each thread to end; whether all did in time."""
        with self._lock:
            members = [*self._members, *self._hanging]
        threads = [member.thread for member in members if member.thread is not None]
        for thread in threads:
            thread.join(timeout_s)
        return not any(thread.is_alive() for thread in threads)

    def look(self, *, elapsed_s: float, limit_s: float) -> None:
        """Replace members that have died or hang; see `serve.watchdog`."""
        with self._lock:
            if self._closing:
                return
            members = list(self._members)
        lost = False
        for member in members:
            if member.thread is None or not member.thread.is_alive():
                lost |= self._lose(member, hangs=False)
            elif is_stuck(member.pulse, elapsed_s=elapsed_s, limit_s=limit_s):
                log.error("thread %s has been at one piece for over %g s", member.name, limit_s)
                lost |= self._lose(member, hangs=True)
        self._fill()
        if lost:
            self._on_trouble()

    def _run(self, member: Member) -> None:
        """Work until the end, whatever that is."""
        try:
            self._work(member)
        except BaseException:
            log.exception("thread %s failed", member.name)
            self._lose(member, hangs=False)
            self._fill()
            self._on_trouble()
            return
        with self._lock:
            self._hanging.discard(member)
            if member in self._members:
                self._members.remove(member)
        self._fill()

    def _lose(self, member: Member, *, hangs: bool) -> bool:
        """Count on a member no more; whether it was one."""
        with self._lock:
            self._hanging.discard(member)
            if member not in self._members:
                return False
            self._members.remove(member)
            member.given_up = True
            member.hangs = hangs
            if hangs:
                self._hanging.add(member)
        try:
            self._on_lost(member)
        except Exception:
            log.exception("what thread %s was at could not be reported as lost", member.name)
        return True

    def _fill(self) -> None:
        """Start as many threads as are missing."""
        with self._lock:
            while not self._closing and len(self._members) < self.size:
                if len(self._hanging) > self.size:
                    return  # each holds memory, and perhaps a core
                member = Member(f"{self.name}-{self._started}")
                member.thread = threading.Thread(
                    target=self._run, args=(member,), name=member.name, daemon=True
                )
                self._members.append(member)  # before it can answer: it is present then
                try:
                    member.thread.start()
                except RuntimeError:  # no more threads to be had; the next look tries again
                    log.exception("thread %s cannot be started", member.name)
                    self._members.remove(member)
                    return
                self._started += 1
