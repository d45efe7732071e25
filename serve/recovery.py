"""Ready again after trouble: only once a real inference has gone through the pipeline.

Rules:
    Trouble is a thread that died or hangs, in any pool or any model that is offered, or such a
    model that is remote and has become another encoder. From then on the server is not ready,
    until a probe has passed that began after the last trouble.
    A probe that fails or takes too long is tried again at intervals, as long as it takes.
    A model that is remote and does not answer is trouble of its own, of which the server stays
    ready for the others: it has a `Recovery` beside, or callers who see that the model is not
    ready would keep it so.
    The trouble is logged where it was found; here the log has one line when it is over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger("horace.serve")

PROBE_S = 30.0
"""How long a probe may take."""


class Recovery:
    """Whether there was trouble that is not known to be over. Belongs to one event loop."""

    def __init__(
        self,
        probe: Callable[[], Awaitable[None]],
        *,
        on_change: Callable[[], None],
        every_s: float = 1.0,
        what: str = "",
        over: str = "ready again: an image went through every model",
    ) -> None:
        """Have no trouble yet.

        Args:
            probe: sends something through the whole pipeline, or raises.
            on_change: told when `in_trouble` has changed.
            every_s: how long to wait after a probe that failed.
            what: begins the lines of the log.
            over: what the log says when it is over.
        """
        self._probe = probe
        self._on_change = on_change
        self._every_s = every_s
        self._what, self._over = what, over
        self._troubles = self._overcome = 0
        self._is_closed = False
        self._probing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        state = "in trouble" if self.in_trouble else "well"
        return f"<Recovery {state}, {self._troubles} so far>"

    @property
    def in_trouble(self) -> bool:
        """Whether no probe has passed since the last trouble."""
        return self._troubles > self._overcome

    def note_trouble(self) -> None:
        """Hear of trouble; be ready no more until a probe has passed."""
        if self._is_closed:
            return
        self._troubles += 1
        self._on_change()
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._recover())

    def close(self) -> None:
        """Probe no more."""
        self._is_closed = True
        if self._probing is not None:
            self._probing.cancel()

    async def _recover(self) -> None:
        """Probe until it passes."""
        failed = ""
        while self.in_trouble:
            seen = self._troubles
            try:
                await asyncio.wait_for(self._probe(), PROBE_S)
            except Exception as error:
                if failed != (failed := f"{type(error).__name__}: {error}"):
                    log.warning("%snot ready yet: %s", self._what, failed)
                await asyncio.sleep(self._every_s)
            else:
                self._overcome = seen
        log.info("%s%s", self._what, self._over)
        self._on_change()
