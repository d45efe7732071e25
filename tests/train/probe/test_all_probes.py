"""What holds of every probe: the order of reading, memory, and one line for bad input."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from models.bundle import Bundle
from models.errors import UsageError
from models.images import open_source
from tests.train.probe.probing import CPU, QUICK, Events, opened
from train.data import memory
from train.errors import TrainError
from train.probe import finetune as finetune_probe
from train.probe import linear as linear_probe
from train.probe import transfer as transfer_probe
from train.probe.__main__ import run as run_probe
from train.probe.few_labels import draw_labels
from train.probe.labelled import record_classes
from train.probe.options import DistilOptions, FinetuneOptions, LinearOptions, TransferOptions
from train.probe.probed import Probed

ROOT = Path(__file__).parents[3]


def test_no_test_image_is_read_before_all_is_chosen(
    linear: LinearOptions, finetune: FinetuneOptions, run: Probed, events: Events
) -> None:
    """Layers and arms come first; then every test image is read, each once."""
    linear_probe.evaluate_linear(linear, run)
    assert events == ["layer fitted"] * 4 + ["test image"] * 200
    events.clear()
    finetune_probe.evaluate_finetune(finetune, run, CPU)
    assert events == ["arm trained"] * 4 + ["test image"] * 200
    events.clear()
    transfer = TransferOptions(
        encoder=str(finetune.run), images=finetune.images, test=finetune.test, labels=0.25,
        recipe=QUICK,
    )  # fmt: skip
    report = transfer_probe.evaluate_transfer(transfer, run, CPU)
    assert events == ["layer fitted"] * 4 + ["arm trained"] * 2 + ["test image"] * 200
    assert [row.name for row in report.rows] == [
        "fine-tuned", "from scratch", "linear, encoder", "linear, random encoder",
        "linear, whitened pixels", "linear, raw pixels",
    ]  # fmt: skip
    assert report.images["images"] == 100
    assert {"c_grid", "labels", "epochs", "precision"} <= report.settings.keys()


def test_too_many_images_end_it_before_anything_is_trained(
    finetune: FinetuneOptions, linear: LinearOptions, run: Probed, events: Events,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Those of the test set, and those that are cropped anew, are counted at the start."""
    read = len(draw_labels(record_classes(open_source(finetune.images))[1], finetune).used)
    fits = 200 + read + 100 - 1  # each set alone, and any two
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: (fits + 0.5) * 14 * 14 / 0.4)
    with_unlabelled = replace(
        finetune, unlabelled=finetune.images, distil=DistilOptions(images=100)
    )
    message = (
        rf"{fits} images of 14x14 here, found {read} \+ 200 \+ 100 \({(fits + 1) * 196:,} bytes"
    )
    with pytest.raises(TrainError, match=message):
        finetune_probe.evaluate_finetune(with_unlabelled, run, CPU)
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: (200 + read - 0.5) * 14 * 14 / 0.4)
    transfer = TransferOptions(
        encoder=str(finetune.run), images=finetune.images, test=finetune.test, labels=0.25,
        seeds=finetune.seeds,
    )  # fmt: skip
    with pytest.raises(TrainError, match=rf"14x14 here, found {read} \+ 200 \("):
        transfer_probe.evaluate_transfer(transfer, run, CPU)
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 100 * 14 * 14)
    options = replace(linear, solver="sgd", augment=True)
    with pytest.raises(TrainError, match=r"expected at most 40 images of 14x14 here, found 400 \("):
        linear_probe.evaluate_linear(options, run)
    assert events == []


def test_a_readout_that_nothing_has_is_refused(
    linear: LinearOptions, make_bundle: Callable[..., Bundle]
) -> None:
    """A linear layer on a bundle has the bundle's; so has a transfer where nothing is trained."""
    encoder = str(make_bundle().path)
    chosen = replace(linear, encoder=encoder, stages=(2,), grid=2)
    transfer = TransferOptions(encoder=encoder, images=linear.images, test=linear.test, grid=2)
    with closing(opened(Path(encoder))) as probed:
        with pytest.raises(UsageError) as refused:
            linear_probe.evaluate_linear(chosen, probed)
        assert str(refused.value) == (
            f"--stages: expected a run, whose readout is chosen here, found {encoder}, which has "
            "a readout of its own; leave the option out, or name a run"
        )
        with pytest.raises(UsageError, match=r"^--grid: expected a run, whose readout"):
            transfer_probe.evaluate_transfer(transfer, probed, CPU)


@pytest.mark.parametrize(
    ("command", "status", "line"),
    [
        ("", 2, "kind of probe: expected linear, finetune or transfer, found none; see"),
        ("best", 2, "found 'best'; see python -m train.probe --help"),
        ("linear {run} --images a --test b --c 0", 2, "--c: expected finite numbers above 0, fo"),
        ("linear {run} --images a --test b --c 1 inf", 2, "--c: expected finite numbers above 0,"),
        ("linear {run} --images a --test b --augment", 2, "--augment: expected --solver sgd, foun"),
        (
            "linear {run} --images a --test b --c 1 --solver sgd",
            2,
            "--c: expected --solver lbfgs, fo",
        ),
        (
            "linear {run} --images a --test b --sgd.epochs 3",
            2,
            "--sgd.*: expected --solver sgd, fou",
        ),
        (
            "finetune {run} --images a --test b --distil.epochs 3",
            2,
            "--distil.*: expected --unlabel",
        ),
        ("linear {run} --images a --test b --record", 2, "--record: expected an encoder that is"),
        ("linear {none} --images a --test b", 1, "expected a bundle directory, found no such"),
        ("finetune {none} --images a --test b", 1, "expected a run directory, found no such dir"),
        ("transfer {none} --images a --test b", 1, "expected a bundle directory, found no such"),
        ("finetune {run} --images a --test b --labels 2", 2, "--labels: expected more than 0, at"),
        (
            "finetune {run} --images a --test b --distil.lr 0",
            2,
            "--distil.lr: expected a finite number above 0, found 0.0",
        ),
        (
            "finetune {run} --images a --test b --distil.temperature inf",
            2,
            "--distil.temperature: expected a finite number above 0, found inf",
        ),
        ("finetune {run} --images a --test b --seeds 1 1", 2, "--seeds: expected different num"),
        (f"finetune {{run}} --images a --test b --seeds {2**64}", 2, "--seeds: expected at most"),
        (
            "finetune {run} --images a --test b --recipe.epochs 0",
            2,
            "--recipe.epochs: expected at least 1, found (0,)",
        ),
        (
            "finetune {run} --images a --test b --recipe.weight-decay inf",
            2,
            "--recipe.weight-decay: expected finite, at least 0, found inf",
        ),
    ],
)
def test_bad_input_is_one_line(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    command: str, status: int, line: str,
) -> None:  # fmt: skip
    """What was wrong, what was expected, what was found; 2 for bad use, 1 for failed work."""
    argv = command.format(run=finished_run, none=tmp_path / "none").split()
    assert run_probe(argv) == status
    captured = capsys.readouterr()
    assert line in captured.err.splitlines()[-1]
    assert captured.out == ""


def test_help_loads_no_torch() -> None:
    """Options are shown at once; torch takes seconds to load."""
    code = (
        "import sys, contextlib, train.probe.__main__\n"
        "with contextlib.suppress(SystemExit): train.probe.__main__.run(['finetune', '--help'])\n"
        "assert 'torch' not in sys.modules"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--recipe.lr-backbone" in shown.stdout
