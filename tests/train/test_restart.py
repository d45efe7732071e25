"""Kills, signals and ranks: whatever happens on the way, a run ends where it would have."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.errors import UsageError
from tests.train.states import final_state
from train.begin import settle
from train.checkpoint import list_checkpoints, load_weights
from train.config import PretrainOptions
from train.log import read_log
from train.loop import pretrain
from train.ranks import Ranks
from train.run import RunDirectory
from train.trainer import LOGGED

RunOptions = Callable[..., PretrainOptions]
PRETRAIN = ("-m", "train.pretrain")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
RANKS = (*TORCHRUN, *PRETRAIN)
STEPS_PER_EPOCH = 360 // 32
IN_TRAINING = "computing in"


def command_line(options: PretrainOptions, *more: str, launch: tuple[str, ...]) -> list[str]:
    """Say the options of the `run_options` fixture as people would."""
    return [
        sys.executable, *launch, options.source, "--out", str(options.out),
        "--image-size-px", "14", "--channels", "1", "--epochs", str(options.epochs),
        "--batch-size", "32", "--optimizer", options.optimizer, "--lr-peak", str(options.lr_peak),
        "--checkpoint-every-steps", "4", "--log-every-steps", "5", "--threads", "1",
        "--precision", options.precision, "--network.layout", "resnet10",
        "--network.width", "8", "--network.stem", "small", "--network.zero-init-residual",
        "--network.projector-widths", "32", "32", "--views.crop-area", ".4", "1",
        "--views.blur-probability", "0", "0", "--views.solarise-probability", "0", "0", *more,
    ]  # fmt: skip


def say_until(process: subprocess.Popen[str], text: str) -> str:
    """Read what a process says up to a line with `text`, or to its end."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if text in line:
            break
    return said


def finish(command: list[str]) -> str:
    """Run a command to its good end; give what it said."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def kill_after(options: PretrainOptions, text: str, delay_s: float) -> bool:
    """Start or resume a run, and kill it so long after it has said `text`.

    Returns:
        Whether it was still at work then.
    """
    more = ("--resume",) if (options.run_path / "config.json").exists() else ()
    process = subprocess.Popen(
        command_line(options, *more, launch=PRETRAIN), stderr=subprocess.PIPE, text=True
    )
    said = say_until(process, text)
    try:
        process.wait(timeout=delay_s)
    except subprocess.TimeoutExpired:
        process.kill()
    assert process.stderr is not None
    said += process.stderr.read()
    process.stderr.close()
    status = process.wait()
    assert status in (0, -signal.SIGKILL), said
    return status == -signal.SIGKILL


def test_two_kills_change_no_bit(tmp_path: Path, run_options: RunOptions) -> None:
    """SIGKILL in mid-run, twice, then --resume: weights and moments of an undisturbed run."""
    draw = random.Random(0)
    killed = run_options(tmp_path / "killed", epochs=12)
    assert kill_after(killed, "epoch 1: kNN", draw.uniform(0.0, 0.2))
    assert kill_after(killed, IN_TRAINING, draw.uniform(0.0, 0.3))
    assert "resuming" in finish(command_line(killed, "--resume", launch=PRETRAIN))
    pretrain(run_options(tmp_path / "undisturbed", epochs=12))
    assert final_state(killed.run_path) == final_state(tmp_path / "undisturbed")
    assert read_steps(killed.run_path) == read_steps(tmp_path / "undisturbed")


def read_steps(run: Path) -> list[float]:
    """The steps of a run's log, in its order."""
    return [record["step"] for record in read_log(run / "log.jsonl")]


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_no_byte(
    tmp_path: Path, run_options: RunOptions
) -> None:
    """Ten SIGKILLs, then the same network, moments and log, and the same exported graph."""
    draw = random.Random(7)
    killed, undisturbed = (
        run_options(tmp_path / name, epochs=60) for name in ("killed", "undisturbed")
    )
    kills = 0
    while kills < 10 and not has_ended(killed):
        kills += kill_after(killed, IN_TRAINING, draw.uniform(0.0, 1.5))
    assert kills == 10, "the run is too short for so many"
    finish(command_line(killed, "--resume", launch=PRETRAIN))
    finish(command_line(undisturbed, launch=PRETRAIN))
    assert final_state(killed.run_path) == final_state(undisturbed.run_path)
    assert read_steps(killed.run_path) == read_steps(undisturbed.run_path)
    graphs = []
    for options in (killed, undisturbed):
        bundle = tmp_path / f"{options.run_path.name}-bundle"
        finish([sys.executable, "-m", "train.export", str(options.out), "--out", str(bundle)])
        graphs.append((bundle / "encoder.onnx").read_bytes())
    assert graphs[0] == graphs[1]


def has_ended(options: PretrainOptions) -> bool:
    """Say whether a run's last step is done."""
    last = f"step-{options.epochs * STEPS_PER_EPOCH:08d}.pt"
    return (options.run_path / "checkpoints" / last).exists()


def resume_from_the_middle(options: PretrainOptions) -> dict[str, bytes]:
    """Train, throw the later checkpoints away, and go on from an earlier one."""
    pretrain(options)
    whole = final_state(options.run_path)
    for path in list_checkpoints(options.run_path / "checkpoints")[2:]:
        path.unlink()
    pretrain(PretrainOptions(**(vars(options) | {"resume": True})))
    assert final_state(options.run_path) == whole
    return whole


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_resumes_to_the_same_bits(
    tmp_path: Path, run_options: RunOptions, precision: str
) -> None:
    """Weights are float32, products are not, and the state of the scaler comes back."""
    options = run_options(
        tmp_path / "run", precision=precision, epochs=1, keep_checkpoints=9, knn_every_epochs=0
    )
    resume_from_the_middle(options)
    state = load_weights(list_checkpoints(options.run_path / "checkpoints")[-1])
    assert bool(state["scaler"]) == (precision == "fp16")
    assert state["network"]["backbone.conv1.weight"].dtype == torch.float32
    config = RunDirectory(path=options.run_path).read_config()
    assert (config.options["device"], config.options["precision"]) == ("cpu", precision)


def test_a_resumed_log_says_of_how_many_steps_its_means_are(
    tmp_path: Path, run_options: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first record of a sitting averages what it has seen; all others are as undisturbed."""
    monkeypatch.setattr("train.trainer.LEAST_RECORDS", 2)  # else every step has a record
    options = run_options(tmp_path / "run", epochs=1, keep_checkpoints=9, knn_every_epochs=0)
    pretrain(options)
    whole = records_but_speed(options.run_path)
    list_checkpoints(options.run_path / "checkpoints")[-1].unlink()
    pretrain(replace(options, resume=True))
    resumed = records_but_speed(options.run_path)
    assert [(r["step"], r["steps_averaged"]) for r in whole] == [(5, 5), (10, 5), (12, 2)]
    assert [(r["step"], r["steps_averaged"]) for r in resumed] == [(5, 5), (10, 2), (12, 2)]
    assert (resumed[0], resumed[2]) == (whole[0], whole[2])
    means = {*LOGGED, "steps_averaged"}
    differing = {name for name in whole[1] if resumed[1][name] != whole[1][name]}
    assert differing <= means


def records_but_speed(run: Path) -> list[dict[str, float]]:
    """Read a run's log, less what the machine's load decides."""
    return [
        {k: v for k, v in record.items() if k != "images_per_s"}
        for record in read_log(run / "log.jsonl")
    ]


@pytest.mark.slow
def test_a_compiled_network_resumes_to_the_same_bits(
    tmp_path: Path, run_options: RunOptions
) -> None:
    """The compiled passes are the same in every sitting, and close to the plain ones."""
    changes: dict[str, object] = {"epochs": 1, "keep_checkpoints": 9, "precision": "fp32"}
    changes |= {"optimizer": "sgd", "lr_peak": 3e-4}
    compiled = run_options(tmp_path / "compiled", compile=True, **changes)
    resume_from_the_middle(compiled)
    plain = run_options(tmp_path / "plain", **changes)
    pretrain(plain)
    assert_close(compiled.run_path, plain.run_path)


def assert_close(run: Path, other: Path) -> None:
    """Two runs ended with weights that agree as float32 sums in another order do."""
    states = [load_weights(list_checkpoints(path / "checkpoints")[-1]) for path in (run, other)]
    for name, value in states[0]["network"].items():
        torch.testing.assert_close(value, states[1]["network"][name], rtol=2e-3, atol=2e-5)


def workers_of(torchrun: int) -> list[int]:
    """The processes that torchrun has started."""
    return [
        int(pid) for pid in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    ]


RANKS_CHANGES: dict[str, object] = {
    "epochs": 2, "optimizer": "sgd", "lr_peak": 3e-4, "precision": "fp32"
}  # fmt: skip
"""Steps so small that what differs in the last bit stays small."""


def test_two_ranks_do_what_one_process_does(tmp_path: Path, run_options: RunOptions) -> None:
    """Over gloo: weights close to those of one process, and one log."""
    one, two = (run_options(tmp_path / name, **RANKS_CHANGES) for name in ("one", "two"))
    pretrain(one)
    finish(command_line(two, launch=RANKS))
    assert_close(one.run_path, two.run_path)
    assert read_steps(one.run_path) == read_steps(two.run_path), "one rank keeps the log"


@pytest.mark.slow
def test_ranks_outlive_a_kill_to_the_same_bits(tmp_path: Path, run_options: RunOptions) -> None:
    """Torchrun starts both anew when one dies; they go on without being told to."""
    whole, killed = (run_options(tmp_path / name, **RANKS_CHANGES) for name in ("whole", "killed"))
    finish(command_line(whole, launch=RANKS))
    launch = (*TORCHRUN, "--max-restarts=1", *PRETRAIN)
    process = subprocess.Popen(
        command_line(killed, launch=launch), stderr=subprocess.PIPE, text=True
    )
    before = say_until(process, "epoch 1: kNN")
    os.kill(workers_of(process.pid)[-1], signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == 0, before + said
    assert "resuming" in said
    assert final_state(killed.run_path) == final_state(whole.run_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_two_ranks_stop_after_the_same_step_and_one_goes_on(
    tmp_path: Path, run_options: RunOptions, number: signal.Signals
) -> None:
    """A signal to torchrun saves; going on with another number of ranks is said, not refused."""
    options = run_options(tmp_path / "run", epochs=40, optimizer="sgd", precision="fp32")
    launch = (*TORCHRUN, "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", *PRETRAIN)
    process = subprocess.Popen(
        command_line(options, launch=launch), stderr=subprocess.PIPE, text=True
    )
    say_until(process, "epoch 1: kNN")
    process.send_signal(number)
    _, said = process.communicate()  # until the workers have closed it, too
    assert "stopped after step" in said
    assert not has_ended(options)
    said = finish(command_line(options, "--resume", launch=PRETRAIN))
    assert "the run was started with 2 ranks and goes on with 1" in said
    assert has_ended(options)


@pytest.mark.slow
def test_every_rank_may_have_a_place_of_its_own(
    tmp_path: Path, run_options: RunOptions, mini_source: str
) -> None:
    """As nodes have whose scratch disks are their own: a run is resumed, finished or not."""
    images, _, labels = mini_source.removeprefix("idx:").partition(",")
    for rank in range(2):
        (tmp_path / f"node-{rank}").mkdir()
        for file in (images, labels):
            shutil.copy(file, tmp_path / f"node-{rank}")
    script = tmp_path / "start.py"
    script.write_text(
        "import os, runpy, sys\n"
        "sys.argv[1] = sys.argv[1].replace('node-0', 'node-' + os.environ['LOCAL_RANK'])\n"
        "runpy.run_module('train.pretrain', run_name='__main__', alter_sys=True)\n"
    )
    names = (tmp_path / "node-0" / Path(file).name for file in (images, labels))
    options = run_options(
        tmp_path / "run", source="idx:" + ",".join(map(str, names)), epochs=1, optimizer="sgd",
        precision="fp32",
    )  # fmt: skip
    launch = (*TORCHRUN, str(script))
    finish(command_line(options, launch=launch))
    whole = final_state(options.run_path)
    finish(command_line(options, "--resume", launch=launch))
    list_checkpoints(options.run_path / "checkpoints")[-1].unlink()
    finish(command_line(options, "--resume", launch=launch))
    assert final_state(options.run_path) == whole


def test_a_batch_that_ranks_cannot_share_is_refused(
    tmp_path: Path, run_options: RunOptions
) -> None:
    """Every rank needs as many images as the others."""
    options = run_options(tmp_path / "run", batch_size=31)
    with pytest.raises(UsageError) as error:
        settle(options, None, Ranks(world=2))
    assert str(error.value) == (
        "--batch-size: expected a multiple of the 2 ranks, found 31; give 32"
    )
