"""The training: one loop, from a source of images to the last checkpoint.

Rules:
    A run that is resumed from any checkpoint ends, on the CPU with the same threads and
    ranks, bit for bit where the undisturbed run ends: see `train.trainer`.
    With several ranks all do every step; the first alone keeps the books (`train.books`).
    After a signal the step is finished, a checkpoint made, and all ranks leave after the
    same step.
    When torchrun starts the ranks anew, a run that it began goes on from the last checkpoint
    that can be read, unasked.
"""

from __future__ import annotations

import logging
import shlex
from contextlib import ExitStack, closing
from dataclasses import replace

from tqdm.contrib.logging import logging_redirect_tqdm

from train.begin import (
    goes_on,
    is_finished,
    make_source,
    make_trainer,
    read_data,
    settle,
    show_views,
    start_or_resume,
    try_compiler,
    try_network,
)
from train.books import Books
from train.checkpoint import Progress
from train.config import PretrainOptions
from train.data.batches import BatchSource
from train.data.rejects import write_rejects
from train.data.training_data import TrainingData
from train.device import Compute, gpu_faults, on_device, prepare_device
from train.log import ProgressDisplay, RunLog, read_log
from train.plot import plot_curves
from train.ranks import Ranks, find_ranks, joined, together
from train.run import RunConfig, RunDirectory
from train.stop import StopRequest, end_process
from train.trainer import Trainer
from train.watch import Watch

NEEDS_LESS = "free the GPU, or begin another run with a lower --batch-size or --image-size-px"
"""What can be done where the memory of a GPU is too small for a run."""

log = logging.getLogger("horace")


def pretrain(options: PretrainOptions) -> None:
    """Train, or go on training, in the run directory that the options name.

    On Ctrl-C, SIGTERM or SIGUSR1 the step is finished and a checkpoint made before the
    process ends, with the exit status that `train.stop` gives.

    Raises:
        HoraceError: the directory is taken, differs or cannot be written, the source cannot
            be used, the loss became infinite, the GPU is full, or a rank has ended.
    """
    if options.show_views is not None:
        return show_views(options)
    ranks, run = find_ranks(), RunDirectory(path=options.run_path)
    if not ranks.is_lead:
        log.setLevel(logging.ERROR)
    with joined(ranks), gpu_faults(mend=NEEDS_LESS), ExitStack() as held:
        options = replace(options, resume=bool(ranks.largest(goes_on(options, run, ranks))))
        if ranks.is_lead:
            held.enter_context(run.held(resume=options.resume))
        ranks.wait()
        kept = run.read_config() if options.resume else None
        options, compute = settle(options, kept, ranks)
        prepare_device(compute, threads=options.threads or 1)
        if kept is None:
            try_network(options, compute)
        if kept is not None and is_finished(options, run, kept, ranks):
            log.info("%s is finished: no step is left to take", run.path)
        else:
            learn(options, run, kept, compute, ranks)
        with run.writing():
            if ranks.is_lead:
                plot_curves(read_log(run.log_file), run.curves_file, title=str(run.path))
    path = shlex.quote(str(run.path))
    log.info("the run is in %s; export it with `python -m train.export %s`", run.path, path)


def learn(
    options: PretrainOptions,
    run: RunDirectory,
    kept: RunConfig | None,
    compute: Compute,
    ranks: Ranks,
) -> None:
    """Read the images, make or restore what learns from them, and train.

    `kept` is what a run that goes on began with.
    """
    if options.compile:
        try_compiler(compute.device)
    data, options, config = read_data(options, run, kept, ranks)
    with closing(make_source(options, data, ranks)) as source, run.writing():
        trainer = make_trainer(
            options, config, compute, ranks, steps_per_epoch=source.steps_per_epoch
        )
        start = start_or_resume(run, config, trainer)
        keep_rejects(run, data, ranks)
        train(trainer, source, data, run, start)
        keep_rejects(run, data, ranks)


def train(
    trainer: Trainer, source: BatchSource, data: TrainingData, run: RunDirectory, start: Progress
) -> None:
    """Take the steps that are left, and let the first rank keep the books between them."""
    ranks, total_steps, device = trainer.ranks, trainer.total_steps, trainer.compute.device
    with ExitStack() as open_files, StopRequest(is_managed=ranks.is_managed) as stop:
        books = None
        if ranks.is_lead:
            books = open_books(trainer, data, run, start, open_files)
        for batch in on_device(source.batches(start.step, total_steps), device):
            with together(ranks):
                outcome = trainer.step(batch)
            done = batch.step + 1
            signal = ranks.largest(stop.signal)
            if books is not None:
                books.after_step(outcome, done, must_save=signal != 0)
            if signal and done < total_steps:
                keep_rejects(run, data, ranks)  # also waits for the checkpoint: torchrun ends
                # all ranks when one has left
                log.warning(
                    "stopped after step %d of %d; go on with `python -m train.pretrain %s "
                    "--resume --out %s`",
                    done, total_steps, shlex.quote(trainer.options.source),
                    shlex.quote(str(run.path)),
                )  # fmt: skip
                end_process(signal)


def open_books(
    trainer: Trainer, data: TrainingData, run: RunDirectory, start: Progress, files: ExitStack
) -> Books:
    """Open the log and the display, say what is ahead, and measure where it begins.

    `files` closes what is opened here.
    """
    options = trainer.options
    watch = Watch(data.watched, trainer.to_input, every_epochs=options.knn_every_epochs)
    describe_training(trainer, len(data.train), is_watched=bool(watch))
    run_log = RunLog(run.log_file, run.tensorboard, step=start.step)
    files.callback(run_log.close)
    display = ProgressDisplay(
        trainer.total_steps * options.batch_size, start.step * options.batch_size
    )
    files.callback(display.close)
    files.enter_context(logging_redirect_tqdm())
    books = Books(trainer, watch, run, run_log, display, data.rejects, start)
    files.callback(books.keep_rejects)
    books.open()
    return books


def describe_training(trainer: Trainer, images: int, *, is_watched: bool) -> None:
    """Say what an epoch is, on what it is computed, and what is not watched."""
    batch_size, compute = trainer.options.batch_size, trainer.compute
    log.info(
        "%d images to train on, %d steps of %d an epoch; the %d that fill no batch are left "
        "out, others in each epoch",
        images, trainer.steps_per_epoch, batch_size, images % batch_size,
    )  # fmt: skip
    log.info(
        "computing in %s on %s, %d threads, %d ranks",
        compute.precision, compute.device, trainer.options.threads, trainer.ranks.world,
    )  # fmt: skip
    if not is_watched:
        log.info("no kNN accuracy: it is switched off, or there are no labels of two classes")


def keep_rejects(run: RunDirectory, data: TrainingData, ranks: Ranks) -> None:
    """Write down which images were skipped and why, one rank after the other."""
    known = len(data.rejects)
    for rank in range(ranks.world):
        if rank == ranks.rank:
            known = write_rejects(run.rejects_file, data.rejects.all())
        ranks.wait()
    if known:
        log.info("the %d skipped images and why: %s", known, run.rejects_file)
