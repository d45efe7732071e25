"""`python -m train.pretrain SOURCE`: make an encoder from images alone.

The command only chooses what the options start from, a preset or the run that goes on, and
parses them; `train.loop` does the work. It is imported after parsing, since torch takes
seconds to load and `--help` should not.
"""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path

import tyro

from models.command import run_command
from models.errors import HoraceError, UsageError
from models.image_folder import FolderSource
from models.images import ImageSource, open_source
from train.config import PretrainOptions, options_from_json
from train.errors import MOVED, or_else, training_packages
from train.presets import PRESETS
from train.run import RunDirectory

SLOW_SOURCES = ("fashion-mnist", "idx:")
"""Those that are read whole when they are opened: once is enough."""


def choose_defaults(argv: Sequence[str]) -> PretrainOptions:
    """Give what the options start from: the run that goes on, or the preset that is meant.

    The arguments are parsed once for that. Those that cannot be are left to the real
    parsing, which starts from the folder preset and says what is wrong.
    """
    folder = PRESETS["folder"]
    args = [arg for arg in argv if arg not in ("--debug", "--help", "-h")]
    try:
        with redirect_stderr(io.StringIO()):  # `console_outputs` keeps not every error quiet
            given = tyro.cli(PretrainOptions, args=args, default=folder, console_outputs=False)
    except (HoraceError, SystemExit):
        return folder
    if given.resume:
        if given.out is not None or given.source:
            with suppress(HoraceError):  # `main` says what is wrong with the run
                return kept_options(given.run_path)
        return folder
    is_fashion = given.source.partition(":")[0] == "fashion-mnist"
    named = {arg.partition("=")[0] for arg in args}
    preset = PRESETS["fashion-mnist" if is_fashion and "--preset" not in named else given.preset]
    if "--optimizer" in named and given.optimizer != preset.optimizer:
        # The preset's rates are for its own optimiser: of another they would make nonsense.
        preset = dataclasses.replace(preset, lr_peak=None, lr_biases=None)
    if given.loss.objective != preset.loss.objective and "--loss.lambd" not in named:
        # Nor is its weight of the redundancy term for another objective.
        preset = dataclasses.replace(preset, loss=dataclasses.replace(preset.loss, lambd=None))
    return preset


def kept_options(path: Path) -> PretrainOptions:
    """Give what a run was started with, the source included.

    Raises:
        RunError: it is missing, damaged, or of another Horace.
        UsageError: a value is out of today's range.
    """
    kept = RunDirectory(path=path).read_config()
    return dataclasses.replace(options_from_json(kept.options), source=str(kept.data["uri"]))


def refuse_among_images(out: Path, source: ImageSource) -> None:
    """Refuse to start a run in the folder of its images, which its pictures would be among.

    Raises:
        UsageError: for a run that could not be resumed, since its images would be others.
    """
    if isinstance(source, FolderSource) and source.would_list(out):
        raise UsageError(
            f"--out {out}",
            expected="a directory outside the folder of the images",
            found=f"one inside {source.root}",
            mend="choose another --out: a run writes pictures, which would be images of the folder",
        )


def main(options: PretrainOptions) -> None:
    """Check what can be known without torch, then train."""
    if options.resume and not options.source:
        if options.out is None:
            raise UsageError(
                "--resume",
                expected="the directory of a run",
                found="no --out",
                mend="give --out RUN",
            )
        kept_options(options.run_path)  # raises: else the source would be known
    if not options.source:
        raise UsageError(
            "SOURCE",
            expected="the images to learn from",
            found="none",
            mend="give fashion-mnist or folder:PATH, or --resume with the --out of a run",
        )
    if options.source == "fashion-mnist:test":
        raise UsageError(
            "source",
            expected="training images",
            found=options.source,
            mend="train on fashion-mnist; the test images are for `python -m index.evaluate`",
        )
    if not options.source.startswith(SLOW_SOURCES):
        # A misspelt name ends it before torch is loaded.
        if options.resume:
            with or_else(MOVED):
                open_source(options.source)
        elif options.show_views is None:
            refuse_among_images(options.run_path, open_source(options.source))
    # OpenMP reads this once, when torch loads, which nothing has done yet. By default a waiting
    # thread spins for long, on cores that others use, too, in place of the very thread it
    # waits for. A short spin keeps the full speed of a quiet machine; sleeping at once
    # (OMP_WAIT_POLICY=passive) does not. No value helps where a thread has to wait for its
    # core at every operation: there `--threads 1` is many times as fast as two.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    with training_packages():
        from train.loop import pretrain

    pretrain(options)


if __name__ == "__main__":
    defaults = choose_defaults(sys.argv[1:])
    sys.exit(run_command(PretrainOptions, main, prog="python -m train.pretrain", default=defaults))
