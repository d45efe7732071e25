"""What is sent to each server, and whether what comes back are the encoder's vectors."""

from __future__ import annotations

import base64
import http.client
import io
import json
import struct
from pathlib import Path

import grpc
import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tritonclient.grpc import service_pb2 as kserve

from benchmarks.peers.encoder import join
from benchmarks.peers.loads import Target
from benchmarks.peers.processes import BenchmarkError
from benchmarks.peers.servers import MODEL
from models.preprocess import PreprocessSpec
from models.wire import image_to_wire
from protos import horace_pb2 as pb

JPEG_PX = {1: (28, 28), 3: (500, 375)}
"""By channels: Fashion-MNIST's size, and the median of ImageNet's."""

EMBED = "/horace.v1.Horace/Embed"
INFER = "/inference.GRPCInferenceService/ModelInfer"
PATHS = {
    "horace-embed": EMBED, "horace-kserve": INFER, "horace_grpcio-kserve": INFER, "triton": INFER,
    "horace_http-embed": "/v1/embed", "mosec": "/inference", "litserve": "/predict",
    "bentoml": "/embed",
}  # fmt: skip

BOUNDARY = "horace-and-its-peers"

LEAST_COSINE = 0.999


def make_images(spec: PreprocessSpec, payload: str, count: int) -> list[NDArray[np.uint8] | bytes]:
    """Make images that are smooth as photographs are, as pixels or JPEGs; always the same."""
    rng = np.random.default_rng(0)
    size = (spec.width, spec.height) if payload == "tensor" else JPEG_PX[spec.channels]
    images: list[NDArray[np.uint8] | bytes] = []
    for _ in range(count):
        coarse = rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        if spec.channels == 1:
            picture = picture.convert("L")
        if payload == "tensor":
            images.append(np.asarray(picture).reshape(spec.height, spec.width, spec.channels))
        else:
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=87)
            images.append(file.getvalue())
    return images


def write_bodies(images: list[NDArray[np.uint8] | bytes], folder: Path) -> dict[str, Target]:
    """Write the body of each contender's request; give its target, but for the address."""
    folder.mkdir(parents=True, exist_ok=True)
    jpegs = [image for image in images if isinstance(image, bytes)]
    plain = join(jpegs) if jpegs else np.stack(images).tobytes()
    text = base64.b64encode(plain).decode()
    form = httpx.Request(
        "POST", "http://any", data={"encoding": "base64"},
        files=[("images", ("a.jpg", jpeg, "image/jpeg")) for jpeg in jpegs],
        headers={"content-type": f"multipart/form-data; boundary={BOUNDARY}"},
    )  # fmt: skip
    bodies = {
        "horace-embed": _frame(pb.EmbedRequest(images=map(image_to_wire, images))),
        "horace-kserve": _frame(_infer_request(images, plain)),
        "horace_grpcio-kserve": _frame(_infer_request(images, plain)),
        "triton": _frame(_triton_request(images, plain)),
        "horace_http-embed": form.read(),
        "mosec": plain,
        "litserve": json.dumps({"images": text}).encode(),
        "bentoml": json.dumps({"bodies": [text]}).encode(),
    }
    types = dict.fromkeys(("litserve", "bentoml"), "application/json")
    types["horace_http-embed"] = form.headers["content-type"]
    grpc_types = {
        name: "application/grpc" for name, path in PATHS.items() if path in (EMBED, INFER)
    }
    targets = {}
    for name, body in bodies.items():
        file = folder / f"{name}.body"
        file.write_bytes(body)
        content_type = (types | grpc_types).get(name, "application/octet-stream")
        targets[name] = Target(
            url="", path=PATHS[name], body=file.resolve(), model=MODEL, batch=len(images),
            content_type=content_type,
        )  # fmt: skip
    return targets


def _infer_request(
    images: list[NDArray[np.uint8] | bytes], plain: bytes
) -> kserve.ModelInferRequest:
    """Ask ModelInfer for the vectors of pixels, or of files as a BYTES tensor."""
    first, count = images[0], len(images)
    tensor = kserve.ModelInferRequest.InferInputTensor(name="images")
    if isinstance(first, bytes):
        tensor.datatype, shape = "BYTES", [count, 1]
    else:
        tensor.datatype, shape = "UINT8", [count, *first.shape]
    tensor.shape.extend(shape)
    wanted = kserve.ModelInferRequest.InferRequestedOutputTensor(name="embeddings")
    return kserve.ModelInferRequest(
        model_name=MODEL, inputs=[tensor], outputs=[wanted], raw_input_contents=[plain]
    )


def _triton_request(
    images: list[NDArray[np.uint8] | bytes], plain: bytes
) -> kserve.ModelInferRequest:
    """Ask Triton; see `benchmarks.peers.triton_jpeg_model` for how JPEGs go there."""
    request = _infer_request(images, plain)
    jpegs = [image for image in images if isinstance(image, bytes)]
    if jpegs:
        length = max(map(len, jpegs))
        request.inputs[0].datatype = "UINT8"
        request.inputs[0].shape[:] = [len(jpegs), length]
        request.raw_input_contents[:] = [b"".join(jpeg.ljust(length, b"\0") for jpeg in jpegs)]
    return request


def _frame(message: pb.EmbedRequest | kserve.ModelInferRequest) -> bytes:
    """Write a message as gRPC frames it."""
    content = message.SerializeToString()
    return b"\0" + struct.pack(">I", len(content)) + content


def check_answer(name: str, target: Target, expected_ND: NDArray[np.float32]) -> None:
    """Call once, and hold the reply against vectors made without a server.

    Raises:
        BenchmarkError: the reply has other vectors.
    """
    raw = (_call_grpc if target.content_type == "application/grpc" else _call_http)(name, target)
    found_ND = np.frombuffer(raw, "<f4")
    if found_ND.size == expected_ND.size:
        found_ND = found_ND.reshape(expected_ND.shape)
        norms = np.linalg.norm(found_ND, axis=1) * np.linalg.norm(expected_ND, axis=1)
        if ((found_ND * expected_ND).sum(axis=1) >= LEAST_COSINE * norms).all():
            return
    raise BenchmarkError(
        f"reply of {name}", expected="the encoder's vectors", found=f"{len(raw)} bytes of others"
    )


def _call_grpc(name: str, target: Target) -> bytes:
    """Give the bytes of the vectors that a gRPC server answers with."""
    assert target.body is not None
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(target.url, options=options) as channel:
        try:
            reply = channel.unary_unary(target.path)(target.body.read_bytes()[5:], timeout=60)
        except grpc.RpcError as error:
            raise BenchmarkError(name, expected="a reply", found=f"{error!r:.300}") from error
    if name == "horace-embed":
        return pb.EmbedResponse.FromString(reply).vectors.data
    raw: bytes = kserve.ModelInferResponse.FromString(reply).raw_output_contents[0]
    return raw


def _call_http(name: str, target: Target) -> bytes:
    """Give the bytes of the vectors that an HTTP server answers with."""
    assert target.body is not None
    connection = http.client.HTTPConnection(target.url, timeout=60)
    headers = {"Content-Type": target.content_type}
    connection.request("POST", target.path, target.body.read_bytes(), headers)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    if reply.status != 200:
        raise BenchmarkError(name, expected="status 200", found=f"{reply.status} {content!r:.200}")
    match name:
        case "bentoml":
            return base64.b64decode(json.loads(content)[0])
        case "horace_http-embed":
            rows = json.loads(content)["results"]
            return b"".join(base64.b64decode(row["vector"]) for row in rows)
        case _:
            return content
