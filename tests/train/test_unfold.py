"""A bundle's weights, back in its network: the same function, and BatchNorm's statistics again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.bundle import Bundle
from models.documents import document_bytes
from models.images import open_source
from models.networks import Backbone, ResNet
from models.preprocess import PreprocessSpec, preprocess
from train.backbones import TorchvisionBackbone
from train.errors import ExportError, RunError
from train.export.bundle import export_run
from train.export.graph import EncoderGraph, write_onnx
from train.export.options import ReadoutOptions
from train.export.readout import PooledReadout
from train.export.unfold import channel_statistics, restore_statistics, unfold_backbone
from train.probe.opening import require_weights
from train.probe.pretrained import load_graph, load_to_train, read_pretrained
from train.run import RunDirectory


@pytest.fixture
def images_NHWC(finished_run: Path, mini_source: str) -> NDArray[np.uint8]:
    """100 images as the run takes them."""
    spec = RunDirectory(path=finished_run).read_config().preprocessing
    records = list(open_source(mini_source).records())[:100]
    return np.stack([preprocess(record.read(), spec) for record in records])


def maps_of(graph: EncoderGraph, images_NHWC: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """Give the stages' maps, in whatever mode the graph is."""
    with torch.no_grad():
        return [one.numpy() for one in graph.maps(torch.from_numpy(images_NHWC))]


def test_a_bundle_gives_back_its_runs_network(
    bundle: Bundle, finished_run: Path, images_NHWC: NDArray[np.uint8]
) -> None:
    """Trained and untrained, every stage's map is the run's, on pixels normalised alike."""
    own, kept = read_pretrained(bundle.path), read_pretrained(finished_run)
    assert own.config.options == kept.config.options
    np.testing.assert_allclose(own.config.channel_mean, kept.config.channel_mean, rtol=1e-5)
    np.testing.assert_allclose(own.config.channel_std, kept.config.channel_std, rtol=1e-5)
    assert own.untrained is not None
    assert kept.untrained is not None
    for mine, theirs in ((own.trained, kept.trained), (own.untrained, kept.untrained)):
        found = maps_of(load_graph(mine, own.config), images_NHWC)
        expected = maps_of(load_graph(theirs, kept.config), images_NHWC)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_a_bundle_gives_back_the_stages_that_its_readout_reads(
    finished_run: Path, images_NHWC: NDArray[np.uint8], tmp_path: Path
) -> None:
    """The export has no deeper ones; trained and untrained, those before are the run's."""
    readout = ReadoutOptions(stages=(1, 2), grid=(2,), dim=16)
    bundle = export_run(
        RunDirectory(path=finished_run), tmp_path / "shallow", name="shallow", readout=readout
    )
    own, kept = read_pretrained(bundle.path), read_pretrained(finished_run)
    assert own.untrained is not None
    assert kept.untrained is not None
    for mine, theirs in ((own.trained, kept.trained), (own.untrained, kept.untrained)):
        found = maps_of(load_graph(mine, own.config), images_NHWC)
        expected = maps_of(load_graph(theirs, kept.config), images_NHWC)[:2]
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    with pytest.raises(ExportError, match=r"none for layer3.0.conv1, as where its readout reads"):
        load_graph(own.trained, kept.config)


def test_statistics_come_back_from_images(bundle: Bundle, images_NHWC: NDArray[np.uint8]) -> None:
    """The frozen network stays as it was, and in training normalises to the very same."""
    pretrained = read_pretrained(bundle.path)
    bare = load_graph(pretrained.trained, pretrained.config)
    graph = load_to_train(pretrained, images_NHWC)
    frozen = maps_of(graph, images_NHWC)
    for one, other in zip(frozen, maps_of(bare, images_NHWC), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    for one, other in zip(maps_of(graph.train(), images_NHWC), frozen, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-3)
    off = maps_of(bare.train(), images_NHWC)[-1]
    assert np.abs(off - frozen[-1]).mean() > 0.1 * np.abs(frozen[-1]).mean()


def test_a_network_of_torchvision_comes_back(tmp_path: Path) -> None:
    """Its convolutions and BatchNorms find one another by what flows, not by their names."""
    spec = PreprocessSpec(height=32, width=32, channels=1, resize=32)
    torch.manual_seed(0)
    network, other = (TorchvisionBackbone("resnet18", 1, 32) for _ in range(2))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]  # it has one
    readout = PooledReadout(network.stage_dims)
    graph = EncoderGraph(network, readout, (0.25,), (0.5,))
    write_onnx(graph, spec, tmp_path / "encoder.onnx")
    assert channel_statistics(tmp_path / "encoder.onnx") == (
        pytest.approx((0.25,)), pytest.approx((0.5,)),
    )  # fmt: skip
    unfold_backbone(tmp_path / "encoder.onnx", other, spec)
    images_NCHW = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        for one, expected in zip(other(images_NCHW), network(images_NCHW), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-3)


class Plain(Backbone):
    """One convolution with a bias, and nothing after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.stage_dims = (4,)

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Convolve."""
        return (self.conv(images_NCHW),)


def test_what_does_not_unfold_is_refused(bundle: Bundle) -> None:
    """Weights without a BatchNorm, and those of another network: one line, and what to give."""
    file, spec = bundle.encoder_path, bundle.preprocessing
    with pytest.raises(ExportError, match=r"found conv.weight, which is of no convolution that a"):
        unfold_backbone(file, Plain(), spec)
    wider = ResNet(layout="resnet10", width=16, in_channels=1)
    with pytest.raises(ExportError, match=r"no weights of its shape for conv1; give the run that"):
        unfold_backbone(file, wider, spec)


def test_what_says_nothing_of_its_network_is_refused(tmp_path: Path, bundle: Bundle) -> None:
    """A bundle of another maker, and what is neither bundle nor run."""
    with pytest.raises(RunError, match="expected a run directory, found no such directory"):
        read_pretrained(tmp_path / "none")
    foreign = tmp_path / "foreign"
    shutil.copytree(bundle.path, foreign)
    document = json.loads((foreign / "bundle.json").read_text())
    del document["provenance"]["options"]
    (foreign / "bundle.json").write_bytes(document_bytes(document))
    with pytest.raises(RunError, match="found none of 'options' in its provenance; give the run"):
        read_pretrained(foreign)


def test_a_bundle_may_be_named_by_its_encoder(bundle: Bundle) -> None:
    """As everywhere; in another precision it has no weights to be trained further."""
    named = read_pretrained(bundle.encoder_path)
    whole = read_pretrained(bundle.path)
    assert (named.config, named.trained, named.untrained) == (
        whole.config,
        whole.trained,
        whole.untrained,
    )
    require_weights(bundle.encoder_path)
    with pytest.raises(RunError) as error:
        read_pretrained(bundle.path / "encoder.int8.onnx")
    assert str(error.value) == (
        f"{bundle.path}/encoder.int8.onnx: expected the encoder in fp32, whose weights can be "
        f"trained further, found that in int8; name the bundle, {bundle.path}"
    )


def test_restoring_twice_changes_nothing(bundle: Bundle, images_NHWC: NDArray[np.uint8]) -> None:
    """What has its statistics keeps them."""
    pretrained = read_pretrained(bundle.path)
    graph = load_to_train(pretrained, images_NHWC)
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    restore_statistics(graph, images_NHWC)
    for name, value in graph.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-3, atol=1e-3)
