"""A long run of mixed requests, and what a server takes in the course of it.

Requests are drawn with a seed: pixels and files by Embed, streams, KServe tensors, searches by
image and by id, calls that are cancelled after a moment, and calls whose deadline has passed
before they can be answered. Each reply is checked: a vector must be to the bit that of the
encoder in this process. After every fortieth of the run the callers pause, and the server is
sampled.

It holds if every call that was neither cancelled nor late is answered rightly; resident memory
grows by less than 1% from the first tenth to the end (medians of three samples, since bursts of
cancelled calls move it by some per cent either way); threads and open descriptors are as many at
the end as after the first tenth; and nothing is held when all is over.

Each caller has a connection of its own and makes a new one after some thousand requests.

Run from the root, for each front end: `python -m benchmarks.serve_soak --frontend native
--out benchmarks/results/serve_soak_native.json`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

import grpc
from tritonclient.grpc import service_pb2 as kserve
from tritonclient.grpc import service_pb2_grpc as kserve_grpc

from benchmarks.hostile_requests import Sound
from benchmarks.served import Sample, Served, ServedError, environment
from index.build import BuildOptions, build
from models.bundle import SHIPPED_BUNDLE
from models.command import run_command
from models.errors import UsageError
from models.wire import vectors_from_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc

MEMORY_GROWTH = 0.01
"""Of resident memory, from the first tenth to the end."""

PARTS = 40
"""Samples of a run."""

CONNECTION_REQUESTS = 5000
"""After which a caller connects anew."""

MINI = "tests/data/fashion-mnist-mini"
TIMEOUT_S = 60.0

KINDS = {
    "pixels": 45,
    "files": 20,
    "search-image": 5,
    "search-id": 5,
    "stream": 3,
    "infer": 10,
    "cancel": 6,
    "expire": 6,
}
"""Kinds of requests, with their shares in percent."""

GONE = {grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}


@dataclass(frozen=True, kw_only=True)
class SoakOptions:
    """Send mixed requests for a long time, and see what the server takes."""

    requests: int = 300_000
    """How many."""
    callers: int = 32
    """Callers, each with one request under way."""
    seed: int = 0
    """Of the mix."""
    kinds: tuple[str, ...] = ()
    """Only these kinds of requests, to find out which of them costs; all where none is given."""
    frontend: Literal["native", "grpcio"] = "native"
    """What reads gRPC."""
    looks: int = 5
    """How often the open descriptors are counted for a sample, of which the least is taken."""
    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        if unknown := set(self.kinds) - set(KINDS):
            raise UsageError("--kinds", expected=", ".join(KINDS), found=", ".join(unknown))
        if self.requests < PARTS or self.callers < 1 or self.looks < 1:
            raise UsageError(
                "--requests, --callers, --looks", expected=f"at least {PARTS}, at least 1, 1"
            )


@dataclass(kw_only=True)
class Seen:
    """What all callers have seen.

    Attributes:
        begun: requests that were begun.
        kinds: of them, by kind and by how they ended.
        faults: calls that ended as they must not, with the first of each kind.
    """

    begun: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def fault(self, what: str, why: str) -> None:
        """Note what must not be."""
        self.faults[what] += 1
        self.first.setdefault(what, why[:500])


class Caller:
    """One caller: a connection at a time, a request at a time."""

    def __init__(
        self,
        address: str,
        seen: Seen,
        sound: Sound,
        *,
        ids: list[int],
        seed: int,
        kinds: tuple[str, ...],
    ) -> None:
        """Connect.

        Args:
            address: of the server.
            seen: shared by all callers.
            sound: images, and the vectors that they must have.
            ids: of stored images.
            seed: of this caller's mix.
            kinds: of requests; all where there are none.
        """
        self._address = address
        self._seen = seen
        self._sound = sound
        self._ids = ids
        self._rng = random.Random(seed)
        self._kinds = kinds or tuple(KINDS)
        self._weights = [KINDS[kind] for kind in self._kinds]
        self._left = 0
        self._channel: grpc.aio.Channel | None = None

    async def send(self, requests: int) -> None:
        """Send some requests, one after another."""
        for _ in range(requests):
            await self._connect()
            (kind,) = self._rng.choices(self._kinds, self._weights)
            self._seen.begun += 1
            try:
                await getattr(self, "_" + kind.replace("-", "_"))()
            except grpc.aio.AioRpcError as error:
                self._seen.fault(f"{error.code().name} for {kind}", error.details() or "")
            else:
                self._seen.kinds[kind] += 1

    async def close(self) -> None:
        """Hang up."""
        if self._channel is not None:
            await self._channel.close()

    async def _connect(self) -> None:
        """Connect anew where it is time to."""
        if self._left == 0:
            await self.close()
            options = [("grpc.use_local_subchannel_pool", 1)]  # not a connection of others
            self._channel = grpc.aio.insecure_channel(self._address, options=options)
            self._stub = pb_grpc.HoraceStub(self._channel)
            self._kserve = kserve_grpc.GRPCInferenceServiceStub(self._channel)
            self._left = self._rng.randrange(CONNECTION_REQUESTS // 2, CONNECTION_REQUESTS)
        self._left -= 1

    def _pick(self, first: int, last: int) -> int:
        """Choose an image."""
        return self._rng.randrange(first, last)

    def _check(self, vector: bytes, n: int) -> None:
        """Hold a vector against the right one."""
        if vector != self._sound.vectors[n]:
            self._seen.fault("another vector", f"of image {n}")

    async def _pixels(self) -> None:
        """Embed one image of the encoder's size."""
        n = self._pick(0, len(self._sound.pixels))
        request = pb.EmbedRequest(images=[self._sound.images[n]])
        reply = await self._stub.Embed(request, timeout=TIMEOUT_S)
        self._check(vectors_from_wire(reply.vectors).tobytes(), n)

    async def _files(self) -> None:
        """Embed one to four files."""
        which = [self._pick(len(self._sound.pixels), len(self._sound.images)) for _ in range(4)]
        which = which[: self._rng.randrange(1, 5)]
        request = pb.EmbedRequest(images=[self._sound.images[n] for n in which])
        reply = await self._stub.Embed(request, timeout=TIMEOUT_S)
        for row, n in zip(vectors_from_wire(reply.vectors), which, strict=True):
            self._check(row.tobytes(), n)

    async def _search_image(self) -> None:
        """Search by an image."""
        queries = pb.ImageQueries(images=[self._sound.images[self._pick(0, 4)]])
        await self._search(pb.SearchRequest(images=queries, k=5))

    async def _search_id(self) -> None:
        """Search by a stored image."""
        queries = pb.IdQueries(ids=[self._rng.choice(self._ids)])
        await self._search(pb.SearchRequest(ids=queries, k=5, include_vectors=True))

    async def _search(self, request: pb.SearchRequest) -> None:
        """Search; there are as many hits as asked for."""
        reply = await self._stub.Search(request, timeout=TIMEOUT_S)
        if [len(hits.hits) for hits in reply.results] != [5]:
            self._seen.fault("other hits", str(reply)[:200])

    async def _stream(self) -> None:
        """Stream five requests."""
        which = [self._pick(0, len(self._sound.pixels)) for _ in range(5)]
        requests = [pb.EmbedRequest(images=[self._sound.images[n]]) for n in which]
        stream = self._stub.EmbedStream(iter(requests), timeout=TIMEOUT_S)
        replies = [reply async for reply in stream]
        for reply, n in zip(replies, which, strict=True):
            self._check(vectors_from_wire(reply.vectors).tobytes(), n)

    async def _infer(self) -> None:
        """Send pixels as a KServe tensor."""
        n = self._pick(0, len(self._sound.pixels))
        request = kserve.ModelInferRequest(model_name="mine")
        tensor = request.inputs.add(name="images", datatype="UINT8")
        tensor.shape.extend([1, 28, 28, 1])
        request.parameters["normalize"].bool_param = True  # as Embed does
        request.raw_input_contents.append(self._sound.pixels[n].tobytes())
        reply = await self._kserve.ModelInfer(request, timeout=TIMEOUT_S)
        self._check(reply.raw_output_contents[0], n)

    async def _cancel(self) -> None:
        """Hang up on a call after a moment."""
        call = self._stub.Embed(pb.EmbedRequest(images=self._sound.images))
        await asyncio.sleep(self._rng.random() * 0.004)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call

    async def _expire(self) -> None:
        """Give a call less time than it takes."""
        request = pb.EmbedRequest(images=self._sound.images)
        try:
            await self._stub.Embed(request, timeout=self._rng.random() * 0.004)
        except grpc.aio.AioRpcError as error:
            if error.code() not in GONE and "deadline" not in (error.details() or ""):
                raise


async def soak(served: Served, options: SoakOptions) -> tuple[Seen, list[Sample]]:
    """Send all requests, and sample the server at every part."""
    seen, sound = Seen(), Sound()
    async with grpc.aio.insecure_channel(served.address) as channel:
        stub = pb_grpc.HoraceStub(channel)
        queries = pb.ImageQueries(images=sound.images[:1])
        found = await stub.Search(pb.SearchRequest(images=queries, k=50))
        ids = [hit.id for hit in found.results[0].hits]
    callers = [
        Caller(
            served.address,
            seen,
            sound,
            ids=ids,
            seed=options.seed * 1000 + n,
            kinds=options.kinds,
        )
        for n in range(options.callers)
    ]
    samples: list[Sample] = []
    for part in range(1, PARTS + 1):
        left = options.requests * part // PARTS - seen.begun
        shares = [left // len(callers) + (n < left % len(callers)) for n in range(len(callers))]
        await asyncio.gather(
            *[caller.send(share) for caller, share in zip(callers, shares, strict=True)]
        )
        if not served.is_alive:
            break
        await asyncio.to_thread(served.settle)
        samples.append(served.sample(seen.begun, looks=options.looks))
        print(f"{samples[-1]} faults={seen.faults.total()}", file=sys.stderr)
    for caller in callers:
        await caller.close()
    return seen, samples


def judge(served: Served, seen: Seen, samples: list[Sample]) -> dict[str, bool]:
    """Hold a run against what it is to show."""
    held = served.settle() if served.is_alive else {}
    if len(samples) < PARTS:
        return {"the process lives": False}
    first, last = samples[PARTS // 10 - 1], samples[-1]
    return {
        "the process lives": served.is_alive,
        "every reply is right": not seen.faults,
        "nothing is held": bool(held) and not any(held.values()),
        "memory grows less than 1%": growth_of(samples) < MEMORY_GROWTH,
        "threads are flat": last.threads <= first.threads,
        "descriptors are flat": last.descriptors <= first.descriptors,
        "no traceback in the log": "Traceback" not in served.log,
    }


def growth_of(samples: list[Sample]) -> float:
    """Give by how much memory grew from the first tenth to the end: medians of three samples."""
    tenth = PARTS // 10
    first = median(sample.resident_mib for sample in samples[tenth - 1 : tenth + 2])
    return median(sample.resident_mib for sample in samples[-3:]) / first - 1


def main(options: SoakOptions) -> None:
    """Run, and write what came of it.

    Raises:
        ServedError: it did not hold.
    """
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "collection"
        build(
            BuildOptions(
                images=f"idx:{MINI}/train-images-idx3-ubyte.gz,{MINI}/train-labels-idx1-ubyte.gz",
                encoder=str(SHIPPED_BUNDLE),
                out=path,
            )
        )
        served = Served(
            Path(folder), "--frontend", options.frontend, "--log-level", "warning",
            "--bundle", f"mine={SHIPPED_BUNDLE}", "--collection", f"mine={path}",
        )  # fmt: skip
        try:
            seen, samples = asyncio.run(soak(served, options))
            verdict = judge(served, seen, samples)
            verdict["it drains and exits with 0"] = served.is_alive and served.stop() == 0
            log = served.log
        finally:
            served.kill()
    result = {
        **environment("onnxruntime", "faiss-cpu"),
        "options": {k: v for k, v in asdict(options).items() if k != "out"},
        "verdict": verdict,
        "memory_growth": growth_of(samples) if len(samples) == PARTS else None,
        "seconds": round(time.monotonic() - began_s, 1),
        **vars(seen),
        "samples": [asdict(sample) for sample in samples],
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)
    if not all(verdict.values()):
        failed = ", ".join(what for what, holds in verdict.items() if not holds)
        raise ServedError("soak", expected="all to hold", found=f"not: {failed}; {log[-2000:]}")


if __name__ == "__main__":
    sys.exit(run_command(SoakOptions, main, prog="python -m benchmarks.serve_soak"))
