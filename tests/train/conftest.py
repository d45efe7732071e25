"""The 400 real images that ship with the tests, one finished run on them, and its bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.bundle import Bundle
from train.config import NetworkOptions, PretrainOptions, ViewOptions

RunOptions = Callable[..., PretrainOptions]

MINI = Path(__file__).parents[1] / "data/fashion-mnist-mini"


@pytest.fixture(scope="session")
def mini_source() -> str:
    """400 training images of Fashion-MNIST, with labels."""
    return f"idx:{MINI / 'train-images-idx3-ubyte.gz'},{MINI / 'train-labels-idx1-ubyte.gz'}"


@pytest.fixture(scope="session")
def run_options(mini_source: str) -> RunOptions:
    """Give a function that makes the options of a run of a second or two on one thread."""

    def make(out: Path, **changes: object) -> PretrainOptions:
        values: dict[str, object] = {
            "source": mini_source,
            "out": out,
            "image_size_px": 14,
            "channels": 1,
            "epochs": 3,
            "batch_size": 32,
            "lr_peak": 3e-3,
            "checkpoint_every_steps": 4,
            "log_every_steps": 5,
            "threads": 1,
            "network": NetworkOptions(layout="resnet10", width=8, projector_widths=(32, 32)),
            "views": ViewOptions(crop_area=(0.4, 1.0)),
        }
        return PretrainOptions(**(values | changes))  # type: ignore[arg-type]  # any option

    return make


@pytest.fixture(scope="session")
def finished_run(run_options: RunOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on the 400 images, undisturbed; give the run directory."""
    from train.loop import pretrain

    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    pretrain(run_options(out))
    return out


@pytest.fixture(scope="session")
def bundle(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Export that run; no test writes into the bundle."""
    from train.export.bundle import export_run
    from train.run import RunDirectory

    out = tmp_path_factory.mktemp("bundles") / "mini"
    return export_run(RunDirectory(path=finished_run), out, name="mini")


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[torch.cuda.CUDAGraph]:
    """The CUDA graphs that were replayed, one for each time."""
    found: list[torch.cuda.CUDAGraph] = []
    replay = torch.cuda.CUDAGraph.replay

    def noted(graph: torch.cuda.CUDAGraph) -> None:
        found.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", noted)
    return found
