"""The finished run, opened, and options of probes of it that take seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from models.images import ImageSource, open_source
from tests.train.probe.probing import MINI, QUICK, Events, WatchedSource, opened
from train.probe import arms, linear_layers
from train.probe import finetune as finetune_probe
from train.probe import linear as linear_probe
from train.probe import transfer as transfer_probe
from train.probe.options import FinetuneOptions, LinearOptions
from train.probe.probed import Probed


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Commands set torch's threads; so small networks are faster on one, on shared cores far."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def test_source() -> str:
    """200 test images of Fashion-MNIST, with labels."""
    return f"idx:{MINI / 't10k-images-idx3-ubyte.gz'},{MINI / 't10k-labels-idx1-ubyte.gz'}"


@pytest.fixture
def run(finished_run: Path) -> Iterator[Probed]:
    """The finished run, opened."""
    with closing(opened(finished_run)) as probed:
        yield probed


@pytest.fixture
def linear(finished_run: Path, mini_source: str, test_source: str) -> LinearOptions:
    """Options of a linear probe of the run."""
    return LinearOptions(encoder=str(finished_run), images=mini_source, test=test_source)


@pytest.fixture
def finetune(finished_run: Path, mini_source: str, test_source: str) -> FinetuneOptions:
    """Options of fine-tuning the run on a quarter of its labels, in seconds."""
    return FinetuneOptions(
        run=finished_run, images=mini_source, test=test_source, labels=0.25, seeds=(0, 1),
        recipe=QUICK,
    )  # fmt: skip


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch, test_source: str) -> Events:
    """What was read and fitted, in its order; test images come from a watched source."""
    found: Events = []

    def watched(uri: str) -> ImageSource:
        source = open_source(uri)
        return WatchedSource(source, found) if uri == test_source else source

    for module in (linear_probe, finetune_probe, transfer_probe):
        monkeypatch.setattr(module, "open_source", watched)
    fit = linear_layers.fit

    def noted_fit(*arguments: object) -> object:
        made = fit(*arguments)  # type: ignore[arg-type]  # passed on
        found.append("layer fitted")
        return made

    monkeypatch.setattr(linear_layers, "fit", noted_fit)
    train_arm = arms.train_arm

    def noted_arm(*arguments: object) -> object:
        made = train_arm(*arguments)
        found.append("arm trained")
        return made

    monkeypatch.setattr(arms, "train_arm", noted_arm)
    return found
