"""Values read from files, and read again when the files change: certificates and keys.

Rules:
    What is read first must be right; what is read later replaces it only if it is right too.
    Else the log says why, once a change, it is counted, and the old value goes on.
    A change is taken when the files have been still from one look to the next: who writes
    two files, or one slowly, is not read half way. `reload` reads at once. A change of who
    may read a file is one, too.
    Looking is cheap (a `stat` a file), so it is done by a thread rather than by inotify,
    which would miss files that are mounted or linked anew, as Kubernetes does.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from models.errors import HoraceError

log = logging.getLogger("horace.serve")

Value = TypeVar("Value")

LOOK_EVERY_S = 0.5
"""Seconds between two looks; a change is taken after one to two of them."""


class Reloadable(Generic[Value]):
    """A value of some files. `look` and `reload` belong to one thread at a time."""

    def __init__(self, what: str, paths: Sequence[str], read: Callable[[], Value]) -> None:
        """Read the value.

        Args:
            what: its name in the log.
            paths: the files that it is made of.
            read: makes it anew.

        Raises:
            HoraceError: what `read` raises.
        """
        self.what = what
        self._paths = tuple(paths)
        self._read = read
        self._refusals = 0
        self._lock = threading.Lock()
        self._taken = self._seen = self._sign()
        self._value = read()

    def __repr__(self) -> str:
        return f"<Reloadable {self.what}>"

    @property
    def value(self) -> Value:
        """The last value that was right."""
        return self._value

    def refusals(self) -> int:
        """Give how many changes `look` has not taken so far."""
        return self._refusals

    def look(self) -> None:
        """Read again if the files have changed, and not since the last look; log how it went."""
        signature = self._sign()
        is_still, self._seen = signature == self._seen, signature
        if not is_still or signature == self._taken:
            return
        try:
            self.reload()
        except HoraceError as error:
            self._refusals += 1
            log.error("%s: not taken, the old goes on: %s", self.what, error)
        else:
            log.info("%s: read again", self.what)

    def reload(self) -> None:
        """Read again now.

        Raises:
            HoraceError: it is not right; the old value goes on.
        """
        with self._lock:
            self._taken = self._sign()
            self._value = self._read()

    def _sign(self) -> tuple[tuple[int, int, int, int] | None, ...]:
        """Tell the files' present content from another, without reading it."""
        return tuple(map(_sign, self._paths))


def _sign(path: str) -> tuple[int, int, int, int] | None:
    """Tell one file's content and modes from another's; None where there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


class RereadThread:
    """A thread that has some reloadables look, until it is closed."""

    def __init__(
        self, watched: Sequence[Reloadable[Any]], *, every_s: float = LOOK_EVERY_S
    ) -> None:
        self._watched = tuple(watched)
        self._every_s = every_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="reload", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """End the thread."""
        self._closing.set()
        self._thread.join(timeout_s)

    def _watch(self) -> None:
        """Look, and look again; nothing ends this but `close`."""
        while not self._closing.wait(self._every_s):
            for watched in self._watched:
                try:
                    watched.look()
                except Exception:
                    log.exception("%r: looking failed; it goes on", watched)
