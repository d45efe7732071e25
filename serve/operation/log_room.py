"""Leaves out lines of the log that its reader has no room for, instead of waiting for it.

Rules:
    A pipe whose reader hangs, or a terminal that is paused, takes no more at some point, and a
    write waits, with the event loop or the supervisor in it: the server would hang for its log.
    A pipe is pages, and a line that does not fit into the last one begins another, so that a
    quarter of its bytes may be half of them: the other half is kept for a long traceback.
    The next line that is written says how many were not.
    A reader that has gone is no matter: a write fails at once.

Source: pipe(7), poll(2).
"""

from __future__ import annotations

import array
import fcntl
import logging
import os
import select
import stat
import termios

FIELDS = "fields"
"""The attribute of a log record that holds what a line has beside its text."""


class RoomFilter(logging.Filter):
    """Lets a line through if the stream of its handler takes it at once; the last of its filters.

    Attributes:
        left_out: lines that were not written since the last that was.
    """

    def __init__(self, handler: logging.Handler) -> None:
        """Look at the stream of `handler`, if it has one, at every line."""
        super().__init__()
        self._handler = handler
        self.left_out = 0

    def __repr__(self) -> str:
        return f"<RoomFilter {self.left_out} lines left out>"

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this line is written; one that is says how many before it were not."""
        fields: dict[str, object] = getattr(record, FIELDS, {})
        told = fields.get("left_out", 0)
        assert isinstance(told, int)
        if not _has_room(self._handler):
            self.left_out += 1 + told
            return False
        if self.left_out:
            setattr(record, FIELDS, {**fields, "left_out": self.left_out + told})
            self.left_out = 0
        return True


def _has_room(handler: logging.Handler) -> bool:
    """Whether a line can be written without waiting, as far as can be told."""
    try:
        fd = handler.stream.fileno()  # type: ignore[attr-defined]  # some have none
        is_pipe = stat.S_ISFIFO(os.fstat(fd).st_mode)
    except (AttributeError, OSError, ValueError):  # none, or one that is closed
        return True
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    events = dict(poll.poll(0))
    if not is_pipe or events.get(fd, 0) & select.POLLERR:
        return bool(events)
    unread = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, unread)
    return bool(events) and unread[0] <= fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) // 4
