"""What is counted of a message before it is parsed: enough, and not too much."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as kserve

from models.wire import image_to_wire
from protos import horace_pb2 as pb
from serve.errors import RequestError
from serve.security.wire import MAX_PACKED_BYTES, check_message, make_plan

TOO_MANY = r"message: expected at most 100 fields, found more; split the request"


def check(kind, raw: bytes, max_fields: int = 100) -> None:
    """Count a message of a kind."""
    plan = make_plan(kind.DESCRIPTOR)
    assert plan is not None
    check_message(raw, plan, max_fields=max_fields)


def delimited(number: int, data: bytes) -> bytes:
    """A field of bytes."""
    size, length = len(data), b""
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


MANY = 101
ENTRY = b"\x0a\x00"  # field 1, empty


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        (pb.EmbedRequest, b"\x12\x00" * MANY),
        (pb.EmbedRequest, b"\x18\x04" * MANY),
        (pb.SearchRequest, delimited(2, ENTRY * MANY)),
        (pb.SearchRequest, delimited(11, ENTRY * MANY)),
        (pb.SearchRequest, delimited(11, delimited(1, ENTRY * MANY))),
        (pb.SearchRequest, delimited(11, delimited(1, ENTRY * 49)) * 2),
        (kserve.ModelInferRequest, b"\x2a\x00" * MANY),
        (kserve.ModelInferRequest, b"\x32\x00" * MANY),
        (kserve.ModelInferRequest, b"\x3a\x00" * MANY),
        (kserve.ModelInferRequest, delimited(5, delimited(5, b"\x42\x00" * MANY))),
        (kserve.ModelInferRequest, delimited(5, b"\x18\x01" * MANY)),
        (kserve.ModelInferRequest, delimited(6, delimited(2, b"") * MANY)),
    ],
    ids=[
        "images", "numbers", "queries", "combinations", "examples", "examples of two",
        "inputs", "outputs", "raw contents", "typed contents", "shape", "parameters",
    ],
)  # fmt: skip
def test_parts_are_counted_wherever_they_can_be_many(kind, raw):
    """Of Embed, of Search and of KServe, at the top and within; one fewer is none too many."""
    with pytest.raises(RequestError, match=TOO_MANY):
        check(kind, raw)
    check(kind, raw, max_fields=MANY + 2)


def test_numbers_that_are_packed_are_counted_by_their_bytes():
    """A byte of them takes eight in memory."""
    packed = bytes(MAX_PACKED_BYTES)
    check(kserve.ModelInferRequest, delimited(5, delimited(5, delimited(3, packed))))
    raw = delimited(5, delimited(5, delimited(3, packed)) + delimited(3, b"\1"))
    with pytest.raises(RequestError, match=r"at most 2097152 bytes of packed integers, found more"):
        check(kserve.ModelInferRequest, raw)


def test_what_an_image_holds_is_not_looked_at():
    """Pixels may be any bytes, and as many as they like."""
    image = np.full((300, 300, 1), 0x12, np.uint8)
    request = pb.EmbedRequest(images=[image_to_wire(image)] * 3, request_id="a" * 300)
    check(pb.EmbedRequest, request.SerializeToString(), max_fields=4)
    assert make_plan(pb.ListModelsRequest.DESCRIPTOR) is None


def test_a_group_is_refused():
    """None of our messages has one, and it could hide any number of parts."""
    with pytest.raises(RequestError, match="message: expected no groups, found one"):
        check(pb.EmbedRequest, b"\x1b\x1c")


@given(st.binary(max_size=200))
def test_other_bytes_are_left_to_the_parser(raw):
    """They are counted or let through, and never a fault of ours."""
    for kind in (pb.EmbedRequest, pb.SearchRequest, kserve.ModelInferRequest):
        with suppress(RequestError):
            check(kind, raw, max_fields=20)


def test_empty_images_by_the_thousand_are_refused_unparsed(serving, fake):
    """By Embed, by Search, by a stream and by KServe."""
    tensor = delimited(5, delimited(1, b"images") + delimited(5, b"\x42\x00" * 9000))

    async def main():
        async with (
            serving(fake, max_images_per_request=4) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            horace, triton = "/horace.v1.Horace/", "/inference.GRPCInferenceService/"
            calls = [
                channel.unary_unary(horace + "Embed")(b"\x12\x00" * 9000),
                channel.unary_unary(horace + "Search")(delimited(2, ENTRY * 9000)),
                channel.stream_stream(horace + "EmbedStream")(iter([b"\x12\x00" * 9000])).read(),
                channel.unary_unary(triton + "ModelInfer")(tensor),
            ]
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert outcome.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert outcome.details().startswith("message: expected at most 272 fields, found")

    asyncio.run(main())
