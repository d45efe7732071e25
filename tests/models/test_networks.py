"""The torch networks: shapes, torchvision's names, and the parts that training relies on."""

from __future__ import annotations

import pytest
import torch
import torchvision

from models.errors import UsageError
from models.networks import (
    LAYOUTS,
    Backbone,
    BarlowTwins,
    GlobalPoolReadout,
    Projector,
    ResNet,
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("stem", "shrink"), [("small", 1), ("large", 4)])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_every_stage_gives_its_map(layout: str, stem: str, shrink: int, in_channels: int) -> None:
    """Each stage halves the map and doubles the channels, after the stem."""
    network = ResNet(layout=layout, width=4, in_channels=in_channels, stem=stem).eval()
    with torch.inference_mode():
        maps = network(torch.zeros(1, in_channels, 32, 32))
    sizes = [32 // shrink // 2**i for i in range(4)]
    expected = [(1, dim, size, size) for dim, size in zip(network.stage_dims, sizes, strict=True)]
    assert [tuple(x.shape) for x in maps] == expected


def test_the_last_stages_can_be_left_out() -> None:
    """With fewer stages the maps are those of the whole network's first ones; 0 or 5 is refused."""
    torch.manual_seed(0)
    whole = ResNet(layout="resnet10", width=4).eval()
    short = ResNet(layout="resnet10", width=4, stages=3).eval()
    assert short.stage_dims == whole.stage_dims[:3]
    own = {k: v for k, v in whole.state_dict().items() if not k.startswith("layer4.")}
    short.load_state_dict(own)
    images_NCHW = torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        for found, expected in zip(short(images_NCHW), whole(images_NCHW)[:3], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for stages in (0, 5):
        with pytest.raises(UsageError, match=f"network stages: expected 1 to 4, found {stages}"):
            ResNet(layout="resnet10", stages=stages)


@pytest.mark.parametrize("layout", ["resnet18", "resnet34", "resnet50"])
def test_published_weights_fit_by_name(layout: str) -> None:
    """At width 64 with the large stem, torchvision's weights load and give its output."""
    torch.manual_seed(0)
    published = torchvision.models.get_model(layout, weights=None).eval()
    network = ResNet(layout=layout, stem="large").eval()
    weights = {k: v for k, v in published.state_dict().items() if not k.startswith("fc.")}
    # In torchvision's bottleneck, too, it is the 3x3 convolution that strides.
    network.load_state_dict(weights)
    published.fc = torch.nn.Identity()
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        pooled = GlobalPoolReadout(network.stage_dims)(network(images))
        torch.testing.assert_close(pooled, published(images), rtol=1e-4, atol=1e-4)


def test_residual_branches_start_at_zero_where_asked() -> None:
    """A block is then its shortcut, so equal width passes its input through."""
    for zero_init, is_shortcut in ((True, True), (False, False)):
        network = ResNet(layout="resnet18", width=4, zero_init_residual=zero_init).eval()
        block = network.get_submodule("layer1.1")
        x = torch.rand(1, 4, 8, 8)
        with torch.inference_mode():
            assert torch.equal(block(x), x) is is_shortcut


def test_the_trained_network_gives_features_and_embeddings() -> None:
    """Features have the readout's size, embeddings the projector's last width."""
    network = BarlowTwins(ResNet(layout="resnet10", width=4, in_channels=1), (16, 24))
    features, embeddings = network(torch.rand(3, 1, 12, 12))
    assert features.shape == (3, network.readout.dim) == (3, 32)
    assert embeddings.shape == (3, 24)
    linears = [m for m in network.projector.modules() if isinstance(m, torch.nn.Linear)]
    assert all(linear.bias is None for linear in linears)


def test_a_projector_without_batchnorm_has_biases_instead() -> None:
    """An ablation of the paper; the last layer is linear alone, as ever."""
    layers = list(Projector(4, (8, 6), batch_norm=False))
    assert [type(layer) for layer in layers] == [torch.nn.Linear, torch.nn.ReLU, torch.nn.Linear]
    assert [layer.bias is None for layer in (layers[0], layers[2])] == [False, True]


def test_a_predictor_changes_one_embedding() -> None:
    """`predict` is the identity without a predictor, and keeps the shape with one."""
    backbone = ResNet(layout="resnet10", width=4, in_channels=1)
    z = torch.rand(5, 24)
    assert BarlowTwins(backbone, (16, 24)).predict(z) is z
    network = BarlowTwins(backbone, (16, 24), predictor_width=7)
    assert network.predict(z).shape == z.shape
    assert [p.shape[0] for p in network.predictor.parameters()] == [7, 7, 7, 24, 24]


def test_what_is_no_backbone_of_its_own_has_no_maps() -> None:
    """The seam itself is nothing to run."""
    with pytest.raises(NotImplementedError):
        Backbone()(torch.zeros(1, 3, 8, 8))


def test_the_same_seed_gives_the_same_network() -> None:
    """Initial weights come from torch's generator alone."""
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(ResNet(layout="resnet10", width=4).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("layout", "stem", "message"),
    [
        ("resnet9", "small", "network layout: expected resnet10 or resnet18 or"),
        ("resnet10", "tiny", "network stem: expected small or large, found 'tiny'"),
    ],
)
def test_an_unknown_name_is_refused(layout: str, stem: str, message: str) -> None:
    """The error lists the names there are."""
    with pytest.raises(UsageError) as error:
        ResNet(layout=layout, stem=stem)
    assert str(error.value).startswith(message)
