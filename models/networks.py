"""The torch networks: what a backbone is, our ResNets, the readout, and the heads.

Rules:
    A backbone returns the maps of all its stages; a readout makes vectors of them. So the
    choice of stage, grid or whitening at export is another readout, never another backbone.
    Those of torchvision and timm are made in `train.backbones`.
    Parameter names are torchvision's (`conv1`, `bn1`, `layer1.0.conv1`, ...), so that
    published ResNet weights map by name.
    The input is normalised float32; nothing here knows of uint8, means or bundles.

Only `train` imports this module: `serve` and `index` must start without torch.

Source: He et al., arXiv 1512.03385; stem and zero-init residual as in Goyal et al., arXiv
1706.02677; the projector as in Zbontar et al., arXiv 2103.03230, section 2.2; the predictor
of its ablation as in Chen and He, arXiv 2011.10566, section 3.

Shapes: N images, C channels, H x W pixels, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.errors import UsageError

STEMS = ("small", "large")
LAYOUTS: dict[str, tuple[str, tuple[int, ...]]] = {
    "resnet10": ("basic", (1, 1, 1, 1)),
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
}
"""Block kind and blocks per stage of the ResNets people know by name (resnet10: one each)."""


class Backbone(nn.Module):
    """A network from normalised images to the maps of its stages: what is exported.

    Attributes:
        stage_dims: channels of each stage's map, shallow to deep; at least one stage.
    """

    stage_dims: tuple[int, ...]

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Give the map of each stage, shallow to deep: (N, stage_dims[i], H_i, W_i)."""
        raise NotImplementedError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; its output is as wide as its width."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Give relu(branch + shortcut), (N, width, H / stride, W / stride)."""
        branch = torch.relu_(self.bn1(self.conv1(x_NCHW)))
        branch = self.bn2(self.conv2(branch))
        return torch.relu_(branch.add_(self.downsample(x_NCHW)))


class BottleneckBlock(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; its output is four widths wide."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Give relu(branch + shortcut), (N, 4 * width, H / stride, W / stride)."""
        branch = torch.relu_(self.bn1(self.conv1(x_NCHW)))
        branch = torch.relu_(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        return torch.relu_(branch.add_(self.downsample(x_NCHW)))


class ResNet(Backbone):
    """A residual network that returns the map of every stage.

    Args:
        layout: a name of `LAYOUTS`.
        width: channels of the first stage; each later stage has twice as many (64 is the
            published width).
        in_channels: channels of the images.
        stem: `small` is one 3x3 convolution at full resolution, for images up to about 64
            pixels; `large` is the published 7x7 convolution and max-pooling, together a
            quarter of the resolution.
        stages: how many stages there are; fewer than four leave out the last ones.
        zero_init_residual: whether every residual branch starts at zero, as published. The
            untrained network is then little more than its shortcuts.

    Attributes:
        stage_dims: channels of each stage's map.

    Raises:
        UsageError: a layout or stem of another name, or another number of stages.
    """

    def __init__(
        self,
        *,
        layout: str,
        width: int = 64,
        in_channels: int = 3,
        stem: str = "small",
        stages: int = 4,
        zero_init_residual: bool = True,
    ) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise UsageError("network layout", expected=" or ".join(LAYOUTS), found=repr(layout))
        if stem not in STEMS:
            raise UsageError("network stem", expected=" or ".join(STEMS), found=repr(stem))
        kind, all_depths = LAYOUTS[layout]
        if not 1 <= stages <= len(all_depths):
            expected = f"1 to {len(all_depths)}"
            raise UsageError("network stages", expected=expected, found=str(stages))
        depths = all_depths[:stages]
        block = BasicBlock if kind == "basic" else BottleneckBlock
        kernel, stride = (3, 1) if stem == "small" else (7, 2)
        self.conv1 = nn.Conv2d(in_channels, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool: nn.Module = (
            nn.Identity() if stem == "small" else nn.MaxPool2d(3, stride=2, padding=1)
        )
        self.stage_dims = tuple(width * 2**i * block.expansion for i in range(len(depths)))
        channels = width
        for i, depth in enumerate(depths):
            stage = _stage(block, channels, width * 2**i, depth, stride=1 if i == 0 else 2)
            self.add_module(f"layer{i + 1}", stage)
            channels = self.stage_dims[i]
        _initialise(self, zero_init_residual=zero_init_residual)

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Give the map of each stage, shallow to deep: (N, stage_dims[i], H_i, W_i)."""
        x = self.maxpool(torch.relu_(self.bn1(self.conv1(images_NCHW))))
        maps = []
        for i in range(len(self.stage_dims)):
            x = self.get_submodule(f"layer{i + 1}")(x)
            maps.append(x)
        return tuple(maps)


class GlobalPoolReadout(nn.Module):
    """The plain readout: the last stage's map, averaged over its pixels.

    A readout is any module from the stages' maps to (N, dim) vectors that has `dim`.
    """

    def __init__(self, stage_dims: Sequence[int]) -> None:
        super().__init__()
        self.dim = stage_dims[-1]

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Average the last map to (N, dim)."""
        return maps[-1].mean(dim=(2, 3))


class Projector(nn.Sequential):
    """The head the loss sees: Linear layers without bias, BatchNorm and ReLU between them.

    Args:
        in_dim: dimensions of the backbone's features.
        widths: output width of each Linear layer; the paper has (8192, 8192, 8192).
        batch_norm: whether there is BatchNorm; without it, an ablation of the paper, the
            hidden layers have the biases that it would have brought.
    """

    def __init__(self, in_dim: int, widths: Sequence[int], *, batch_norm: bool = True) -> None:
        layers: list[nn.Module] = []
        for width in widths[:-1]:
            layers.append(nn.Linear(in_dim, width, bias=not batch_norm))
            layers += [nn.BatchNorm1d(width), nn.ReLU()] if batch_norm else [nn.ReLU()]
            in_dim = width
        super().__init__(*layers, nn.Linear(in_dim, widths[-1], bias=False))


class Predictor(nn.Sequential):
    """A head on one view's embedding, to break the symmetry: an ablation of the paper.

    Args:
        dim: dimensions of the embedding, in and out.
        hidden_dim: width between its two layers.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(
            nn.Linear(dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, dim),
        )


class BarlowTwins(nn.Module):
    """Backbone, global pooling and projector: what is trained.

    Each view passes on its own, as in the authors' code, so that BatchNorm sees the
    statistics of one view; only the backbone outlives the training.

    Args:
        backbone: what is trained for.
        projector_widths: as for `Projector`.
        projector_batch_norm: as for `Projector`.
        predictor_width: hidden width of the predictor; 0 for none.
    """

    def __init__(
        self,
        backbone: Backbone,
        projector_widths: Sequence[int],
        *,
        projector_batch_norm: bool = True,
        predictor_width: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.readout = GlobalPoolReadout(backbone.stage_dims)
        self.projector = Projector(
            self.readout.dim, projector_widths, batch_norm=projector_batch_norm
        )
        self.predictor: nn.Module = (
            Predictor(projector_widths[-1], predictor_width) if predictor_width else nn.Identity()
        )

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Give the features (N, readout.dim) and the embeddings (N, projector_widths[-1])."""
        features_ND: Tensor = self.readout(self.backbone(images_NCHW))
        return features_ND, self.projector(features_ND)

    def predict(self, z_ND: Tensor) -> Tensor:
        """Give what view 1's embedding becomes before the loss: itself without a predictor.

        In the ablations the loss takes `predict(z1)` and z2, or z2.detach() under
        stop-gradient; each view plays one role, and nothing is symmetrised.
        """
        predicted_ND: Tensor = self.predictor(z_ND)
        return predicted_ND


def _stage(
    block: type[BasicBlock | BottleneckBlock],
    in_channels: int,
    width: int,
    depth: int,
    *,
    stride: int,
) -> nn.Sequential:
    """Chain `depth` blocks; only the first one strides."""
    first = block(in_channels, width, stride)
    rest = [block(width * block.expansion, width, 1) for _ in range(depth - 1)]
    return nn.Sequential(first, *rest)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Give the identity where shapes agree, else a strided 1x1 convolution."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


def _initialise(network: ResNet, *, zero_init_residual: bool) -> None:
    """He-initialise convolutions and, where asked, let residual branches start at zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, BasicBlock) and zero_init_residual:
            nn.init.zeros_(module.bn2.weight)
        elif isinstance(module, BottleneckBlock) and zero_init_residual:
            nn.init.zeros_(module.bn3.weight)
