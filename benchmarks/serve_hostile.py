"""Hostile inputs against a real server: does it live, and does it answer everybody else?

Every request that carries something hostile carries sound images, too, or is sent together
with a request that does, and their vectors must be to the bit those of the encoder in this
process. Of all inputs

| share | what |
|---|---|
| 80% | encoded images, mutated or bombs: Embed, EmbedStream, KServe's BYTES, queries of Search |
| 8% | pixels of wrong shapes, wrong lengths, none, or counts that nobody could send |
| 6% | requests that cannot be meant, by their numbers, names or kinds; of many images or none |
| 3% | KServe tensors that are not what they say |
| 3% | bytes that are no message, to every method there is |

The run is held to this: the process lives; no reply is INTERNAL, UNKNOWN or UNAVAILABLE; every
sound image has its vector; no message tells a path, an address in memory or a stack; in the
end nothing is held, no thread is stuck (a large sound request is answered, and there are as
many threads as before), nothing in the log is a traceback; and memory is flat: what is
resident after the first tenth against the end, medians of five samples, since a large picture
that is let in moves it for a while.

The inputs are `benchmarks.hostile_inputs`, the requests `benchmarks.hostile_requests`.

Run from the root, for each front end: `python -m benchmarks.serve_hostile --frontend native
--out benchmarks/results/serve_hostile_native.json`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import grpc

from benchmarks.hostile_requests import Attack, Tally
from benchmarks.served import Sample, Served, ServedError, environment
from index.build import BuildOptions, build
from models.bundle import SHIPPED_BUNDLE
from models.command import run_command
from models.errors import UsageError

MEMORY_GROWTH = 0.05
"""Of resident memory, from the first tenth to the end: what is above is not flat."""

PARTS = 40
"""Samples of a run."""

THREADS_MORE = 2
"""Threads that may be there at the end and not after the first tenth: pools fill late."""

MINI = "tests/data/fashion-mnist-mini"


@dataclass(frozen=True, kw_only=True)
class HostileOptions:
    """Send hostile inputs to a server, and see whether it answers everybody else."""

    inputs: int = 20_000
    """How many."""
    seed: int = 0
    """Of all of them."""
    concurrency: int = 8
    """Requests under way at once."""
    frontend: Literal["native", "grpcio"] = "native"
    """What reads gRPC."""
    looks: int = 5
    """How often the open descriptors are counted for a sample, of which the least is taken."""
    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        if self.inputs < 10 or self.concurrency < 1 or self.looks < 1:
            raise UsageError(
                "--inputs, --concurrency, --looks", expected="at least 10, at least 1, 1"
            )


async def attack(served: Served, options: HostileOptions) -> tuple[Tally, list[Sample]]:
    """Send all inputs, and sample the server at every part."""
    samples: list[Sample] = []
    limits = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(served.address, options=limits) as channel:
        run = Attack(channel, options.seed)

        async def send(until: int) -> None:
            while run.tally.inputs < until and served.is_alive:
                await run.go()

        for part in range(1, PARTS + 1):
            until = options.inputs * part // PARTS
            await asyncio.gather(*[send(until) for _ in range(options.concurrency)])
            if not served.is_alive:
                break
            await asyncio.to_thread(served.settle)
            samples.append(served.sample(run.tally.inputs, looks=options.looks))
            print(f"{samples[-1]} faults={sum(run.tally.faults.values())}", file=sys.stderr)
        if served.is_alive:
            await _fill_every_thread(run)
    return run.tally, samples


async def _fill_every_thread(run: Attack) -> None:
    """Have every thread of the server decode something sound: one that is stuck would show."""
    images = run.sound.images * 50
    places = {place: place % len(run.sound.images) for place in range(len(images))}
    await run.embed_mixed(images, places, "sound images, in the end")


def judge(served: Served, tally: Tally, samples: list[Sample]) -> dict[str, bool]:
    """Hold a run against what it is to show."""
    held = served.settle() if served.is_alive else {}
    growth = _growth(samples)
    log = served.log
    return {
        "the process lives": served.is_alive,
        "no reply is wrong": not tally.faults,
        "nothing is held": bool(held) and not any(held.values()),
        "no thread is stuck": len(samples) == PARTS
        and samples[-1].threads <= samples[PARTS // 10 - 1].threads + THREADS_MORE,
        "no traceback in the log": "Traceback" not in log and "incident" not in log,
        "memory is flat": growth is not None and growth <= MEMORY_GROWTH,
    }


def _growth(samples: list[Sample]) -> float | None:
    """Give by how much memory grew from the first tenth to the end: medians of five samples."""
    if len(samples) < PARTS:
        return None
    tenth = PARTS // 10
    first = median(sample.resident_mib for sample in samples[tenth - 1 : tenth + 4])
    return median(sample.resident_mib for sample in samples[-5:]) / first - 1


def main(options: HostileOptions) -> None:
    """Run, and write what came of it.

    Raises:
        ServedError: it did not hold.
    """
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        collection = Path(folder) / "collection"
        build(
            BuildOptions(
                images=f"idx:{MINI}/train-images-idx3-ubyte.gz,{MINI}/train-labels-idx1-ubyte.gz",
                encoder=str(SHIPPED_BUNDLE),
                out=collection,
            )
        )
        served = Served(
            Path(folder), "--frontend", options.frontend,
            "--bundle", f"mine={SHIPPED_BUNDLE}", "--collection", f"mine={collection}",
        )  # fmt: skip
        try:
            tally, samples = asyncio.run(attack(served, options))
            verdict = judge(served, tally, samples)
            status = served.stop() if served.is_alive else served.process.returncode
            verdict["it drains and exits with 0"] = status == 0
            log = served.log
        finally:
            served.kill()
    result = {
        **environment("pillow", "simplejpeg", "onnxruntime"),
        "options": {k: v for k, v in asdict(options).items() if k != "out"},
        "verdict": verdict,
        "memory_growth": _growth(samples),
        "seconds": round(time.monotonic() - began_s, 1),
        "samples": [asdict(sample) for sample in samples],
        **vars(tally),
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)
    if not all(verdict.values()):
        failed = ", ".join(what for what, holds in verdict.items() if not holds)
        raise ServedError(
            "hostile inputs", expected="all to hold", found=f"not: {failed}; log: {log[-2000:]}"
        )


if __name__ == "__main__":
    sys.exit(run_command(HostileOptions, main, prog="python -m benchmarks.serve_hostile"))
