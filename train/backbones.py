"""Backbones by name: our ResNets, and those of torchvision and timm behind the same seam.

Rules:
    A backbone takes any number of channels and returns the maps of its stages, the last four
    where it has more, as (N, C, H, W); classifiers are not part of it, and no parameter is
    left that its maps do not depend on.
    Weights start untrained, drawn from torch's generator: nothing is downloaded. Trained
    ones are `train.weights`'s matter.
    A stage of a torchvision network is the last block at each resolution. Networks that keep
    one resolution have four stages at equal distances under timm, and one under torchvision.

Shapes: N images, C channels, H x W pixels, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from models.errors import UsageError
from models.networks import Backbone, BarlowTwins, ResNet
from train.device import Compute
from train.errors import TrainError
from train.option_groups import NetworkOptions, unknown_name

MAX_STAGES = 4
"""As many as a ResNet has."""

HEADS = ("avgpool", "classifier", "fc", "head", "heads", "adaptive_avg_pool2d", "mean", "flatten")
"""What comes after the last map in torchvision's networks, by name."""


class TorchvisionBackbone(Backbone):
    """A classification network of torchvision, up to its last map.

    Args:
        name: as in `torchvision.models.list_models()`.
        in_channels: channels of the images.
        image_size_px: side of the square images.

    Raises:
        UsageError: there is no such network, or it cannot take such images.
    """

    def __init__(self, name: str, in_channels: int, image_size_px: int) -> None:
        super().__init__()
        example = torch.zeros(1, in_channels, image_size_px, image_size_px)
        with _unsuited_images(f"torchvision:{name}", image_size_px):
            network = _torchvision_model(name, image_size_px)
            _take_channels(network, in_channels)
            stages, shapes = _find_stages(network, example)
            self.model = create_feature_extractor(network, {stage: stage for stage in stages})
        self.stage_dims, self.are_channels_last = zip(*map(_channels_of, shapes), strict=True)

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Give the map of each stage."""
        outputs = zip(self.model(images_NCHW).values(), self.are_channels_last, strict=True)
        return tuple(_as_map(x, is_channels_last=is_last) for x, is_last in outputs)


class TimmBackbone(Backbone):
    """A network of timm, up to its last map; a transformer's maps pass its last norm.

    Args:
        name: as in `timm.list_models()`.
        in_channels: channels of the images.
        image_size_px: side of the square images.

    Raises:
        TrainError: timm is not installed.
        UsageError: there is no such network, or it cannot take such images.
    """

    def __init__(self, name: str, in_channels: int, image_size_px: int) -> None:
        super().__init__()
        with _unsuited_images(f"timm:{name}", image_size_px):
            self.model = _timm_model(name, in_channels, image_size_px)
            feature_info = cast(Sequence[Mapping[str, int]], self.model.feature_info)
            self.indices = _spread([info["reduction"] for info in feature_info])
            example = torch.zeros(1, in_channels, image_size_px, image_size_px)
            maps = self._try_norm(example)
            prune = cast(Callable[..., object], self.model.prune_intermediate_layers)
            prune(self.indices, prune_norm=not self.is_normed, prune_head=True)
        self.stage_dims = tuple(x.shape[1] for x in maps)

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Give the map of each stage."""
        intermediates = cast(Callable[..., list[Tensor]], self.model.forward_intermediates)
        maps = intermediates(
            images_NCHW,
            indices=self.indices,
            norm=self.is_normed,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        return tuple(maps)

    def _try_norm(self, example_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Run the example, and learn whether the network's last norm can take its maps."""
        self.eval()
        self.is_normed = True
        try:
            with torch.no_grad():
                return self(example_NCHW)  # type: ignore[no-any-return]  # a module's call
        except AssertionError:
            self.is_normed = False
            with torch.no_grad():
                return self(example_NCHW)  # type: ignore[no-any-return]  # a module's call
        finally:
            self.train()


def build_backbone(network: NetworkOptions, in_channels: int, image_size_px: int) -> Backbone:
    """Build the untrained backbone, the part that is exported, from torch's generator.

    Args:
        network: names it; width, stem, stages and zero-init residual are of our ResNets only.
        in_channels: channels of the images.
        image_size_px: side of the square images.

    Raises:
        TrainError: its library is not installed.
        UsageError: the library has no such network, or it cannot take such images.
    """
    library, _, name = network.layout.rpartition(":")
    if library == "torchvision":
        return TorchvisionBackbone(name, in_channels, image_size_px)
    if library == "timm":
        return TimmBackbone(name, in_channels, image_size_px)
    return ResNet(
        layout=network.layout,
        width=network.width,
        in_channels=in_channels,
        stem=network.stem,
        stages=network.stages,
        zero_init_residual=network.zero_init_residual,
    )


def build_network(network: NetworkOptions, in_channels: int, image_size_px: int) -> BarlowTwins:
    """Build the untrained backbone with the heads that the loss needs; see `build_backbone`."""
    return BarlowTwins(
        build_backbone(network, in_channels, image_size_px),
        network.projector_widths,
        projector_batch_norm=network.projector_batch_norm,
        predictor_width=network.predictor_width,
    )


def refuse_lone_pixels(
    backbone: nn.Module, in_channels: int, image_size_px: int, compute: Compute
) -> None:
    """Refuse bf16 on a CPU for a network that strides over a map of one pixel.

    There the oneDNN of torch 2.14.1 writes the gradient of a kernel's middle alone, channels last,
    and leaves the rest as the memory was: seen on an Intel Xeon with AVX-512. A map that was
    padded before the convolution, as timm's "same" does, is larger. The mode of the network is
    left at eval.

    Raises:
        UsageError: naming the convolution.
    """
    if (compute.name, compute.precision) != ("cpu", "bf16"):
        return
    lone: list[str] = []

    def look(name: str, convolution: nn.Conv2d, arrived: tuple[Tensor, ...]) -> None:
        is_strided = max(convolution.stride) > 1 and max(convolution.kernel_size) > 1
        is_padded = any(convolution.padding)  # by itself, not before it
        if is_strided and is_padded and arrived[0].shape[2:] == (1, 1):
            lone.append(name)

    hooks = [
        module.register_forward_pre_hook(partial(look, name))
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        backbone.eval()(torch.zeros(1, in_channels, image_size_px, image_size_px))
    for hook in hooks:
        hook.remove()
    if lone:
        raise UsageError(
            "--precision bf16 on a CPU",
            expected="maps of more than one pixel before each strided convolution",
            found=f"one of one pixel before {lone[0]}",
            mend="give --precision fp32, or train on larger images",
        )


def _torchvision_model(name: str, image_size_px: int) -> nn.Module:
    """Make a network, untrained, for images of the size where its weights depend on it."""
    names = torchvision_models.list_models(module=torchvision_models)
    if name not in names:
        raise _no_such("torchvision", name, names)
    arguments: dict[str, object] = {}
    if name in ("googlenet", "inception_v3"):  # no second classifier, and their own start
        arguments = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        arguments = {"image_size": image_size_px}
    elif name.startswith("maxvit_"):
        arguments = {"input_size": (image_size_px, image_size_px)}
    network: nn.Module = torchvision_models.get_model(name, weights=None, **arguments)
    return network


def _timm_model(name: str, in_channels: int, image_size_px: int) -> nn.Module:
    """Make a network, untrained and without classifier."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise TrainError(
            f"--network.layout timm:{name}",
            expected="the package timm",
            found="none",
            mend="install it by `pip install '.[timm]'`",
        ) from error
    if not timm.is_model(name):
        raise _no_such("timm", name, timm.list_models())
    make = partial(timm.create_model, name, pretrained=False, in_chans=in_channels, num_classes=0)
    network: nn.Module
    try:
        network = make(img_size=image_size_px)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        network = make()  # of any size
    return network


def _no_such(library: str, name: str, names: Sequence[str]) -> UsageError:
    """Make the error for a library's model that does not exist."""
    return unknown_name(
        "--network.layout",
        f"{library}:{name}",
        [f"{library}:{one}" for one in names],
        expected=f"{library}: and one of its {len(names)} image classifiers",
    )


def _take_channels(network: nn.Module, in_channels: int) -> None:
    """Give a network of three channels a first convolution for as many as there are."""
    modules = network.named_modules()
    name, module = next((n, m) for n, m in modules if isinstance(m, nn.Conv2d))
    if module.in_channels == in_channels:
        return
    fresh = nn.Conv2d(
        in_channels,
        module.out_channels,
        cast(tuple[int, int], module.kernel_size),
        cast(tuple[int, int], module.stride),
        cast(tuple[int, int], module.padding),
        bias=module.bias is not None,
    )
    nn.init.kaiming_normal_(fresh.weight, mode="fan_out", nonlinearity="relu")
    network.set_submodule(name, fresh)


def _find_stages(network: nn.Module, example: Tensor) -> tuple[list[str], list[torch.Size]]:
    """Name the last block at each resolution, and give the shapes of what they return."""
    network.eval()
    units = _units(network)
    with torch.no_grad():
        outputs = create_feature_extractor(network, {unit: unit for unit in units})(example)
    network.train()
    last_at: dict[int, str] = {}
    for unit, output in outputs.items():
        if isinstance(output, Tensor) and _is_map(output.shape):
            side = math.isqrt(output.shape[1] - 1) if output.ndim == 3 else output.shape[2]
            last_at[side] = unit
    stages = list(last_at.values())[-MAX_STAGES:]
    return stages, [outputs[stage].shape for stage in stages]


def _units(network: nn.Module) -> list[str]:
    """Name the blocks of a network in order: its modules, those of its lists, and operations.

    The traced operations are `features.3.0`, `layer1.0.conv1`, `relu`; a block is the first
    part of their name, or two where the first names a list of modules.
    """
    train_nodes, eval_nodes = get_graph_node_names(network)
    units: dict[str, None] = {}
    for node in (node for node in eval_nodes[1:] if node in set(train_nodes)):
        parts = node.split(".")
        if parts[0].startswith(HEADS):
            break
        is_list = isinstance(getattr(network, parts[0], None), nn.Sequential | nn.ModuleList)
        units[".".join(parts[: 2 if is_list else 1])] = None
    return list(units)


def _is_map(shape: torch.Size) -> bool:
    """Tell a square map, or a class token with the tokens of one, from other values."""
    if len(shape) == 3:
        return shape[1] > 1 and math.isqrt(shape[1] - 1) ** 2 == shape[1] - 1
    return len(shape) == 4 and shape[2] in (shape[1], shape[3])


def _channels_of(shape: torch.Size) -> tuple[int, bool]:
    """Give the channels of (1, C, H, W), of (1, H, W, C), or of tokens; and if they are last."""
    is_channels_last = len(shape) == 3 or shape[2] != shape[3]  # images are square
    return shape[-1] if is_channels_last else shape[1], is_channels_last


def _as_map(x: Tensor, *, is_channels_last: bool) -> Tensor:
    """Give (N, C, H, W) of itself, of (N, H, W, C), or of (N, 1 + H * W, C) tokens."""
    if x.ndim == 3:
        side = math.isqrt(x.shape[1] - 1)
        x = x[:, 1:].reshape(x.shape[0], side, side, x.shape[2])
    return x.permute(0, 3, 1, 2) if is_channels_last else x


def _spread(reductions: Sequence[int]) -> list[int]:
    """Choose the stages of timm's features: the last four, or four at equal distances."""
    n = len(reductions)
    if len(set(reductions)) > 1 or n <= MAX_STAGES:
        return list(range(n))[-MAX_STAGES:]
    return [n * (i + 1) // MAX_STAGES - 1 for i in range(MAX_STAGES)]


@contextmanager
def _unsuited_images(layout: str, image_size_px: int) -> Iterator[None]:
    """Say in one line that a library's network cannot take the images.

    Raises:
        UsageError: in place of what the library raised.
    """
    try:
        yield
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise UsageError(
            f"--network.layout {layout}",
            expected=f"a network for images of {image_size_px} x {image_size_px} pixels",
            found=f"one that fails on them ({lines[0]})",
            mend="choose another --image-size-px or layout",
        ) from error
