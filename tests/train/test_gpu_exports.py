"""What is made of a run on CUDA, there and where no GPU is: a bundle, a report, a refusal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from models.bundle import read_bundle
from models.images import open_source
from train.config import PretrainOptions
from train.export.bundle import export_run
from train.export.options import ReadoutOptions
from train.loop import pretrain
from train.report.facts import read_facts
from train.report.model import Findings, draw_sample, find_out
from train.run import RunDirectory

RunOptions = Callable[..., PretrainOptions]

pytestmark = pytest.mark.gpu

WITHOUT_GPU = """
import sys
from dataclasses import replace
from pathlib import Path

import torch

from train.checkpoint import list_checkpoints, load_weights
from train.errors import TrainError
from train.export.bundle import export_run
from train.loop import pretrain
from train.pretrain import kept_options
from train.run import RunDirectory

run, out = map(Path, sys.argv[1:])
assert not torch.cuda.is_available()
state = load_weights(list_checkpoints(run / "checkpoints")[-1])
print({x.device.type for x in state["network"].values()}, "cuda_rng" in state)
print(export_run(RunDirectory(path=run), out, name="run", with_random_twin=False).fingerprint)
try:
    pretrain(replace(kept_options(run), out=run, resume=True))
except TrainError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def gpu_run(run_options: RunOptions, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run in bf16 on a GPU."""
    out = tmp_path_factory.mktemp("gpu") / "run"
    pretrain(run_options(out, device="cuda", precision="bf16"))
    return RunDirectory(path=out)


def test_a_run_of_a_gpu_is_exported_alike_without_one(
    gpu_run: RunDirectory, tmp_path: Path
) -> None:
    """The same bundle comes of it, to the bit; that the run cannot go on is one line."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_GPU, str(gpu_run.path), str(tmp_path / "there")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    devices, fingerprint, refusal = done.stdout.splitlines()
    assert devices == "{'cpu'} True"
    assert "CUDA devices of this machine: expected one, as where the run began" in refusal
    here = export_run(gpu_run, tmp_path / "here", name="run", with_random_twin=False)
    assert here.fingerprint == fingerprint == read_bundle(tmp_path / "there").fingerprint


def test_a_readout_is_fitted_on_a_gpu(gpu_run: RunDirectory, tmp_path: Path) -> None:
    """Pooled cells of two stages, whitened, in every precision: the export checks each itself."""
    bundle = export_run(
        gpu_run,
        tmp_path / "bundle",
        name="run",
        readout=ReadoutOptions(stages=(2, 3), grid=(2,), dim=32),
        precisions=("int8", "fp16"),
    )
    assert bundle.dim == 32
    precisions = bundle.provenance["precisions"]
    assert isinstance(precisions, dict)
    assert precisions.keys() == {"fp32", "int8", "fp16"}
    fp32, int8, fp16 = (precisions[name]["knn_top1"] for name in ("fp32", "int8", "fp16"))
    assert fp32 > 0.3
    assert int8 == pytest.approx(fp32, abs=0.11)  # four of 40 images
    assert fp16 == pytest.approx(fp32, abs=0.06)


def test_a_report_of_a_gpu_is_that_of_a_cpu(
    gpu_run: RunDirectory, mini_source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spectra, C and neighbours are of the network, not of the device."""
    facts, source = read_facts(gpu_run), open_source(mini_source)
    sample = draw_sample(source, facts.config.preprocessing, 64, limit=None)

    def found() -> Findings:
        return find_out(gpu_run, facts, sample, source)

    on_gpu = found()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = found()
    assert on_gpu.rankme == pytest.approx(on_cpu.rankme, rel=1e-2)
    np.testing.assert_allclose(on_gpu.correlation.zoom, on_cpu.correlation.zoom, atol=1e-2)
    for one, other in zip(on_gpu.searches, on_cpu.searches, strict=True):
        assert one.query == other.query
        np.testing.assert_allclose(one.cosines, other.cosines, atol=1e-2)
