"""Checkpoints: complete, whole, few, and refused when they are not this run's."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from models.networks import BarlowTwins, ResNet
from train import checkpoint
from train.checkpoint import (
    Progress,
    checkpoint_file,
    last_whole_step,
    list_checkpoints,
    load_backbone,
    load_weights,
    restore_checkpoint,
    save_checkpoint,
    save_initial,
    save_weights,
)
from train.errors import RunError
from train.optim import make_optimizer, set_lr

Parts = tuple[BarlowTwins, torch.optim.Optimizer, torch.amp.GradScaler]


def make_network(width: int = 4) -> Parts:
    """A network, an optimiser that has state, and a scaler that does something."""
    network = BarlowTwins(ResNet(layout="resnet10", width=width, in_channels=1), (8, 8))
    optimizer = make_optimizer(network, "adamw", weight_decay=0.1)
    set_lr(optimizer, 0.01)
    torch.autograd.backward(network(torch.rand(4, 1, 8, 8))[1].square().sum())
    optimizer.step()
    return network, optimizer, torch.amp.GradScaler("cpu")


def test_a_restored_run_is_the_saved_one(tmp_path: Path) -> None:
    """Weights, BatchNorm statistics, optimiser, scaler, generator, step and seconds come back."""
    network, optimizer, scaler = make_network()
    scaler.load_state_dict(scaler.state_dict() | {"scale": 128.0, "_growth_tracker": 5})
    progress = Progress(step=7, elapsed_s=1.5)
    path = save_checkpoint(tmp_path, progress, network, optimizer, scaler, keep=1)
    drawn = torch.rand(3)
    other, other_optimizer, other_scaler = make_network()
    assert restore_checkpoint(path, other, other_optimizer, other_scaler) == progress
    assert other_scaler.state_dict() == scaler.state_dict()
    assert torch.equal(torch.rand(3), drawn)
    for name, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    kept, restored = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert all(torch.equal(kept[i]["exp_avg"], restored[i]["exp_avg"]) for i in kept)


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    """Older ones go once a newer one is whole; what is unfinished is not listed."""
    parts = make_network()
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, Progress(step=step), *parts, keep=2)
    (tmp_path / ".tmp-step-00000200.pt.x").touch()
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step-00000010.pt", "step-00000100.pt"]


def flip_a_bit(path: Path) -> None:
    """Damage a file in its middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By name; it takes no place among those that are kept, and not one need be whole."""
    assert last_whole_step(tmp_path) == 0
    parts = make_network()
    for step in (4, 8, 12):
        path = save_checkpoint(tmp_path, Progress(step=step), *parts, keep=3)
    flip_a_bit(path)
    with caplog.at_level(logging.WARNING, logger="horace"):
        assert last_whole_step(tmp_path) == 8
    assert caplog.messages == [
        f"{path} cannot be used: damage: its content does not match its SHA-256"
    ]
    save_checkpoint(tmp_path, Progress(step=9), *parts, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000009.pt", "step-00000012.pt"
    ]  # fmt: skip
    assert last_whole_step(tmp_path) == 9
    flip_a_bit(checkpoint_file(tmp_path, 9))
    with pytest.raises(RunError) as error:
        last_whole_step(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: expected a checkpoint that can be read, found none among 2; bring them "
        "back from a copy, or delete them to begin at step 0 again"
    )


def test_a_checkpoint_that_is_deleted_while_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that is at work has saved a later one, which is found."""
    parts = make_network()
    save_checkpoint(tmp_path, Progress(step=1), *parts, keep=1)
    seen = iter([list_checkpoints(tmp_path)])
    save_checkpoint(tmp_path, Progress(step=2), *parts, keep=1)
    monkeypatch.setattr(
        checkpoint, "list_checkpoints", lambda folder: next(seen, None) or list_checkpoints(folder)
    )
    assert last_whole_step(tmp_path) == 2


def test_a_backbone_comes_from_a_checkpoint_or_from_the_start(tmp_path: Path) -> None:
    """Both files give the backbone alone."""
    network, optimizer, scaler = make_network()
    save_initial(tmp_path / "initial.pt", network)
    path = save_checkpoint(tmp_path, Progress(step=3), network, optimizer, scaler, keep=1)
    for file, step in ((tmp_path / "initial.pt", 0), (path, 3)):
        backbone = ResNet(layout="resnet10", width=4, in_channels=1)
        assert load_backbone(file, backbone).step == step
        assert torch.equal(backbone.conv1.weight, network.backbone.conv1.weight)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None], ids=["empty", "text", "absent"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    """The error names the file and how to go on."""
    path = tmp_path / "step-00000001.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError) as error:
        restore_checkpoint(path, *make_network())
    assert str(error.value).startswith(f"{path}: expected a checkpoint of this run, found ")
    assert str(error.value).endswith("delete the file to go on from the one before it")


def test_another_network_is_refused(tmp_path: Path) -> None:
    """Weights of unlike shapes are not this run's."""
    path = save_checkpoint(tmp_path, Progress(step=1), *make_network(width=8), keep=1)
    with pytest.raises(
        RunError, match="expected a checkpoint of this run, found weights of another network"
    ):
        restore_checkpoint(path, *make_network(width=4))
    with pytest.raises(
        RunError, match="expected a checkpoint of this run, found weights of another network"
    ):
        load_backbone(path, ResNet(layout="resnet10", width=4, in_channels=1))


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    """A pickle of anything but weights is refused before it acts."""
    path = tmp_path / "step-00000001.pt"
    save_weights(path, {"step": 1, "network": Path("/")})  # type: ignore[typeddict-item]  # foreign
    with pytest.raises(RunError, match="found a file of something else"):
        restore_checkpoint(path, *make_network())


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """A checkpoint with one bit changed anywhere is refused in plain words, never loaded."""
    path = save_checkpoint(tmp_path, Progress(step=1), *make_network(), keep=1)
    sound = path.read_bytes()
    assert torch.load(path, weights_only=True)["step"] == 1, "the hash is in torch's way"
    for bit in range(0, 8 * len(sound), 8 * len(sound) // 97):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(RunError) as error:
            load_weights(path)
        assert str(error.value) == (
            f"{path}: expected a checkpoint of this run, found damage: its content does not "
            "match its SHA-256; delete the file to go on from the one before it"
        )
