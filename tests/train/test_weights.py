"""Weights in: every layout lands on the right tensors, and what does not fit is said."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from models.bundle import BUNDLE_FILE, OutputSpec, write_bundle
from models.networks import BarlowTwins, ResNet
from models.preprocess import PreprocessSpec
from train.backbones import build_backbone
from train.checkpoint import list_checkpoints, load_weights
from train.errors import RunError, TrainError
from train.export.run_graph import last_checkpoint
from train.option_groups import NetworkOptions
from train.run import RunDirectory
from train.weights import WeightsReport, initialise_from

WIDTHS = (16, 16, 16)


def make_network(*, layout: str = "resnet18", width: int = 4, stem: str = "large") -> BarlowTwins:
    """Give an untrained network whose weights no file has."""
    torch.manual_seed(99)
    return BarlowTwins(ResNet(layout=layout, width=width, stem=stem), WIDTHS)


def trained(layout: str = "resnet18", *, stem: str = "large") -> BarlowTwins:
    """Give a network that stands for somebody's trained one, BatchNorm statistics and all."""
    torch.manual_seed(1)
    network = BarlowTwins(ResNet(layout=layout, width=4, stem=stem), WIDTHS)
    for tensor in network.state_dict().values():
        tensor.uniform_(0.5, 1.5) if tensor.is_floating_point() else tensor.fill_(7)
    return network


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put a prefix before every name."""
    return {prefix + name: x for name, x in tensors.items()}


def official_backbone(network: BarlowTwins) -> object:
    """Lay out the authors' `resnet50.pth`: the state dict of a torchvision backbone."""
    return OrderedDict(network.backbone.state_dict())


def no_decay(p: Tensor) -> bool:
    """Stand for the function that the authors' optimiser keeps in its groups."""
    return p.ndim == 1


def official_checkpoint(network: BarlowTwins) -> object:
    """Lay out the authors' `checkpoint.pth`; its optimiser holds functions by name."""
    tensors = {k: v for k, v in network.state_dict().items() if not k.startswith("predictor.")}
    statistics = nn.BatchNorm1d(WIDTHS[-1], affine=False).state_dict()
    model = under("module.", tensors | under("bn.", dict(statistics)))
    group = {"lr": 0.2, "weight_decay_filter": no_decay, "params": [0]}
    return {"epoch": 7, "model": model, "optimizer": {"state": {}, "param_groups": [group]}}


class Configuration:
    """Stands for the configuration object that Lightning keeps in a checkpoint."""

    def __init__(self) -> None:
        self.content = {"method": "barlow_twins"}


def solo_learn(network: BarlowTwins) -> object:
    """Lay out a checkpoint of solo-learn: Lightning's, with a configuration and biases."""
    tensors = under("backbone.", dict(network.backbone.state_dict()))
    tensors |= under("projector.", dict(network.projector.state_dict()))
    tensors |= {"projector.0.bias": torch.ones(16), "classifier.weight": torch.ones(10, 32)}
    return {"epoch": 3, "state_dict": tensors, "hyper_parameters": Configuration()}


def lightly_children(network: BarlowTwins) -> object:
    """Lay out lightly's tutorials: a Sequential of the children, and a projection head."""
    backbone = nn.Sequential(*network.backbone.children(), nn.AdaptiveAvgPool2d(1))
    tensors = under("backbone.", dict(backbone.state_dict()))
    return tensors | under("projection_head.layers.", dict(network.projector.state_dict()))


def lightly_named(network: BarlowTwins) -> object:
    """Lay out lightly's benchmarks: Lightning's state dict, names as torchvision's."""
    tensors = under("backbone.", dict(network.backbone.state_dict()))
    tensors |= under("projection_head.layers.", dict(network.projector.state_dict()))
    return {"state_dict": tensors, "pytorch-lightning_version": "2.0"}


def compiled_and_wrapped(network: BarlowTwins) -> object:
    """Lay out what torch.compile within DDP gives."""
    return {"model_state_dict": under("module._orig_mod.", dict(network.state_dict()))}


@pytest.mark.parametrize(
    "layout",
    [
        official_backbone,
        official_checkpoint,
        solo_learn,
        lightly_children,
        lightly_named,
        compiled_and_wrapped,
    ],
)
def test_every_layout_lands_on_its_tensors(layout: object, tmp_path: Path) -> None:
    """Each tensor of the backbone, and of the projector where the file has one."""
    assert callable(layout)
    source, network, file = trained(), make_network(), tmp_path / "weights.pth"
    torch.save(layout(source), file)
    report = initialise_from(file, network)
    expected, found = source.state_dict(), network.state_dict()
    parts = ("backbone.",) if layout is official_backbone else ("backbone.", "projector.")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) is (name.startswith(parts)), name
    assert report.taken == tuple(name for name in found if name.startswith(parts))
    assert not report.unfit


def test_a_report_says_what_was_taken_and_what_was_not(tmp_path: Path) -> None:
    """Counts by part, then names: of another shape with both, absent, unused."""
    file = tmp_path / "published.pth"
    tensors = dict(trained().backbone.state_dict()) | {"fc.weight": torch.ones(10, 32)}
    torch.save(tensors, file)
    network = make_network(stem="small")
    report = initialise_from(file, network)
    assert report.summary() == (
        f"{file}: took 119 of 120 tensors of the backbone, 0 of 13 tensors of the projector; "
        "of another shape: backbone.conv1.weight (4x3x7x7, here 4x3x3x3); "
        "not in the file: projector.0.weight, projector.1.weight, projector.1.bias, "
        "projector.1.running_mean and 9 more; unused of the file: fc.weight"
    )
    assert report.unfit == {"backbone.conv1.weight": ((4, 3, 7, 7), (4, 3, 3, 3))}


def test_published_torchvision_weights_fit_our_network(tmp_path: Path) -> None:
    """A torchvision ResNet-18, saved as people save it, gives the same features here."""
    torch.manual_seed(0)
    published = torchvision.models.resnet18(weights=None).eval()
    torch.save(published.state_dict(), tmp_path / "resnet18.pth")
    network = BarlowTwins(ResNet(layout="resnet18", stem="large"), WIDTHS).eval()
    report = initialise_from(tmp_path / "resnet18.pth", network)
    assert report.unused == ("fc.weight", "fc.bias")
    published.fc = nn.Identity()
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(network(images)[0], published(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "vit_b_32"])
def test_a_librarys_weights_fit_its_own_backbone(name: str, tmp_path: Path) -> None:
    """Also where `encoder`, elsewhere a word for the backbone, is a part of it."""
    sized = {"image_size": 32} if name == "vit_b_32" else {}
    published = torchvision.models.get_model(name, weights=None, **sized)
    torch.save(published.state_dict(), tmp_path / "x.pth")
    network = BarlowTwins(build_backbone(NetworkOptions(layout=f"torchvision:{name}"), 3, 32), (8,))
    report = initialise_from(tmp_path / "x.pth", network)
    assert [name for name in report.absent if name.startswith("backbone.")] == []
    assert not report.unfit
    assert all(name.startswith(("classifier.", "heads.")) for name in report.unused)


@pytest.mark.filterwarnings("ignore")
def test_lightlys_own_networks_fit(tmp_path: Path) -> None:
    """The real ResNet-9 and head of lightly, as its tutorial for CIFAR-10 puts them together."""
    from lightly import models  # here, where its warnings are not errors
    from lightly.models import modules as heads

    theirs = models.ResNetGenerator("resnet-9", width=4 / 64)
    module = nn.Module()
    module.backbone = nn.Sequential(*list(theirs.children())[:-1], nn.AdaptiveAvgPool2d(1))
    module.projection_head = heads.BarlowTwinsProjectionHead(32, 16, 16)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "lightly.ckpt")
    network = make_network(layout="resnet10", stem="small")
    report = initialise_from(tmp_path / "lightly.ckpt", network)
    assert (report.absent, report.unfit) == ((), {})
    assert report.unused == ("projection_head.layers.6.bias",)
    theirs.linear = nn.Identity()
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        found, expected = network.eval()(images)[0], theirs.eval()(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    """Of other widths, or of other names: nothing is changed, and the error says which."""
    file, network = tmp_path / "x.pth", make_network(width=8)
    before = {name: x.clone() for name, x in network.state_dict().items()}
    torch.save(trained("resnet10").backbone.state_dict(), file)
    with pytest.raises(TrainError, match=r"found tensors of other shapes: .*4x3x7x7, here"):
        initialise_from(file, network)
    torch.save({"blocks.0.attn.qkv.weight": torch.ones(3, 3)}, file)
    with pytest.raises(TrainError) as error:
        initialise_from(file, network)
    assert str(error.value) == (
        f"weights {file}: expected some that fit the backbone, found other names, such as "
        "blocks.0.attn.qkv.weight; name the network that they are of by --network.layout, "
        "--network.width and --network.stem"
    )
    assert all(torch.equal(before[name], x) for name, x in network.state_dict().items())


class Malice:
    """Would leave a file behind if a reader ran it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (shutil.copyfile, (__file__, str(self.path)))


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    """What a pickle would call is replaced by what does nothing; the weights are read."""
    content = {"state_dict": trained().state_dict(), "config": Malice(tmp_path / "harm")}
    torch.save(content, tmp_path / "x.pth")
    initialise_from(tmp_path / "x.pth", make_network())
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"no weights", "a file that torch cannot read safely"),
        (b"\x80\x02.", "a file that torch cannot read safely"),
        (b"\x80\x02]K\x01s.", "a file that torch cannot read safely"),
        (None, "nothing of that name"),
        ({"epoch": 3}, "no named tensors"),
        ([torch.ones(2)], "no named tensors"),
    ],
)
def test_what_holds_no_weights_is_one_line(content: object, found: str, tmp_path: Path) -> None:
    """Neither a traceback of torch nor a network that was silently left as it was."""
    file = tmp_path / "x.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(TrainError) as error:
        initialise_from(file, make_network())
    assert str(error.value).startswith(
        f"weights {file}: expected a run, a bundle of one, or a file of torch tensors by name, "
        f"found {found}"
    )
    assert "\n" not in str(error.value)


def network_of_run() -> BarlowTwins:
    """Give a network as the finished run of the tests has it."""
    return BarlowTwins(ResNet(layout="resnet10", width=8, in_channels=1), (32, 32))


def check_is_run(report: WeightsReport, network: BarlowTwins, checkpoint: Path) -> None:
    """Hold every tensor against those of a checkpoint."""
    kept = load_weights(checkpoint)["network"]
    assert report.source == checkpoint
    assert all(torch.equal(kept[name], x) for name, x in network.state_dict().items())


def test_a_run_gives_its_last_checkpoint(finished_run: Path) -> None:
    """The directory, or a checkpoint in it; projector included."""
    (*_, last) = list_checkpoints(RunDirectory(path=finished_run).checkpoints)
    for path in (finished_run, last):
        network = network_of_run()
        check_is_run(initialise_from(path, network), network, last)
    network = network_of_run()
    report = initialise_from(finished_run / "initial.pt", network)
    assert all(name.startswith("projector.") for name in report.absent)


def test_a_damaged_last_checkpoint_is_passed_over_by_whoever_reads_a_run(
    finished_run: Path, tmp_path: Path
) -> None:
    """Weights for another run, and what is exported and probed; the report reads likewise."""
    run = RunDirectory(path=tmp_path / "run")
    shutil.copytree(finished_run, run.path)
    (*earlier, last) = list_checkpoints(run.checkpoints)
    later = last.with_name("step-99999999.pt")
    later.write_bytes(last.read_bytes()[:-1])
    network = network_of_run()
    assert initialise_from(run.path, network).source == last
    assert last_checkpoint(run) == last
    for whole in (*earlier, last):
        whole.unlink()
    with pytest.raises(RunError, match="expected a checkpoint that can be read, found none among"):
        last_checkpoint(run)


def make_bundle(path: Path, run: Path, *, export_of: Path, checkpoint: str) -> Path:
    """Write a bundle that says it was exported from `export_of`, with a graph of any bytes."""
    config = RunDirectory(path=run).read_config()
    graph = path.with_suffix(".onnx")
    graph.write_bytes(b"graph")
    provenance = {
        "run": str(export_of),
        "options": dict(config.options),
        "data": dict(config.data),
        "training": {"checkpoint": checkpoint},
    }
    write_bundle(
        path,
        name="x",
        files={"encoder.onnx": graph},
        preprocessing=PreprocessSpec(height=14, width=14, channels=1, resize=14),
        output=OutputSpec(dim=32),
        provenance=provenance,  # type: ignore[arg-type]  # plain JSON
    )
    return path


@pytest.mark.parametrize("name", ["", "encoder.onnx"])
def test_a_bundle_leads_to_its_run(finished_run: Path, tmp_path: Path, name: str) -> None:
    """Training goes on from the very checkpoint that was exported."""
    first, *_, last = list_checkpoints(RunDirectory(path=finished_run).checkpoints)
    assert first != last
    bundle = make_bundle(
        tmp_path / "bundle", finished_run, export_of=finished_run, checkpoint=first.name
    )
    network = network_of_run()
    check_is_run(initialise_from(bundle / name, network), network, first)


@pytest.mark.parametrize(
    ("export_of", "checkpoint", "found"),
    [
        ("gone", "step-00000001.pt", "gone: no such directory; give the"),
        (None, "step-00000001.pt", "which is another run or has no step-00000001.pt"),
    ],
)
def test_a_bundle_whose_run_is_gone_is_refused(
    export_of: str | None, checkpoint: str, found: str, finished_run: Path, tmp_path: Path
) -> None:
    """Its graph is no weights to train; the error says to give the run itself."""
    run = tmp_path / export_of if export_of else finished_run
    bundle = make_bundle(tmp_path / "b", finished_run, export_of=run, checkpoint=checkpoint)
    assert (bundle / BUNDLE_FILE).is_file()
    with pytest.raises(TrainError) as error:
        initialise_from(bundle, network_of_run())
    assert str(error.value).startswith(f"weights of the bundle {bundle}: expected the run that ")
    assert found in str(error.value)
    assert str(error.value).endswith("; give the run's directory or a checkpoint itself")


def test_a_damaged_checkpoint_of_ours_is_refused(finished_run: Path, tmp_path: Path) -> None:
    """Its hash is checked before anything is read."""
    (*_, last) = list_checkpoints(RunDirectory(path=finished_run).checkpoints)
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / last.name).write_bytes(content)
    with pytest.raises(TrainError, match="its content does not match its SHA-256"):
        initialise_from(tmp_path / last.name, network_of_run())
