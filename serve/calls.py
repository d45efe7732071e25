"""Counts the calls under way, for every service and protocol of one server.

Rules:
    One account: the drain of a server ends when nothing that any service answers is left.
    A call is under way until its handler returns, and sends its reply until its task ends, so
    far as that is told: grpcio's ends when the flow control of HTTP/2 has let all of it out.
    A call is accepted once: what was begun, its body included, is answered by a drain.
    After `drain` new calls are refused as UNAVAILABLE; streams read no more, answer what
    they have read, and end so, too.

Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from serve.bracket import Bracket
from serve.errors import STOPPING, UnavailableError


class AcceptedEarly:
    """The context of a call that was accepted, and is counted, before a service sees it."""


class Calls:
    """The calls that a server has under way."""

    def __init__(self) -> None:
        """Start with none."""
        self._active = 0
        self._accepted = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._streams: set[Callable[[], None]] = set()
        self._senders: set[asyncio.Task[Any]] = set()
        self._counted = Bracket(self._begin, self._end)

    def __repr__(self) -> str:
        return f"<Calls {'draining' if self._draining else 'open'} active={self._active}>"

    @property
    def active(self) -> int:
        """Calls that are under way."""
        return self._active

    @property
    def sending(self) -> int:
        """Calls that send their reply."""
        return len(self._senders)

    @property
    def draining(self) -> bool:
        """Whether new calls are refused."""
        return self._draining

    @property
    def accepted(self) -> int:
        """Calls that were not refused for draining, since the start."""
        return self._accepted

    def check_open(self) -> None:
        """Accept a new call, or refuse it once the server drains.

        Raises:
            UnavailableError: it does.
        """
        if self._draining:
            raise UnavailableError(f"{STOPPING}; call another")
        self._accepted += 1

    def drain(self) -> None:
        """Refuse new calls and end streams; calls that are under way are answered."""
        self._draining = True
        for cut_short in tuple(self._streams):
            cut_short()

    async def wait_idle(self) -> None:
        """Wait until no call is under way."""
        await self._idle.wait()

    def send_reply(self) -> None:
        """Count the call that this task answers as sending until the task ends."""
        task = asyncio.current_task()
        assert task is not None, "every front end answers a call in a task"
        self._senders.add(task)
        task.add_done_callback(self._senders.discard)

    @contextmanager
    def accepted_early(self) -> Iterator[None]:
        """Accept a call and count it as under way, before a service sees its `AcceptedEarly`.

        Raises:
            UnavailableError: the server drains.
        """
        self.check_open()
        with self._counted:
            yield

    def counted(self) -> AbstractContextManager[None]:
        """Count a call as under way."""
        return self._counted

    def _begin(self) -> None:
        """Count one more."""
        self._active += 1
        self._idle.clear()

    def _end(self) -> None:
        """Count one less."""
        self._active -= 1
        if not self._active:
            self._idle.set()

    @contextmanager
    def reading(self, cut_short: Callable[[], None]) -> Iterator[None]:
        """Accept a stream, and have it cut short when the server drains, or drains already."""
        self._streams.add(cut_short)
        if self._draining:
            cut_short()
        else:
            self._accepted += 1
        try:
            yield
        finally:
            self._streams.discard(cut_short)
