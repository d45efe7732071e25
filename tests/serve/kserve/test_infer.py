"""Inference with Triton's own client, over a real server."""

from __future__ import annotations

import asyncio
import io
import struct

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from PIL import Image
from tritonclient.grpc import InferInput, InferRequestedOutput, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from models.encoder import open_encoder
from protos import horace_pb2 as pb
from serve.errors import RequestError, ServeError
from serve.kserve.inputs import read_inputs
from serve.kserve.parameters import read_parameters
from serve.kserve.regions import OwnRegions, Regions


def pixels(images: np.ndarray, datatype: str = "UINT8") -> InferInput:
    """The input of a model: pixels."""
    tensor = InferInput("images", list(images.shape), datatype)
    tensor.set_data_from_numpy(images)
    return tensor


def encoded(*files: bytes) -> InferInput:
    """The input of a model: encoded images."""
    tensor = InferInput("images", [len(files)], "BYTES")
    tensor.set_data_from_numpy(np.array(files, dtype=np.object_))
    return tensor


def png(value: int) -> bytes:
    """A file of the fake encoder's size and one value."""
    file = io.BytesIO()
    Image.new("L", (8, 8), value).save(file, "PNG")
    return file.getvalue()


def stack(*values: int) -> np.ndarray:
    """Images of one value each, of the fake encoder's size."""
    return np.stack([np.full((8, 8, 1), value, np.uint8) for value in values])


async def infer(server, *inputs: InferInput, **arguments):
    """Ask the fake model with Triton's client."""
    async with triton.InferenceServerClient(server.address) as client:
        return await client.infer("fake", list(inputs), **arguments)


def run(serving, fake, *inputs, options=None, **arguments):
    """Serve the fake encoder, ask it once, and give the reply."""

    async def scenario():
        async with serving(fake, **(options or {})) as server:
            return await infer(server, *inputs, **arguments)

    return asyncio.run(scenario())


def test_pixels_give_the_encoders_bits(serving, make_bundle):
    """UINT8 and FP32 pixels and files give what the encoder gives, not normalised."""
    bundle = make_bundle("cats", dim=16)
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image[..., 0]).save(file, "PNG")
        files.append(file.getvalue())

    async def scenario():
        async with (
            serving(bundle=(str(bundle.path),)) as server,
            triton.InferenceServerClient(server.address) as client,
        ):
            floats = pixels(images.astype(np.float32), "FP32")
            tensors = (pixels(images), floats, encoded(*files))
            return [await client.infer("cats", [t], request_id="mine") for t in tensors]

    expected = open_encoder(bundle.path, threads=1).encode(images)
    for reply in asyncio.run(scenario()):
        assert reply.as_numpy("embeddings").tobytes() == expected.tobytes()
        response = reply.get_response()
        assert (response.id, response.model_name, response.model_version) == ("mine", "cats", "1")
        assert response.parameters["fingerprint"].string_param == bundle.fingerprint
        assert [output.name for output in response.outputs] == ["embeddings"]


def test_a_request_larger_than_a_batch_is_split_and_reassembled(serving, fake):
    """In the order of its images."""
    values = range(100)
    reply = run(serving, fake, pixels(stack(*values)), options={"max_batch_images": 8})
    assert reply.as_numpy("embeddings")[:, 0].tolist() == list(values)
    assert max(map(len, fake.batches)) <= 8


@pytest.mark.parametrize(
    ("arguments", "name", "dtype"),
    [
        ({}, "embeddings", np.float32),
        ({"parameters": {"dtype": "fp16"}}, "embeddings", np.float16),
        ({"outputs": [InferRequestedOutput("embeddings_fp16")]}, "embeddings_fp16", np.float16),
    ],
)
def test_vectors_come_as_asked_for(serving, fake, arguments, name, dtype):
    """By the output's name or by a parameter."""
    found = run(serving, fake, pixels(stack(7)), **arguments).as_numpy(name)
    assert found.dtype == dtype
    assert found.tolist() == [[7, 1, 1, 1]]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"parameters": {"dtype": "INT8"}}, "embeddings"),
        (
            {"outputs": [InferRequestedOutput("embeddings_int8"), InferRequestedOutput("scales")]},
            "embeddings_int8",
        ),
    ],
)
def test_int8_comes_with_a_scale_a_row(serving, fake, arguments, name):
    """Vector = int8 * scale."""
    reply = run(serving, fake, pixels(stack(127, 2)), **arguments)
    found = reply.as_numpy(name)
    assert found.dtype == np.int8
    assert np.allclose(found * reply.as_numpy("scales"), [[127, 1, 1, 1], [2, 1, 1, 1]], atol=0.01)


def test_vectors_are_cut_and_then_normalised(serving, fake):
    """As in horace.v1, on request."""
    reply = run(serving, fake, pixels(stack(3)), parameters={"dims": 2, "normalize": True})
    assert np.allclose(reply.as_numpy("embeddings"), np.array([[3, 1]]) / np.sqrt(10))


def test_one_bad_image_costs_itself_alone(serving, fake):
    """A row of NaN, and a status that nobody had to ask for."""
    reply = run(serving, fake, encoded(png(1), b"no image", png(3)))
    vectors = reply.as_numpy("embeddings")
    assert vectors[[0, 2], 0].tolist() == [1, 3]
    assert np.isnan(vectors[1]).all()
    assert reply.as_numpy("status").tolist() == [[pb.OK], [pb.UNSUPPORTED_FORMAT], [pb.OK]]
    messages = reply.as_numpy("message")[:, 0]
    assert messages[0] == messages[2] == b""
    assert messages[1].startswith(b"image: expected")


def test_a_bad_image_as_int8_is_zeros_with_a_scale_of_nan(serving, fake):
    """INT8 has no NaN."""
    reply = run(serving, fake, encoded(b"no image", png(3)), parameters={"dtype": "INT8"})
    assert reply.as_numpy("embeddings")[0].tolist() == [0, 0, 0, 0]
    assert np.isnan(reply.as_numpy("scales")[0, 0])
    assert np.isfinite(reply.as_numpy("scales")[1, 0])


def test_a_status_comes_where_it_is_asked_for(serving, fake):
    """Also where all is well."""
    wanted = [InferRequestedOutput("status"), InferRequestedOutput("embeddings")]
    reply = run(serving, fake, pixels(stack(1, 2)), outputs=wanted)
    assert reply.as_numpy("status").tolist() == [[0], [0]]
    assert reply.as_numpy("embeddings")[:, 0].tolist() == [1, 2]


def test_float_pixels_that_are_none_cost_their_image_alone(serving, fake):
    """What is scaled to 0..1 is not taken for a dark image."""
    images = stack(1, 2, 3).astype(np.float32)
    images[1] /= 255
    reply = run(serving, fake, pixels(images, "FP32"))
    assert reply.as_numpy("status").ravel().tolist() == [pb.OK, pb.UNREADABLE, pb.OK]
    message = reply.as_numpy("message")[1, 0].decode()
    assert message.startswith("FP32 pixels: expected whole numbers from 0 to 255, found 0.00784")


def refused(serving, fake, *inputs, **arguments) -> str:
    """Ask once; the status and message of the refusal, of a call that computed nothing."""
    with pytest.raises(InferenceServerException) as error:
        run(serving, fake, *inputs, **arguments)
    assert fake.computed == []
    return f"{error.value.status()}: {error.value.message()}".removeprefix("StatusCode.")


BAD_FLOATS = [256.0, -1.0, float("nan"), float("inf"), 0.5]


@pytest.mark.parametrize("value", BAD_FLOATS)
def test_a_call_fails_where_no_image_has_a_vector(serving, fake, value):
    """With the fault of the first."""
    images = np.full((1, 8, 8, 1), value, np.float32)
    line = refused(serving, fake, pixels(images, "FP32"))
    assert line.startswith("INVALID_ARGUMENT: FP32 pixels: expected whole numbers from 0 to 255")


def lie(shape: list[int], raw: bytes, datatype: str = "UINT8", name: str = "images") -> InferInput:
    """An input whose contents are not what its shape says."""
    tensor = InferInput(name, shape, datatype)
    tensor._raw_content = raw
    return tensor


def element(length: int, data: bytes) -> bytes:
    """An element of a BYTES tensor that may lie about its length."""
    return struct.pack("<I", length) + data


@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        ([lie([1, 8, 8, 1], bytes(63))], "contents of images of shape [1, 8, 8, 1]: expected 64"),
        ([lie([0, 8, 8, 1], b"")], "shape of images: expected 1 to 1024 images a request, found"),
        ([lie([2000, 8, 8, 1], b"")], "shape of images: expected 1 to 1024 images a request"),
        ([lie([2**62, 8, 8, 1], b"")], "shape of images: expected 1 to 1024 images a request"),
        ([lie([-1, 8, 8, 1], b"")], "shape of images: expected 1 to 1024 images a request"),
        ([lie([1, 2**40, 2**40, 1], b"")], "contents of images of shape"),
        ([lie([1, -8, -8, 1], bytes(64))], "shape of images: expected (N, H, W, C)"),
        ([lie([1, 1, 8, 8], bytes(64))], "shape of images: expected (N, H, W, C), C being 1, 3"),
        ([lie([8, 8, 1], bytes(64))], "shape of images: expected (N, H, W, C)"),
        ([lie([1, 8, 8, 1], bytes(64), "INT32")], "datatype of images: expected UINT8 or FP32"),
        ([lie([1, 8, 8, 1], bytes(64), name="x")], "inputs: expected 'images' alone, found 'x'"),
        ([], "inputs: expected 'images' alone, found none"),
        ([pixels(stack(1)), pixels(stack(2))], "inputs: expected 'images' alone, found 'images'"),
        ([lie([1], element(9, b"abc"), "BYTES")], "element 0 of images: expected a 4-byte little"),
        ([lie([1], b"ab", "BYTES")], "element 0 of images: expected a 4-byte little-endian length"),
        ([lie([2], element(1, b"a"), "BYTES")], "BYTES of images: expected 2 elements, found 1"),
        ([lie([1], element(1, b"ab"), "BYTES")], "BYTES of images: expected 1 elements, found 1"),
        ([lie([1, 2], element(1, b"a"), "BYTES")], "shape of images: expected (N) or (N, 1)"),
    ],
)  # fmt: skip
def test_an_input_that_cannot_be_meant_is_refused(serving, fake, inputs, line):
    """Before anything is computed."""
    assert refused(serving, fake, *inputs).startswith(f"INVALID_ARGUMENT: {line}")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"parameters": {"dims": 9}}, "INVALID_ARGUMENT: parameter dims: expected 1 to 4, found 9"),
        ({"parameters": {"dims": "2"}}, "INVALID_ARGUMENT: parameter dims: expected an integer"),
        ({"parameters": {"dtype": "fp8"}}, "INVALID_ARGUMENT: parameter dtype: expected FP32 or"),
        ({"parameters": {"normalise": True}}, "INVALID_ARGUMENT: parameter: expected dims, dtype"),
        ({"priority": 9}, "INVALID_ARGUMENT: priority: expected 0 to 3"),
        (
            {"sequence_id": 3, "sequence_start": True},
            "FAILED_PRECONDITION: sequence: expected requests that stand alone",
        ),
        ({"outputs": [InferRequestedOutput("x")]}, "INVALID_ARGUMENT: outputs: expected embed"),
        (
            {"outputs": [InferRequestedOutput("embeddings"), InferRequestedOutput("embeddings")]},
            "INVALID_ARGUMENT: outputs: expected each name once, found one twice",
        ),
        (
            {"outputs": [InferRequestedOutput("embeddings", class_count=3)]},
            "INVALID_ARGUMENT: output embeddings: expected the tensor: vectors have no classes",
        ),
        ({"model_version": "7"}, "NOT_FOUND: version of model 'fake': expected '1', found '7'"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(serving, fake, arguments, line):
    """A misspelt parameter is not an ignored one."""
    assert refused(serving, fake, pixels(stack(1)), **arguments).startswith(line)


def test_of_a_parameters_name_the_beginning_is_repeated():
    """A caller may send megabytes of it."""
    for name in ("sequence_", "x"):
        with pytest.raises(ServeError) as error:
            read_parameters({name + "x" * 100_000: None}, dim=4)
        assert len(str(error.value)) < 250


def test_a_timeout_in_microseconds_is_a_deadline(serving, fake):
    """What cannot be computed by then never is; a later one changes nothing."""

    async def scenario():
        async with serving(fake, max_batch_images=1) as server:
            fake.gate.clear()
            first = asyncio.create_task(infer(server, pixels(stack(1))))
            assert await asyncio.to_thread(fake.entered.wait, 120)
            second = asyncio.create_task(infer(server, pixels(stack(2)), timeout=60_000_000))
            with pytest.raises(InferenceServerException, match="deadline") as error:
                await infer(server, pixels(stack(3)), timeout=1)
            assert error.value.status() == "StatusCode.DEADLINE_EXCEEDED"
            fake.gate.set()
            await asyncio.gather(first, second)
            assert fake.computed == [1, 2]

    asyncio.run(scenario())


def send(serving, fake, request):
    """Send a message that Triton's client would not; the status and message of the refusal."""

    async def scenario():
        async with serving(fake) as server, grpc.aio.insecure_channel(server.address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.ModelInfer(request)
            return f"{error.value.code().name}: {error.value.details()}"

    line = asyncio.run(scenario())
    assert fake.computed == []
    return line


def many_of(field: str, count: int) -> service_pb2.ModelInferRequest:
    """A sound request that has far too much of something."""
    request = service_pb2.ModelInferRequest(model_name="fake", raw_input_contents=[bytes(64)])
    tensor = request.inputs.add(name="images", datatype="UINT8", shape=[1, 8, 8, 1])
    if field == "inputs":
        request.inputs.extend([tensor] * count)
    elif field == "outputs":
        request.outputs.extend([request.InferRequestedOutputTensor(name="embeddings")] * count)
    elif field == "shape":
        tensor.shape.extend([1] * count)
    elif field == "raw":
        request.raw_input_contents.extend([b""] * count)
    elif field == "parameters":
        for n in range(count):
            request.parameters[f"triton_{n}"].bool_param = True
    else:
        del request.raw_input_contents[:]
        tensor.contents.uint_contents.extend([1] * count)
    return request


MANY_FIELDS = "message: expected at most 4352 fields, found more; split the request"


@pytest.mark.parametrize(
    ("field", "count", "line"),
    [
        ("inputs", 300, "inputs: expected 'images' alone, found 'images', 'images'"),
        ("outputs", 1000, "outputs: expected at most 6, found 1000"),
        ("shape", 300_000, "shape of images: expected (N, H, W, C), C being 1, 3 or 4, found [1"),
        ("raw", 3000, "raw_input_contents: expected 1, as there is one input, found 3001"),
        ("parameters", 1000, "parameters: expected at most 32, found 1000"),
        *((field, 300_000, MANY_FIELDS) for field in ("inputs", "outputs", "raw", "parameters")),
        ("typed", 2_000_000, "typed contents of images: expected at most 1048576 values, found 2"),
    ],
)
def test_huge_counts_are_refused_by_their_count(serving, fake, field, count, line):
    """Nothing is listed before its length is looked at."""
    assert send(serving, fake, many_of(field, count)).startswith(f"INVALID_ARGUMENT: {line}")


@pytest.mark.parametrize(
    ("datatype", "contents", "line"),
    [
        ("UINT8", {}, "expected 1000000000000 bytes, found 0"),
        ("UINT8", {"raw": bytes(3)}, "expected 1000000000000 bytes, found 3"),
        ("FP32", {"raw": bytes(3)}, "expected 4000000000000 bytes, found 3"),
        ("UINT8", {"uint_contents": [5] * 3}, "expected 1000000000000 bytes, found 3"),
        ("FP32", {"fp32_contents": [5.0] * 3}, "expected 4000000000000 bytes, found 12"),
    ],
)
def test_a_shape_that_lies_is_refused_before_memory_is_asked_for(datatype, contents, line):
    """A hundred bytes would else take the whole queue's, and others would be turned away."""
    request = service_pb2.ModelInferRequest()
    tensor = request.inputs.add(name="images", datatype=datatype, shape=[1, 10**6, 10**6, 1])
    typed = {name: values for name, values in contents.items() if name != "raw"}
    if raw := contents.get("raw"):
        request.raw_input_contents.append(raw)
    tensor.contents.MergeFrom(service_pb2.InferTensorContents(**typed))
    none = OwnRegions(Regions(max_regions=0), lambda: "")
    with pytest.raises(RequestError, match=f"{line}$"):
        read_inputs(request, none, max_images=8, max_bytes=8)


def test_typed_contents_are_read(serving, fake):
    """KServe clients other than Triton's may send them."""

    async def scenario():
        async with serving(fake) as server, grpc.aio.insecure_channel(server.address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            tensor = service_pb2.ModelInferRequest.InferInputTensor
            contents = service_pb2.InferTensorContents
            for given in (
                tensor(datatype="UINT8", contents=contents(uint_contents=[5] * 64)),
                tensor(datatype="FP32", contents=contents(fp32_contents=[5.0] * 64)),
                tensor(datatype="BYTES", contents=contents(bytes_contents=[png(5)])),
            ):
                given.name = "images"
                given.shape.extend([1] if given.datatype == "BYTES" else [1, 8, 8, 1])
                request = service_pb2.ModelInferRequest(model_name="fake", inputs=[given])
                reply = await stub.ModelInfer(request)
                assert np.frombuffer(reply.raw_output_contents[0], "<f4")[0] == 5

    asyncio.run(scenario())
