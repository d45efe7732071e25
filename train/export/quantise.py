"""The encoder in other precisions: INT8 for CPUs, FP16 for GPUs.

Rules:
    INT8 is static: ranges of activations are measured on training images, so that nothing is
    decided by a batch and a vector's bits stay those it has alone.
    Weights have a scale a channel and seven bits: on x86 without VNNI the sum of two products
    of uint8 and int8 saturates at sixteen bits, and a vector must not depend on the server's
    CPU. Activations are uint8, the form that ONNX Runtime's kernels multiply fastest.
    What comes before the backbone and after it stays float32: the input's normalisation is
    exact there, and whitening divides by variances that differ by orders of magnitude.
    FP16 keeps the input and the output as they are.

Source: Jacob et al., arXiv 1712.05877; ONNX Runtime's guide to quantization (U8S8, reduce
range); docs/decisions/0006-readout-and-whitening.md.

Shapes: N images, H x W pixels, C channels.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from models.bundle import Precision
from train.errors import ExportError
from train.export.graph import save_graph
from train.export.graph_names import BACKBONE_PREFIX, INPUT_NAME

CALIBRATION_BATCH = 8

WEIGHTED_OPERATIONS = ("Conv", "Gemm", "MatMul")
"""Operations whose second input is a weight; those that are not the backbone's stay float32."""


class CalibrationImages(CalibrationDataReader):  # type: ignore[misc]  # it has no types
    """Feeds images to ONNX Runtime's calibration, batch by batch."""

    def __init__(self, images_NHWC: NDArray[np.uint8]) -> None:
        steps = range(0, len(images_NHWC), CALIBRATION_BATCH)
        self._batches = iter([images_NHWC[i : i + CALIBRATION_BATCH] for i in steps])

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        """Give the next batch by the input's name; None after the last."""
        batch_NHWC = next(self._batches, None)
        return None if batch_NHWC is None else {INPUT_NAME: batch_NHWC}


def write_int8(encoder: Path, out: Path, images_NHWC: NDArray[np.uint8]) -> None:
    """Write a float32 encoder in 8-bit integers.

    Args:
        encoder: the graph of `train.export.graph.write_onnx`.
        out: the file to write.
        images_NHWC: some hundred training images, (N, H, W, C) uint8, to measure on.

    Raises:
        ExportError: ONNX Runtime cannot quantise the graph.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet(), _translated("int8"):
        prepared, quantised = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(str(encoder), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(quantised),
            CalibrationImages(images_NHWC),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=nodes_outside_backbone(onnx.load(prepared).graph),
            calibrate_method=CalibrationMethod.MinMax,
        )
        model = onnx.load(quantised)
    save_graph(model, out)


def write_fp16(encoder: Path, out: Path) -> None:
    """Write a float32 encoder in half precision, with the same input and output.

    Means stay in float32: CUDA adds up before it divides, and half precision ends at 65,504.

    Raises:
        ExportError: ONNX Runtime cannot convert the graph.
    """
    with _quiet(), _translated("fp16"):  # quiet of weights below the least half, which become it
        model = convert_float_to_float16(
            onnx.load(encoder),
            keep_io_types=True,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, "ReduceMean", "GlobalAveragePool"],
        )
    save_graph(model, out)


def nodes_outside_backbone(graph: onnx.GraphProto) -> list[str]:
    """Name what normalises the input and what reads vectors out of the maps.

    These are the arithmetic operations before the first weight of the backbone, and those
    that have a weight of another name.
    """
    names: list[str] = []
    is_inside = False
    for node in graph.node:
        has_weight = node.op_type in WEIGHTED_OPERATIONS
        is_backbone = has_weight and node.input[1].startswith(BACKBONE_PREFIX)
        is_inside = is_inside or is_backbone
        if not is_inside or (has_weight and not is_backbone):
            names.append(node.name)
    return names


@contextmanager
def _translated(precision: Precision) -> Iterator[None]:
    """Turn what ONNX, its runtime and protobuf raise, which are classes of their own."""
    try:
        yield
    except OSError:  # a full disk, which is no fault of the graph
        raise
    except Exception as error:
        raise ExportError(
            f"the {precision.upper()} graph",
            expected="a network that ONNX Runtime can convert",
            found=(str(error).splitlines() or [type(error).__name__])[0],
            mend=f"export without --{precision}",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep ONNX Runtime's advice on models that it cannot know from the person exporting."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
