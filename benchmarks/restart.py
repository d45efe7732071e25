"""Ten SIGKILLs at random moments, and whether the run ends in the bytes of an undisturbed one.

One run of `python -m train.pretrain` is left alone. Another, with the same options, is killed
again and again: each time a moment is drawn evenly between the start of the process, imports
and reading included, and twice an equal share of the training after its first step, or the
last checkpoint where that comes first. It then goes on with `--resume`, or by the command it
was started with where it had not yet written its `config.json`, in the end without a kill.

Compared are SHA-256 of the last checkpoint's weights, of the optimiser's moments, of torch's
generator, of the steps in the log, and of the `encoder.onnx` that is exported. No kill
counts that comes after the last checkpoint: a run that gets there too early is an error. Images
are those that ship with the tests.

It is about one process on the CPU, in the precision that `auto` is there; for the others, for
compiled networks and for ranks see `tests/train/test_restart.py`. Run from the root:
`python -m benchmarks.restart --out benchmarks/results/restart.json`.
"""

from __future__ import annotations

import hashlib
import json
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measuring import command_line
from models.bundle import ENCODER_FILE, Json
from models.command import run_command
from models.errors import UsageError
from models.files import canonical_json, sha256_file
from train.checkpoint import list_checkpoints, load_weights
from train.errors import TrainError
from train.log import read_log
from train.run import RunDirectory, describe_environment

MINI = "tests/data/fashion-mnist-mini"
SOURCE = f"idx:{MINI}/train-images-idx3-ubyte.gz,{MINI}/train-labels-idx1-ubyte.gz"
"""400 images, which are read at once."""

IN_TRAINING = "computing in"
"""What `train.loop` says when all is read and made."""

TRAINING_OPTIONS = (
    "--preset", "fashion-mnist", "--device", "cpu", "--batch-size", "32",
    "--network.layout", "resnet10", "--network.width", "8",
    "--network.projector-widths", "64", "64",
    "--checkpoint-every-steps", "25", "--log-every-steps", "1",
)  # fmt: skip
"""Small, so that ten starts and two whole runs take minutes; a kill costs up to 25 steps."""

EXPORT_OPTIONS = ("--readout.dim", "0", "--no-random-twin")
"""400 images are too few for the preset's whitening."""


@dataclass(frozen=True, kw_only=True)
class RestartOptions:
    """Kill a training at random moments and compare it with an undisturbed one."""

    kills: int = 10
    """How often."""
    seed: int = 284
    """Decides the moments."""
    epochs: int = 120
    """Passes over the 400 images."""
    threads: int = 2
    """CPU threads of each training."""
    keep: Path | None = None
    """New directory for both runs and bundles; a temporary one where not given."""
    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        for name in ("kills", "epochs", "threads"):
            if getattr(self, name) < 1:
                found = str(getattr(self, name))
                raise UsageError(f"--{name}", expected="at least 1", found=found)
        if self.keep is not None and self.keep.exists():
            raise UsageError(str(self.keep), expected="a new directory", found="an existing one")


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long the undisturbed run took.

    Attributes:
        startup_s: from the start of the process to the first step.
        training_s: from there to the last checkpoint.
        ending_s: from there to the end of the process, the plot of the curves included.
        steps: of the whole run.
    """

    startup_s: float
    training_s: float
    ending_s: float
    steps: int

    def bound_s(self, step: int, kills: int) -> float:
        """Say up to when a process may be killed that goes on after `step`."""
        share = min(2 / kills, 1 - step / self.steps)
        return self.startup_s + share * self.training_s


@dataclass(frozen=True, kw_only=True)
class Sitting:
    """One process of the run that is killed.

    Attributes:
        resumed: whether it was given `--resume`.
        from_step: the last checkpoint at its start; 0 where there was none.
        bound_s: what its moment was drawn up to.
        after_s: its moment, in seconds since the start of the process.
        was_training: whether it had come as far as its first step.
        step: the last in the log when it had ended.
    """

    resumed: bool
    from_step: int
    bound_s: float
    after_s: float
    was_training: bool
    step: int


def pretrain_command(run: Path, options: RestartOptions) -> list[str]:
    """Give the command that starts a run."""
    return [
        sys.executable, "-m", "train.pretrain", SOURCE, "--out", str(run), *TRAINING_OPTIONS,
        "--epochs", str(options.epochs), "--threads", str(options.threads),
    ]  # fmt: skip


def run_undisturbed(command: Sequence[str], run: Path) -> Pace:
    """Train to the end; give how long it took.

    Raises:
        TrainError: the training failed.
    """
    start_s = training_from_s = time.time()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    with process.stderr as lines:
        for said_line in lines:
            said += said_line
            if IN_TRAINING in said_line:
                training_from_s = time.time()
    check_status(process.wait(), said, allowed=(0,))
    saved_s = list_checkpoints(RunDirectory(path=run).checkpoints)[-1].stat().st_mtime
    return Pace(
        startup_s=training_from_s - start_s,
        training_s=saved_s - training_from_s,
        ending_s=time.time() - saved_s,
        steps=log_steps(run)[-1],
    )


def kill_at(
    command: Sequence[str], run: Path, after_s: float, bound_s: float, said_file: Path
) -> Sitting:
    """Start or resume a run, and kill it after so many seconds.

    Raises:
        TrainError: it failed of itself.
    """
    resumed, from_step = RunDirectory(path=run).config_file.exists(), last_checkpoint(run)
    with said_file.open("w") as errors:  # a file, for nobody would empty a pipe
        start_s = time.monotonic()
        process = subprocess.Popen([*command, *resume_option(run)], stderr=errors)
        try:
            process.wait(timeout=max(0.0, start_s + after_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
        status = process.wait()
    said = said_file.read_text(errors="replace")
    check_status(status, said, allowed=(0, -signal.SIGKILL))
    return Sitting(
        resumed=resumed,
        from_step=from_step,
        bound_s=round(bound_s, 3),
        after_s=round(after_s, 3),
        was_training=IN_TRAINING in said,
        step=max(log_steps(run), default=0),
    )


def resume_option(run: Path) -> tuple[str, ...]:
    """Give `--resume` where there is a run, and nothing where one has to be started."""
    return ("--resume",) if RunDirectory(path=run).config_file.exists() else ()


def kill_again_and_again(
    command: Sequence[str], run: Path, pace: Pace, options: RestartOptions
) -> list[Sitting]:
    """Kill a run as often as asked, then let it end.

    Raises:
        TrainError: it was at its end before.
    """
    draw, said_file = random.Random(options.seed), run.with_name("said.txt")
    sittings: list[Sitting] = []
    for n in range(options.kills):
        bound_s = pace.bound_s(last_checkpoint(run), options.kills)
        sittings.append(kill_at(command, run, draw.uniform(0, bound_s), bound_s, said_file))
        print(line(sittings[-1]), flush=True)
        if last_checkpoint(run) == pace.steps:
            raise TrainError(
                "the run", expected=f"{options.kills} kills before its last checkpoint",
                found=f"{n}", mend="give more --epochs, or another --seed",
            )  # fmt: skip
    finish([*command, *resume_option(run)])
    return sittings


def finish(command: Sequence[str]) -> None:
    """Run a command to its good end.

    Raises:
        TrainError: it failed.
    """
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    check_status(done.returncode, done.stderr, allowed=(0,))


def check_status(status: int, said: str, *, allowed: Sequence[int]) -> None:
    """Refuse a process that ended as it should not have."""
    if status not in allowed:
        last = said.strip().rpartition("\n")[2]
        raise TrainError("a process", expected="a good end", found=f"status {status}: {last}")


def last_checkpoint(run: Path) -> int:
    """Give the step that a run would go on from."""
    found = list_checkpoints(RunDirectory(path=run).checkpoints)
    return int(found[-1].stem.rpartition("-")[2]) if found else 0


def log_steps(run: Path) -> list[int]:
    """Give the steps of a run's log, in its order."""
    return [int(record["step"]) for record in read_log(RunDirectory(path=run).log_file)]


def hashes_of(run: Path, bundle: Path) -> dict[str, str]:
    """Export a run, and hash what it has come to.

    Raises:
        TrainError: the export failed.
    """
    export = [sys.executable, "-m", "train.export", str(run), "--out", str(bundle)]
    finish([*export, *EXPORT_OPTIONS])
    state = load_weights(list_checkpoints(RunDirectory(path=run).checkpoints)[-1])
    of_parameters = state["optimizer"]["state"]
    assert isinstance(of_parameters, dict)
    moments = {
        f"{i} {name}": tensor
        for i, values in of_parameters.items()
        for name, tensor in values.items()
    }
    return {
        "weights": hash_tensors(state["network"]),
        "moments": hash_tensors(moments),
        "generator": hash_tensors({"torch_rng": state["torch_rng"]}),
        "log_steps": hashlib.sha256(canonical_json(log_steps(run))).hexdigest(),
        "encoder.onnx": sha256_file(bundle / ENCODER_FILE),
    }


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes, in order of name; lower-case hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def measure(options: RestartOptions, folder: Path) -> dict[str, Json]:
    """Train both runs in a folder and compare them."""
    runs = {name: folder / name for name in ("undisturbed", "killed")}
    command = {name: pretrain_command(run, options) for name, run in runs.items()}
    pace = run_undisturbed(command["undisturbed"], runs["undisturbed"])
    print(
        f"undisturbed: {pace.startup_s:.1f} s to the first step, {pace.training_s:.1f} s to the "
        f"last checkpoint, {pace.ending_s:.1f} s to the end",
        flush=True,
    )
    sittings = kill_again_and_again(command["killed"], runs["killed"], pace, options)
    hashes = {name: hashes_of(run, folder / f"{name}-bundle") for name, run in runs.items()}
    config = RunDirectory(path=runs["killed"]).read_config()
    return {
        "training": shlex.join(["python", *pretrain_command(Path("RUN"), options)[1:]]),
        "precision": config.options["precision"],
        "threads": config.options["threads"],
        "seed": options.seed,
        "undisturbed": {name: round(value, 3) for name, value in asdict(pace).items()},
        "kills": [asdict(sitting) for sitting in sittings],
        "hashes": {name: dict(found) for name, found in hashes.items()},
        "equal": hashes["undisturbed"] == hashes["killed"],
    }


def main(options: RestartOptions) -> None:
    """Measure, print, and write the result.

    Raises:
        TrainError: a process failed, or the runs differ; in the latter case the result is
            written all the same.
    """
    start_s = time.monotonic()
    if options.keep is not None:
        options.keep.mkdir(parents=True)
        found = measure(options, options.keep.resolve())
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(options, Path(folder))
    environment = describe_environment()
    report: dict[str, Json] = {
        "command": command_line(),
        "hardware": environment["hardware"],
        "versions": environment["versions"],
        "elapsed_s": round(time.monotonic() - start_s, 1),
        **found,
    }
    print(json.dumps({name: report[name] for name in ("elapsed_s", "hashes", "equal")}, indent=2))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    if not found["equal"]:
        raise TrainError(
            "the run that was killed",
            expected="the bytes of the undisturbed one",
            found="others",
            mend="look at both with --keep",
        )


def line(sitting: Sitting) -> str:
    """Lay out one sitting for people."""
    how = "resumed" if sitting.resumed else "started"
    where = "in training" if sitting.was_training else "before training"
    return (
        f"{how} at step {sitting.from_step}, killed after {sitting.after_s:.2f} of at most "
        f"{sitting.bound_s:.2f} s, {where}, the log at step {sitting.step}"
    )


if __name__ == "__main__":
    sys.exit(run_command(RestartOptions, main, prog="python -m benchmarks.restart"))
