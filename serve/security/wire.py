"""How much a message holds, counted on its bytes before it is parsed.

Rules:
    A part of a message costs two bytes on the wire and fifty times as much in memory, and a
    parser makes them all before anybody can count them: so parts are counted first, and
    counting ends at the first that is too many.
    What is counted are fields, at the top and within the messages that can hold many others.
    Numbers that are packed are counted as bytes. A part's own size costs nothing.
    Bytes that are no message are left to the parser to refuse, but for groups, which no
    message of ours has.

A request of one image takes about 2 us (one core of an AMD EPYC of the Zen 3 kind): it has a
handful of fields, and what is in them is skipped.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, Union

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from serve.errors import RequestError

MAX_PACKED_BYTES = 2 << 20
"""Of packed numbers of variable length, which take up to eight times as much in memory. It is
what `serve.kserve.inputs.MAX_TYPED_VALUES` pixels take."""

MAX_DEPTH = 8

FIELDS_AN_IMAGE = 4
"""Of a message: a combined query of one example has three."""

OTHER_FIELDS = 256
"""Of a message, such as parameters of KServe."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

Parse: TypeAlias = Callable[[bytes], Any]

Plan: TypeAlias = dict[int, Union["Plan", None]]
"""What to look into of a message, by field; a field of packed numbers has None."""

_FIXED = {
    FieldDescriptor.TYPE_DOUBLE,
    FieldDescriptor.TYPE_FLOAT,
    FieldDescriptor.TYPE_FIXED32,
    FieldDescriptor.TYPE_FIXED64,
    FieldDescriptor.TYPE_SFIXED32,
    FieldDescriptor.TYPE_SFIXED64,
}
"""They take as much in memory as on the wire."""


class NotAMessageError(Exception):
    """These bytes are none."""


class _Room:
    """What one message may hold."""

    __slots__ = ("_max_fields", "_packed")

    def __init__(self, max_fields: int) -> None:
        self._max_fields = max_fields
        self._packed = MAX_PACKED_BYTES

    def too_many_fields(self) -> RequestError:
        """Say that there are more fields."""
        return RequestError(
            "message",
            expected=f"at most {self._max_fields} fields",
            found="more",
            mend="split the request",
        )

    def take_packed(self, size: int) -> None:
        """Count packed numbers."""
        self._packed -= size
        if self._packed < 0:
            raise RequestError(
                "message",
                expected=f"at most {MAX_PACKED_BYTES} bytes of packed integers",
                found="more",
                mend="send raw bytes",
            )


def most_fields(max_images: int) -> int:
    """Give the fields of the largest message that may be meant."""
    return FIELDS_AN_IMAGE * max_images + OTHER_FIELDS


def make_plan(kind: Descriptor, depth: int = 0) -> Plan | None:
    """Say what to count of messages of a kind; None where nothing can be many."""
    plan: Plan = {}
    has_many = False
    for field in kind.fields:
        if field.is_repeated and field.type not in _FIXED:
            has_many = True
            if field.type not in (
                FieldDescriptor.TYPE_MESSAGE,
                FieldDescriptor.TYPE_STRING,
                FieldDescriptor.TYPE_BYTES,
            ):
                plan[field.number] = None
        if field.message_type is not None and depth < MAX_DEPTH:
            within = make_plan(field.message_type, depth + 1)
            if within is not None:
                plan[field.number] = within
                has_many = True
    return plan if has_many else None


def check_message(raw: bytes, plan: Plan, *, max_fields: int) -> None:
    """Refuse a message of too many parts.

    Args:
        raw: it, in protobuf's encoding; or other bytes, which are no matter here.
        plan: of its kind.
        max_fields: at the top and in what the plan looks into, all together.

    Raises:
        RequestError: it has more.
    """
    try:
        _walk(raw, 0, len(raw), plan, max_fields, _Room(max_fields))
    except (NotAMessageError, IndexError):
        return


def _walk(raw: bytes, at: int, end: int, plan: Plan, left: int, room: _Room) -> int:
    """Count the fields between two places; give how many more there may be."""
    while at < end:
        left -= 1
        if left < 0:
            raise room.too_many_fields()
        tag = raw[at]
        at += 1
        if tag > 127:
            tag, at = read_varint(raw, at - 1)
        wire = tag & 7
        if wire == BYTES:
            start = at + 1
            if (size := raw[at]) > 127:
                size, start = read_varint(raw, at)
            at = start + size
            if at > end:
                raise NotAMessageError
            if plan and (tag >> 3) in plan:
                if (within := plan[tag >> 3]) is None:
                    room.take_packed(size)
                else:
                    left = _walk(raw, start, at, within, left, room)
        elif wire == VARINT:
            at = at + 1 if raw[at] < 128 else read_varint(raw, at)[1]
        elif wire == FIXED32:
            at += 4
        elif wire == FIXED64:
            at += 8
        else:
            raise RequestError("message", expected="no groups", found="one")
    return left


def read_varint(raw: bytes, at: int) -> tuple[int, int]:
    """Give a number of variable length, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise NotAMessageError


def reading(parse: Parse, max_fields: int) -> Parse:
    """Make what reads a message of a kind: counts what it holds, and then parses it."""
    kind = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)
    plan = None if kind is None else make_plan(kind)

    def read(raw: bytes) -> Any:
        if plan is not None:
            check_message(raw, plan, max_fields=max_fields)
        return _parse(parse, raw, kind)

    return read


def _parse(parse: Parse, raw: bytes, kind: Descriptor | None) -> Any:
    """Parse a message.

    Raises:
        RequestError: the bytes are none of its kind.
    """
    try:
        return parse(raw)
    except Exception as error:  # protobuf's own, of another class in each implementation
        name = "a message of this method" if kind is None else f"a {kind.full_name}"
        raise RequestError(
            "message", expected=f"{name} in protobuf's encoding", found=f"{len(raw)} other bytes"
        ) from error
