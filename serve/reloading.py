"""What is read again when an operator says so (SIGHUP): bundles, certificates, keys.

Rules:
    Whoever reads files at the start registers a hook that reads them again.
    A hook that fails changes nothing of its own, or says what it has changed all the same, and
    does not keep the others from running; its failure is logged in one line and counted. Whoever
    reads files by itself, too, counts what it refuses, and that is added.
    One reload at a time; one that is asked for meanwhile follows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from models.errors import HoraceError

log = logging.getLogger("horace.serve")

Hook = Callable[[], Awaitable[None]]


class PartialReloadError(HoraceError):
    """Some of what a hook reads is as it was, and some was read again: it says which."""


@dataclass(frozen=True, kw_only=True)
class ReloadStatistics:
    """What has been read again since the start.

    Attributes:
        runs: how often everything was.
        failures: how often what could not be read, by name; 0 where it always could.
    """

    runs: int
    failures: dict[str, int]


class Reloads:
    """The hooks of one server. Belongs to one event loop."""

    def __init__(self) -> None:
        """Start with none."""
        self._hooks: dict[str, Hook] = {}
        self._refusals: dict[str, Callable[[], int]] = {}
        self._running = asyncio.Lock()
        self._runs = 0
        self._failures: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<Reloads of {', '.join(self._hooks) or 'nothing'}>"

    def register(self, what: str, hook: Hook, refusals: Callable[[], int] = lambda: 0) -> None:
        """Have `hook` read `what` again at every reload, in the order of registration.

        Args:
            what: its name in the log and in the counts.
            hook: reads it.
            refusals: how often it could not be read between reloads, so far.
        """
        assert what not in self._hooks
        self._hooks[what] = hook
        self._refusals[what] = refusals
        self._failures[what] = 0

    def statistics(self) -> ReloadStatistics:
        """Give the counts so far."""
        failures = {what: n + self._refusals[what]() for what, n in self._failures.items()}
        return ReloadStatistics(runs=self._runs, failures=failures)

    async def run(self) -> list[str]:
        """Read everything again.

        Returns:
            What could not be read, or not all of it.
        """
        async with self._running:
            failed = [what for what, hook in self._hooks.items() if not await _runs(what, hook)]
            self._runs += 1
            for what in failed:
                self._failures[what] += 1
            return failed


async def _runs(what: str, hook: Hook) -> bool:
    """Run a hook; whether it went well."""
    try:
        await hook()
    except PartialReloadError as error:
        log.error("reload of %s refused in part: %s", what, error)
        return False
    except HoraceError as error:
        log.error("reload of %s refused, what was there stays: %s", what, error)
        return False
    except Exception:
        log.exception("reload of %s failed in our own code, what was there stays", what)
        return False
    log.info("reloaded %s", what)
    return True
