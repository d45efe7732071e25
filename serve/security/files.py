"""Values read from files, and read again when the files change: certificates and keys.

Rules:
    What is read first must be right; what is read later replaces it only if it is right too.
    Else the log says why, once a change, it is counted, and the old value goes on.
    What the system does not give is no answer: every look asks again, so that a key which
    was taken back does not stay for want of a descriptor. Each reason is told once a change.
    A change is taken when the files have been still from one look to the next: who writes
    two files, or one slowly, is not read half way. `reload` reads at once. A change of who
    may read a file is one, too.
    Nothing is waited for: a pipe in the place of a file is refused.
    Looking is cheap (a `stat` a file), so it is done by a thread rather than by inotify,
    which would miss files that are mounted or linked anew, as Kubernetes does.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from models.errors import HoraceError, reason_of
from models.files import open_regular
from serve.errors import StartError

log = logging.getLogger("horace.serve")

Value = TypeVar("Value")

LOOK_EVERY_S = 0.5
"""Seconds between two looks; a change is taken after one to two of them."""


MAX_FILE_BYTES = 16 << 20
"""Of a file, unless it has a bound of its own: what was put in its place by mistake is not read."""


class UnreadableError(StartError):
    """A file that the system does not give now; another time it may."""


def read_file(
    what: str, path: str | Path, *, max_bytes: int = MAX_FILE_BYTES, mend: str | None = None
) -> bytes:
    """Read a file whole; of a link, the one that it leads to.

    Args:
        what: its name in an error.
        path: where it is.
        max_bytes: that it may have.
        mend: what to do where there is none.

    Raises:
        UnreadableError: there is none, it is no regular file, or the system does not give it.
        StartError: it is larger.
    """
    try:
        with os.fdopen(open_regular(Path(path), os.O_RDONLY), "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise UnreadableError(
            what,
            expected="a file that can be read",
            found=reason_of(error),
            mend=mend if isinstance(error, FileNotFoundError) else None,
        ) from error
    if len(content) > max_bytes:
        raise StartError(what, expected=f"at most {max_bytes} bytes", found="more")
    return content


class Reloadable(Generic[Value]):
    """A value of some files. `look` and `reload` belong to one thread at a time."""

    def __init__(self, what: str, paths: Sequence[str], read: Callable[[], Value]) -> None:
        """Read the value.

        Args:
            what: its name in the log.
            paths: the files that it is made of.
            read: makes it anew; raises `UnreadableError` for what is to be tried again.

        Raises:
            HoraceError: what `read` raises.
        """
        self.what = what
        self._paths = tuple(paths)
        self._read = read
        self._refusals = 0
        self._said: set[str] = set()
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
        """Give how often `look` has told so far why it did not take a change."""
        return self._refusals

    def look(self) -> None:
        """Read again if the files have changed, and not since the last look; log how it went."""
        signature = self._sign()
        is_still, self._seen = signature == self._seen, signature
        if not is_still:
            self._said.clear()
        if not is_still or signature == self._taken:
            return
        try:
            self.reload()
        except HoraceError as error:
            self._refuse(str(error))
        else:
            log.info("%s: read again", self.what)

    def _refuse(self, reason: str) -> None:
        """Tell and count why a change is not taken, unless that was told of it."""
        if reason not in self._said:
            self._said.add(reason)
            self._refusals += 1
            log.error("%s: not taken, the old goes on: %s", self.what, reason)

    def reload(self) -> None:
        """Read again now.

        Raises:
            HoraceError: it is not right, or cannot be read; the old value goes on.
        """
        with self._lock:
            before, self._taken = self._taken, self._sign()
            try:
                self._value = self._read()
            except UnreadableError:
                self._taken = before  # what is there is not known: the next look asks again
                raise

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
