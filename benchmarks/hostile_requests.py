"""Hostile requests among sound ones, and what must not come of them.

Rules:
    A hostile image travels with two sound ones, whose vectors must be right to the bit.
    Where a whole request is hostile, a sound one is sent at the same time.
    A fault is noted with the first reply that shows it; the run goes on.

What is sent follows from the seed; in which order, from the replies, too.
"""

from __future__ import annotations

import asyncio
import random
import re
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tritonclient.grpc import service_pb2 as kserve
from tritonclient.grpc import service_pb2_grpc as kserve_grpc

from benchmarks.hostile_inputs import HostileImages
from models.bundle import SHIPPED_BUNDLE
from models.encoder import open_encoder
from models.vectors import finish_vectors
from models.wire import image_to_wire, vectors_from_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc

HOSTILE_A_REQUEST = 4
"""Files of a request that are hostile, beside the two that are not."""

TIMEOUT_S = 60.0

TEXTS = ("", "no such", "x" * 100_000, "\n\r\0", "../../etc/passwd", "%s%n", "é" * 5000)

ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
}
"""How a hostile request may end."""

LEAK = re.compile(
    r"""(?<![\w:/.])/(?:usr|home|root|work|tmp|opt|srv|etc|proc)/ | \b0x[0-9a-fA-F]{6,}
    | Traceback | File[ ]" | \bobject[ ]at\b | site-packages | \.py\b""",
    re.VERBOSE,
)


Method = tuple[str, bool, bool]

METHODS: list[Method] = [
    (f"/{service.full_name}/{method.name}", method.client_streaming, method.server_streaming)
    for file in (pb, kserve, health_pb2, reflection_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
"""Every method there is: path, and whether requests and replies are streams."""


@dataclass(kw_only=True)
class Tally:
    """What came of the inputs.

    Attributes:
        inputs: hostile ones that were sent.
        kinds: of them, by what was done.
        codes: of hostile requests, by status code.
        items: of hostile images, by their status.
        sound: sound images that were answered rightly.
        faults: what must not be, by what it was, with the first of each.
    """

    inputs: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    items: Counter[str] = field(default_factory=Counter)
    sound: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def fault(self, what: str, why: str) -> None:
        """Note what must not be."""
        self.faults[what] += 1
        self.first.setdefault(what, why[:500])

    def check_text(self, text: str) -> None:
        """Note a message that tells what is nobody's business."""
        if LEAK.search(text):
            self.fault("a message that tells too much", text)

    def check_code(self, code: grpc.StatusCode, details: str, kind: str) -> None:
        """Note how a hostile request ended."""
        self.codes[code.name] += 1
        self.check_text(details)
        if code not in ALLOWED:
            self.fault(f"{code.name} for {kind}", details)


class Sound:
    """Sound images, and the vectors that the shipped encoder gives them in this process."""

    def __init__(self) -> None:
        """Embed them one by one: a server's are the same to the bit, in whatever batch."""
        rng = np.random.default_rng(7)
        self.pixels = [rng.integers(0, 256, (28, 28, 1), dtype=np.uint8) for _ in range(4)]
        seeds = HostileImages(0).seeds
        names = ("baseline.jpg", "rgb.png", "lossy.webp", "still.gif", "rgb.bmp", "lzw.tiff")
        self.files = [seeds[name] for name in names]
        self.images = [image_to_wire(pixels) for pixels in self.pixels]
        self.images += [pb.Image(encoded=data) for data in self.files]
        with closing(open_encoder(SHIPPED_BUNDLE)) as encoder:
            self.vectors = [
                finish_vectors(encoder.encode(encoder.preprocess(image)[None])).tobytes()
                for image in (*self.pixels, *self.files)
            ]


class Attack:
    """One run: makes inputs, sends them, and checks the replies."""

    def __init__(self, channel: grpc.aio.Channel, seed: int) -> None:
        self._channel = channel
        self._stub = pb_grpc.HoraceStub(channel)
        self._kserve = kserve_grpc.GRPCInferenceServiceStub(channel)
        self._images = HostileImages(seed)
        self._rng = random.Random(seed + 1)
        self.sound = Sound()
        self.tally = Tally()
        self._dim = len(self.sound.vectors[0]) // 4

    async def go(self) -> None:
        """Send one request of some kind, with its sound company."""
        draw = self._rng.random()
        share = 0.80 / HOSTILE_A_REQUEST / (0.80 / HOSTILE_A_REQUEST + 0.20)
        ways: list[tuple[float, Callable[[], Awaitable[None]]]]
        if draw < share:
            ways = [(6, self._embed), (1, self._stream), (2, self._infer_files), (1, self._search)]
        else:
            ways = [(8, self._pixels), (6, self._meaningless), (3, self._tensors), (3, self._bytes)]
        weights = [weight for weight, _ in ways]
        ((_, way),) = self._rng.choices(ways, weights)
        try:
            await way()
        except grpc.aio.AioRpcError as error:
            what = f"{error.code().name} for {way.__name__.strip('_')}"
            self.tally.fault(what, error.details() or "")

    # Encoded images.

    def _files(self) -> list[bytes]:
        """Make the hostile files of one request."""
        made = [self._images.next() for _ in range(HOSTILE_A_REQUEST)]
        self.tally.inputs += len(made)
        self.tally.kinds.update(hostile.kind for hostile in made)
        return [hostile.data for hostile in made]

    def _mix(self, hostile: list[pb.Image]) -> tuple[list[pb.Image], dict[int, int]]:
        """Put sound images among hostile ones; give where they are, and which."""
        which = self._rng.sample(range(len(self.sound.images)), 2)
        mixed: list[tuple[pb.Image, int]] = [(image, -1) for image in hostile]
        for n in which:
            mixed.insert(self._rng.randrange(len(mixed) + 1), (self.sound.images[n], n))
        places = {place: n for place, (_, n) in enumerate(mixed) if n >= 0}
        return [image for image, _ in mixed], places

    def _check_reply(self, reply: pb.EmbedResponse, places: dict[int, int], count: int) -> None:
        """Hold a reply against what sound images in it must have."""
        if len(reply.statuses) != count:
            self.tally.fault("a status is missing", f"{len(reply.statuses)} of {count}")
            return
        rows = vectors_from_wire(reply.vectors)
        row = 0
        for place, status in enumerate(reply.statuses):
            self.tally.check_text(status.message)
            vector = b""
            if status.code == pb.OK:
                vector, row = rows[row].tobytes(), row + 1
            if place not in places:
                self.tally.items[pb.ItemCode.Name(status.code)] += 1
            else:
                self._check_sound(vector, places[place], str(status.message))
        if row != len(rows):
            self.tally.fault("a vector too many", f"{len(rows)} of {row}")

    def _check_sound(self, vector: bytes, n: int, message: str) -> None:
        """Hold the vector of a sound image against the right one."""
        if vector == self.sound.vectors[n]:
            self.tally.sound += 1
        else:
            self.tally.fault("a sound image without its vector", message or f"image {n}: another")

    async def _embed(self) -> None:
        """Embed hostile files among sound images."""
        images, places = self._mix([pb.Image(encoded=data) for data in self._files()])
        await self.embed_mixed(images, places, "files")

    async def embed_mixed(self, images: list[pb.Image], places: dict[int, int], kind: str) -> None:
        """Embed, and check what comes."""
        try:
            reply = await self._stub.Embed(pb.EmbedRequest(images=images), timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            self.tally.fault(f"{error.code().name} for a request of {kind}", error.details() or "")
            return
        self.tally.codes["OK"] += 1
        self._check_reply(reply, places, len(images))

    async def _stream(self) -> None:
        """Stream a hostile request and a sound one, whichever first."""
        mixed, places = self._mix([pb.Image(encoded=data) for data in self._files()])
        requests = [(mixed, places), ([self.sound.images[0]], {0: 0}), ([], {})]
        self._rng.shuffle(requests)
        self.tally.inputs += 1
        self.tally.kinds["a request of no images in a stream"] += 1
        stream = self._stub.EmbedStream(
            iter([pb.EmbedRequest(images=images) for images, _ in requests]), timeout=TIMEOUT_S
        )
        replies = [reply async for reply in stream]
        if len(replies) != len(requests):
            self.tally.fault("a reply of a stream is missing", f"{len(replies)}")
            return
        for (images, places), reply in zip(requests, replies, strict=True):
            if images:
                self._check_reply(reply, places, len(images))
            elif reply.error.code != grpc.StatusCode.INVALID_ARGUMENT.value[0]:
                self.tally.fault("a request of no images in a stream", str(reply.error))

    async def _infer_files(self) -> None:
        """Send hostile and sound files as a BYTES tensor."""
        n = self._rng.randrange(len(self.sound.pixels), len(self.sound.images))
        files = self._files()
        place = self._rng.randrange(len(files) + 1)
        files.insert(place, self.sound.files[n - len(self.sound.pixels)])
        raw = b"".join(struct.pack("<I", len(data)) + data for data in files)
        request = self._tensor("BYTES", [len(files)], raw)
        request.parameters["normalize"].bool_param = True  # as Embed does
        try:
            reply = await self._kserve.ModelInfer(request, timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            self.tally.fault(f"{error.code().name} for BYTES", error.details() or "")
            return
        rows = np.frombuffer(reply.raw_output_contents[0], "<f4").reshape(-1, self._dim)
        self._check_sound(rows[place].tobytes(), n, "by KServe")

    def _tensor(self, datatype: str, shape: list[int], raw: bytes) -> Any:
        """Write a request of KServe."""
        request = kserve.ModelInferRequest(model_name="mine")
        tensor = request.inputs.add(name="images", datatype=datatype)
        tensor.shape.extend(shape)
        request.raw_input_contents.append(raw)
        return request

    async def _search(self) -> None:
        """Search by hostile files among sound images."""
        images, places = self._mix([pb.Image(encoded=data) for data in self._files()])
        request = pb.SearchRequest(images=pb.ImageQueries(images=images), k=3)
        reply = await self._stub.Search(request, timeout=TIMEOUT_S)
        for place, hits in enumerate(reply.results):
            self.tally.check_text(hits.status.message)
            if place in places and (hits.status.code != pb.OK or len(hits.hits) != 3):
                self.tally.fault("a sound query without its hits", hits.status.message)
            elif place in places:
                self.tally.sound += 1
        if len(reply.results) != len(images):
            self.tally.fault("a query without a result", f"{len(reply.results)}")

    # Pixels.

    async def _pixels(self) -> None:
        """Embed pixels that are not what they say, among sound images."""
        rng = self._rng
        sides = (0, 1, 27, 28, 29, 100, 65535, 0x7FFFFFFF, 0xFFFFFFFF)
        raw = pb.RawImage(
            pixels=rng.randbytes(rng.choice((0, 1, 783, 784, 785, 28 * 28 * 3, 28 * 28 * 4))),
            height=rng.choice((28, 28, *sides)),
            width=rng.choice((28, 28, *sides)),
            channels=rng.choice((1, 3, 4, 0, 2, 5, 0xFFFFFFFF)),
        )
        hostile = rng.choice(
            (pb.Image(raw=raw), pb.Image(raw=raw), pb.Image(), pb.Image(encoded=b""))
        )
        self.tally.inputs += 1
        self.tally.kinds["pixels"] += 1
        await self.embed_mixed(*self._mix([hostile]), "pixels")

    # Whole requests; their sound company is a request of its own.

    async def _beside(self, kind: str, call: Awaitable[tuple[grpc.StatusCode, str]]) -> None:
        """Send a hostile request, and a sound one at the same time."""
        self.tally.inputs += 1
        self.tally.kinds[kind] += 1
        n = self._rng.randrange(len(self.sound.images))
        image = self.sound.images[n]
        (code, details), _ = await asyncio.gather(call, self.embed_mixed([image], {0: n}, "sound"))
        self.tally.check_code(code, details, kind)

    async def _end_of(self, call: Any) -> tuple[grpc.StatusCode, str]:
        """Give the status of a unary call."""
        try:
            await call
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
        return grpc.StatusCode.OK, ""

    async def _meaningless(self) -> None:
        """Send a request that is a message, and cannot be meant."""
        rng = self._rng
        one = [self.sound.images[0]]
        text = rng.choice(TEXTS)
        number = rng.choice((0, 1, 511, 513, 0x7FFFFFFF, 0xFFFFFFFF))
        floats = np.array([rng.choice((np.nan, np.inf, 1e38, 0.0, 1.0))] * self._dim, "<f4")
        vectors = pb.Vectors(
            data=floats.tobytes()[: rng.choice((0, 1, 4 * self._dim))],
            dtype=rng.choice((0, 1, 2, 3, 99)),
            rows=rng.choice((0, 1, 2, 0xFFFFFFFF)),
            dim=rng.choice((0, 1, self._dim, 0xFFFFFFFF)),
            scales=[rng.choice((np.nan, 0.0, 1.0))] * rng.choice((0, 1, 1000)),
        )
        by_vector = pb.VectorQueries(vectors=vectors, fingerprint=text)
        requests = [
            pb.EmbedRequest(model=text, images=one),
            pb.EmbedRequest(images=one, dims=number, dtype=rng.choice((0, 3, 99))),
            pb.EmbedRequest(images=one * rng.choice((0, 1025, 5000))),
            pb.EmbedRequest(images=one, request_id=text, priority=number),
            pb.SearchRequest(),
            pb.SearchRequest(collection=text, ids=pb.IdQueries(ids=[1])),
            pb.SearchRequest(ids=pb.IdQueries(ids=[0, 2**64 - 1] * rng.choice((1, 600))), k=number),
            pb.SearchRequest(vectors=by_vector, k=rng.choice((0, 3, number))),
            pb.SearchRequest(
                images=pb.ImageQueries(images=one),
                filter=rng.choice((text, "(" * 5000, "label = 'x")),
            ),
            pb.SearchRequest(
                combined=pb.Combined(
                    queries=[
                        pb.Combination(
                            positives=[pb.Example(vector=by_vector), pb.Example()],
                            negatives=[pb.Example(id=number)],
                            negative_weight=rng.choice((np.nan, -1.0, 1e30)),
                        )
                    ]
                )
            ),
        ]
        request = rng.choice(requests)
        make = self._stub.Embed if isinstance(request, pb.EmbedRequest) else self._stub.Search
        await self._beside(
            "a request that cannot be meant", self._end_of(make(request, timeout=TIMEOUT_S))
        )

    async def _tensors(self) -> None:
        """Send a tensor of KServe that is not what it says."""
        rng = self._rng
        sizes = (0, 1, -1, 28, 29, 1 << 31, 1 << 62, -(1 << 63))
        request = self._tensor(
            rng.choice(("UINT8", "FP32", "BYTES", "FP16", "no such", "")),
            [rng.choice((1, 28, 28, *sizes)) for _ in range(rng.choice((0, 1, 2, 3, 4, 9)))],
            rng.randbytes(rng.choice((0, 3, 4, 784, 3136))),
        )
        spoil = rng.randrange(6)
        if spoil == 0:
            del request.raw_input_contents[:]
        elif spoil == 1:
            request.raw_input_contents.extend([b"more"] * 3)
        elif spoil == 2:
            request.inputs[0].contents.bytes_contents.append(b"both")
        elif spoil == 3:
            request.inputs[0].parameters["shared_memory_region"].string_param = "/etc/passwd"
            request.inputs[0].parameters["shared_memory_byte_size"].int64_param = 1 << 62
        elif spoil == 4:
            request.outputs.add(name=rng.choice(("embeddings", "no such", "x" * 10_000)))
            request.parameters["timeout"].int64_param = rng.choice((-1, 1 << 62))
        await self._beside(
            "a tensor", self._end_of(self._kserve.ModelInfer(request, timeout=TIMEOUT_S))
        )

    async def _bytes(self) -> None:
        """Send bytes that are no message, to any method."""
        method = self._rng.choice(METHODS)
        size = self._rng.choice((1, 16, 1000, 100_000))
        raw = self._rng.choice((self._rng.randbytes(size), b"\x0a\xff\xff\xff\xff\x0f" * 3))
        await self._beside("bytes", self._call_raw(method, raw))

    async def _call_raw(self, method: Method, raw: bytes) -> tuple[grpc.StatusCode, str]:
        """Call any method with any bytes."""
        path, streams_in, streams_out = method
        make = getattr(
            self._channel,
            f"{'stream' if streams_in else 'unary'}_{'stream' if streams_out else 'unary'}",
        )(path)
        call = make(iter([raw]) if streams_in else raw, timeout=TIMEOUT_S)
        try:
            if streams_out:
                await call.read()  # a Watch of health goes on for ever
                if not call.done():
                    call.cancel()
                    return grpc.StatusCode.OK, ""
            else:
                await call
        except grpc.aio.AioRpcError:
            pass
        return await call.code(), await call.details() or ""
