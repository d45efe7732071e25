"""The GPU path: precisions, recording, compilation, streams and ranks of a whole run on CUDA.

What is made of such a run is in `test_gpu_exports.py` and `probe/test_gpu_probes.py`; the parts
of a step that a GPU may do otherwise are in `test_gpu_parts.py`.
"""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.train.states import final_state
from train.checkpoint import list_checkpoints, load_weights
from train.config import LossOptions, NetworkOptions, PretrainOptions, ViewOptions
from train.errors import RunError, TrainError
from train.log import read_log
from train.loop import pretrain
from train.loss import forms
from train.recorded import STEPS_BEFORE
from train.run import RunDirectory

RunOptions = Callable[..., PretrainOptions]
Replays = list[torch.cuda.CUDAGraph]

EFFICIENT = NetworkOptions(layout="torchvision:efficientnet_b0", projector_widths=(32, 32))
"""Its stochastic depth draws on the GPU."""

TRANSFORMER = NetworkOptions(layout="timm:vit_tiny_patch16_224", projector_widths=(32, 32))

pytestmark = pytest.mark.gpu


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    """The network of the last checkpoint."""
    return load_weights(list_checkpoints(run / "checkpoints")[-1])["network"]


def losses_of(run: Path) -> list[float]:
    """The losses of a run's log."""
    return [record["loss"] for record in read_log(run / "log.jsonl") if "loss" in record]


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A GPU on which this process may have some 8 MB."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


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


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # advice of older torch
def test_a_compiled_network_trains(tmp_path: Path, run_options: RunOptions) -> None:
    """torch.compile sees both passes as one graph."""
    options = run_options(tmp_path / "run", device="cuda", precision="bf16", compile=True)
    pretrain(options)
    losses = losses_of(options.run_path)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channels": 3, "optimizer": "lars"},
        {"loss": LossOptions(objective="hsic"), "epochs": 1},
        {"loss": LossOptions(form="tiled"), "epochs": 1},
        {"loss": LossOptions(objective="cross-entropy", lambd=0.1), "epochs": 1},
        {"precision": "fp16", "optimizer": "sgd", "epochs": 1},
        {"data_in": "stream"},
        {"data_in": "stream", "views": ViewOptions(crop_area=(0.4, 1.0), views_in="workers")},
        {"channels": 3, "image_size_px": 224, "epochs": 1},
        {"network": EFFICIENT, "image_size_px": 32, "channels": 3, "epochs": 1, "optimizer": "sgd"},
        {"network": TRANSFORMER, "image_size_px": 32, "epochs": 1, "optimizer": "sgd"},
    ],
    ids=[
        "adamw",
        "lars",
        "hsic",
        "tiled",
        "entropy",
        "fp16-sgd",
        "stream",
        "workers",
        "at-224",
        "random-depth",
        "transformer",
    ],
)
def test_a_recorded_step_learns_what_others_learn(
    tmp_path: Path,
    run_options: RunOptions,
    monkeypatch: pytest.MonkeyPatch,
    replays: Replays,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, object],
) -> None:
    """A CUDA graph is replayed, and the run ends close to one that never was recorded."""
    monkeypatch.setattr(forms, "TILE_BYTES", 8 * 32 * 4)  # a quarter of C, if it is tiled
    common = {"device": "cuda", "precision": "fp32", **changes}
    options = run_options(tmp_path / "recorded", **common)
    pretrain(options)
    weights = load_weights(list_checkpoints(options.run_path / "checkpoints")[-1])
    assert len(replays) == weights["step"] - STEPS_BEFORE > 0
    assert "cannot be recorded" not in caplog.text
    plain = run_options(tmp_path / "plain", cuda_graph=False, **common)
    pretrain(plain)
    assert len(replays) == weights["step"] - STEPS_BEFORE
    found = last_weights(plain.run_path)
    for name, value in weights["network"].items():
        torch.testing.assert_close(value, found[name], rtol=1e-2, atol=1e-3)


def test_a_full_gpu_is_said_in_one_line(
    tmp_path: Path, run_options: RunOptions, little_memory: None
) -> None:
    """How much was wanted, how much there is, and what to do: no traceback of torch's."""
    with pytest.raises(
        TrainError, match=r"^memory of the GPU: .* found Tried to allocate"
    ) as error:
        pretrain(run_options(tmp_path / "run", device="cuda", precision="fp32"))
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("with a lower --batch-size or --image-size-px")


def test_a_run_of_a_cpu_goes_on_there_beside_a_gpu(tmp_path: Path, run_options: RunOptions) -> None:
    """What began on a CPU ends in the same bits; on a GPU it would not, and is refused."""
    changes = {"device": "cpu", "precision": "fp32", "keep_checkpoints": 99}
    options = run_options(tmp_path / "run", **changes)
    pretrain(options)
    whole = final_state(options.run_path)
    for path in list_checkpoints(options.run_path / "checkpoints")[3:]:
        path.unlink()
    go_on = {"resume": True, "keep_checkpoints": 99}
    with pytest.raises(RunError, match=r"device: expected 'cpu', found 'cuda'"):
        pretrain(run_options(tmp_path / "run", device="cuda", **go_on))
    pretrain(run_options(tmp_path / "run", **go_on))
    assert final_state(options.run_path) == whole


def test_a_gpu_starts_from_what_a_cpu_has_learnt(tmp_path: Path, run_options: RunOptions) -> None:
    """The encoder begins as good as the other ended, and its own run is no worse for it."""
    first = run_options(tmp_path / "first", device="cpu", precision="fp32", epochs=6)
    pretrain(first)
    warm = run_options(tmp_path / "warm", device="cuda", init_from=first.run_path, lr_peak=1e-5)
    pretrain(warm)
    ended = [x["knn_top1"] for x in read_log(first.run_path / "log.jsonl") if "knn_top1" in x][-1]
    records = read_log(warm.run_path / "log.jsonl")
    assert records[0]["knn_start"] == pytest.approx(ended, abs=0.051)  # two of 40 images
    assert losses_of(warm.run_path)[0] < 0.5 * losses_of(first.run_path)[0]
    assert "gpu" in RunDirectory(path=warm.run_path).read_config().environment


@pytest.mark.parametrize(
    "processes",
    [
        1,
        pytest.param(
            2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
        ),
    ],
)
def test_torchrun_does_what_one_process_does(
    tmp_path: Path, run_options: RunOptions, processes: int
) -> None:
    """One process of it records its steps; DDP and SyncBatchNorm over NCCL end close to it."""
    one = run_options(tmp_path / "one", device="cuda", precision="fp32", optimizer="sgd")
    pretrain(one)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={processes}",
        "-m", "train.pretrain", one.source, "--out", str(tmp_path / "more"), "--device", "cuda",
        "--precision", "fp32", "--optimizer", "sgd", "--image-size-px", "14", "--channels", "1",
        "--epochs", "3", "--batch-size", "32", "--lr-peak", "3e-3", "--threads", "1",
        "--network.layout", "resnet10", "--network.width", "8", "--network.stem", "small",
        "--network.zero-init-residual", "--network.projector-widths", "32", "32",
        "--views.crop-area", ".4", "1",
        "--views.blur-probability", "0", "0", "--views.solarise-probability", "0", "0",
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"on cuda:0, 1 threads, {processes} ranks" in done.stderr
    assert "cannot be recorded" not in done.stderr
    for name, value in last_weights(tmp_path / "more").items():
        torch.testing.assert_close(value, last_weights(one.run_path)[name], rtol=1e-2, atol=1e-3)
