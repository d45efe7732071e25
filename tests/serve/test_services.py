from __future__ import annotations

import asyncio
import io
import re
import zlib

import grpc
import numpy as np
import pytest
from PIL import Image

from models.encoder import open_encoder
from models.images import open_source
from models.vectors import finish_vectors
from models.wire import image_to_wire, vectors_from_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc
from serve.client import AsyncClient, RetryPolicy
from serve.errors import RequestError
from serve.operation.options import MetricsOptions

ONCE = RetryPolicy(attempts=1)


def encoded(pixels, kind="PNG") -> bytes:
    """An image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def random_files(count, seed=0, kind="PNG"):
    """Different grey images of 28 x 28."""
    rng = np.random.default_rng(seed)
    return [encoded(rng.integers(0, 256, (28, 28), dtype=np.uint8), kind) for _ in range(count)]


def pixel_bomb() -> bytes:
    """A PNG of a few bytes whose header promises 10^10 pixels."""
    file = bytearray(encoded(np.zeros((1, 1), np.uint8)))
    file[16:24] = (100_000).to_bytes(4, "big") * 2
    file[29:33] = zlib.crc32(file[12:29]).to_bytes(4, "big")
    return bytes(file)


def stub_of(server):
    """A channel and the plain stub, without the client's help."""
    channel = grpc.aio.insecure_channel(server.address)
    return channel, pb_grpc.HoraceStub(channel)


def test_three_broken_of_64_leave_61_vectors_and_every_other_request_whole(serving, make_bundle):
    """A truncated JPEG, a text file and a pixel bomb each say why; nobody else notices."""
    files = random_files(64)
    jpeg = random_files(1, kind="JPEG")[0]
    files[5], files[20], files[63] = jpeg[: len(jpeg) // 2], b"plain text, no image", pixel_bomb()
    others = [random_files(3, seed=seed) for seed in range(1, 21)]

    async def main():
        bundle = make_bundle()
        encoder = open_encoder(bundle.path)
        async with (
            serving(bundle=(str(bundle.path),)) as server,
            AsyncClient(server.address) as client,
        ):
            mixed, *replies = await asyncio.gather(
                client.embed(files), *[client.embed(other) for other in others]
            )
        assert mixed.vectors.shape == (61, 16)
        failed = {n: status for n, status in enumerate(mixed.statuses) if not status.ok}
        assert {n: status.code for n, status in failed.items()} == {
            5: "corrupt",
            20: "unsupported_format",
            63: "too_many_pixels",
        }
        assert "found text" in failed[20].message
        assert "100000" in failed[63].message
        for other, reply in zip(others, replies, strict=True):
            pixels = np.stack([encoder.preprocess(file) for file in other])
            expected = finish_vectors(encoder.encode(pixels))
            np.testing.assert_array_equal(reply.raise_for_status().vectors, expected)

    asyncio.run(main())


def test_vectors_are_those_of_an_index_to_the_bit(serving, make_bundle, tmp_path):
    """Served in any batch, a file has the vector that `index.build` stores for it."""
    from index.build import BuildOptions, build
    from index.collection import Collection, id_of

    folder = tmp_path / "images"
    folder.mkdir()
    for n, file in enumerate(random_files(150)):
        (folder / f"{n:03}.png").write_bytes(file)
    bundle = make_bundle()
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=tmp_path / "c"))
    records = list(open_source(str(folder)).records())

    async def main():
        async with (
            serving(bundle=(str(bundle.path),)) as server,
            AsyncClient(server.address) as client,
        ):
            return await asyncio.gather(*[client.embed([record.read()]) for record in records])

    with Collection.open(tmp_path / "c") as collection:
        stored = collection.vectors([id_of(record.key) for record in records])
    served = np.concatenate([reply.vectors for reply in asyncio.run(main())])
    assert served.dtype == np.float32
    np.testing.assert_array_equal(served, stored)


def test_a_request_may_hold_several_batches(serving, fake, image):
    """Seventy images, one request, three batches."""

    async def main():
        async with serving(fake) as server, AsyncClient(server.address) as client:
            reply = await client.embed([image(n) for n in range(70)], normalize=False)
            assert reply.vectors[:, 0].tolist() == list(range(70))
            assert [len(batch) for batch in fake.batches] == [32, 32, 6]

    asyncio.run(main())


def test_two_models_answer_by_name_and_the_first_by_default(serving, make_bundle):
    """A name that is not served lists those that are."""
    file = random_files(1)

    async def main():
        one, two = make_bundle("one", seed=1), make_bundle("two", seed=2)
        bundles = (str(one.path), f"second={two.path}")
        async with serving(bundle=bundles) as server, AsyncClient(server.address) as client:
            assert (await client.embed(file)).fingerprint == one.fingerprint
            assert (await client.embed(file, model="second")).fingerprint == two.fingerprint
            models = await client.list_models()
            assert [(model.name, model.is_default) for model in models] == [
                ("one", True),
                ("second", False),
            ]
            assert models[0].preprocessing == one.preprocessing
            with pytest.raises(
                Exception, match=r"^model: expected 'one' or 'second', found 'two';"
            ):
                await client.embed(file, model="two")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (pb.EmbedRequest(), "INVALID_ARGUMENT", "images: expected 1 to 4 a request, found 0"),
        (
            pb.EmbedRequest(images=[pb.Image()] * 5),
            "INVALID_ARGUMENT",
            "images: expected 1 to 4 a request, found 5; split the request",
        ),
        (
            pb.EmbedRequest(images=[pb.Image()], dims=9),
            "INVALID_ARGUMENT",
            "dims: expected 1 to 4, found 9",
        ),
        (
            pb.EmbedRequest(images=[pb.Image()], dtype=77),
            "INVALID_ARGUMENT",
            "dtype: expected fp32 or fp16 or int8, found code 77",
        ),
        (
            pb.EmbedRequest(images=[pb.Image()], model="cat"),
            "NOT_FOUND",
            "model: expected 'fake', found 'cat'; name one that is there, or have it served",
        ),
        (
            pb.SearchRequest(ids=pb.IdQueries(ids=[1])),
            "NOT_FOUND",
            "collection: expected none: this server has none, found ''; have it serve one",
        ),
    ],
)
def test_what_concerns_a_whole_request_is_a_status_of_the_call(
    serving, fake, request_, code, message
):
    """Each refusal has its own code and one line, before anything is computed."""

    async def main():
        async with serving(fake, max_images_per_request=4) as server:
            channel, stub = stub_of(server)
            method = stub.Embed if isinstance(request_, pb.EmbedRequest) else stub.Search
            async with channel:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await method(request_)
        assert (error.value.code().name, error.value.details()) == (code, message)
        assert fake.computed == []

    asyncio.run(main())


def test_every_kind_of_wrong_image_is_a_status(serving, fake):
    """No image set, pixels that do not fit their shape, no bytes, too many bytes."""
    images = [
        pb.Image(),
        pb.Image(raw=pb.RawImage(pixels=b"123", height=2, width=2, channels=1)),
        pb.Image(encoded=b""),
        pb.Image(encoded=b"x" * 2000),
        pb.Image(raw=pb.RawImage(pixels=b"12345678", height=2, width=2, channels=2)),
    ]

    async def main():
        async with serving(fake, max_image_bytes=1000) as server:
            channel, stub = stub_of(server)
            async with channel:
                reply = await stub.Embed(pb.EmbedRequest(images=images, request_id="r-7"))
        assert [status.code for status in reply.statuses] == [
            pb.EMPTY,
            pb.WRONG_SHAPE,
            pb.EMPTY,
            pb.TOO_MANY_BYTES,
            pb.WRONG_SHAPE,
        ]
        assert all(status.message for status in reply.statuses)
        assert vectors_from_wire(reply.vectors).shape == (0, 4)
        assert reply.request_id == "r-7"

    asyncio.run(main())


def test_an_encoders_failure_leaks_nothing(serving, fake, image, caplog):
    """The caller learns that it failed; paths and traces are in the log alone."""
    fake_error = RuntimeError("/opt/models/secret.onnx: bad alloc")

    async def main():
        async with serving(fake) as server:
            fake.failures.append(fake_error)
            channel, stub = stub_of(server)
            async with channel:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await stub.Embed(pb.EmbedRequest(images=[image_to_wire(image(1))]))
                return error.value

    error = asyncio.run(main())
    assert error.code() is grpc.StatusCode.INTERNAL
    assert error.details() == "the encoder failed on these images"
    assert "secret.onnx" in caplog.text


def test_a_fault_of_ours_is_internal_with_an_incident_number(serving, fake, image, caplog):
    """What nobody foresaw reaches the caller as a number that the log explains."""

    async def main():
        async with serving(fake) as server:
            server.catalog.models["fake"] = None
            channel, stub = stub_of(server)
            async with channel:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await stub.Embed(pb.EmbedRequest(images=[image_to_wire(image(1))]))
                return error.value

    error = asyncio.run(main())
    assert error.code() is grpc.StatusCode.INTERNAL
    incident = re.fullmatch(
        "internal error; the server's log has it as incident ([0-9a-f]{8})", error.details()
    )
    assert incident
    assert f"incident {incident[1]}" in caplog.text


def test_a_deadline_that_passes_in_the_queue_computes_nothing(serving, fake, image, eventually):
    """The caller gets DEADLINE_EXCEEDED, and its images never reach the encoder."""

    async def main():
        async with serving(fake) as server:
            channel, stub = stub_of(server)
            async with channel:
                fake.gate.clear()
                held = stub.Embed(pb.EmbedRequest(images=[image_to_wire(image(1))]))
                await eventually(fake.entered.is_set)
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await stub.Embed(
                        pb.EmbedRequest(images=[image_to_wire(image(2))]), timeout=0.05
                    )
                assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                engine = server.catalog.model("").engine
                await eventually(lambda: engine.statistics().held_requests == 1)
                fake.gate.set()
                await held
                await stub.Embed(pb.EmbedRequest(images=[image_to_wire(image(3))]))
        assert fake.computed == [1, 3]

    asyncio.run(main())


def test_a_cancelled_call_computes_nothing(serving, fake, image, eventually):
    """A caller that hangs up takes its waiting images out of the queue."""

    async def main():
        async with serving(fake) as server:
            engine = server.catalog.model("").engine
            channel, stub = stub_of(server)
            async with channel:
                fake.gate.clear()
                held = stub.Embed(pb.EmbedRequest(images=[image_to_wire(image(1))]))
                await eventually(fake.entered.is_set)
                gone = stub.Embed(pb.EmbedRequest(images=[image_to_wire(image(2))]))
                await eventually(lambda: engine.statistics().waiting_images == 1)
                gone.cancel()
                await eventually(lambda: engine.statistics().waiting_images == 0)
                fake.gate.set()
                await held
        assert fake.computed == [1]

    asyncio.run(main())


@pytest.mark.parametrize("frontend", ["grpcio", "native"])
def test_a_call_whose_time_ends_while_it_is_computed_counts_as_late(
    serving, fake, image, eventually, frontend
):
    """And one that hangs up then as cancelled: operators tell the two apart."""

    async def counted(server, code):
        text = (await server.operation.metrics()).decode()
        return f'horace_requests_total{{code="{code}",method="Embed"}} 1' in text

    async def main():
        async with serving(fake, frontend=frontend, metrics=MetricsOptions(port=0)) as server:
            channel, stub = stub_of(server)
            async with channel:
                fake.gate.clear()
                request = pb.EmbedRequest(images=[image_to_wire(image(1))])
                late = stub.Embed(request, timeout=1.0023)  # grpcio has 1.01 of it on the wire
                await eventually(fake.entered.is_set)
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await late
                assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                gone = stub.Embed(request, timeout=60)
                engine = server.catalog.model("").engine
                await eventually(lambda: engine.statistics().waiting_images == 1)
                gone.cancel()
                await eventually(lambda: engine.statistics().waiting_images == 0)
                fake.gate.set()
            assert await counted(server, "DEADLINE_EXCEEDED")
            assert await counted(server, "CANCELLED")

    asyncio.run(main())


def test_a_full_queue_is_resource_exhausted_at_once(serving, fake, image, eventually):
    """The refusal comes while the encoder is still busy, and says how full it is."""

    async def main():
        async with serving(fake, max_queue_images=2) as server:
            channel, stub = stub_of(server)
            async with channel:
                fake.gate.clear()
                held = stub.Embed(pb.EmbedRequest(images=[image_to_wire(image(1))] * 2))
                await eventually(fake.entered.is_set)
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await stub.Embed(pb.EmbedRequest(images=[image_to_wire(image(2))]))
                assert not fake.gate.is_set()
                fake.gate.set()
                await held
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "2 of 2 images" in error.value.details()

    asyncio.run(main())


def test_a_name_of_20_kb_is_not_found_in_a_short_line(serving, fake, image):
    """The status does not outgrow gRPC's trailers, in whatever script the name is."""

    async def main():
        async with serving(fake) as server:
            channel, stub = stub_of(server)
            async with channel:
                for name in ("x" * 20_000, "\N{SNOWMAN}" * 20_000):
                    with pytest.raises(grpc.aio.AioRpcError) as error:
                        await stub.Embed(
                            pb.EmbedRequest(model=name, images=[image_to_wire(image(1))])
                        )
                    assert error.value.code() is grpc.StatusCode.NOT_FOUND
                    assert error.value.details().startswith("model: expected 'fake', found ")

    asyncio.run(main())


def test_the_clients_error_is_one_of_ours(serving, fake, image):
    """What the server says is what the client raises, word for word."""

    async def main():
        async with serving(fake) as server, AsyncClient(server.address, retry=ONCE) as client:
            with pytest.raises(RequestError, match=r"^dims: expected 1 to 4, found 9$"):
                await client.embed([image(1)], dims=9)

    asyncio.run(main())
