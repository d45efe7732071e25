"""Backbones of torchvision and timm behind our seam: maps, channels, gradients, ONNX, errors."""

from __future__ import annotations

import builtins
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
import torch
import torchvision

from models.errors import UsageError
from models.networks import GlobalPoolReadout, ResNet
from models.preprocess import PreprocessSpec
from train.backbones import build_backbone, build_network, refuse_lone_pixels
from train.device import Compute
from train.errors import TrainError
from train.export.graph import EncoderGraph, embed_with_torch, write_onnx
from train.option_groups import NetworkOptions


@pytest.mark.parametrize(
    ("layout", "in_channels", "size_px", "stages"),
    [
        ("torchvision:resnet18", 1, 32, [(64, 8), (128, 4), (256, 2), (512, 1)]),
        ("torchvision:mobilenet_v3_small", 4, 64, [(16, 16), (24, 8), (48, 4), (576, 2)]),
        ("torchvision:swin_t", 3, 32, [(96, 8), (192, 4), (384, 2), (768, 1)]),
        ("torchvision:vit_b_32", 3, 64, [(768, 2)]),
        ("timm:test_convnext", 1, 32, [(24, 8), (32, 4), (48, 2), (64, 1)]),
        ("timm:test_vit", 3, 48, [(64, 3)] * 4),
        ("timm:mobilenetv3_small_050", 2, 32, [(8, 8), (16, 4), (24, 2), (288, 1)]),
    ],
)
def test_a_backbone_by_name_gives_its_maps(
    layout: str, in_channels: int, size_px: int, stages: list[tuple[int, int]]
) -> None:
    """Any channels; maps as (N, C, H, W); no parameter that the maps do not depend on."""
    backbone = build_backbone(NetworkOptions(layout=layout), in_channels, size_px)
    maps = backbone(torch.rand(2, in_channels, size_px, size_px))
    assert [tuple(x.shape) for x in maps] == [(2, dim, side, side) for dim, side in stages]
    assert backbone.stage_dims == tuple(dim for dim, _ in stages)
    torch.autograd.backward(maps[-1].square().mean())
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("layout", ["resnet10", "resnet50", "torchvision:resnet18"])
def test_bf16_on_a_cpu_strides_over_no_map_of_one_pixel(layout: str) -> None:
    """There oneDNN leaves most of a kernel's gradient as the memory was."""
    network = NetworkOptions(layout=layout, width=8, stem="large")
    bf16, fp32 = (
        Compute(device=torch.device("cpu"), precision=precision) for precision in ("bf16", "fp32")
    )
    backbone = build_backbone(network, 1, 32)
    refuse_lone_pixels(backbone, 1, 16, fp32)
    refuse_lone_pixels(backbone, 1, 17, bf16)
    with pytest.raises(UsageError) as error:
        refuse_lone_pixels(backbone, 1, 16, bf16)
    assert re.fullmatch(
        r"--precision bf16 on a CPU: expected maps of more than one pixel before each strided "
        r"convolution, found one of one pixel before (model\.)?layer4\.0\.conv[12]; give "
        r"--precision fp32, or train on larger images",
        str(error.value),
    )


def test_a_map_that_is_padded_before_its_convolution_is_none_of_one_pixel() -> None:
    """As by timm's "same": there the gradient is whole."""
    bf16 = Compute(device=torch.device("cpu"), precision="bf16")
    backbone = build_backbone(NetworkOptions(layout="timm:tf_mobilenetv3_small_minimal_100"), 1, 16)
    refuse_lone_pixels(backbone, 1, 16, bf16)


def test_torchvisions_last_map_is_what_it_pools() -> None:
    """The stages are those of the network, not beside it: its own classifier agrees."""
    torch.manual_seed(0)
    published = torchvision.models.get_model("densenet121", weights=None)
    torch.manual_seed(0)
    backbone = build_backbone(NetworkOptions(layout="torchvision:densenet121"), 3, 64)
    published.classifier = torch.nn.Identity()
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        pooled = GlobalPoolReadout(backbone.stage_dims)(backbone.eval()(images))
        torch.testing.assert_close(pooled, published.eval()(images))


def test_timms_last_map_is_what_it_pools() -> None:
    """Transformers pass their last norm, and so do the maps."""
    import timm

    torch.manual_seed(0)
    published = timm.create_model("test_vit", img_size=32, num_classes=0)
    torch.manual_seed(0)
    backbone = build_backbone(NetworkOptions(layout="timm:test_vit"), 3, 32)
    images = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        tokens = published.eval().forward_features(images)[:, 1:]
        (*_, last) = backbone.eval()(images)
        torch.testing.assert_close(last.flatten(2).transpose(1, 2), tokens)


@pytest.mark.parametrize("layout", ["torchvision:squeezenet1_1", "timm:test_convnext"])
def test_a_librarys_backbone_can_be_exported(layout: str, tmp_path: Path) -> None:
    """ONNX Runtime gives what torch gives, at another batch than the traced one."""
    backbone = build_backbone(NetworkOptions(layout=layout), 1, 32)
    readout = GlobalPoolReadout(backbone.stage_dims)
    graph = EncoderGraph(backbone, readout, (0.5,), (0.25,))
    spec = PreprocessSpec(height=32, width=32, channels=1, resize=32)
    write_onnx(graph, spec, tmp_path / "x.onnx")
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1), dtype=np.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    (vectors,) = session.run(None, {"images": images})
    np.testing.assert_allclose(vectors, embed_with_torch(graph, images), rtol=1e-3, atol=1e-3)


def test_our_own_networks_are_built_with_their_options() -> None:
    """Width, stem and heads as the options say; the same seed gives the same weights."""
    options = NetworkOptions(
        layout="resnet10",
        width=8,
        stem="large",
        projector_widths=(16, 8),
        projector_batch_norm=False,
        predictor_width=6,
    )
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        network = build_network(options, 2, 32)
        states.append(network.state_dict())
    assert isinstance(network.backbone, ResNet)
    assert network.backbone.conv1.weight.shape == (8, 2, 7, 7)
    assert states[0]["projector.0.bias"].shape == (16,)
    assert states[0]["predictor.0.weight"].shape == (6, 8)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            "torchvision:resnet5",
            r"found 'torchvision:resnet5'; did you mean torchvision:resnet50 or ",
        ),
        ("timm:vit_tiny_patch16_223", "did you mean timm:vit_tiny_patch16_224 or "),
        ("torchvision:fcn_resnet50", "one of its .* image classifiers, found "),
        (
            "torchvision:inception_v3",
            "expected a network for images of 32 x 32 pixels, found one that fails on them .*; "
            "choose another --image-size-px or layout",
        ),
        ("torchvision:vit_b_32", "expected a network for images of 20 x 20 pixels, found"),
    ],
)
def test_a_backbone_that_cannot_be_is_one_line(layout: str, message: str) -> None:
    """Misspelt names come with close ones; a library's own errors are translated."""
    size_px = 20 if layout == "torchvision:vit_b_32" else 32
    with pytest.raises(UsageError, match=message) as error:
        build_backbone(NetworkOptions(layout=layout), 3, size_px)
    assert "\n" not in str(error.value)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line says what to install."""
    really_import = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> ModuleType:
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'", name="timm")
        return really_import(name, *args, **kwargs)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(TrainError) as error:
        build_backbone(NetworkOptions(layout="timm:test_convnext"), 3, 32)
    assert str(error.value) == (
        "--network.layout timm:test_convnext: expected the package timm, found none; "
        "install it by `pip install '.[timm]'`"
    )
