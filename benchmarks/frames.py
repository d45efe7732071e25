"""Unary gRPC calls over one HTTP/2 connection, for a load generator that is to cost little.

grpc.aio took 200 us of a core for a call; at three times a server's peak that is most of a core, of
which a machine that serves and measures has none to spare. This writes the frames itself, for a
third of that: the headers of all calls are the same bytes, what is due goes out together, and of a
reply only the frames' heads and the status are read.

Rules:
    What a caller of gRPC does is done: `grpc-timeout` says what is left when the call is sent, and
    one that has had no reply by then is reset, as DEADLINE_EXCEEDED; one that is not sent by then
    never is.
    Flow control, the largest frame and the most streams at a time are kept to: who has as many
    waits here for a stream.
    The peer is told to keep no table of headers, so that a status can be found in a block
    without the blocks before it. A block without one is a failure, not a guess.

Source: RFC 9113 (HTTP/2), RFC 7541 (HPACK, with the code of its Appendix B),
https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

from __future__ import annotations

import asyncio
import math
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import grpc

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
HEADER_TABLE_SIZE, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 1, 3, 4, 5
CANCEL = 8

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DEFAULT_WINDOW = 65_535
LARGEST_WINDOW = (1 << 31) - 1
SWEEP_S = 0.005
"""How often calls are looked for whose deadline has passed."""

_CODE = {
    "-": "010110", "0": "00000", "1": "00001", "2": "00010", "3": "011001", "4": "011010",
    "5": "011011", "6": "011100", "7": "011101", "8": "011110", "9": "011111", "a": "00011",
    "c": "00100", "e": "00101", "f": "100101", "g": "100110", "m": "101001", "p": "101011",
    "r": "101100", "s": "01000", "t": "01001", "u": "101101", "y": "1111010",
}  # fmt: skip
"""Of Huffman's code in RFC 7541, Appendix B, what is looked for."""

OnEnd = Callable[[str, float, bool], None]
"""Hears how a call ended: its status, the seconds that it took, and whether it was told when
to come back."""


def huffman(text: str) -> bytes:
    """Encode text as HPACK does, filled up with ones."""
    bits = "".join(_CODE[letter] for letter in text)
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def literal(text: str | bytes, *, coded: bool = False) -> bytes:
    """Lay out a string of HPACK that is shorter than 127 bytes."""
    data = text.encode() if isinstance(text, str) else text
    assert len(data) < 127
    return bytes([len(data) | (0x80 if coded else 0)]) + data


STATUS_KEYS = (literal(huffman("grpc-status"), coded=True), literal("grpc-status"))
RETRY_KEYS = (literal(huffman("retry-after-ms"), coded=True), literal("retry-after-ms"))
STATUS_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
STATUS_VALUES = {
    form: name
    for number, name in STATUS_NAMES.items()
    for form in (literal(huffman(str(number)), coded=True), literal(str(number)))
}


def read_status(block: bytes) -> str:
    """Find the status in a block of trailers.

    Raises:
        ValueError: there is none.
    """
    for key in STATUS_KEYS:
        if (at := block.find(key)) >= 0:
            at += len(key)
            return STATUS_VALUES[block[at : at + 1 + (block[at] & 127)]]
    raise ValueError(f"trailers: expected grpc-status, found {block!r}")


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Lay out a frame."""
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return head + payload


def request_headers(authority: str, path: str) -> bytes:
    """Lay out the headers of every call, with indices of HPACK's static table where it has them."""
    fields = (
        (b"\x04", path),
        (b"\x01", authority),
        (b"\x0f\x10", "application/grpc"),  # content-type
        (b"\x00" + literal("te"), "trailers"),
    )
    post_over_http = b"\x83\x86"
    return post_over_http + b"".join(name + literal(value) for name, value in fields)


@lru_cache(maxsize=1 << 16)
def timeout_header(milliseconds: int) -> bytes:
    """Lay out the header that says how long a call may take."""
    return b"\x00" + literal("grpc-timeout") + literal(f"{milliseconds}m")


@dataclass(eq=False, slots=True)
class _Call:
    """A call without a reply yet.

    Attributes:
        made_s: when it was made.
        window: bytes that its stream may still send.
        left: of its message, what has not been sent.
    """

    made_s: float
    window: int
    left: memoryview


class Frames(asyncio.Protocol):
    """One connection that makes one kind of call, again and again."""

    def __init__(self, headers: bytes, message: bytes, timeout_s: float, on_end: OnEnd) -> None:
        """Call nobody yet.

        Args:
            headers: see `request_headers`.
            message: of every call, serialised.
            timeout_s: of every call.
            on_end: hears of every call that is over.
        """
        self._headers = headers
        self._message = memoryview(b"\x00" + struct.pack(">I", len(message)) + message)
        self._timeout_s = timeout_s
        self._on_end = on_end
        self._calls: dict[int, _Call] = {}
        self._due: deque[tuple[float, int]] = deque()
        self._waiting: deque[float] = deque()  # for a stream
        self._blocked: deque[int] = deque()  # for room in the connection's window
        self._next_stream = 1
        self._most_streams = 1 << 20
        self._most_frame = 1 << 14
        self._stream_window = self._window = DEFAULT_WINDOW
        self._received = 0
        self._out: list[bytes | memoryview] = []
        self._in = b""
        self._loop = asyncio.get_running_loop()
        self.ready = self._loop.create_future()
        self.idle = asyncio.Event()

    # What callers do.

    def call(self) -> None:
        """Make a call; `on_end` hears of its end. Nothing, once the connection is lost."""
        if self._transport.is_closing():
            return
        self.idle.clear()
        now_s = time.monotonic()
        if len(self._calls) < self._most_streams:
            self._begin(now_s, self._timeout_s)
        else:
            self._waiting.append(now_s)

    def close(self) -> None:
        """Hang up."""
        self._transport.close()

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say hello."""
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        settings = struct.pack(">HIHI", HEADER_TABLE_SIZE, 0, INITIAL_WINDOW_SIZE, LARGEST_WINDOW)
        more = struct.pack(">I", LARGEST_WINDOW - DEFAULT_WINDOW)
        hello = frame(SETTINGS, 0, 0, settings) + frame(WINDOW_UPDATE, 0, 0, more)
        transport.write(PREFACE + hello)
        self._loop.call_later(SWEEP_S, self._sweep)

    def data_received(self, data: bytes) -> None:
        """Read the frames that have come."""
        data = self._in + data if self._in else data
        at, end = 0, len(data)
        while end - at >= 9:
            size = int.from_bytes(data[at : at + 3], "big")
            if end - at - 9 < size:
                break
            stream = int.from_bytes(data[at + 5 : at + 9], "big")
            self._take(data[at + 3], data[at + 4], stream, data[at + 9 : at + 9 + size])
            at += 9 + size
        self._in = data[at:]

    def connection_lost(self, error: Exception | None) -> None:
        """End the calls that have no reply, first those that would take their place."""
        now_s = time.monotonic()
        while self._waiting:
            self._on_end("UNAVAILABLE", now_s - self._waiting.popleft(), False)
        for stream in list(self._calls):
            self._end(stream, "UNAVAILABLE")
        self.idle.set()

    # The frames.

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """Do what a frame says."""
        if kind == DATA:
            self._received += len(payload)
            if self._received > LARGEST_WINDOW // 2:
                self._send(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", self._received)))
                self._received = 0
        elif kind == HEADERS:
            assert flags & END_HEADERS, "blocks of ours fit into a frame"
            if flags & END_STREAM and stream in self._calls:
                told = any(key in payload for key in RETRY_KEYS)
                self._end(stream, read_status(payload), told=told)
        elif kind == RST_STREAM:
            self._end(stream, "UNAVAILABLE")
        elif kind == SETTINGS and not flags & ACK:
            self._take_settings(payload)
        elif kind == PING and not flags & ACK:
            self._send(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE:
            self._take_window(stream, int.from_bytes(payload, "big"))

    def _take_settings(self, payload: bytes) -> None:
        """Keep to what the peer asks for."""
        for key, value in struct.iter_unpack(">HI", payload):
            if key == MAX_CONCURRENT_STREAMS:
                self._most_streams = value
            elif key == MAX_FRAME_SIZE:
                self._most_frame = value
            elif key == INITIAL_WINDOW_SIZE:
                for call in self._calls.values():
                    call.window += value - self._stream_window
                self._stream_window = value
        self._send(frame(SETTINGS, ACK, 0))
        if not self.ready.done():
            self.ready.set_result(None)

    def _take_window(self, stream: int, size: int) -> None:
        """Send what has waited for room."""
        if stream:
            if (call := self._calls.get(stream)) is not None:
                call.window += size
                self._send_message(stream, call)
            return
        self._window += size
        for _ in range(len(self._blocked)):
            stream = self._blocked.popleft()
            if (call := self._calls.get(stream)) is not None:
                self._send_message(stream, call)

    # Calls.

    def _begin(self, made_s: float, left_s: float) -> None:
        """Send a call's headers, and of its message what may be sent."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        call = self._calls[stream] = _Call(made_s, self._stream_window, self._message)
        self._due.append((made_s + self._timeout_s, stream))
        headers = self._headers + timeout_header(math.ceil(1e3 * left_s))
        self._send(frame(HEADERS, END_HEADERS, stream, headers))
        self._send_message(stream, call)

    def _begin_next(self, now_s: float) -> None:
        """Send of the calls that wait for a stream the next that has time."""
        self._drop_late(now_s)
        if self._waiting:
            made_s = self._waiting.popleft()
            self._begin(made_s, made_s + self._timeout_s - now_s)

    def _drop_late(self, now_s: float) -> None:
        """Give up the calls that have waited for a stream until their deadline."""
        while self._waiting and now_s - self._waiting[0] >= self._timeout_s:
            self._on_end("DEADLINE_EXCEEDED", now_s - self._waiting.popleft(), False)

    def _send_message(self, stream: int, call: _Call) -> None:
        """Send of a message what the windows have room for."""
        while call.left and call.window > 0:
            if self._window <= 0:
                self._blocked.append(stream)
                return
            size = min(len(call.left), call.window, self._window, self._most_frame)
            call.window -= size
            self._window -= size
            part, call.left = call.left[:size], call.left[size:]
            head = size.to_bytes(3, "big") + bytes([DATA, 0 if call.left else END_STREAM])
            self._send(head + stream.to_bytes(4, "big"))
            self._send(part)

    def _end(self, stream: int, code: str, *, told: bool = False) -> None:
        """Report the end of a call, if it has not ended."""
        if (call := self._calls.pop(stream, None)) is None:
            return
        now_s = time.monotonic()
        self._begin_next(now_s)
        self._on_end(code, now_s - call.made_s, told)
        if not self._calls:
            self.idle.set()

    def _sweep(self) -> None:
        """Give up the calls whose deadline has passed."""
        now_s = time.monotonic()
        while self._due and self._due[0][0] <= now_s:
            _, stream = self._due.popleft()
            if stream in self._calls:
                self._send(frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL)))
                self._end(stream, "DEADLINE_EXCEEDED")
        self._drop_late(now_s)
        if not self._transport.is_closing():
            self._loop.call_later(SWEEP_S, self._sweep)

    def _send(self, data: bytes | memoryview) -> None:
        """Send with whatever else is sent in this turn of the loop."""
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(data)

    def _flush(self) -> None:
        """Write what has gathered."""
        out, self._out = self._out, []
        self._transport.write(b"".join(out))


async def connect(
    address: str, path: str, message: bytes, *, timeout_s: float, on_end: OnEnd
) -> Frames:
    """Connect to a server, for calls of one method with one message."""
    host, _, port = address.rpartition(":")
    headers = request_headers(address, path)
    _, frames = await asyncio.get_running_loop().create_connection(
        lambda: Frames(headers, message, timeout_s, on_end), host, int(port)
    )
    await frames.ready
    return frames
