"""The encoders that are served: one that ships, its INT8 form, a light one and a large one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.bundle import SHIPPED_BUNDLE, OutputSpec, read_bundle, write_bundle
from models.preprocess import PreprocessSpec

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def make_bundle(name: str, home: Path) -> Path:
    """Give the directory of a bundle, made where it is not there."""
    if name == "small":
        return SHIPPED_BUNDLE
    path = home / f"bundle-{name}"
    if not path.is_dir():
        {"int8": _write_int8, "light": _write_light, "large": _write_large}[name](path)
    return path


def _write_int8(path: Path) -> None:
    """Make the INT8 form of the encoder that ships an encoder of its own."""
    shipped = read_bundle(SHIPPED_BUNDLE)
    write_bundle(
        path,
        name="int8",
        files={"encoder.onnx": shipped.path_of("int8")},
        preprocessing=shipped.preprocessing,
        output=shipped.output,
        provenance={"of": shipped.name},
    )


def _write_light(path: Path) -> None:
    """Make three convolutions with random weights: an encoder that costs next to nothing."""
    from torch import nn

    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 512),
    )  # fmt: skip
    spec = PreprocessSpec(height=28, width=28, channels=1, resize=28)
    _write_random(path, network, spec, dim=512, mean=(0.5,), std=(0.5,))


def _write_large(path: Path) -> None:
    """Make ResNet-50 at 224 with random weights."""
    import torchvision
    from torch import nn

    network = torchvision.models.resnet50(weights=None)
    network.fc = nn.Identity()
    spec = PreprocessSpec(height=224, width=224, channels=3, resize=224)
    _write_random(path, network, spec, dim=2048, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _write_random(
    path: Path,
    network: Any,
    spec: PreprocessSpec,
    *,
    dim: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    """Export a network as `train.export` does, and make a bundle of it."""
    import torch
    from torch import nn

    from train.export.graph import EncoderGraph, write_onnx

    torch.manual_seed(0)
    for parameter in network.parameters():  # the seed comes after the network was made
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter)
    graph = EncoderGraph(network, nn.Identity(), mean, std)
    file = path.with_suffix(".onnx")
    write_onnx(graph, spec, file)
    write_bundle(
        path,
        name=path.name,
        files={"encoder.onnx": file},
        preprocessing=spec,
        output=OutputSpec(dim=dim),
        provenance={"weights": "random"},
    )
    file.unlink()
