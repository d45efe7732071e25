"""The errors of the server and its client, and what each is called in gRPC.

Rules:
    An exception knows nothing of gRPC; one table gives its status code.
    Only a message that was written for the caller reaches the caller: an exception that the
    table does not name becomes INTERNAL with an incident number, and the log has the rest.
    No reply carries a path or a stack trace, or a message so long that gRPC loses the
    status with it.
"""

from __future__ import annotations

import logging
import math
import re
import secrets

import grpc

from models.errors import FingerprintMismatchError, HoraceError, UsageError
from serve.forecast import Forecast

log = logging.getLogger("horace.serve")


MAX_MESSAGE_BYTES = 2000
"""Of a status's message, in UTF-8; gRPC takes three bytes for one where it is not ASCII, and
refuses trailers from 8 KiB on."""


STOPPING = "the server is stopping"
"""How the line of a server that drains begins, so that a client can tell it from none."""


RETRY_KEYS = ("retry-after-ms", "grpc-retry-pushback-ms")
"""Trailing metadata that says when to come back.

Source of the second: gRFC A6, https://github.com/grpc/proposal/blob/master/A6-client-retries.md
"""


RETRY_AFTER_S = 1.0
"""When to come back for what other calls hold: they end within about that, and no more is known."""


PROMISED = {"promised": True}
"""`extra` of a line of the log that is found nowhere else, or that a caller was told of: it is
written however many of its kind there are (`serve.operation.logs`)."""


class ServeError(HoraceError):
    """Base of the errors of `serve`.

    Attributes:
        retry_after_s: when a call may do better, where the server says so; negative: never.
    """

    retry_after_s: float | None = None


class RequestError(ServeError):
    """A request that cannot be meant."""


class UnknownNameError(ServeError):
    """A model, a collection or an id that is not there."""


class UnauthenticatedError(ServeError):
    """A call without a key that this server knows."""


class PreconditionError(ServeError):
    """A request that this server, as it is set up, cannot serve."""


class QueueFullError(ServeError):
    """No room for this request now; `retry_after_s` says when there may be, where known."""

    def __init__(
        self,
        what: str,
        *,
        expected: str | None = None,
        found: str | None = None,
        mend: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(what, expected=expected, found=found, mend=mend)
        self.retry_after_s = retry_after_s


class DeadlineError(ServeError):
    """The caller's deadline passed before there was a reply, or would have.

    Attributes:
        forecast: how long a reply would have taken, where that was known.
    """

    forecast: Forecast | None = None


class UnavailableError(ServeError):
    """A server that does not answer, or that takes no more requests."""


class CancelledError(ServeError):
    """A call that its caller ended."""


class InternalError(ServeError):
    """A fault of the server; its log says more."""


class FailedItemsError(ServeError):
    """Images or queries of a call that have no result, where all were needed."""


class StartError(ServeError):
    """A server that cannot start as it was asked to."""


STATUS_CODES: dict[type[HoraceError], grpc.StatusCode] = {
    RequestError: grpc.StatusCode.INVALID_ARGUMENT,
    UsageError: grpc.StatusCode.INVALID_ARGUMENT,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    UnknownNameError: grpc.StatusCode.NOT_FOUND,
    PreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    FingerprintMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    CancelledError: grpc.StatusCode.CANCELLED,
    InternalError: grpc.StatusCode.INTERNAL,
}
"""What the server answers; the first entry of a code is also what the client raises."""


def to_status(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """Give the status code and the message with which a call ends."""
    for kind in type(error).__mro__:
        if code := STATUS_CODES.get(kind):
            # Cut first, as a caller's own text may be long; each path may grow by a few letters.
            return code, _cut(without_paths(_cut(str(error))))
    incident = secrets.token_hex(4)
    kind_name = type(error).__name__
    log.error("incident %s: %s", incident, kind_name, exc_info=error, extra=PROMISED)
    return (
        grpc.StatusCode.INTERNAL,
        f"internal error; the server's log has it as incident {incident}",
    )


def without_paths(text: str) -> str:
    """Leave of every path in a text its last part: where things lie is nobody's business.

    Errors that are written for callers name no paths, and why something could not be loaded
    is told to none of them; this is for what comes to one by an oversight. Where a path ends
    cannot always be told: of one with spaces a word may be left.
    """
    if "/" not in text:  # a refusal under load is not to cost a search
        return text
    return _PATH.sub(_leave_last, text)


def _leave_last(path: re.Match[str]) -> str:
    """Give the last part of a path."""
    return ".../" + path[0].rstrip("/").rpartition("/")[2]


_PATH = re.compile(
    r"""(?<![\w./:~-])
    (?: (?:file:/{0,2})? ~? (?:/+[\w.@+~=-]++){2,}+ /*+   # from the root, or from a home
      | (?<!['"]) ~? /+[\w.@+~=-]++ /*+                   # just below it
      | (?<![@+=]) [\w.@+~=-]++
        (?: (?:/+[\w.@+~=-]++){2,}+ /*+                   # through a directory to another
          | /+[\w@+~=-]*+\.[A-Za-z]\w{0,7} (?![\w/]) )    # to a file with a suffix
    )""",
    re.VERBOSE,
)
"""What a caller wrote is searched, too, so this looks at no character more than a few times: what
is read of a part is not given back (`++`), and where it could begin again, it asks for a slash."""


def retry_after_ms(error: BaseException) -> int | None:
    """Give the whole milliseconds after which a refused call may be tried again."""
    if isinstance(error, QueueFullError | DeadlineError) and error.retry_after_s is not None:
        return math.ceil(error.retry_after_s * 1e3)
    return None


def retry_metadata(error: BaseException) -> tuple[tuple[str, str], ...]:
    """Give the trailing metadata of a refusal: ours, and what gRPC's own retries obey."""
    if (after_ms := retry_after_ms(error)) is None:
        return ()
    return tuple((key, str(after_ms)) for key in RETRY_KEYS)


def _cut(message: str) -> str:
    """Cut a message to `MAX_MESSAGE_BYTES`; what it costs has the same bound."""
    encoded = message[: MAX_MESSAGE_BYTES + 1].encode(errors="replace")
    if len(encoded) <= MAX_MESSAGE_BYTES:
        return message
    return encoded[:MAX_MESSAGE_BYTES].decode(errors="ignore") + "..."


def from_status(code: grpc.StatusCode, message: str) -> ServeError:
    """Give the exception that a client raises for a call that ended with `code`."""
    for kind, known in STATUS_CODES.items():
        if known is code and issubclass(kind, ServeError):
            return kind(message)
    return InternalError(f"{code.name}: {message}")
