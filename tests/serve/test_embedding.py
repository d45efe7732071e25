from __future__ import annotations

import asyncio
import io

import numpy as np
import pytest
from PIL import Image

from models.encoder import open_encoder
from models.errors import ImageError
from models.vectors import finish_vectors
from models.wire import image_to_wire
from serve.client import AsyncClient
from serve.embedding import SMALL_BYTES, take_images


def test_dims_are_cut_before_vectors_are_normalised(serving, make_bundle):
    """A truncated vector has unit length again; unnormalised ones are the encoder's own."""
    out = io.BytesIO()
    Image.new("L", (28, 28), 7).save(out, "PNG")
    file = [out.getvalue()]

    async def main():
        bundle = make_bundle()
        encoder = open_encoder(bundle.path)
        raw = encoder.encode(encoder.preprocess(file[0])[None])
        async with (
            serving(bundle=(str(bundle.path),)) as server,
            AsyncClient(server.address) as client,
        ):
            cut = await client.embed(file, dims=5)
            np.testing.assert_array_equal(cut.vectors, finish_vectors(raw, dims=5))
            plain = await client.embed(file, normalize=False)
            np.testing.assert_array_equal(plain.vectors, raw)
            half = await client.embed(file, dtype="fp16")
            np.testing.assert_allclose(half.vectors, finish_vectors(raw), atol=1e-3)
            byte = await client.embed(file, dtype="int8")
            np.testing.assert_allclose(byte.vectors, finish_vectors(raw), atol=1 / 127)
            assert cut.fingerprint == bundle.fingerprint

    asyncio.run(main())


def test_a_vector_that_is_not_finite_is_a_status(serving, fake, image):
    """The encoder fails on two of three images: the third has its vector."""

    async def main():
        async with serving(fake) as server, AsyncClient(server.address) as client:
            encode = fake.encode
            poison = np.array([[np.nan], [1], [np.inf]], np.float32)
            fake.encode = lambda images: encode(images) * poison
            result = await client.embed([image(1), image(2), image(3)], normalize=False)
            assert [status.code for status in result.statuses] == ["not_finite", "ok", "not_finite"]
            assert "the encoder fails on this image" in result.statuses[0].message
            np.testing.assert_array_equal(result.vectors, [[2, 1, 1, 1]])
            unit = await client.embed([image(1), image(2), image(3)])
            assert unit.statuses == result.statuses
            np.testing.assert_array_equal(unit.vectors, finish_vectors(result.vectors))

    asyncio.run(main())


def test_in_one_batch_each_request_has_its_vectors_as_it_asked(serving, fake, image, eventually):
    """Normalised, as they are, or cut; beside one that is not finite, whose request says so."""

    async def main():
        async with serving(fake) as server, AsyncClient(server.address) as client:
            encode, engine = fake.encode, server.catalog.model("fake").engine
            poison = np.array([[1], [1], [1], [np.inf]], np.float32)

            def waiting():
                return engine.statistics().waiting_images

            fake.encode = lambda images: encode(images) * (poison if len(images) == 4 else 1)
            fake.gate.clear()
            first = asyncio.create_task(client.embed([image(9)]))
            await eventually(fake.entered.is_set)
            asked = [{}, {"normalize": False}, {"dims": 2}, {}]
            works = []
            for n, fields in enumerate(asked, start=1):
                works.append(asyncio.create_task(client.embed([image(n)], **fields)))
                await eventually(lambda n=n: waiting() == n)
            fake.gate.set()
            await first
            unit, plain, cut, broken = await asyncio.gather(*works)
            assert fake.batches[-1] == [1, 2, 3, 4]
            np.testing.assert_array_equal(plain.vectors, [[2, 1, 1, 1]])
            raw = np.array([[1, 1, 1, 1], [3, 1, 1, 1]], np.float32)
            np.testing.assert_array_equal(unit.vectors, finish_vectors(raw[:1]))
            np.testing.assert_array_equal(cut.vectors, finish_vectors(raw[1:], dims=2))
            assert [status.code for status in broken.statuses] == ["not_finite"]

    asyncio.run(main())


def test_what_fp16_cannot_hold_is_a_status_and_int8_holds_all(serving, fake, image):
    """70000 would be infinite in FP16; 65504 is its largest, and INT8 has a scale a row."""

    async def main():
        async with serving(fake) as server, AsyncClient(server.address) as client:
            fake.encode = lambda images: np.array(
                [[70_000, 0, 0, 0], [65_504, -1, 0, 0], [0, 0, 0, 0]], np.float32
            )
            images = [image(n) for n in range(3)]
            half = await client.embed(images, normalize=False, dtype="fp16")
            assert [status.code for status in half.statuses] == ["out_of_range", "ok", "ok"]
            assert "at most 65504, which fp16 holds" in half.statuses[0].message
            np.testing.assert_array_equal(half.vectors, [[65_504, -1, 0, 0], [0, 0, 0, 0]])
            unit = await client.embed(images, dtype="fp16")
            assert all(status.ok for status in unit.statuses)
            byte = await client.embed(images, normalize=False, dtype="int8")
            np.testing.assert_allclose(byte.vectors[:, 0], [70_000, 65_504, 0], rtol=1e-6)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("sizes", "is_read"),
    [([100], True), ([SMALL_BYTES], True), ([SMALL_BYTES + 1], False), ([10, 20], False)],
)
@pytest.mark.parametrize("raw", [False, True])
def test_a_small_image_alone_is_read_at_once_and_counted_as_others_are(sizes, is_read, raw):
    """Twice its bytes: in the message, and read."""
    contents = [bytes(range(256)) * (size // 256) + bytes(size % 256) for size in sizes]
    messages = [
        image_to_wire(np.frombuffer(content, np.uint8).reshape(-1, 1, 1) if raw else content)
        for content in contents
    ]
    images, payload_bytes = take_images(messages)
    assert payload_bytes == 2 * sum(sizes)
    assert isinstance(images, tuple) == is_read
    assert [bytes(memoryview(image).cast("B")) for image in images] == contents


def test_a_broken_image_alone_goes_on_in_its_place():
    """Its bytes count, since the message holds them."""
    message = image_to_wire(np.zeros((2, 3, 1), np.uint8))
    message.raw.height = 5
    images, payload_bytes = take_images([message])
    assert [type(image) for image in images] == [ImageError]
    assert payload_bytes == 12
