"""An encoder on a GPU: batches of every size under ONNX Runtime as it comes, and under Horace.

ResNet-50 at 224 with random weights, on CUDA. In process, the same batches of 1, 32, 8 and other
numbers of images, as a server's batcher makes them, and batches of one size alone, go to

    onnxruntime     one session with the options that it has by itself;
    heuristic       one session whose convolutions are planned by cuDNN's heuristic;
    horace          `models.runtime`: a session for each of a few sizes, the layout of tensor cores;
    horace fp16     the same of the encoder in half precision.

All have seen every size before, and take turns within every round. The least cosine is that of
any image's vector with the CPU's. Served, `python -m serve` has closed loops from processes of
`serve.client bench`, on the same machine; latencies are the least, median and most of processes
and rounds. Run from the root, where there is a GPU:
`python -m benchmarks.gpu --out benchmarks/results/encoder_gpu.json`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from benchmarks.measuring import command_line, spread_of, turns
from benchmarks.peers.bundles import make_bundle
from benchmarks.served import Served
from models.bundle import Precision, read_bundle, write_bundle
from models.command import progress, run_command
from models.errors import EncoderError
from models.providers import Placement
from models.runtime import open_bundle
from train.export.quantise import write_fp16
from train.run import describe_environment

LARGEST = 32
ALONE = (1, 8, 32)
ALONE_BATCHES = 100
WARM_UP_BATCHES = 10
ON_GPU = Placement(provider="cuda")

Encode = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class GpuOptions:
    """Measure an encoder on a GPU, in process and served."""

    rounds: int = 3
    """How often each contender has its turn."""
    batches: int = 10
    """Batches of a turn beside those of 1, 8 and 32."""
    seconds: float = 3.0
    """How long each closed loop of a server takes."""
    loops: tuple[str, ...] = ("1x1", "4x4", "8x16")
    """Closed loops: so many client processes, each with so many requests under way."""
    home: Path = Path("artifacts/bench/peers")
    """Where the bundle is made."""
    out: Path | None = None
    """JSON file for the result."""


def main(options: GpuOptions) -> None:
    """Measure, print, and write the result."""
    options.home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        bundle = add_fp16(make_bundle("large", options.home), Path(folder))
        report = {
            "command": command_line(),
            "hardware": describe_environment()["hardware"],
            "versions": {name: version(name) for name in ("onnxruntime-gpu", "torch", "numpy")},
            "rounds": options.rounds,
            "in_process": measure_in_process(bundle, options),
            "served": {
                precision: measure_served(bundle, precision, options, Path(folder))
                for precision in ("fp32", "fp16")
            },
        }
    print(json.dumps(report, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def add_fp16(path: Path, folder: Path) -> Path:
    """Give the bundle with its encoder in half precision beside it."""
    bundle = read_bundle(path)
    fp16 = folder / "encoder.fp16.onnx"
    write_fp16(bundle.path_of("fp32"), fp16)
    return write_bundle(
        folder / "bundle",
        name="large",
        files={"encoder.onnx": bundle.path_of("fp32"), fp16.name: fp16},
        preprocessing=bundle.preprocessing,
        output=bundle.output,
        provenance={},
    ).path


def measure_in_process(bundle: Path, options: GpuOptions) -> dict[str, object]:
    """Time batches of all sizes, and of one size, contender by contender."""
    rng = np.random.default_rng(0)
    images_NHWC = rng.integers(0, 256, (LARGEST, 224, 224, 3), dtype=np.uint8)
    exact = unit(open_bundle(bundle).encode(images_NHWC))
    contenders: dict[str, Encode] = {
        "onnxruntime": plain_session(bundle, {}),
        "heuristic": plain_session(bundle, {"cudnn_conv_algo_search": "HEURISTIC"}),
        "horace": open_bundle(bundle, placement=ON_GPU).encode,
        "horace fp16": open_bundle(bundle, placement=ON_GPU, precision="fp16").encode,
    }
    mixed: dict[str, list[float]] = {name: [] for name in contenders}
    longest_ms: dict[str, list[float]] = {name: [] for name in contenders}
    alone: dict[str, dict[int, list[float]]] = {name: {n: [] for n in ALONE} for name in contenders}
    least = dict.fromkeys(contenders, 1.0)
    sizes = [1, LARGEST, 8, *rng.integers(1, LARGEST + 1, options.batches).tolist()]
    for encode in contenders.values():
        timed(encode, images_NHWC, sizes)  # what is planned once for all is planned
    for number in progress(range(options.rounds), what="GPU", total=options.rounds, unit="round"):
        for name, encode in turns(contenders.items(), number):
            times_s, vectors = timed(encode, images_NHWC, sizes)
            mixed[name].append(sum(sizes) / sum(times_s))
            longest_ms[name].append(max(times_s) * 1e3)
            cosines = ((unit(found) * exact[: len(found)]).sum(axis=1).min() for found in vectors)
            least[name] = min(least[name], *map(float, cosines))
            if not all(np.isfinite(found).all() for found in vectors):
                raise EncoderError(name, expected="finite vectors", found="others")
            for size in ALONE:
                timed(encode, images_NHWC, [size] * WARM_UP_BATCHES)
                times_s, _ = timed(encode, images_NHWC, [size] * ALONE_BATCHES)
                alone[name][size].append(float(np.median(times_s)) * 1e3)
    return {
        name: {
            "mixed_images_per_s": spread_of(mixed[name], 1),
            "mixed_longest_ms": spread_of(longest_ms[name], 2),
            "alone_ms": {str(n): spread_of(alone[name][n], 3) for n in ALONE},
            "one_minus_least_cosine": float(f"{1 - least[name]:.1e}"),
        }
        for name in contenders
    }


def plain_session(bundle: Path, choice: dict[str, str]) -> Encode:
    """Open the encoder as ONNX Runtime's documentation shows."""
    graph = read_bundle(bundle).path_of("fp32")
    session = ort.InferenceSession(str(graph), providers=[("CUDAExecutionProvider", choice)])
    name = session.get_inputs()[0].name
    return lambda images_NHWC: session.run(None, {name: images_NHWC})[0]


def timed(
    encode: Encode, images_NHWC: NDArray[np.uint8], sizes: Sequence[int]
) -> tuple[list[float], list[NDArray[np.float32]]]:
    """Give the seconds of each batch, and its vectors."""
    times_s, vectors = [], []
    for size in sizes:
        start_s = time.perf_counter()
        vectors.append(encode(images_NHWC[:size]))
        times_s.append(time.perf_counter() - start_s)
    return times_s, vectors


def unit(vectors_ND: NDArray[np.floating]) -> NDArray[np.float64]:
    """Bring vectors to length one."""
    vectors_ND = np.asarray(vectors_ND, np.float64)
    return np.asarray(vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True))


def measure_served(
    bundle: Path, precision: Precision, options: GpuOptions, folder: Path
) -> dict[str, object]:
    """Start a server, and have it called by closed loops."""
    where = f"large={bundle},provider=cuda,precision={precision}"
    server = Served(folder, "--bundle", where)
    try:
        return {loop: call(server.address, loop, options) for loop in options.loops}
    finally:
        server.process.terminate()
        server.process.wait()


def call(address: str, loop: str, options: GpuOptions) -> dict[str, object]:
    """Run a closed loop several times, and add up what its processes saw."""
    clients, under_way = map(int, loop.split("x"))
    command = [
        sys.executable, "-m", "serve.client", "bench", "--server", address, "--json",
        "--concurrency", str(under_way), "--seconds", str(options.seconds),
    ]  # fmt: skip
    reports = []
    for _ in range(options.rounds):
        processes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(clients)
        ]
        reports.append([json.loads(process.communicate()[0]) for process in processes])
    of_all = [report for reports_of_round in reports for report in reports_of_round]
    if any(report["failed_images"] or report["errors"] for report in of_all):
        raise EncoderError(f"loop {loop}", expected="a vector for every image", found="failures")
    return {
        "images_per_s": spread_of(
            [sum(r["images_per_s"] for r in round_) for round_ in reports], 1
        ),
        "p50_ms": spread_of([report["p50_ms"] for report in of_all], 2),
        "p99_ms": spread_of([report["p99_ms"] for report in of_all], 2),
    }


if __name__ == "__main__":
    sys.exit(run_command(GpuOptions, main, prog="python -m benchmarks.gpu"))
