from __future__ import annotations

import contextlib
import io
import json
import logging
import os

import grpc
import numpy as np
import pytest

from models.errors import UsageError
from models.wire import image_to_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc
from serve.errors import to_status
from serve.job import Embedded
from serve.operation.log_room import RoomFilter
from serve.operation.logs import (
    LINES_PER_S,
    JsonFormatter,
    RateFilter,
    RequestLog,
    TextFormatter,
    describe,
    printable,
    request_id_to_log,
    set_up_logs,
)
from serve.operation.observer import Call
from serve.operation.options import LogOptions

OK, INTERNAL = grpc.StatusCode.OK, grpc.StatusCode.INTERNAL
FULL = grpc.StatusCode.RESOURCE_EXHAUSTED


class Clock:
    """A clock that tests turn."""

    now_s = 100.0

    def __call__(self) -> float:
        """Tell the time."""
        return self.now_s


@pytest.fixture
def lines():
    """A function that gives the log's lines so far, as objects."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    log = logging.getLogger("horace.request")
    level = logging.getLogger("horace").level
    log.addHandler(handler)

    def read(options: LogOptions | None = None) -> list[dict[str, object]]:
        if options:
            set_up_logs(options, [handler])
        return [json.loads(line) for line in stream.getvalue().splitlines()]

    yield read
    log.removeHandler(handler)
    logging.getLogger("horace").setLevel(level)


def call(code=OK, **fields) -> Call:
    """A call that is over."""
    return Call(method="Embed", arrived_s=0.0, code=code, **fields)


def record(text="it happened", **extra) -> logging.LogRecord:
    """A record of the log."""
    made = logging.LogRecord("horace.serve", logging.INFO, "f", 1, text, (), None)
    made.created = 1_800_000_000.25
    made.__dict__.update(extra)
    return made


def test_json_is_one_object_a_line_whatever_the_text():
    """Line breaks and quotes in a message do not break the line."""
    line = JsonFormatter().format(record('two\nlines "quoted"', fields={"model": "m"}))
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2027-01-15T08:00:00.250Z",
        "level": "info",
        "logger": "horace.serve",
        "message": 'two\nlines "quoted"',
        "model": "m",
    }


def test_json_has_the_traceback_in_the_same_object():
    """An exception is a field, not lines of its own."""
    try:
        1 / 0  # noqa: B018  # raises
    except ZeroDivisionError as error:
        failed = record(exc_info=(type(error), error, error.__traceback__))
    entry = json.loads(JsonFormatter().format(failed))
    assert entry["exception"].startswith("Traceback")
    assert entry["exception"].endswith("ZeroDivisionError: division by zero")


def test_text_has_the_fields_after_the_message():
    """People read the same fields; those that the message is made of once."""
    fields = {"method": "Embed", "code": "OK", "model": "m", "images": 3}
    line = TextFormatter().format(record(fields=fields))
    assert line.endswith("INFO it happened model=m images=3")


def test_every_line_of_a_worker_says_which_one_it_is():
    """Where several processes write to one log."""
    assert json.loads(JsonFormatter(worker=2).format(record()))["worker"] == 2
    assert "INFO [worker 2] it happened" in TextFormatter(worker=2).format(record())


def test_a_line_says_what_the_request_was_and_never_what_was_in_it(lines):
    """Names, counts and times; no pixels, metadata or key."""
    lines(LogOptions(log_format="json"))
    secret = (("authorization", "Bearer sesame"), ("x-request-id", "abc-1"))
    embedded = Embedded(
        vectors_ND=np.zeros((1, 4), np.float32),
        errors=[None, None],
        decode_s=0.001,
        queue_s=0.002,
        inference_s=0.003,
    )
    failed = call(
        INTERNAL,
        model="m",
        images=2,
        client="team-a",
        embedded=embedded,
        metadata=lambda: secret,
        message="the encoder failed",
        search_s=0.5,
    )
    RequestLog(LogOptions()).answered(failed, 0.25)
    (line,) = lines()
    assert line.pop("time")
    assert line == {
        "level": "warning",
        "logger": "horace.request",
        "message": "Embed INTERNAL",
        "request_id": "abc-1",
        "client": "team-a",
        "method": "Embed",
        "code": "INTERNAL",
        "model": "m",
        "images": 2,
        "total_ms": 250.0,
        "failed_images": 1,
        "decode_ms": 1.0,
        "queue_ms": 2.0,
        "inference_ms": 3.0,
        "search_ms": 500.0,
        "error": "the encoder failed",
    }


@pytest.mark.parametrize(
    ("level", "written"),
    [
        ("debug", ["OK fast", "OK slow", "FULL", "INTERNAL"]),
        ("info", ["OK slow", "FULL", "INTERNAL"]),
        ("warning", ["INTERNAL"]),
        ("error", []),
    ],
)
def test_what_is_worth_a_line(lines, level, written):
    """Faults of the server are warnings; refusals and slow requests are information."""
    options = LogOptions(log_format="json", log_level=level, log_slow_s=1.0)
    lines(options)
    log = RequestLog(options)
    log.answered(call(request_id="OK fast"), 0.1)
    log.answered(call(request_id="OK slow"), 1.0)
    log.answered(call(FULL, request_id="FULL"), 0.1)
    log.answered(call(INTERNAL, request_id="INTERNAL"), 0.1)
    assert [line["request_id"] for line in lines()] == written


def test_an_overload_does_not_fill_the_disk(lines):
    """A thousand refusals in a second are some lines; the next line counts the others."""
    lines(LogOptions(log_format="json"))
    clock = Clock()
    log = RequestLog(LogOptions(), clock=clock)
    for _ in range(1000):
        log.answered(call(FULL), 0.001)
    assert len(lines()) == LINES_PER_S
    assert repr(log) == f"<RequestLog {1000 - LINES_PER_S} lines left out>"
    clock.now_s += 1
    log.answered(call(FULL), 0.001)
    log.answered(call(FULL), 0.001)
    *_, first, second = lines()
    assert first["left_out"] == 1000 - LINES_PER_S
    assert "left_out" not in second


def test_an_id_is_the_messages_else_the_metadatas_else_a_new_one():
    """Every line can be found again, whether the caller named its request or not."""
    named = (("x-request-id", "from-metadata"),)
    assert request_id_to_log(call(request_id="mine", metadata=lambda: named)) == "mine"
    assert request_id_to_log(call(metadata=lambda: named)) == "from-metadata"
    made = {request_id_to_log(call(metadata=lambda: None)) for _ in range(100)}
    assert len(made) == 100
    assert all(len(request_id) == 16 for request_id in made)


def test_what_a_caller_wrote_cannot_forge_a_line():
    """No line break, no escape of a terminal, no megabyte."""
    assert printable("a\nINFO all is well\x1b[2J") == "a?INFO all is well?[2J"
    assert len(str(describe(call(request_id="x" * 10_000), 1.0)["request_id"])) == 128


def test_a_time_that_is_none_is_refused():
    """The options check themselves."""
    with pytest.raises(UsageError, match="--log-slow-s: expected above 0, up to 3600, found 0"):
        LogOptions(log_slow_s=0)


def test_the_servers_log_is_json_on_stderr(start_server, make_bundle):
    """A real process: each line an object, the failed request by its id, stdout clean."""
    server = start_server("--bundle", f"m={make_bundle().path}", "--log-format", "json")
    with grpc.insecure_channel(server.address) as channel:
        request = pb.EmbedRequest(
            images=[image_to_wire(np.zeros((28, 28, 1), np.uint8))],
            dims=10_000,
            request_id="the one that fails",
        )
        with pytest.raises(grpc.RpcError, match="dims"):
            pb_grpc.HoraceStub(channel).Embed(request)
    assert server.stop() == 0
    entries = [json.loads(line) for line in server.log.read_text().splitlines()]
    (failed,) = [entry for entry in entries if entry["logger"] == "horace.request"]
    assert failed["request_id"] == "the one that fails"
    assert failed["code"] == "INVALID_ARGUMENT"
    assert failed["level"] == "info"
    assert failed["model"] == "m"
    assert server.process.stdout.read() == ""


def test_a_warning_without_end_does_not_fill_the_log():
    """Each place has some lines a second; the next one says how many were left out."""
    clock, stream = Clock(), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(rate := RateFilter(clock=clock))

    def write(level: int, name: str = "horace.serve", line: int = 1) -> None:
        handler.handle(logging.LogRecord(name, level, "here.py", line, "again", None, None))

    def count() -> int:
        return len(stream.getvalue().splitlines())

    for _ in range(LINES_PER_S + 5):
        write(logging.ERROR)
    assert count() == LINES_PER_S
    assert repr(rate) == "<RateFilter 5 lines left out>"
    write(logging.ERROR, line=2)
    write(logging.INFO)
    write(logging.ERROR, name="another")
    assert count() == LINES_PER_S + 3
    clock.now_s += 1
    write(logging.ERROR)
    write(logging.ERROR)
    last, after = map(json.loads, stream.getvalue().splitlines()[-2:])
    assert last["left_out"] == 5
    assert "left_out" not in after


def test_a_library_that_repeats_itself_has_as_many_lines_a_minute():
    """As one does, twenty times a second, while there is no descriptor for a connection."""
    clock, stream = Clock(), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(RateFilter(clock=clock))
    record = logging.LogRecord("library", logging.WARNING, "there.py", 1, "no accept", None, None)
    for _ in range(60 * LINES_PER_S):
        handler.handle(record)
        clock.now_s += 1 / LINES_PER_S
    assert len(stream.getvalue().splitlines()) == LINES_PER_S
    clock.now_s += 1
    handler.handle(record)
    assert json.loads(stream.getvalue().splitlines()[-1])["left_out"] == 59 * LINES_PER_S


@pytest.mark.parametrize("error", [grpc.aio.InternalError("execute_batch"), OSError("disk")])
def test_a_caller_who_has_gone_is_no_traceback(error):
    """Those of grpcio are left out; nobody can mend them, and nothing is lost."""
    handler = logging.StreamHandler(stream := io.StringIO())
    set_up_logs(LogOptions(), [handler])
    record = logging.LogRecord(
        "grpc._cython.cygrpc", logging.ERROR, "", 0, "raised in core by servicer method", (),
        (type(error), error, None),
    )  # fmt: skip
    handler.handle(record)
    assert bool(stream.getvalue()) == isinstance(error, OSError)


def test_what_was_promised_is_in_the_log_however_much_there_is():
    """Every incident that a caller was told of has its line, some have a traceback."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(RateFilter(clock=Clock()))
    log = logging.getLogger("horace.serve")
    log.addHandler(handler)
    try:
        told = [to_status(KeyError(n))[1].split()[-1] for n in range(LINES_PER_S + 5)]
    finally:
        log.removeHandler(handler)
    entries = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [entry["message"] for entry in entries] == [f"incident {n}: KeyError" for n in told]
    assert ["exception" in entry for entry in entries] == [True] * LINES_PER_S + [False] * 5


def test_the_logs_that_are_set_up_are_bounded(lines):
    """By the handlers, which all of the server's lines come to."""
    handler = logging.StreamHandler(io.StringIO())
    set_up_logs(LogOptions(), [handler])
    assert [type(one) for one in handler.filters] == [RateFilter, RoomFilter]


@pytest.mark.timeout(60)  # of one that waits for the reader
def test_a_reader_that_hangs_holds_up_nobody():
    """A pipe that is full takes no line; read again, the next says how many are missing."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as reader, os.fdopen(writing, "w") as stream:
        handler = logging.StreamHandler(stream)
        set_up_logs(LogOptions(log_format="json"), [handler])

        def write(text: str, **fields: object) -> None:
            record = logging.LogRecord("horace.serve", logging.INFO, "", 1, text, None, None)
            record.fields = fields
            handler.handle(record)

        for n in range(2000):
            write(f"line {n} {'.' * 100}", left_out=1)  # what was left out before is, too
        os.set_blocking(reading, False)
        lines = reader.read().splitlines()
        assert 50 < len(lines) < 1000
        write("last")
        assert json.loads(reader.readline())["left_out"] == 2 * (2000 - len(lines))
        write("after")
        assert "left_out" not in json.loads(reader.readline())


@pytest.mark.timeout(60)  # of one that waits for the reader
def test_lines_that_waste_the_pages_of_a_pipe_leave_room_for_a_traceback():
    """Two lines of somewhat more than half a page take a page each."""
    reading, writing = os.pipe()
    with os.fdopen(reading), os.fdopen(writing, "w") as stream:
        handler = logging.StreamHandler(stream)
        set_up_logs(LogOptions(), [handler])
        for n in range(200):
            text = "x" * (2060 if n % 20 else 9000)
            record = logging.LogRecord("horace.serve", logging.INFO, "", n, text, None, None)
            handler.handle(record)
        assert handler.filters[1].left_out


def test_a_reader_that_has_gone_holds_up_nobody(monkeypatch):
    """A write fails then, which logging keeps to itself."""
    monkeypatch.setattr(logging, "raiseExceptions", False)
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    handler = logging.StreamHandler(stream)
    set_up_logs(LogOptions(), [handler])
    handler.handle(logging.LogRecord("horace.serve", logging.ERROR, "", 1, "x", None, None))
    assert repr(handler.filters[1]) == "<RoomFilter 0 lines left out>"
    with contextlib.suppress(BrokenPipeError):
        stream.close()
