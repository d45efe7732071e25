"""Reads the body of a request: JSON, or a multipart form, within bounds.

Rules:
    A body that says that it is too long is refused before it is read, one that turns out so
    as soon as it does; what all bodies hold together is bounded, too.
    A body holds what has come of it. It is refused by its head where what it announces has no
    room, and holds nothing by that. A caller with several bodies may hold more only while an
    eighth as much stays free, as in `serve.room`.
    JSON is parsed once its parts are counted on its bytes: what they take is bounded, too.
    A form is taken apart as it arrives; nothing of it is written to a disk.
    In a form, parts named `images` are images; every other part is a field, as text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import orjson
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from serve.errors import QueueFullError, RequestError
from serve.http.faults import BodyTooLargeError, MediaTypeError
from serve.room import SHARE

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_TEXT = 1 << 16
"""Characters of a part that is no image: those of a filter (`index.filters.MAX_CHARACTERS`)."""

MAX_FIELD_BYTES = 4 * MAX_TEXT
"""What they take in UTF-8, at most."""

MAX_PART_HEADERS = 8

MAX_JSON_COMMAS = 1 << 20
"""Values of a body in JSON; a number of two bytes takes sixteen times as much in memory."""

OPENINGS_AN_IMAGE, QUOTES_AN_IMAGE = 8, 16
"""Of lists and objects, and of texts: what an example of a combined query takes, and more."""

OTHER_OPENINGS = OTHER_QUOTES = 4096
"""Of all else; a filter may be long."""

COUNTED_AT_ONCE = 1 << 16
"""Bytes of a body in JSON."""

JSON_TYPE, FORM_TYPE = b"application/json", b"multipart/form-data"


@dataclass(frozen=True, kw_only=True)
class Body:
    """What a request says.

    Attributes:
        fields: by name; JSON values, or texts where `is_form`.
        images: of a form; None where there were none.
        is_form: whether it came as a form.
    """

    fields: Mapping[str, object]
    images: list[bytes] | None = None
    is_form: bool = False


class BodyMemory:
    """Counts the bytes that bodies hold in memory together. Belongs to one event loop."""

    def __init__(self, most_bytes: int) -> None:
        """Allow this many bytes."""
        self.most_bytes = most_bytes
        self._held_bytes = 0
        self._by_client: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<BodyMemory {self.held_bytes} of {self.most_bytes} bytes>"

    @property
    def held_bytes(self) -> int:
        """What bodies hold now."""
        return self._held_bytes

    @contextmanager
    def holding(self, client: str) -> Iterator[Held]:
        """Count one body of a client until it is answered."""
        held = Held(self, client)
        try:
            yield held
        finally:
            self.add(client, -held.size_bytes)

    def held_by(self, client: str) -> int:
        """Say how many of the bytes are a client's."""
        return self._by_client[client]

    def add(self, client: str, size_bytes: int) -> None:
        """Count more bytes of a client, or less."""
        self._held_bytes += size_bytes
        self._by_client[client] += size_bytes
        if not self._by_client[client]:
            del self._by_client[client]


@dataclass
class Held:
    """What one body of a client holds."""

    memory: BodyMemory
    client: str
    size_bytes: int = 0

    def check(self, to_bytes: int) -> None:
        """See whether so many bytes could be held.

        Raises:
            QueueFullError: there is no room for them.
        """
        memory, more = self.memory, to_bytes - self.size_bytes
        of_client = memory.held_by(self.client)
        to_leave = (of_client + more) // SHARE if of_client > self.size_bytes else 0
        if more > 0 and memory.most_bytes - memory.held_bytes - more < to_leave:
            raise QueueFullError(
                "request bodies",
                expected=f"at most {memory.most_bytes} bytes in memory",
                found=f"{memory.held_bytes} held, {of_client} of them of this caller",
                mend="try again",
            )

    def grow(self, to_bytes: int) -> None:
        """Hold at least this many bytes.

        Raises:
            QueueFullError: there is no room for them.
        """
        self.check(to_bytes)
        if to_bytes > self.size_bytes:
            self.memory.add(self.client, to_bytes - self.size_bytes)
            self.size_bytes = to_bytes


async def read_body(
    request: Request, held: Held, known: Collection[str], *, max_bytes: int, max_images: int
) -> Body:
    """Read a request's body.

    Args:
        request: of which nothing is read yet.
        held: counts its bytes.
        known: fields of a form; another is a refusal as soon as it comes.
        max_bytes: of the whole body.
        max_images: of a form; more are a refusal as soon as they come.

    Raises:
        BodyTooLargeError: it has more bytes.
        MediaTypeError: it is neither JSON nor a form.
        RequestError: it is not what it says.
        QueueFullError: other bodies hold the memory.
    """
    kind, parameters = parse_options_header(request.headers.get("content-type"))
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise _wrong_type(f"content-encoding {request.headers['content-encoding'][:40]!r}")
    chunks = _chunks(request, held, max_bytes)
    if kind == FORM_TYPE:
        return await _read_form(chunks, parameters.get(b"boundary", b""), known, max_images)
    if kind == JSON_TYPE:
        return _read_json(b"".join([chunk async for chunk in chunks]), max_images)
    found = f"content-type {kind.decode('latin-1')[:40]!r}" if kind else "no content-type"
    raise _wrong_type(found)


async def _chunks(request: Request, held: Held, max_bytes: int) -> AsyncIterator[bytes]:
    """Give a body as it comes, counted."""
    max_bytes = min(max_bytes, held.memory.most_bytes)  # or it would be told to try again
    announced = request.headers.get("content-length")
    if announced is not None:
        _check_size(int(announced), max_bytes)  # h11 lets nothing else than digits pass
        held.check(int(announced))
    read_bytes = 0
    async for chunk in request.stream():
        read_bytes += len(chunk)
        _check_size(read_bytes, max_bytes)
        held.grow(read_bytes)
        yield chunk


def _check_size(size_bytes: int, max_bytes: int) -> None:
    """Refuse too long a body."""
    if size_bytes > max_bytes:
        raise BodyTooLargeError(
            "body",
            expected=f"at most {max_bytes} bytes",
            found=f"{size_bytes} or more",
            mend="split the request",
        )


def _read_json(data: bytes, max_images: int) -> Body:
    """Read a JSON object."""
    _check_json(data, max_images)
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise RequestError("body", expected="JSON", found=str(error)) from error
    if not isinstance(document, dict):
        raise RequestError("body", expected="a JSON object", found=type(document).__name__)
    return Body(fields=document)


def _check_json(data: bytes, max_images: int) -> None:
    """Refuse a body of too many parts before it is parsed: each takes a hundred bytes or two.

    Raises:
        RequestError: it has more than any request can mean.
    """
    for parts, most, what in (
        (b"{[", OPENINGS_AN_IMAGE * max_images + OTHER_OPENINGS, "lists and objects"),
        (b'"', QUOTES_AN_IMAGE * max_images + OTHER_QUOTES, "quotation marks"),
        (b",", MAX_JSON_COMMAS, "commas"),
    ):
        if _has_more(data, parts, most):
            raise RequestError(
                "body", expected=f"at most {most} {what}", found="more", mend="split the request"
            )


def _has_more(data: bytes, parts: bytes, most: int) -> bool:
    """Whether there are more of some bytes; it costs what it finds, so it stops at too many."""
    found = 0
    for start in range(0, len(data), COUNTED_AT_ONCE):
        found += sum(data.count(part, start, start + COUNTED_AT_ONCE) for part in parts)
        if found > most:
            return True
    return False


async def _read_form(
    chunks: AsyncIterator[bytes], boundary: bytes, known: Collection[str], max_images: int
) -> Body:
    """Read a multipart form."""
    if not boundary:
        raise RequestError("multipart form", expected="a boundary in content-type", found="none")
    form = _Form(known, max_images)
    try:
        parser = MultipartParser(boundary, form.callbacks, max_header_count=MAX_PART_HEADERS)
        async for chunk in chunks:
            parser.write(chunk)
    except FormParserError as error:
        raise RequestError("multipart form", found=f"{error!s:.200}") from error
    if not form.is_complete:
        raise RequestError(
            "multipart form", expected="the boundary that ends it", found="the end of the body"
        )
    images = form.images if form.images else None
    return Body(fields=form.fields, images=images, is_form=True)


@dataclass
class _Form:
    """Collects the parts of a form as the parser meets them."""

    known: Collection[str]
    max_images: int
    fields: dict[str, object] = field(default_factory=dict)
    images: list[bytes] = field(default_factory=list)
    is_complete: bool = False

    def __post_init__(self) -> None:
        self._headers: dict[bytes, bytes] = {}
        self._header_name = self._header_value = b""
        self._name = ""
        self._data = bytearray()

    @property
    def callbacks(self) -> MultipartCallbacks:
        """What the parser calls."""
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    def _on_part_begin(self) -> None:
        self._headers, self._data = {}, bytearray()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        """Learn the part's name, and refuse it if it is not known or one too many."""
        _, parameters = parse_options_header(self._headers.get(b"content-disposition"))
        name = parameters.get(b"name")
        if name is None:
            raise RequestError("part of the form", expected="a name", found="none")
        self._name = name.decode("utf-8", "replace")
        if self._name == "images" and len(self.images) >= self.max_images:
            found = f"more than {self.max_images}"
            expected = f"1 to {self.max_images} a request"
            raise RequestError("images", expected=expected, found=found, mend="split the request")
        if self._name not in self.known:
            raise unknown_field(self._name, self.known)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._data += memoryview(data)[start:end]
        if self._name != "images" and len(self._data) > MAX_FIELD_BYTES:
            raise RequestError(
                self._field, expected=f"at most {MAX_FIELD_BYTES} bytes", found="more"
            )

    def _on_part_end(self) -> None:
        """Keep the part."""
        data, self._data = bytes(self._data), bytearray()
        if self._name == "images":
            self.images.append(data)
            return
        if self._name in self.fields:
            raise RequestError(self._field, expected="one value", found="several")
        try:
            self.fields[self._name] = data.decode()
        except UnicodeDecodeError as error:
            raise RequestError(self._field, expected="UTF-8", found="other bytes") from error

    def _on_end(self) -> None:
        self.is_complete = True

    @property
    def _field(self) -> str:
        """Name the present part in a message."""
        return f"field {self._name[:40]!r}"


def unknown_field(name: str, known: Collection[str]) -> RequestError:
    """Say which fields there are."""
    return RequestError("field", expected=f"one of {', '.join(known)}", found=repr(name[:40]))


def _wrong_type(found: str) -> MediaTypeError:
    """Say which forms a body may have."""
    return MediaTypeError(
        "body", expected="application/json or multipart/form-data, not compressed", found=found
    )
