"""The graph that is exported: uint8 pixels in, vectors out, written as one ONNX file.

Rules:
    Layout, scale, mean and deviation are inside, so no second implementation can drift.
    The readout is a module of its own; a final linear map in one must be a 1x1 convolution,
    which ONNX Runtime computes alike for every batch size, as it does not a matrix product.

Shapes: N images of H x W pixels and C channels, D dimensions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.preprocess import PreprocessSpec
from train.device import images_at_once
from train.errors import ExportError
from train.export.graph_names import BATCH_NAME, INPUT_NAME, OUTPUT_NAME

T = TypeVar("T")

OPSET = 20
"""Recent enough for the exporter to need no conversion, old enough for TensorRT 10."""

TRACE_BATCH = 2
"""Images in the example; 1 would be burnt into the graph as a constant."""

EMBED_BATCH = 256


class EncoderGraph(nn.Module):
    """Normalisation, backbone and readout, in eval mode.

    Args:
        backbone: gives the maps of its stages for normalised (N, C, H, W).
        readout: makes (N, D) vectors of the maps; has `dim`.
        channel_mean: per channel, of values in [0, 1].
        channel_std: per channel.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        readout: nn.Module,
        channel_mean: Sequence[float],
        channel_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.backbone, self.readout = backbone, readout
        mean = torch.tensor(channel_mean, dtype=torch.float64).view(1, -1, 1, 1)
        std = torch.tensor(channel_std, dtype=torch.float64).view(1, -1, 1, 1)
        self.register_buffer("scale", (1 / (255 * std)).float())
        self.register_buffer("shift", (-mean / std).float())
        self.eval()

    def forward(self, images_NHWC: Tensor) -> Tensor:
        """Embed (N, H, W, C) uint8 as (N, D) float32."""
        vectors_ND: Tensor = self.readout(self.maps(images_NHWC))
        return vectors_ND

    def maps(self, images_NHWC: Tensor) -> tuple[Tensor, ...]:
        """Give the stages' maps of (N, H, W, C) uint8, for other readouts than its own."""
        # The cast comes first: TensorRT has uint8 at the graph's edge and nowhere else.
        images_NCHW = images_NHWC.to(torch.float32).permute(0, 3, 1, 2)
        maps: tuple[Tensor, ...] = self.backbone(images_NCHW * self.scale + self.shift)
        return maps


def embed_with_torch(graph: EncoderGraph, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Run the graph in torch: what the exported file is compared with."""
    return torch.cat(list(run_in_batches(graph, graph, images_NHWC))).cpu().numpy()


def run_in_batches(
    graph: EncoderGraph,
    function: Callable[[Tensor], T],
    images_NHWC: NDArray[np.uint8],
    rows: NDArray[np.int64] | None = None,
) -> Iterator[T]:
    """Apply a function of uint8 images to all of them, or to some rows, where the graph is."""
    device = graph.scale.device
    rows = np.arange(len(images_NHWC)) if rows is None else rows
    step = images_at_once(EMBED_BATCH, *images_NHWC.shape[1:3])
    for i in range(0, len(rows), step):
        batch_NHWC = torch.from_numpy(images_NHWC[rows[i : i + step]])
        with torch.inference_mode():
            yield function(batch_NHWC.to(device))


def write_onnx(graph: EncoderGraph, spec: PreprocessSpec, path: Path) -> None:
    """Write the graph as one ONNX file with a dynamic batch.

    Raises:
        ExportError: torch cannot express the graph.
    """
    shape = (TRACE_BATCH, spec.height, spec.width, spec.channels)
    example = torch.zeros(shape, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch's own exporter
        try:
            program = torch.onnx.export(
                graph,
                (example,),
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                dynamic_shapes=({0: torch.export.Dim(BATCH_NAME)},),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            assert program is not None
        except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
            lines = str(error).splitlines()
            raise ExportError(
                "the ONNX graph",
                expected="a network that torch can export",
                found=lines[0] if lines else type(error).__name__,
            ) from error
    save_graph(program.model_proto, path)


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write a model as one file; equal weights give equal bytes wherever it was made."""
    _forget_where_it_was_made(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _forget_where_it_was_made(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes: they hold stack traces, so paths of this machine."""
    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
    for whole in (model, graph):
        whole.ClearField("metadata_props")
