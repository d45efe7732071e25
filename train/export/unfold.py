"""Weights of an exported graph, back in the network that the graph was written from.

The exporter folds every BatchNorm into the convolution before it, so a graph holds neither
statistics nor scales of its own. What it computes can be had back all the same.

Rules:
    The network computes what the graph computes, to rounding.
    Every BatchNorm is then the identity plus the folded bias; `restore_statistics` gives it,
    from images, the mean and variance that it needs where it is trained further, and changes
    nothing of what the network computes.
    A network is refused unless each of its weights belongs to a convolution without a bias
    that a BatchNorm follows at once, as in our ResNets and torchvision's.

Shapes: N images, H x W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from models.networks import Backbone
from models.preprocess import PreprocessSpec
from train.errors import ExportError
from train.export.graph import EncoderGraph, run_in_batches
from train.export.graph_names import BACKBONE_PREFIX

Folded = dict[str, tuple[Tensor, Tensor | None]]
"""Weight and bias of a graph's convolutions, by the weight's name."""


def unfold_backbone(file: Path, backbone: Backbone, spec: PreprocessSpec) -> None:
    """Put the weights of a graph into its network, which then is in eval mode.

    Args:
        file: the ONNX graph.
        backbone: as the graph's was built; in any state.
        spec: what images it takes.

    Raises:
        ExportError: the graph is of another network, or of one that does not unfold.
    """
    pairs = _folded_pairs(backbone, spec)
    _require_all_paired(file, backbone, pairs)
    found = _convolutions(onnx.load(file))
    with torch.no_grad():
        for name, (convolution, norm) in pairs.items():
            weight, bias = found.get(f"{BACKBONE_PREFIX}{name}.weight", (None, None))
            if weight is None:
                raise _not_of(file, f"none for {name}, as where its readout reads no stage so deep")
            if weight.shape != convolution.weight.shape:
                raise _not_of(file, f"no weights of its shape for {name}")
            convolution.weight.copy_(weight)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
            norm.weight.fill_(1)
            norm.bias.copy_(torch.zeros_like(norm.bias) if bias is None else bias)


def channel_statistics(file: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Give mean and deviation, per channel of values in [0, 1], that a graph normalises by.

    Raises:
        ExportError: it has no normalisation of ours.
    """
    tensors = {tensor.name: tensor for tensor in onnx.load(file).graph.initializer}
    if not {"scale", "shift"} <= tensors.keys():
        raise _not_of(file, "no normalisation of pixels")
    scale, shift = (
        numpy_helper.to_array(tensors[name]).astype(np.float64).ravel()
        for name in ("scale", "shift")
    )
    std = 1 / (255 * scale)
    return tuple((-shift * std).tolist()), tuple(std.tolist())


def restore_statistics(graph: EncoderGraph, images_NHWC: NDArray[np.uint8]) -> None:
    """Give every BatchNorm of a network the statistics of what arrives at it.

    What the network computes in eval mode stays the same; in training a BatchNorm now starts
    where that of the pretrained network was.
    """
    norms = [module for module in graph.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    sums = {norm: torch.zeros(3, norm.num_features, dtype=torch.float64) for norm in norms}

    def note(norm: nn.Module, arrived: tuple[Tensor, ...]) -> None:
        x_NCHW = arrived[0].double().cpu()
        counts = torch.full((x_NCHW.shape[1],), x_NCHW.numel() / x_NCHW.shape[1])
        parts = (counts, x_NCHW.sum(dim=(0, 2, 3)), x_NCHW.square().sum(dim=(0, 2, 3)))
        sums[norm] += torch.stack(parts)  # type: ignore[index]  # hooked on these alone

    with _hooked([norm.register_forward_pre_hook(note) for norm in norms]):
        for _ in run_in_batches(graph, graph.maps, images_NHWC):
            pass
    for norm, (counts_C, sums_C, squares_C) in sums.items():
        mean_C = sums_C / counts_C
        variance_C = squares_C / counts_C - mean_C.square()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.no_grad():
            slope_C = norm.weight / (norm.running_var + norm.eps).sqrt()
            norm.bias.add_(slope_C * (mean_C.to(norm.bias) - norm.running_mean))
            norm.running_mean.copy_(mean_C)
            norm.running_var.copy_(variance_C.clamp(min=0))
            norm.weight.copy_(slope_C * (norm.running_var + norm.eps).sqrt())


def _folded_pairs(
    backbone: Backbone, spec: PreprocessSpec
) -> Mapping[str, tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Find by name the convolutions whose output goes into a BatchNorm, with it."""
    names = {module: name for name, module in backbone.named_modules()}
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # outputs are kept, so that no id comes twice
    pairs: dict[str, tuple[nn.Conv2d, nn.BatchNorm2d]] = {}

    def leave(module: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        made[id(output)] = (module, output)

    def enter(module: nn.Module, arrived: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        if id(arrived[0]) in made:
            convolution, _ = made[id(arrived[0])]
            pairs[names[convolution]] = (convolution, module)

    hooks = [
        module.register_forward_hook(leave)
        if isinstance(module, nn.Conv2d)
        else module.register_forward_pre_hook(enter)
        for module in names
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    ]
    with _hooked(hooks), torch.inference_mode():
        backbone.eval()(torch.zeros(1, spec.channels, spec.height, spec.width))
    return pairs


def _require_all_paired(
    file: Path, backbone: Backbone, pairs: Mapping[str, tuple[nn.Conv2d, nn.BatchNorm2d]]
) -> None:
    """Refuse a network with weights that no pair accounts for."""
    known = {
        parameter
        for convolution, norm in pairs.values()
        for parameter in (convolution.weight, norm.weight, norm.bias)
    }
    for name, parameter in backbone.named_parameters():
        if parameter not in known:
            raise _not_of(file, f"{name}, which is of no convolution that a BatchNorm follows")


def _convolutions(model: onnx.ModelProto) -> Folded:
    """Find the convolutions of a graph whose weights are constants."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def read(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(tensors[name]).copy())

    return {
        node.input[1]: (read(node.input[1]), read(node.input[2]) if len(node.input) > 2 else None)
        for node in model.graph.node
        if node.op_type == "Conv" and all(name in tensors for name in node.input[1:])
    }


@contextmanager
def _hooked(hooks: list[RemovableHandle]) -> Iterator[None]:
    """Take the hooks off at the end."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _not_of(file: Path, found: str) -> ExportError:
    """Make the error for a graph whose network cannot be had back."""
    return ExportError(
        f"weights of {file}",
        expected="a network of convolutions that each have a BatchNorm",
        found=found,
        mend="give the run that it was exported from",
    )
