"""What a worker and its supervisor tell each other, over a pipe."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Order(enum.Enum):
    """What a supervisor tells a worker; the end of the pipe is an order to drain, too."""

    STOP = "stop"
    CUT_OFF = "cut off"
    RELOAD = "reload"
    ANSWER = "answer"


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A worker serves.

    Attributes:
        line: says where and what, as for a single server.
    """

    line: str


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A worker ends with an error that a person can mend.

    Attributes:
        line: the error.
        bad_use: whether the options are at fault.
    """

    line: str
    bad_use: bool


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A worker's event loop turns: it has come to `Order.ANSWER`."""


Report = Ready | Failed | Answer
