"""`python -m train.export.tensorrt BUNDLE`: compile an encoder for this machine's GPU.

Rules:
    An engine is a cache, never part of a bundle: its file is named by the encoder's
    fingerprint, the GPU, TensorRT's version and the profile, and is built where there is none.
    One optimisation profile covers every batch from the least to the most; kernels are chosen
    for the usual one.
    The network is strongly typed: it computes in the precision of the ONNX file, so FP16 is
    the encoder that `train.export --fp16` wrote and scored.

Source: NVIDIA TensorRT's Python API, versions 10 and 11.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from models.bundle import Bundle, Precision, read_bundle, split_precision
from models.command import run_command
from models.errors import UsageError
from models.files import atomic_file
from train.errors import ExportError, training_packages, writing
from train.export.graph_names import INPUT_NAME

if TYPE_CHECKING:
    import tensorrt

DEFAULT_BATCHES = (1, 16, 64)
DEFAULT_OUT = Path("artifacts/engines")


@dataclass(frozen=True, kw_only=True)
class TensorrtOptions:
    """Compile an encoder with TensorRT, for the GPU of this machine and no other."""

    bundle: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="BUNDLE")]]
    """Bundle of `train.export`, or the file of one of its encoders, such as its FP16 one."""

    out: Path = DEFAULT_OUT
    """Directory of engines."""

    batches: tuple[int, int, int] = DEFAULT_BATCHES
    """Least, usual and most images of a batch."""

    def __post_init__(self) -> None:
        check_batches(self.batches)


def main(options: TensorrtOptions) -> None:
    """Compile, and print where the engine is."""
    print(build_engine(options.bundle, options.out, batches=options.batches))


def build_engine(path: Path, out: Path, *, batches: tuple[int, int, int] = DEFAULT_BATCHES) -> Path:
    """Compile an encoder; an engine that is there already is kept.

    Args:
        path: the bundle's directory, or the file of one of its encoders.
        out: the directory of engines.
        batches: least, usual and most images of a batch.

    Returns:
        The engine's file.

    Raises:
        ExportError: TensorRT or a GPU is missing, or TensorRT refuses the graph.
        BundleError: the bundle is missing or damaged, or has no such precision.
        UsageError: the batches do not rise, or the encoder is in INT8.
        RunError: the engine cannot be written.
    """
    check_batches(batches)
    bundle, precision = read_bundle(path), split_precision(path)[1]
    refuse_int8(precision)
    gpu = require_tensorrt()
    import tensorrt as trt  # an extra, and only where there is a GPU

    file = out / engine_name(bundle, precision, gpu, trt.__version__, batches)
    if not file.is_file():
        plan = compile_graph(bundle, bundle.path_of(precision).read_bytes(), batches)
        with writing(out, mend="make room or choose another --out"), atomic_file(file) as temporary:
            temporary.write_bytes(plan)
    return file


def require_tensorrt() -> str:
    """Give the name of the GPU, where it and TensorRT are there.

    Raises:
        ExportError: naming all that is missing.
    """
    with training_packages():
        import torch

    has_gpu = torch.cuda.is_available()
    missing = [] if find_spec("tensorrt") else ["no Python package tensorrt"]
    missing += [] if has_gpu else ["no CUDA device"]
    if missing:
        raise ExportError(
            "a TensorRT engine",
            expected="a CUDA device and the Python package tensorrt",
            found=" and ".join(missing),
            mend="run this on the machine that will serve, after `pip install '.[tensorrt]'`; "
            "the bundle itself needs neither",
        )
    return torch.cuda.get_device_name()


def engine_name(
    bundle: Bundle, precision: Precision, gpu: str, version: str, batches: tuple[int, int, int]
) -> str:
    """Name an engine by everything that it depends on."""
    fingerprint = bundle.fingerprint_of(bundle.path_of(precision).name)
    place = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    sizes = "-".join(map(str, batches))
    return f"{fingerprint[:16]}.{place}.trt{version}.n{sizes}.plan"


def compile_graph(bundle: Bundle, graph: bytes, batches: tuple[int, int, int]) -> bytes:
    """Compile an ONNX graph with one profile for all batches; minutes for a large one.

    Raises:
        ExportError: TensorRT refuses the graph, or fails.
    """
    import tensorrt as trt

    builder = trt.Builder(trt.Logger(trt.Logger.WARNING))
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, builder.logger)
    if not parser.parse(graph):
        raise _refused(str(parser.get_error(0)))
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, bundle, batches))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _refused("no engine; TensorRT has said why above")
    return bytes(plan)


def check_batches(batches: tuple[int, int, int]) -> None:
    """Refuse sizes of batches that do not rise from 1 or more.

    Raises:
        UsageError: they do not.
    """
    least, usual, most = batches
    if not 1 <= least <= usual <= most:
        raise UsageError(
            "--batches",
            expected="1 <= least <= usual <= most",
            found=" ".join(map(str, batches)),
        )


def _profile(
    builder: tensorrt.Builder, bundle: Bundle, batches: tuple[int, int, int]
) -> tensorrt.IOptimizationProfile:
    """Tell TensorRT the input's least, usual and largest shape."""
    spec = bundle.preprocessing
    image = (spec.height, spec.width, spec.channels)
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT_NAME, *((size, *image) for size in batches))
    return profile


def refuse_int8(precision: Precision) -> None:
    """Refuse what is quantised for CPUs; `models.providers` says why.

    Raises:
        UsageError: it is INT8.
    """
    if precision == "int8":
        raise UsageError(
            "the INT8 encoder on a GPU",
            expected="the fp32 or the fp16 encoder",
            found="int8, whose unsigned activations are for CPUs",
            mend="export with --fp16 and give encoder.fp16.onnx",
        )


def _refused(reason: str) -> ExportError:
    """Make the error for a graph that TensorRT will not compile."""
    return ExportError(
        "the TensorRT engine",
        expected="a graph that TensorRT compiles",
        found=(reason.splitlines() or ["no reason"])[0],
        mend="serve the ONNX file, or report it with TensorRT's version",
    )


if __name__ == "__main__":
    sys.exit(run_command(TensorrtOptions, main, prog="python -m train.export.tensorrt"))
