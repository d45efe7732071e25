"""The training: one loop, from a source of images to the last checkpoint.

Rules:
    A run that is resumed from any checkpoint ends, on the CPU with the same threads, bit for
    bit where the undisturbed run ends: see `train.trainer`.
    After one step the log comes first, then the kNN accuracy, then the checkpoint, so that
    the records up to a checkpoint are all there when it is.
    A loss that is not finite ends the run before another checkpoint is written.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
import sys
import time
from dataclasses import asdict, replace
from typing import cast

import torch
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from models.bundle import Json
from models.cpu import cpu_budget
from models.files import atomic_file
from models.images import open_source
from models.preprocess import PreprocessSpec
from train import monitor
from train.checkpoint import (
    Progress,
    list_checkpoints,
    restore_checkpoint,
    save_checkpoint,
    save_initial,
)
from train.config import PretrainOptions, options_json
from train.data import ImageSet, Split, channel_statistics, load_images
from train.errors import TrainError
from train.log import ProgressDisplay, RunLog, read_log
from train.plot import plot_curves
from train.run import RunConfig, RunDirectory, describe_environment
from train.stop import StopRequest
from train.trainer import StepOutcome, Trainer, split_data

log = logging.getLogger("horace")


def pretrain(options: PretrainOptions) -> None:
    """Train, or go on training, in the run directory that the options name.

    On Ctrl-C or SIGTERM the step is finished and a checkpoint made before the process ends.

    Raises:
        HoraceError: the directory is taken, differs or cannot be written, the source cannot
            be used, or the loss became infinite.
    """
    run = RunDirectory(path=options.run_path)
    with run.held(resume=options.resume):
        kept = run.read_config() if options.resume else None
        options = replace(options, threads=count_threads(options, kept))
        torch.set_num_threads(options.threads or 1)
        data, split, config = read_data(options, run, kept)
        trainer = Trainer(
            options,
            data,
            split,
            channel_mean=config.channel_mean,
            channel_std=config.channel_std,
        )
        with run.writing():
            start = start_or_resume(run, config, trainer, resume=options.resume)
            with RunLog(run.log_file, run.tensorboard, step=start.step) as run_log:
                train(trainer, run, run_log, start)
            plot_curves(read_log(run.log_file), run.curves_file, title=str(run.path))
    log.info("the run is in %s; export it with `python -m train.export %s`", run.path, run.path)


def count_threads(options: PretrainOptions, kept: RunConfig | None) -> int:
    """Give the threads to compute with: another number would give other last bits."""
    kept_threads = kept.options["threads"] if kept is not None else None
    return options.threads or cast(int | None, kept_threads) or cpu_budget()


def read_data(
    options: PretrainOptions, run: RunDirectory, kept: RunConfig | None
) -> tuple[ImageSet, Split, RunConfig]:
    """Read and split the images, and refuse those of another run than the one that goes on.

    What can differ is looked at as early as it is known: options before any image.
    """
    source = open_source(options.source)
    spec = PreprocessSpec(
        height=options.image_size_px,
        width=options.image_size_px,
        channels=options.channels,
        resize=options.image_size_px,
    )
    if kept is not None:
        run.check_options(kept, options_json(options), spec, source.uri)
    data = load_images(source, spec, limit=options.limit_images)
    split = split_data(options, data)
    config = describe_run(options, source.uri, spec, data, split)
    if kept is not None:
        run.check_data(kept, config.data)
    return data, split, config


def train(trainer: Trainer, run: RunDirectory, run_log: RunLog, start: Progress) -> None:
    """Take the steps that are left, with log, kNN accuracy and checkpoints between them."""
    options, batch_size = trainer.options, trainer.options.batch_size
    describe_training(trainer)
    if trainer.is_watched and start.step == 0:
        run_log.write(0, trainer.baselines())
    began_s = saved_s = time.monotonic()
    window: list[Tensor] = []
    images = (trainer.total_steps * batch_size, start.step * batch_size)
    display = ProgressDisplay(*images)
    with display, logging_redirect_tqdm(), StopRequest() as stop:
        for step, rows in trainer.batches(start.step):
            outcome = trainer.step(step, rows)
            window.append(outcome.losses_3)
            display.advance(len(rows))
            done, is_last = step + 1, step + 1 == trainer.total_steps
            if done % trainer.log_every_steps == 0 or is_last:
                record_losses(trainer, run_log, display, outcome, window, done)
                window.clear()
            if trainer.is_knn_due(done):
                record_knn(trainer, run_log, done)
            now_s = time.monotonic()
            is_due = now_s - saved_s >= options.checkpoint_every_s
            is_due |= done % options.checkpoint_every_steps == 0
            if is_due or is_last or stop.signal:
                mean_losses(window, done)  # never keep what a broken loss left behind
                elapsed_s = start.elapsed_s + now_s - began_s
                progress = Progress(step=done, elapsed_s=elapsed_s)
                save_checkpoint(
                    run.checkpoints,
                    progress,
                    trainer.network,
                    trainer.optimizer,
                    keep=options.keep_checkpoints,
                )
                saved_s = now_s
            if stop.signal and not is_last:
                log.warning(
                    "stopped after step %d of %d; go on with `python -m train.pretrain "
                    "--resume --out %s`",
                    done, trainer.total_steps, shlex.quote(str(run.path)),
                )  # fmt: skip
                stop.end_process()


def describe_training(trainer: Trainer) -> None:
    """Say what an epoch is, and what is not watched."""
    n, batch_size = len(trainer.split.train), trainer.options.batch_size
    log.info(
        "%d images to train on, %d steps of %d an epoch; the %d that fill no batch are left "
        "out, others in each epoch",
        n, trainer.steps_per_epoch, batch_size, n % batch_size,
    )  # fmt: skip
    if not trainer.is_watched:
        log.info("no kNN accuracy: it is switched off, or there are no labels of two classes")


def record_losses(
    trainer: Trainer,
    run_log: RunLog,
    display: ProgressDisplay,
    outcome: StepOutcome,
    window: list[Tensor],
    done: int,
) -> None:
    """Log and show what the steps since the last record gave."""
    values = {
        "epoch": done / trainer.steps_per_epoch,
        "lr": trainer.lr(done - 1),
        **mean_losses(window, done),
        "spread": warn_of_collapse(outcome.features_ND, done),
        "images_per_s": display.images_per_s(),
    }
    run_log.write(done, values)
    display.show({name: values[name] for name in ("epoch", "loss")})


def record_knn(trainer: Trainer, run_log: RunLog, done: int) -> None:
    """Measure and log the kNN accuracy at the end of an epoch."""
    epoch, top1 = done / trainer.steps_per_epoch, trainer.knn_top1()
    run_log.write(done, {"epoch": epoch, "knn_top1": top1})
    log.info("epoch %d: kNN %.2f%% on held-out images", round(epoch), 100 * top1)


def start_or_resume(
    run: RunDirectory, config: RunConfig, trainer: Trainer, *, resume: bool
) -> Progress:
    """Fill the run directory, or bring the trainer to its last checkpoint.

    `config.json` comes last: before it there is no run, after it there is all of one.
    """
    if not resume:
        save_initial(run.initial_file, trainer.network)
        write_rejects(run, trainer.data)
        run.write_config(config)
        return Progress()
    checkpoints = list_checkpoints(run.checkpoints)
    if not checkpoints:
        log.info("%s has no checkpoint yet: starting at step 0", run.path)
        return Progress()
    progress = restore_checkpoint(checkpoints[-1], trainer.network, trainer.optimizer)
    log.info("resuming %s after step %d of %d", run.path, progress.step, trainer.total_steps)
    return progress


def write_rejects(run: RunDirectory, data: ImageSet) -> None:
    """Keep which images were skipped and why, where any were."""
    if not data.rejects:
        return
    lines = [json.dumps(asdict(reject)) + "\n" for reject in data.rejects]
    with atomic_file(run.rejects_file) as temporary:
        temporary.write_text("".join(lines))
    log.info("the %d skipped images and why: %s", len(lines), run.rejects_file)


def describe_run(
    options: PretrainOptions, uri: str, spec: PreprocessSpec, data: ImageSet, split: Split
) -> RunConfig:
    """Put together what `config.json` keeps."""
    mean, std = channel_statistics(data.images_NHWC, split.train)
    facts: dict[str, Json] = {
        "uri": uri,
        "sha256": data.sha256,
        "images": len(data.images_NHWC),
        "train_images": len(split.train),
        "val_images": len(split.val),
        "bank_images": len(split.bank),
        "classes": list(data.class_names),
        "skipped": {**data.faults},
    }
    return RunConfig(
        options=options_json(options),
        data=facts,
        preprocessing=spec,
        channel_mean=tuple(mean),
        channel_std=tuple(std),
        command=shlex.join(["python", "-m", "train.pretrain", *sys.argv[1:]]),
        environment=describe_environment(),
    )


def mean_losses(window: list[Tensor], step: int) -> dict[str, float]:
    """Average the losses since the last record.

    Raises:
        TrainError: they are not finite.
    """
    if not window:
        return {}
    loss, invariance, redundancy = torch.stack(window).mean(dim=0).tolist()
    if not math.isfinite(loss):
        raise TrainError(
            f"loss up to step {step}",
            expected="a finite number",
            found=str(loss),
            mend="resume is of no use with these options: lower --lr-peak, or raise "
            "--warmup-epochs or --batch-size, and start another run",
        )
    return {"loss": loss, "loss_invariance": invariance, "loss_redundancy": redundancy}


def warn_of_collapse(features_ND: Tensor, step: int) -> float:
    """Measure the spread of a batch's features, and say so where they are all alike."""
    spread = monitor.spread(features_ND)
    if spread < monitor.COLLAPSE_SPREAD:
        log.warning(
            "step %d: the features of all images are nearly equal (spread %.4f, healthy is "
            "above .2): the encoder has collapsed; lower --lr-peak or raise --batch-size",
            step, spread,
        )  # fmt: skip
    return spread
