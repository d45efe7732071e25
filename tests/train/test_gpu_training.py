"""The GPU path: precisions, compilation and ranks of a whole run on CUDA."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from models.networks import ResNet
from train.checkpoint import list_checkpoints, load_weights
from train.config import PretrainOptions
from train.device import Compute
from train.export.graph import EncoderGraph
from train.export.readout import PooledReadout
from train.log import read_log
from train.loop import pretrain
from train.probe.classifier import Classifier, Recipe, train_classifier
from train.recorded import STEPS_BEFORE, recorded

RunOptions = Callable[..., PretrainOptions]

pytestmark = pytest.mark.gpu


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    """The network of the last checkpoint."""
    return load_weights(list_checkpoints(run / "checkpoints")[-1])["network"]


def losses_of(run: Path) -> list[float]:
    """The losses of a run's log."""
    return [record["loss"] for record in read_log(run / "log.jsonl") if "loss" in record]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains_and_resumes(
    tmp_path: Path, run_options: RunOptions, precision: str
) -> None:
    """The loss falls, the GPU is named, and a resumed run ends close to the whole one."""
    changes = {"device": "cuda", "precision": precision, "keep_checkpoints": 99}
    options = run_options(tmp_path / "run", **changes)
    pretrain(options)
    losses = losses_of(options.run_path)
    assert losses[-1] < losses[0]
    assert all(map(math.isfinite, losses))
    whole = last_weights(options.run_path)
    for path in list_checkpoints(options.run_path / "checkpoints")[3:]:
        path.unlink()
    pretrain(run_options(tmp_path / "run", resume=True, **changes))
    for name, value in last_weights(options.run_path).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-2, atol=1e-3)


def test_a_compiled_network_trains(tmp_path: Path, run_options: RunOptions) -> None:
    """torch.compile sees both passes as one graph."""
    options = run_options(tmp_path / "run", device="cuda", precision="bf16", compile=True)
    pretrain(options)
    losses = losses_of(options.run_path)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("changes", [{}, {"channels": 3, "optimizer": "lars"}])
def test_a_recorded_step_learns_what_others_learn(
    tmp_path: Path,
    run_options: RunOptions,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
) -> None:
    """A CUDA graph is replayed, and the run ends close to one that never was recorded."""
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph))
    )
    common = {"device": "cuda", "precision": "fp32", **changes}
    options = run_options(tmp_path / "recorded", **common)
    pretrain(options)
    steps = load_weights(list_checkpoints(options.run_path / "checkpoints")[-1])["step"]
    assert len(replays) == steps - STEPS_BEFORE > 0
    plain = run_options(tmp_path / "plain", cuda_graph=False, **common)
    pretrain(plain)
    assert len(replays) == steps - STEPS_BEFORE
    for name, value in last_weights(options.run_path).items():
        torch.testing.assert_close(value, last_weights(plain.run_path)[name], rtol=1e-2, atol=1e-3)


def test_what_waits_for_the_gpu_is_computed_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """The warning names the reason, and the results are right before and after it."""
    device = torch.device("cuda", 0)
    compute = recorded(lambda x: (x * x.sum().item(),), device)
    for _ in range(STEPS_BEFORE + 3):
        (found,) = compute(torch.ones(3, device=device))
        torch.testing.assert_close(found.cpu(), torch.full((3,), 3.0))
    assert caplog.text.count("cannot be recorded as a CUDA graph") == 1


def test_a_recording_reads_what_it_is_given(caplog: pytest.LogCaptureFixture) -> None:
    """New inputs are looked at, and results that were given stay as they are."""
    device = torch.device("cuda", 0)
    compute = recorded(lambda x: (2 * x,), device)
    found = [compute(torch.full((3,), float(i), device=device))[0] for i in range(8)]
    for i, tensor in enumerate(found):
        torch.testing.assert_close(tensor.cpu(), torch.full((3,), 2.0 * i))
    assert not caplog.text


def test_a_classifier_is_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """Backbone, readout of every stage and layer: nothing in them waits for the host."""
    device = torch.device("cuda", 0)
    backbone = ResNet(layout="resnet10", stem="small", width=8, in_channels=1)
    readout = PooledReadout(backbone.stage_dims, stages=(1, 2, 3), grid=2)
    graph = EncoderGraph(backbone, readout, [0.5], [0.25])
    images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 1), dtype=np.uint8)
    recipe = Recipe(
        epochs=4, batch_size=16, optimizer="adamw", lr_head=1e-3, lr_backbone=1e-3,
        weight_decay=0.0, schedule="cosine", warmup_share=0.1, label_smoothing=0.1,
        smallest_crop=0.8, flip_probability=0.5, head_c=0.1, freezes_batch_norm=False,
    )  # fmt: skip
    train_classifier(
        Classifier(graph, 4), images, np.arange(64) % 4, recipe, seed=0,
        compute=Compute(device=device, precision="bf16"),
    )  # fmt: skip
    assert "cannot be recorded" not in caplog.text


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_do_what_one_does(tmp_path: Path, run_options: RunOptions) -> None:
    """DDP and SyncBatchNorm over NCCL end close to one process."""
    one = run_options(tmp_path / "one", device="cuda", precision="fp32", optimizer="sgd")
    pretrain(one)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "train.pretrain", one.source, "--out", str(tmp_path / "two"), "--device", "cuda",
        "--precision", "fp32", "--optimizer", "sgd", "--image-size-px", "14", "--channels", "1",
        "--epochs", "3", "--batch-size", "32", "--lr-peak", "3e-3", "--threads", "1",
        "--network.layout", "resnet10", "--network.width", "8", "--network.stem", "small",
        "--network.zero-init-residual", "--network.projector-widths", "32", "32",
        "--views.crop-area", ".4", "1",
        "--views.blur-probability", "0", "0", "--views.solarise-probability", "0", "0",
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, value in last_weights(tmp_path / "two").items():
        torch.testing.assert_close(value, last_weights(one.run_path)[name], rtol=1e-2, atol=1e-3)
