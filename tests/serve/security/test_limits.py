"""What a request may cost, over every way in, on both front ends: refused early and by itself."""

from __future__ import annotations

import asyncio
import io
import struct

import grpc
import numpy as np
import pytest
from PIL import Image
from tritonclient.grpc import service_pb2 as kserve
from tritonclient.grpc import service_pb2_grpc as kserve_grpc

from models.wire import image_to_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc
from serve.security.options import CallerLimits

TIMEOUT_S = 30
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def png(side: int) -> bytes:
    """A grey square."""
    file = io.BytesIO()
    Image.new("L", (side, side), 7).save(file, "PNG")
    return file.getvalue()


async def failure(call) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


@pytest.fixture
def attack(serving, fake):
    """A function that runs a coroutine function of stubs against a server with some limits."""

    def run(work, **limits):
        async def main():
            async with (
                serving(fake, **limits) as server,
                grpc.aio.insecure_channel(server.address, options=OPTIONS) as channel,
            ):
                stubs = pb_grpc.HoraceStub(channel), kserve_grpc.GRPCInferenceServiceStub(channel)
                return await work(*stubs)

        return asyncio.run(main())

    return run


def infer_request(*files: bytes):
    """A KServe request of encoded images."""
    request = kserve.ModelInferRequest(model_name="fake")
    tensor = request.inputs.add(name="images", datatype="BYTES")
    tensor.shape.append(len(files))
    raw = b"".join(struct.pack("<I", len(file)) + file for file in files)
    request.raw_input_contents.append(raw)
    return request


def test_a_message_above_the_limit_is_refused_and_the_next_one_served(attack, fake, image):
    """By Embed, by a stream, and by KServe; nothing of it is computed."""
    large = pb.EmbedRequest(images=[pb.Image(encoded=bytes(2 << 20))])
    small = pb.EmbedRequest(images=[image_to_wire(image(5))])

    async def work(horace, triton):
        errors = [await failure(horace.Embed(large, timeout=TIMEOUT_S))]
        errors.append(await failure(horace.EmbedStream(iter([large]), timeout=TIMEOUT_S).read()))
        too_large = infer_request(bytes(2 << 20))
        errors.append(await failure(triton.ModelInfer(too_large, timeout=TIMEOUT_S)))
        for error in errors:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "larger than max" in error.details()
        assert (await horace.Embed(small, timeout=TIMEOUT_S)).vectors.rows == 1

    attack(work, max_message_mib=1)
    assert fake.computed == [5]


@pytest.mark.parametrize(
    ("limits", "file", "code"),
    [
        ({"max_image_bytes": 500}, bytes(501), pb.TOO_MANY_BYTES),
        ({"max_image_pixels": 99}, png(10), pb.TOO_MANY_PIXELS),
    ],
    ids=["bytes", "pixels"],
)
def test_an_image_above_a_limit_is_refused_by_itself(attack, fake, image, limits, file, code):
    """Its batchmates are answered, by Embed, by a stream, and by KServe."""
    request = pb.EmbedRequest(
        images=[image_to_wire(image(1)), pb.Image(encoded=file), pb.Image(encoded=png(8))]
    )

    async def work(horace, triton):
        reply = await horace.Embed(request, timeout=TIMEOUT_S)
        streamed = await horace.EmbedStream(iter([request]), timeout=TIMEOUT_S).read()
        for answer in (reply, streamed):
            assert [status.code for status in answer.statuses] == [pb.OK, code, pb.OK]
            assert answer.vectors.rows == 2
        inferred = await triton.ModelInfer(infer_request(file, png(8)), timeout=TIMEOUT_S)
        rows = np.frombuffer(inferred.raw_output_contents[0], "<f4").reshape(2, 4)
        assert np.isnan(rows[0]).all()
        assert rows[1].tolist() == [7, 1, 1, 1]

    attack(work, **limits)


def test_more_images_than_a_request_may_have_are_refused_unread(attack, fake, image):
    """By Embed, by Search's images, by a stream, which goes on, and by KServe."""
    many = pb.EmbedRequest(images=[image_to_wire(image(1))] * 5)
    few = pb.EmbedRequest(images=[image_to_wire(image(2))] * 4)

    async def work(horace, triton):
        error = await failure(horace.Embed(many, timeout=TIMEOUT_S))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == "images: expected 1 to 4 a request, found 5; split the request"
        stream = horace.EmbedStream(iter([many, few]), timeout=TIMEOUT_S)
        refused, answered = [reply async for reply in stream]
        assert refused.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert answered.vectors.rows == 4
        error = await failure(triton.ModelInfer(infer_request(*[png(8)] * 5), timeout=TIMEOUT_S))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT

    attack(work, max_images_per_request=4)
    assert fake.computed == [2, 2, 2, 2]


def test_a_rate_of_images_counts_them_whatever_the_way_in(attack, image):
    """Twelve images are the burst: four by Embed, two by KServe, six by Search; the next waits."""
    wire = image_to_wire(image(1))
    one = pb.EmbedRequest(images=[wire])
    example = pb.Example(image=wire)
    query = pb.Combination(positives=[example] * 3, negatives=[example])
    by_images = pb.SearchRequest(images=pb.ImageQueries(images=[wire] * 2))
    combined = pb.SearchRequest(combined=pb.Combined(queries=[query]))

    async def work(horace, triton):
        await horace.Embed(pb.EmbedRequest(images=[wire] * 4), timeout=TIMEOUT_S)
        await triton.ModelInfer(infer_request(png(8), png(8)), timeout=TIMEOUT_S)
        for search in (by_images, combined):  # charged, though there is nothing to search in
            error = await failure(horace.Search(search, timeout=TIMEOUT_S))
            assert error.code() is grpc.StatusCode.NOT_FOUND
        for call in (
            horace.Embed(one),
            triton.ModelInfer(infer_request(png(8))),
            horace.Search(by_images),
            horace.Search(combined),
        ):
            error = await failure(call)
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error.details().startswith("rate of this caller: expected at most 0.001 images")
            assert int(dict(error.trailing_metadata())["retry-after-ms"]) > 100_000
        await horace.ListModels(pb.ListModelsRequest())  # has none

    attack(work, limits=CallerLimits(images_per_s=0.001, burst_s=12_000))
