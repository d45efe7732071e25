"""Run directories: who may work in one, how a run goes on, and what a full disk does."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.errors import SourceError, UsageError
from tests.train.states import final_state
from train.checkpoint import list_checkpoints
from train.config import PretrainOptions
from train.device import DeviceBatch
from train.errors import RunError
from train.export.bundle import export_run
from train.log import read_log
from train.loop import pretrain
from train.pretrain import choose_defaults, kept_options
from train.pretrain import main as start
from train.run import RunDirectory
from train.trainer import StepOutcome, Trainer

RunOptions = Callable[..., PretrainOptions]
MODULE = [sys.executable, "-m", "train.pretrain"]


def arguments(options: PretrainOptions, *more: str) -> list[str]:
    """Say the options of the `run_options` fixture as people would."""
    return [
        *MODULE, options.source, "--out", str(options.out), "--image-size-px", "14",
        "--channels", "1", "--batch-size", "32", "--lr-peak", "3e-3", "--threads", "1",
        "--network.layout", "resnet10", "--network.width", "8", "--network.stem", "small",
        "--network.projector-widths", "32", "32", "--views.crop-area", ".4", "1",
        "--views.blur-probability", "0", "0", "--views.solarise-probability", "0", "0",
        "--network.zero-init-residual", "--epochs", str(options.epochs), *more,
    ]  # fmt: skip


LONG_RUN = {"epochs": 5}
"""A run that is still at work when a test has read of its first epoch."""


@pytest.fixture(scope="module")
def undisturbed(run_options: RunOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train that long without an interruption."""
    options = run_options(tmp_path_factory.mktemp("runs") / "long", **LONG_RUN)
    pretrain(options)
    return options.run_path


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)],
    ids=["Ctrl-C", "SIGTERM", "SIGUSR1"],
)
def test_an_interrupted_run_keeps_all_of_its_steps(
    tmp_path: Path,
    run_options: RunOptions,
    undisturbed: Path,
    number: signal.Signals,
    status: int,
) -> None:
    """A checkpoint is made, the way on is said, and the end is that of an undisturbed run."""
    options = run_options(tmp_path / "stopped", **LONG_RUN)
    argv = arguments(options)
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "epoch 1: kNN" in line:
                process.send_signal(number)
                break
        rest = process.stderr.read()
    assert process.returncode == status, rest
    command = f"python -m train.pretrain {options.source} --resume --out {options.out}"
    assert f"go on with `{command}`" in rest
    assert "Traceback" not in rest
    assert len(list_checkpoints(tmp_path / "stopped/checkpoints")) == 1
    kept = choose_defaults(["--resume", "--out", str(options.out)])
    pretrain(replace(kept, out=options.out, resume=True))
    assert final_state(tmp_path / "stopped") == final_state(undisturbed)


def test_a_run_shorter_than_the_steps_between_checkpoints_has_some_by_time(
    tmp_path: Path, run_options: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many seconds one is due, whatever the steps."""
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr("train.books.time.monotonic", lambda: float(next(clock)))
    options = run_options(
        tmp_path / "run", epochs=1, checkpoint_every_steps=500, keep_checkpoints=99
    )
    pretrain(options)
    assert len(list_checkpoints(tmp_path / "run/checkpoints")) > 1


def test_free_options_may_change_on_the_way(
    tmp_path: Path, run_options: RunOptions, caplog: pytest.LogCaptureFixture, finished_run: Path
) -> None:
    """Logs, checkpoints and kNN may be had more or less often; a start at step 0 is said."""
    out = tmp_path / "run"
    shutil.copytree(finished_run, out)
    for path in list_checkpoints(out / "checkpoints"):
        path.unlink()
    (out / "checkpoints/.tmp-step-00000009.pt.x").touch()
    with caplog.at_level("INFO", logger="horace"):
        pretrain(
            run_options(
                out, resume=True, keep_checkpoints=1, knn_every_epochs=3, log_every_steps=1,
                checkpoint_every_steps=7, threads=None,
            )
        )  # fmt: skip
    assert "has no checkpoint yet: starting at step 0" in caplog.text
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000033.pt"]
    assert final_state(out) == final_state(finished_run)
    steps = [record["step"] for record in read_log(out / "log.jsonl")]
    assert steps.count(0) == 1


def test_a_longer_run_is_another_run(run_options: RunOptions, finished_run: Path) -> None:
    """The schedule depends on the length, and the error says so."""
    with pytest.raises(RunError) as error:
        pretrain(run_options(finished_run, resume=True, epochs=9))
    assert str(error.value) == (
        f"resuming {finished_run}: epochs: expected 3, found 9; the learning rate of every step "
        "depends on the length: train longer or shorter as a new run, with another --out, from "
        f"these weights with --init-from {finished_run}"
    )


def test_another_number_of_threads_is_refused(run_options: RunOptions, finished_run: Path) -> None:
    """It would give other last bits; the kept number is taken where none is given."""
    with pytest.raises(RunError, match="threads: expected 1, found 2; leave it out, or start"):
        pretrain(run_options(finished_run, resume=True, threads=2))


def make_photos(folder: Path, n: int) -> None:
    """Write grey pictures."""
    folder.mkdir(exist_ok=True)
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")


def test_a_run_whose_images_moved_goes_on(tmp_path: Path, run_options: RunOptions) -> None:
    """As on the scratch disk of another node: it ends as if they had stayed."""
    photos, moved = tmp_path / "photos", tmp_path / "node-2" / "photos"
    make_photos(photos, 8)
    options = run_options(tmp_path / "run", source=str(photos), batch_size=4, epochs=2)
    pretrain(replace(options, checkpoint_every_steps=2))
    undisturbed = final_state(options.run_path)
    moved.parent.mkdir()
    photos.rename(moved)
    photos.mkdir()  # as a place that nothing is mounted at
    kept = replace(kept_options(options.run_path), out=options.out, resume=True)
    list_checkpoints(options.run_path / "checkpoints")[-1].unlink()
    with pytest.raises(SourceError, match="found none; check the path; or name the place"):
        start(kept)
    photos.rmdir()
    with pytest.raises(SourceError) as error:
        start(kept)
    assert str(error.value) == (
        f"image folder {photos}: expected a folder, found nothing; check the path; or name the "
        "place where they are now as SOURCE"
    )
    pretrain(replace(kept, source=str(moved)))
    assert final_state(options.run_path) == undisturbed
    pretrain(replace(kept, source=str(moved)))  # with no step left to take
    assert final_state(options.run_path) == undisturbed


def test_another_cameras_images_are_no_runs_own(tmp_path: Path, run_options: RunOptions) -> None:
    """Uncompressed and numbered alike, they have the names and sizes by which streams are known."""
    for camera, brightness in (("camera-1", 40), ("camera-2", 60)):
        (tmp_path / camera).mkdir()
        for n in range(8):
            pixels = np.full((20, 20), brightness + n, np.uint8)
            Image.fromarray(pixels).save(tmp_path / camera / f"{n}.bmp")
    first, second = (str(tmp_path / camera) for camera in ("camera-1", "camera-2"))
    options = run_options(
        tmp_path / "run", source=first, data_in="stream", workers=1, batch_size=4, epochs=1
    )
    pretrain(options)
    with pytest.raises(RunError, match="found as many, with other pixels or labels; leave the sou"):
        pretrain(replace(options, source=second, resume=True))
    with pytest.raises(RunError, match="with other pixels or labels; name theirs with --source"):
        export_run(
            RunDirectory(path=options.run_path), tmp_path / "bundle", name="x", source=second
        )


def test_other_images_are_named_as_such(
    tmp_path: Path, run_options: RunOptions, finished_run: Path
) -> None:
    """New photographs are counted, and those of another place, for a finished run, too."""
    photos = tmp_path / "photos"
    make_photos(photos, 8)
    options = run_options(tmp_path / "run", source=str(photos), epochs=1, batch_size=4)
    kept = kept_options(finished_run)
    with pytest.raises(RunError) as error:
        pretrain(replace(kept, out=finished_run, source=str(photos), resume=True))
    assert str(error.value) == (
        f"resuming {finished_run}: the images of folder:{photos}: expected the 400 images that it "
        f"was started with, from {kept.source}, found 8 images; leave the source out, or start "
        f"another run with another --out, from these weights with --init-from {finished_run}"
    )
    pretrain(options)
    for checkpoint in (options.run_path / "checkpoints").iterdir():
        checkpoint.unlink()  # else there is nothing left to learn from them
    make_photos(photos, 10)
    with pytest.raises(RunError) as error:
        pretrain(replace(options, resume=True))
    assert str(error.value) == (
        f"resuming {options.out}: the images of folder:{photos} have changed: expected the 8 "
        "images that it was started with, found 10 images; bring the old ones back, or start "
        f"another run with another --out, from these weights with --init-from {options.out}"
    )


def test_a_directory_of_something_else_is_refused(tmp_path: Path, run_options: RunOptions) -> None:
    """Nothing is mixed into the pictures, whose own curves would be one of them."""
    photos = tmp_path / "photos"
    make_photos(photos, 8)
    with pytest.raises(RunError) as error:
        pretrain(run_options(photos, source=str(photos), epochs=1, batch_size=4))
    assert str(error.value) == (
        f"{photos}: expected a new directory, or an empty one, found other files in it, such as "
        "00.png; choose another --out"
    )
    assert len(list(photos.iterdir())) == 8


def test_a_run_among_its_images_is_refused(tmp_path: Path, run_options: RunOptions) -> None:
    """Its curves would be a new image, and the run could not be resumed."""
    photos = tmp_path / "photos"
    make_photos(photos, 8)
    with pytest.raises(UsageError) as error:
        start(run_options(photos / "runs" / "first", source=str(photos)))
    assert str(error.value) == (
        f"--out {photos}/runs/first: expected a directory outside the folder of the images, "
        f"found one inside {photos}; choose another --out: a run writes pictures, which would be "
        "images of the folder"
    )
    assert len(list(photos.iterdir())) == 8
    (tmp_path / "elsewhere").mkdir()
    (photos / "link").symlink_to(tmp_path / "elsewhere")  # which the folder's source follows
    (tmp_path / "alias").symlink_to(photos)
    for out in (photos / "link" / "run", tmp_path / "alias" / "run", photos):
        with pytest.raises(UsageError, match="outside the folder of the images"):
            start(run_options(out, source=str(photos)))


def test_what_is_no_image_of_the_folder_may_lie_in_it(
    tmp_path: Path, run_options: RunOptions
) -> None:
    """A hidden run is never listed, and looking at the views makes none."""
    photos = tmp_path / "photos"
    make_photos(photos, 8)
    hidden = run_options(photos / ".runs" / "first", source=str(photos), epochs=1, batch_size=4)
    start(hidden)
    start(replace(hidden, out=photos / "run", show_views=tmp_path / "views.png"))
    assert (tmp_path / "views.png").exists()
    assert not (photos / "run").exists()


def test_what_an_early_end_leaves_is_no_hindrance(tmp_path: Path, run_options: RunOptions) -> None:
    """Killed before its `config.json`, a run has a lock, first weights and half-written files."""
    out = tmp_path / "run"
    out.mkdir()
    for name in (".lock", "initial.pt", ".tmp-config.json.x"):
        (out / name).touch()
    (out / "lost+found").mkdir()  # of a file system of its own
    pretrain(run_options(out, epochs=1))
    assert (out / "config.json").is_file()


def test_an_export_into_a_run_is_no_hindrance(tmp_path: Path) -> None:
    """Killed, or at work, it has a directory there; what a training half-wrote goes."""
    run = RunDirectory(path=tmp_path)
    (tmp_path / "config.json").touch()
    (tmp_path / ".tmp-log.jsonl.x").touch()
    (tmp_path / ".tmp-bundle.x").mkdir()
    with run.held(resume=True):
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {"config.json", ".lock", ".tmp-bundle.x"}


def test_two_processes_do_not_share_a_run(tmp_path: Path, run_options: RunOptions) -> None:
    """While one holds the directory a second is refused, and leaves the first one's lock."""
    run = RunDirectory(path=tmp_path / "run")
    with run.held(resume=False):
        for _ in range(2):
            with pytest.raises(RunError, match="expected no other process in this run, found one"):
                pretrain(run_options(run.path))
    assert not run.path.exists(), "nothing came into it"


def test_a_full_disk_is_one_line(tmp_path: Path, run_options: RunOptions) -> None:
    """Where the kernel refuses a write, what, expected, found and mend are said."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    out = tmp_path / "run"
    done = subprocess.run(
        arguments(run_options(out)), check=False, capture_output=True, text=True, preexec_fn=limit
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"python -m train.pretrain: {out}: expected a directory that can be written, with room "
        "for what comes, found File too large; mend that or choose another --out; a run that has "
        "begun goes on with --resume"
    )
    assert not out.exists()


def test_a_run_that_is_taken_away_is_one_line(
    tmp_path: Path,
    run_options: RunOptions,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The next record finds it, no thread says it in its own way."""
    out, step = tmp_path / "run", Trainer.step

    def take_away(trainer: Trainer, batch: DeviceBatch) -> StepOutcome:
        if batch.step == 2:
            shutil.rmtree(out)
        return step(trainer, batch)

    monkeypatch.setattr(Trainer, "step", take_away)
    with pytest.raises(RunError) as error:
        pretrain(run_options(out, knn_every_epochs=0))
    assert str(error.value) == (
        f"{out}: expected a directory that can be written, with room for what comes, found No such "
        "file or directory; mend that or choose another --out; a "
        "run that has begun goes on with --resume"
    )
    assert "Traceback" not in capfd.readouterr().err


def test_a_place_that_cannot_be_written_is_found_before_the_images_are_read(
    tmp_path: Path, run_options: RunOptions, caplog: pytest.LogCaptureFixture
) -> None:
    """Below a file no directory can be made."""
    (tmp_path / "file").touch()
    with (
        caplog.at_level("INFO", logger="horace"),
        pytest.raises(RunError, match=r"expected a directory that .*, found Not a directory; mend"),
    ):
        pretrain(run_options(tmp_path / "file/run"))
    assert "reading" not in caplog.text


def test_a_machine_that_cannot_compile_is_one_line(tmp_path: Path, run_options: RunOptions) -> None:
    """It is found before the images are read, and leaves no run that could not go on."""
    out = tmp_path / "run"
    done = subprocess.run(
        arguments(run_options(out), "--compile"), check=False, capture_output=True, text=True,
        env={**os.environ, "CXX": "/none/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "reading" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith(
        "python -m train.pretrain: --compile: expected what torch.compile needs, "
        "found InvalidCxxCompiler: No working C++ compiler found in "
    )
    assert said.endswith(
        "; install a C++ compiler, g++ or what CXX names, and for a GPU Triton, or leave --compile "
        "out"
    )
    assert not out.exists()


@pytest.mark.parametrize("command", ["pretrain fashion-mnist --out {new}", "export {run}"])
def test_without_torch_the_installation_is_named(
    command: str, tmp_path: Path, finished_run: Path
) -> None:
    """In an installation for serving both commands say what to install."""
    name, *rest = command.format(new=tmp_path / "run", run=finished_run).split()
    code = (
        "import runpy, sys\n"
        "class NoTorch:\n"
        "    def find_spec(name, path, target=None):\n"
        "        if name == 'torch': raise ModuleNotFoundError('No torch', name=name)\n"
        "sys.meta_path.insert(0, NoTorch)\n"
        f"sys.argv = ['{name}', *{rest!r}]\n"
        f"runpy.run_module('train.{name}', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"python -m train.{name}: Python package torch: expected an installation for training, "
        "found one for serving and search; install it by `pip install '.[cpu,train]'`"
    ]


def test_a_source_has_to_be_named() -> None:
    """The working directory is never taken for one."""
    done = subprocess.run(MODULE, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "python -m train.pretrain: SOURCE: expected the images to learn from, found none; give "
        "fashion-mnist or folder:PATH, or --resume with the --out of a run"
    ]


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a Lustre that was mounted without them: the line says which directory it is."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("train.run.fcntl.flock", refuse)
    run = RunDirectory(path=tmp_path / "run")
    with (
        pytest.raises(RunError, match=r"run: expected a directory .*, found Function not impl"),
        run.held(resume=False),
    ):
        pass
