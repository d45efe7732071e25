"""The log: who reads it decides its form, and a request that failed or was slow has a line.

Rules:
    The log is stderr's and nobody else's; stdout has the line that says ready.
    A request has one line at most, where it is over: at WARNING where the server is at
    fault, at INFO where the caller is or where it was slow, at DEBUG otherwise.
    Nobody waits for who reads it: see `log_room`.
    Under overload the log does not become the load: beyond some lines a second the rest are
    counted, and the next line says how many were left out. Lines about requests have one such
    account; each warning or error of the server, by the place that logs it, has one of its own.
    Those of a library, which callers may provoke, and which it may repeat for as long as the
    descriptors are all in use, have one by logger and level, of as many lines in a minute.
    What was promised is written all the same: each incident that a caller was told of, each
    model that was refused. Beyond those lines it has no traceback.
    A line carries names, counts and times; never image bytes, keys or metadata. What a
    caller wrote freely, such as its request id, is cut and printable.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable

import grpc

from serve.operation.log_room import FIELDS, RoomFilter
from serve.operation.observer import Call, Nobody
from serve.operation.options import LogOptions
from serve.security.caller import REQUEST_ID_KEY

log = logging.getLogger("horace.request")

LINES_PER_S = 20
"""Lines of one account in one second; what fails more often than this has one cause."""

LIBRARY_S = 60.0
"""In how many seconds a library may write as many."""

SERVER_LOG = "horace.serve"

IN_MESSAGE = ("method", "code")
"""Fields of which the text of a line about a request is made."""

TEXT_FORMAT = "%(asctime)s %(levelname)s %(message)s"
WORKER_FORMAT = "%(asctime)s %(levelname)s [worker {worker}] %(message)s"

LEVELS: dict[grpc.StatusCode, int] = {
    grpc.StatusCode.OK: logging.DEBUG,
    grpc.StatusCode.INTERNAL: logging.WARNING,
    grpc.StatusCode.UNKNOWN: logging.WARNING,
}
"""How much a line about a call that ended so matters; others are INFO, as is a slow one."""


class JsonFormatter(logging.Formatter):
    """Writes a record as an object on one line."""

    def __init__(self, worker: int | None = None) -> None:
        """Write which worker it is, where there are several."""
        super().__init__()
        self._who = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        """Write time, level, logger and text, then the record's own fields."""
        entry: dict[str, object] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._who,
        }
        entry.update(getattr(record, FIELDS, {}))
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class TextFormatter(logging.Formatter):
    """Writes a record as a line for people, its fields after its text."""

    def __init__(self, worker: int | None = None) -> None:
        """Write which worker it is, where there are several."""
        super().__init__(TEXT_FORMAT if worker is None else WORKER_FORMAT.format(worker=worker))

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Write the line, and `name=value` for each field that it does not say itself."""
        fields = getattr(record, FIELDS, {})
        further = (f"{k}={v}" for k, v in fields.items() if k not in IN_MESSAGE)
        parts = [super().formatMessage(record), *further]
        return " ".join(parts)


def set_up_logs(
    options: LogOptions,
    handlers: Iterable[logging.Handler] | None = None,
    *,
    worker: int | None = None,
) -> None:
    """Give the log its form and its level.

    Args:
        options: which.
        handlers: those to change; the root logger's, which write to stderr, where None.
        worker: which of several processes this is, for every line to say.
    """
    formatter: logging.Formatter
    formatter = JsonFormatter(worker) if options.log_format == "json" else TextFormatter(worker)
    for handler in logging.getLogger().handlers if handlers is None else handlers:
        handler.setFormatter(formatter)
        handler.addFilter(RateFilter())
        handler.addFilter(RoomFilter(handler))
    logging.getLogger("horace").setLevel(options.log_level.upper())


def is_of_somebody(record: logging.LogRecord) -> bool:
    """Whether a line is no traceback of a reply that could not be sent: its caller has gone.

    grpcio writes one where it has not heard of that yet; no other fault has this class.
    """
    return not (record.exc_info and isinstance(record.exc_info[1], grpc.aio.InternalError))


class LineBudget:
    """Gives each account `LINES_PER_S` lines in a second, or in another span.

    Attributes:
        left_out: lines of each account that were not written since its last.
    """

    def __init__(self, clock: Callable[[], float], *, span_s: float = 1.0) -> None:
        """Count nothing yet; `clock` gives monotonic seconds."""
        self._clock = clock
        self._span_s = span_s
        self._span_began_s = clock()
        self._lines: Counter[Hashable] = Counter()
        self.left_out: Counter[Hashable] = Counter()

    def has_room(self, account: Hashable) -> bool:
        """Whether this second, or other span, may have another line."""
        if (now_s := self._clock()) - self._span_began_s >= self._span_s:
            self._span_began_s = now_s
            self._lines.clear()
        self._lines[account] += 1
        return self._lines[account] <= LINES_PER_S


class RateFilter(logging.Filter):
    """Lets each account log at most `LINES_PER_S` of its warnings and errors.

    An account is a place of the server's, or, for a minute, a library's logger at one level.
    Those that are `serve.errors.PROMISED` lose their traceback instead. `RequestLog` bounds its
    own.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Count nothing yet; `clock` gives monotonic seconds."""
        super().__init__()
        self._ours = LineBudget(clock)
        self._of_libraries = LineBudget(clock, span_s=LIBRARY_S)

    def __repr__(self) -> str:
        left_out = self._ours.left_out.total() + self._of_libraries.left_out.total()
        return f"<RateFilter {left_out} lines left out>"

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this line is written; one that is says how many before it were not."""
        if record.name == log.name or record.levelno < logging.WARNING:
            return True
        is_ours = record.name == SERVER_LOG
        if not is_ours and not is_of_somebody(record):
            return False
        account = (record.pathname, record.lineno) if is_ours else (record.name, record.levelno)
        budget = self._ours if is_ours else self._of_libraries
        if not budget.has_room(account):
            if getattr(record, "promised", False):
                record.exc_info = record.exc_text = None
                return True
            budget.left_out[account] += 1
            return False
        if left_out := budget.left_out.pop(account, 0):
            setattr(record, FIELDS, {**getattr(record, FIELDS, {}), "left_out": left_out})
        return True


class RequestLog(Nobody):
    """An observer that writes the lines about requests."""

    def __init__(self, options: LogOptions, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Write what `options` ask for, at most `LINES_PER_S`."""
        self._slow_s = options.log_slow_s
        self._budget = LineBudget(clock)

    def __repr__(self) -> str:
        return f"<RequestLog {self._budget.left_out.total()} lines left out>"

    def answered(self, call: Call, total_s: float) -> None:
        """Write a line about a call, if it is worth one."""
        level = LEVELS.get(call.code, logging.INFO)
        if total_s >= self._slow_s:
            level = max(level, logging.INFO)
        if not log.isEnabledFor(level):
            return
        if not self._budget.has_room(log.name):
            self._budget.left_out[log.name] += 1
            return
        fields = describe(call, total_s)
        if left_out := self._budget.left_out.pop(log.name, 0):
            fields["left_out"] = left_out
        log.log(level, "%s %s", call.method, call.code.name, extra={FIELDS: fields})


def describe(call: Call, total_s: float) -> dict[str, object]:
    """Say what is worth knowing about a call, in few words."""
    fields: dict[str, object] = {
        "request_id": request_id_to_log(call),
        "client": printable(call.client),
        "method": call.method,
        "code": call.code.name,
        "model": printable(call.model),
        "images": call.images,
        "total_ms": _ms(total_s),
    }
    if (embedded := call.embedded) is not None:
        fields["failed_images"] = len(embedded.errors) - len(embedded.vectors_ND)
        fields["decode_ms"] = _ms(embedded.decode_s)
        fields["queue_ms"] = _ms(embedded.queue_s)
        fields["inference_ms"] = _ms(embedded.inference_s)
    if call.search_s:
        fields["search_ms"] = _ms(call.search_s)
    if call.message:
        fields["error"] = printable(call.message, most=300)
    return {name: value for name, value in fields.items() if value != ""}


def request_id_to_log(call: Call) -> str:
    """Give the caller's name for a request, from the message or the metadata.

    One that has none is given one, which it keeps: the log and a trace are to have the same.
    """
    if not call.request_id:
        call.request_id = _id_in(call.metadata() or ()) or secrets.token_hex(8)
    return printable(call.request_id)


def _id_in(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """Give the id that came with a request; empty where none did."""
    for key, value in metadata:
        if key == REQUEST_ID_KEY and isinstance(value, str):
            return value
    return ""


def printable(text: str, *, most: int = 128) -> str:
    """Make text of a caller's fit for a line of the log."""
    return re.sub(r"[^\x20-\x7e]+", "?", text[:most])


def _ms(seconds: float) -> float:
    """Give milliseconds, to the microsecond."""
    return round(seconds * 1e3, 3)


def _utc(created_s: float) -> str:
    """Write a time in ISO 8601, in milliseconds and UTC."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created_s))
    return f"{whole}.{int(created_s % 1 * 1000):03d}Z"
