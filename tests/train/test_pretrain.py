"""The command: what a run leaves, and what it refuses."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.command import run_command
from models.errors import UsageError
from tests.train.states import final_state
from train.books import mean_of_window
from train.checkpoint import list_checkpoints, load_weights
from train.config import LossOptions, PretrainOptions
from train.errors import RunError, TrainError
from train.log import read_log
from train.loop import pretrain
from train.pretrain import choose_defaults, main

RunOptions = Callable[..., PretrainOptions]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
STEPS = 3 * (360 // 32)


def test_a_run_leaves_all_of_its_files(finished_run: Path) -> None:
    """Configuration, initial weights, checkpoints, log, events and curves are there."""
    names = {path.name for path in finished_run.iterdir()}
    assert names == {
        "config.json", "initial.pt", "checkpoints", "log.jsonl", "tensorboard", "curves.png"
    }  # fmt: skip
    kept = [path.name for path in list_checkpoints(finished_run / "checkpoints")]
    assert kept == ["step-00000032.pt", f"step-{STEPS:08d}.pt"]
    assert (finished_run / "curves.png").read_bytes().startswith(PNG_SIGNATURE)


def test_the_configuration_is_complete(finished_run: Path, mini_source: str) -> None:
    """Options, data hash, split, versions and command can be read back."""
    config = json.loads((finished_run / "config.json").read_text())
    assert config["options"]["network.projector_widths"] == [32, 32]
    assert config["options"]["seed"] == 0
    assert config["data"]["uri"].startswith("idx:")
    assert len(config["data"]["sha256"]) == 64
    assert (config["data"]["train_images"], config["data"]["val_images"]) == (360, 40)
    assert config["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert config["command"].startswith("python -m train.pretrain")
    assert len(config["channel_mean"]) == len(config["channel_std"]) == 1


def test_the_log_has_losses_and_knn(finished_run: Path) -> None:
    """The baselines come first, then losses that fall, and a kNN accuracy an epoch."""
    records = read_log(finished_run / "log.jsonl")
    assert records[0].keys() == {"step", "knn_pixels", "knn_random"}
    losses = [record for record in records if "loss" in record]
    assert [record["step"] for record in losses] == list(range(1, STEPS + 1))
    assert losses[-1]["loss"] < losses[0]["loss"]
    for record in losses:
        parts = record["loss_invariance"] + record["loss_redundancy"]
        assert parts == pytest.approx(record["loss"], rel=1e-5)
    accuracies = [(r["epoch"], r["knn_top1"]) for r in records if "knn_top1" in r]
    assert [epoch for epoch, _ in accuracies] == [1, 2, 3]
    assert all(0.1 < top1 <= 1 for _, top1 in accuracies)


def test_a_finished_run_resumes_to_itself(
    run_options: RunOptions, finished_run: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """There is nothing left to do, no image is read, and nothing changes."""
    before = final_state(finished_run)
    monkeypatch.delattr("train.begin.open_training_data")
    with caplog.at_level(logging.INFO, logger="horace"):
        pretrain(run_options(finished_run, resume=True))
    assert f"{finished_run} is finished: no step is left to take" in caplog.messages
    assert final_state(finished_run) == before


def test_a_directory_with_a_run_is_refused(run_options: RunOptions, finished_run: Path) -> None:
    """Nothing is written over; the error says how to go on."""
    with pytest.raises(RunError) as error:
        pretrain(run_options(finished_run))
    assert str(error.value) == (
        f"{finished_run}: expected a directory without a run, found a run; "
        "go on with it by --resume, or choose another --out"
    )


def test_resuming_nothing_is_refused(tmp_path: Path, run_options: RunOptions) -> None:
    """--resume needs a run."""
    with pytest.raises(RunError, match="expected a run to resume, found none"):
        pretrain(run_options(tmp_path / "none", resume=True))


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        (None, 1, "{run}: expected a run directory, found no such directory; "),
        ("torn", 1, "{run}/config.json: expected the configuration of a run, schema 1, found "),
        ({"schema_version": 99}, 1, "{run}/config.json: expected the configuration of a run, sch"),
        ({"options": {"new": 1}}, 1, "the options of a run: expected those of this Horace, found "),
        ({"options": {"network.width": 4}}, 2, "--network.width: expected at least 8, found 4"),
    ],
    ids=["no such directory", "damaged", "another schema", "another version", "too narrow now"],
)
def test_a_run_that_cannot_be_read_is_named(
    tmp_path: Path,
    finished_run: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any] | str | None,
    status: int,
    said: str,
) -> None:
    """`--resume --out RUN` says what is wrong with the run, and asks for no SOURCE."""
    run = tmp_path / "run"
    config = json.loads((finished_run / "config.json").read_text())
    if changes is not None:
        run.mkdir()
        if isinstance(changes, dict):
            options = config["options"] | changes.get("options", {})
            changes = json.dumps(config | changes | {"options": options})
        (run / "config.json").write_text(changes)
    argv = ["--resume", "--out", str(run)]
    defaults = choose_defaults(argv)
    assert run_command(PretrainOptions, main, prog="p", argv=argv, default=defaults) == status
    assert capsys.readouterr().err.startswith("p: " + said.format(run=run))


def test_resuming_without_a_name_asks_for_it(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It is not answered with a directory that nobody named."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run, "artifacts/runs/run")
    argv = ["--resume"]
    defaults = choose_defaults(argv)
    assert run_command(PretrainOptions, main, prog="p", argv=argv, default=defaults) == 2
    assert capsys.readouterr().err == (
        "p: --resume: expected the directory of a run, found no --out; give --out RUN\n"
    )


def test_resuming_with_another_option_names_it(run_options: RunOptions, finished_run: Path) -> None:
    """The first option that differs, as it was and as it is."""
    with pytest.raises(RunError) as error:
        pretrain(run_options(finished_run, resume=True, loss=LossOptions(lambd=0.1)))
    assert str(error.value) == (
        f"resuming {finished_run}: loss.lambd: expected None, found 0.1; "
        "leave it out, or start another run with another --out; only --checkpoint-every-s, "
        "--checkpoint-every-steps, --cuda-graph, --keep-checkpoints, --knn-every-epochs, "
        "--log-every-steps, --workers may change on the way"
    )


def make_photos(folder: Path, n: int) -> Path:
    """Write coloured pictures of unlike sizes, without labels, and one broken file."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for i in range(n):
        pixels = draw.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.jpg")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


def test_a_flat_folder_of_photographs_is_enough(
    tmp_path: Path, run_options: RunOptions, caplog: pytest.LogCaptureFixture
) -> None:
    """Colour, no labels, a broken file, one passed over, and every view operation: it trains."""
    folder = make_photos(tmp_path / "photos", 24)
    (folder / "phone.heic").touch()
    options = run_options(
        tmp_path / "run", source=f"folder:{folder}", image_size_px=32, channels=3,
        batch_size=8, epochs=1, optimizer="sgd", lr_peak=0.01, loss=LossOptions(objective="hsic"),
    )  # fmt: skip
    with caplog.at_level(logging.INFO, logger="horace"):
        pretrain(options)
    assert "skipped 1 images" in caplog.text
    assert f"folder:{folder}: 1 file passed over: 1 .heic" in caplog.messages
    assert "no kNN accuracy: " in caplog.text
    assert "24 images to train on, 3 steps of 8 an epoch; the 0 that fill no batch" in caplog.text
    assert f"the 1 skipped images and why: {tmp_path / 'run/rejects.jsonl'}" in caplog.text
    (reject,) = map(json.loads, (tmp_path / "run/rejects.jsonl").read_text().splitlines())
    assert (reject["key"], reject["fault"]) == ("broken.jpg", "unsupported_format")
    records = read_log(tmp_path / "run/log.jsonl")
    assert records
    assert all("knn_top1" not in record for record in records)


def test_less_than_a_batch_is_refused(tmp_path: Path, run_options: RunOptions) -> None:
    """The error says how many there are and what to change."""
    with pytest.raises(TrainError) as error:
        pretrain(run_options(tmp_path / "run", batch_size=512))
    assert str(error.value) == (
        "training images: expected at least one batch of 512, found 360; "
        "lower --batch-size or give more images"
    )
    assert not (tmp_path / "run").exists()


def test_an_infinite_loss_ends_the_run(tmp_path: Path, run_options: RunOptions) -> None:
    """A learning rate that explodes gives one line of advice and no later checkpoint."""
    with pytest.raises(TrainError) as error:
        pretrain(run_options(tmp_path / "run", optimizer="sgd", lr_peak=1e30))
    assert "expected a finite number, found nan" in str(error.value)
    assert "lower --lr-peak" in str(error.value)
    for path in list_checkpoints(tmp_path / "run/checkpoints"):
        weights = load_weights(path)["network"].values()
        assert all(torch.isfinite(x).all() for x in weights)


def test_a_full_gpu_ends_the_run_in_one_line(
    tmp_path: Path, run_options: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch raises in a step becomes what there is to do."""

    def step(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 ...")

    monkeypatch.setattr("train.trainer.Trainer.step", step)
    with pytest.raises(TrainError) as error:
        pretrain(run_options(tmp_path / "run"))
    assert str(error.value) == (
        "memory of the GPU: expected room for what is computed, found Tried to allocate 2.00 GiB. "
        "GPU 0 ...; free the GPU, or begin another run with a lower --batch-size or "
        "--image-size-px"
    )


def test_the_mean_of_no_steps_is_empty() -> None:
    """A checkpoint right after a record has nothing to check."""
    assert mean_of_window([], 3) == {}


def test_the_test_set_is_no_training_set() -> None:
    """The named test split is refused before anything is read."""
    with pytest.raises(UsageError, match="expected training images, found fashion-mnist:test"):
        main(PretrainOptions(source="fashion-mnist:test"))


def test_a_misspelt_source_ends_it_before_torch_is_loaded() -> None:
    """It takes seconds."""
    code = (
        "import sys; from train.config import PretrainOptions; from train.pretrain import main\n"
        "try: main(PretrainOptions(source='folder:fotos'))\n"
        "except Exception as error: print(error, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("image folder fotos: ")
    assert done.stdout.endswith(" False\n")


def test_a_value_that_does_not_parse_is_said_once() -> None:
    """By the command that was typed, not by the look at the options before."""
    command = [sys.executable, "-m", "train.pretrain", "folder:photos", "--epochs", "abc"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("Error parsing --epochs") == 1
    assert "python -m train.pretrain --help" in done.stderr
    assert done.stdout == ""


def test_help_is_quick_and_loads_no_torch() -> None:
    """`--help` lists presets' values without importing torch."""
    code = (
        "import sys; sys.argv = ['pretrain', 'fashion-mnist', '--help']; import runpy\n"
        "try: runpy.run_module('train.pretrain', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "sys.stderr.write(str('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--lr-peak" in done.stdout
    assert done.stderr == "False"
