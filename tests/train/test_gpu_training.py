"""The GPU path: precisions, compilation and ranks of a whole run on CUDA."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from train.checkpoint import list_checkpoints, load_weights
from train.config import PretrainOptions
from train.log import read_log
from train.loop import pretrain

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
