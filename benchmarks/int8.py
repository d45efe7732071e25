"""Compare the INT8 encoder with fp32 under ONNX Runtime: images/s of ResNet-50, kNN of a bundle.

The speed of a network does not depend on its weights, so ResNet-50 at 224 is untrained; what
quantising costs is measured on a bundle that was exported with `--int8`, against the labels of
Fashion-MNIST's test images. Both precisions take turns, round by round, in one process.
Run from the root: `python -m benchmarks.int8 --out benchmarks/results/int8.json`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from benchmarks.measuring import command_line, spread_of, turns
from models.bundle import (
    ENCODER_FILE,
    PRECISION_FILES,
    SHIPPED_BUNDLE,
    OutputSpec,
    Precision,
    read_bundle,
    write_bundle,
)
from models.command import progress, run_command
from models.cpu import cpu_budget
from models.encoder import Encoder
from models.fashion_mnist import open_fashion_mnist
from models.networks import ResNet
from models.preprocess import PreprocessSpec
from models.runtime import open_bundle
from train.export.graph import EncoderGraph, write_onnx
from train.export.parity import measure_parity
from train.export.quantise import write_int8
from train.export.readout import PooledReadout
from train.monitor import KNN_K, KNN_TEMPERATURE, knn_accuracy
from train.run import describe_environment

SIDE_PX = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CALIBRATION_IMAGES = 32
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
ENCODE_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Int8Options:
    """Compare the speed and the neighbours of INT8 and fp32."""

    bundle: tyro.conf.Positional[Path] = SHIPPED_BUNDLE
    """Bundle of Fashion-MNIST whose neighbours are compared; speed alone where it has no INT8."""
    rounds: int = 15
    """How often each precision has its turn."""
    batch_sizes: tuple[int, ...] = (1, 8, 16)
    """Images that ResNet-50 is given at once."""
    threads: int = cpu_budget()
    """CPU threads of each session."""
    out: Path | None = None
    """JSON file for the result."""


def main(options: Int8Options) -> None:
    """Measure, print, and write the result."""
    environment = describe_environment()
    report = {
        "command": command_line(),
        "hardware": environment["hardware"],
        "instructions": cpu_instructions(),
        "threads": options.threads,
        "versions": {name: version(name) for name in ("onnxruntime", "onnx", "torch", "numpy")},
        "resnet50": measure_speed(options),
        "bundle": measure_bundle(options),
    }
    print(json.dumps(report, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def measure_speed(options: Int8Options) -> dict[str, object]:
    """Time ResNet-50 at 224 in both precisions, by turns."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_resnet50(Path(folder))
        encoders = {
            name: open_bundle(path, threads=options.threads, precision=name) for name in PRECISIONS
        }
        by_batch = {
            str(size): time_by_turns(encoders, noise(size), options.rounds)
            for size in options.batch_sizes
        }
        vectors = [encoder.encode(noise(ENCODE_BATCH)) for encoder in encoders.values()]
        parity = measure_parity(*vectors)
        for encoder in encoders.values():
            encoder.close()
    return {
        "side_px": SIDE_PX,
        "rounds": options.rounds,
        "mean_cosine": parity.mean_cosine,
        "by_batch_size": by_batch,
    }


def write_resnet50(folder: Path) -> Path:
    """Write an untrained ResNet-50 as a bundle in both precisions."""
    torch.manual_seed(0)
    backbone = ResNet(layout="resnet50", stem="large", zero_init_residual=False)
    with torch.no_grad():  # BatchNorm's statistics become those of images, as after a training
        for _ in range(3):
            backbone(torch.randn(4, 3, SIDE_PX, SIDE_PX))
    graph = EncoderGraph(backbone, PooledReadout(backbone.stage_dims), MEAN, STD)
    spec = PreprocessSpec(height=SIDE_PX, width=SIDE_PX, channels=3, resize=SIDE_PX)
    files = {PRECISION_FILES[name]: folder / PRECISION_FILES[name] for name in PRECISIONS}
    write_onnx(graph, spec, files[ENCODER_FILE])
    write_int8(files[ENCODER_FILE], files[PRECISION_FILES["int8"]], noise(CALIBRATION_IMAGES))
    return write_bundle(
        folder / "bundle",
        name="resnet50",
        files=files,
        preprocessing=spec,
        output=OutputSpec(dim=backbone.stage_dims[-1]),
        provenance={},
    ).path


def time_by_turns(
    encoders: dict[Precision, Encoder], images_NHWC: NDArray[np.uint8], rounds: int
) -> dict[str, object]:
    """Time encoders on the same images, one after the other in every round."""
    images_per_s: dict[str, list[float]] = {name: [] for name in encoders}
    for encoder in encoders.values():
        encoder.encode(images_NHWC)  # the first run allocates
    numbers = progress(range(rounds), what=f"batch {len(images_NHWC)}", total=rounds, unit="round")
    for number in numbers:
        for name, encoder in turns(encoders.items(), number):
            start_s = time.perf_counter()
            encoder.encode(images_NHWC)
            images_per_s[name].append(len(images_NHWC) / (time.perf_counter() - start_s))
    pairs = zip(images_per_s["int8"], images_per_s["fp32"], strict=True)
    return {
        "images_per_s": {name: spread_of(values) for name, values in images_per_s.items()},
        "int8_over_fp32": spread_of([int8 / fp32 for int8, fp32 in pairs]),
    }


def measure_bundle(options: Int8Options) -> dict[str, object] | None:
    """Compare the kNN accuracy of a bundle's precisions; None where it has no INT8."""
    bundle = read_bundle(options.bundle)
    if "int8" not in bundle.precisions:
        return None
    (bank_NHWC, bank_labels_N), (queries_NHWC, labels_Q) = map(fashion_mnist, ("train", "test"))
    scores, vectors = {}, []
    for precision in PRECISIONS:
        with closing(
            open_bundle(options.bundle, threads=options.threads, precision=precision)
        ) as encoder:
            bank_ND, queries_QD = encode(encoder, bank_NHWC), encode(encoder, queries_NHWC)
        scores[precision] = knn_accuracy(bank_ND, bank_labels_N, queries_QD, labels_Q)
        vectors.append(queries_QD)
    parity = measure_parity(*vectors)
    return {
        "name": bundle.name,
        "fingerprint": bundle.fingerprint,
        "bank": len(bank_labels_N),
        "queries": len(labels_Q),
        "k": KNN_K,
        "temperature": KNN_TEMPERATURE,
        "knn_top1": scores,
        "knn_delta": scores["int8"] - scores["fp32"],
        "mean_cosine": parity.mean_cosine,
        "neighbour_overlap": parity.overlap,
    }


def fashion_mnist(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Give a split's (N, 28, 28, 1) uint8 images and (N,) labels, numbered by name."""
    arrays = open_fashion_mnist(split)
    assert arrays.labels is not None
    _, labels_N = np.unique(np.array(arrays.labels), return_inverse=True)
    return arrays.images.reshape(len(labels_N), 28, 28, 1), labels_N.astype(np.int64)


def encode(encoder: Encoder, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Embed images batch by batch."""
    steps = range(0, len(images_NHWC), ENCODE_BATCH)
    return np.concatenate([encoder.encode(images_NHWC[i : i + ENCODE_BATCH]) for i in steps])


def noise(n: int) -> NDArray[np.uint8]:
    """Give n images of noise; the speed of a network does not depend on what it sees."""
    return np.random.default_rng(n).integers(0, 256, (n, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)


def cpu_instructions() -> list[str]:
    """Name the instructions of this CPU that multiply small integers or short floats."""
    text = Path("/proc/cpuinfo").read_text()
    flags = next((x for x in text.splitlines() if x.startswith("flags")), "").split()
    return sorted(x for x in flags if "vnni" in x or "amx" in x or x in ("avx2", "avx512f"))


if __name__ == "__main__":
    sys.exit(run_command(Int8Options, main, prog="python -m benchmarks.int8"))
