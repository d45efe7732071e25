"""How a run begins or goes on: options settled, images opened, trainer made or restored.

Rules:
    What the machine decides (device, precision, threads, where the images are held) is
    decided once for a run and kept with it: other values would give other last bits.
    A run goes on with the options, images and preprocessing it began with, or not at all; the
    images may lie elsewhere by now;
    another number of ranks is allowed, and said. The channel statistics are those of its
    start, on all ranks those of the first.
    What can differ is looked at as early as it is known: options before any image.
    A run goes on from the last checkpoint that every rank can read.
    `config.json` is written last: before it there is no run, after it there is all of one.
"""

from __future__ import annotations

import logging
import shlex
import sys
from contextlib import nullcontext
from dataclasses import replace
from typing import cast

import numpy as np
import torch

from models.bundle import Json
from models.cpu import cpu_budget
from models.errors import UsageError
from models.images import ImageSource, describe_ignored, open_source
from models.preprocess import PreprocessSpec
from train.backbones import build_network, refuse_lone_pixels
from train.checkpoint import (
    Progress,
    checkpoint_file,
    last_whole_step,
    restore_checkpoint,
    save_initial,
)
from train.collectives import gather
from train.config import PretrainOptions, options_from_json, options_json
from train.data.batches import BatchSource
from train.data.catalogue import list_images
from train.data.memory import sample_images
from train.data.rejects import Rejects
from train.data.stream import MakeViews
from train.data.training_data import (
    DataIn,
    TrainingData,
    choose_data_in,
    open_training_data,
    read_rows,
)
from train.device import Compute, resolve_compute
from train.errors import MOVED, TrainError, or_else
from train.ranks import Ranks, together
from train.run import RunConfig, RunDirectory, describe_environment
from train.trainer import Trainer, view_recipes
from train.views import Normaliser
from train.views.crops import CutCrops
from train.views.picture import MAX_IMAGES, views_of_photographs, write_views_picture
from train.views.workers import FinishedCrops
from train.weights import initialise_from

MACHINE_OPTIONS = ("device", "precision", "threads", "data_in")
"""Options that the machine decides unless they are given, once for a run."""

log = logging.getLogger("horace")


def goes_on(options: PretrainOptions, run: RunDirectory, ranks: Ranks) -> bool:
    """Say whether a run is resumed: it was asked for, or torchrun restarts what it began.

    A run of another's is not: torchrun also starts ranks anew that were refused for it.
    """
    if options.resume or ranks.restarts == 0 or not run.config_file.exists():
        return options.resume
    return run.read_config().environment.get("torchrun") == ranks.job


def settle(
    options: PretrainOptions, kept: RunConfig | None, ranks: Ranks
) -> tuple[PretrainOptions, Compute]:
    """Replace what the machine decides by what it is here, or by what the run began with.

    Raises:
        UsageError: the batch cannot be shared equally, or options exclude one another.
        TrainError: the device is not there.
    """
    ranks.check_batch(options.batch_size)
    if kept is not None:
        before = options_from_json(kept.options)
        unsaid = [name for name in MACHINE_OPTIONS if getattr(options, name) in (None, "auto")]
        options = replace(options, **{name: getattr(before, name) for name in unsaid})
        if options.device == before.device == "cuda" and not torch.cuda.is_available():
            raise TrainError(
                f"resuming {options.run_path}: CUDA devices of this machine",
                expected="one, as where the run began",
                found="none",
                mend="go on where one is, or start another run with another --out and "
                f"--init-from {shlex.quote(str(options.run_path))}",
            )
    if options.views.views_in == "workers":
        if options.data_in == "memory":
            raise UsageError(
                "--views.views-in workers",
                expected="images that are streamed",
                found="--data-in memory",
                mend="give --data-in stream, or --views.views-in batch",
            )
        options = replace(options, data_in="stream")
    compute = resolve_compute(options.device, options.precision, local_rank=ranks.local_rank)
    threads = options.threads or max(1, cpu_budget() // ranks.local_world)
    settled = replace(options, device=compute.name, precision=compute.precision, threads=threads)
    return settled, compute


def try_network(options: PretrainOptions, compute: Compute) -> None:
    """Refuse a network that cannot be built, started or trained before the images are read.

    Raises:
        UsageError: there is no such network, or it cannot take such images.
        TrainError: its library is not installed, or the weights it starts from are none for it.
    """
    network = build_network(options.network, options.channels, options.image_size_px)
    refuse_lone_pixels(network.backbone, options.channels, options.image_size_px, compute)
    if options.init_from is not None:
        initialise_from(options.init_from, network)


def try_compiler(device: torch.device) -> None:
    """Refuse `--compile` where torch cannot compile, before there is a run that needs it.

    It takes seconds, most of which the network would take otherwise.

    Raises:
        TrainError: what torch compiles with is not there or does not work.
    """
    one = torch.zeros(1, device=device)
    try:
        torch.compile(lambda x: x + 1)(one)
    except RuntimeError as error:  # the base of dynamo's and inductor's, too
        raise TrainError(
            "--compile",
            expected="what torch.compile needs",
            found=(str(error).splitlines() or [type(error).__name__])[0],
            mend="install a C++ compiler, g++ or what CXX names, and for a GPU Triton, or leave "
            "--compile out",
        ) from error


def is_finished(options: PretrainOptions, run: RunDirectory, kept: RunConfig, ranks: Ranks) -> bool:
    """Say whether a run that goes on with its own options has taken its last step.

    Raises:
        RunError: the options are others, or no checkpoint can be read.
        SourceError: the source is missing.
    """
    run.check_options(kept, options_json(options), input_spec(options))
    with or_else(MOVED):
        is_there = open_source(options.source).uri == kept.data["uri"]
    last = checkpoint_file(run.checkpoints, kept.total_steps)
    folder = run.checkpoints
    is_whole = last.exists() and checkpoint_file(folder, last_whole_step(folder)) == last
    # Of another place the images have to be the run's first. Ranks may have places of their own.
    return not ranks.largest(not (is_whole and is_there))


def read_data(
    options: PretrainOptions, run: RunDirectory, kept: RunConfig | None, ranks: Ranks
) -> tuple[TrainingData, PretrainOptions, RunConfig]:
    """Read or list the images, and refuse others than those of the run that goes on.

    Returns:
        The images, the options with where they are held, and what `config.json` keeps.
    """
    with nullcontext() if kept is None else or_else(MOVED):
        source, spec = open_source(options.source), input_spec(options)
        if (ignored := describe_ignored(source)) is not None:
            log.warning("%s: %s", source.uri, ignored)
        data = open_training_data(
            source,
            spec,
            data_in=agree_data_in(options, source, spec, ranks),
            limit_images=options.limit_images,
            val_images=options.val_images if options.knn_every_epochs else 0,
            bank_images=options.bank_images,
            seed=options.seed,
        )
    require_same_images(data.sha256, source.uri, ranks)
    options = replace(options, data_in=data.data_in)
    config = describe_run(options, source.uri, spec, data, ranks)
    if kept is None:
        return data, options, agree_statistics(config, ranks)
    run.check_data(kept, config)
    if source.uri != kept.data["uri"]:
        log.info("the images of %s are those that the run began with", source.uri)
    say_if_others(cast(int, kept.environment.get("ranks", 1)), ranks.world)
    return data, options, kept  # with its statistics: other images may be readable now


def agree_statistics(config: RunConfig, ranks: Ranks) -> RunConfig:
    """Take the first rank's channel statistics: of a stream each could read other images."""
    own = torch.tensor([config.channel_mean, config.channel_std], dtype=torch.float64)
    with together(ranks):
        mean, std = gather(own[None], ranks.group)[0].tolist()
    return replace(config, channel_mean=tuple(mean), channel_std=tuple(std))


def require_same_images(sha256: str, uri: str, ranks: Ranks) -> None:
    """Refuse ranks that found other images: they would learn from other batches than one process.

    Raises:
        TrainError: on every rank.
    """
    short = int(sha256[:15], 16)
    if ranks.largest(short) != -ranks.largest(-short):
        raise TrainError(
            f"the images of {uri}",
            expected="the same on all ranks",
            found=f"others here (SHA-256 {sha256[:15]}) or elsewhere",
            mend="give all nodes the same files",
        )


def agree_data_in(
    options: PretrainOptions, source: ImageSource, spec: PreprocessSpec, ranks: Ranks
) -> DataIn:
    """Say where the images are held: on all ranks alike, whatever memory each finds free.

    A rank that streams crops whole photographs and one that holds them does not: they would
    learn from different pixels, and no error would say so.
    """
    if options.data_in != "auto":
        return options.data_in
    own = choose_data_in(source, spec, options.limit_images, processes=ranks.local_world)
    return "stream" if ranks.largest(own == "stream") else "memory"


def input_spec(options: PretrainOptions) -> PreprocessSpec:
    """Say how images are brought to what the network sees."""
    side_px = options.image_size_px
    return PreprocessSpec(height=side_px, width=side_px, channels=options.channels, resize=side_px)


def say_if_others(before: int, now: int) -> None:
    """Say that a run goes on with another number of ranks."""
    if before != now:
        log.warning(
            "the run was started with %d ranks and goes on with %d: it learns from the same "
            "batches, but sums are rounded otherwise, so the last bits will differ",
            before, now,
        )  # fmt: skip


def make_source(options: PretrainOptions, data: TrainingData, ranks: Ranks) -> BatchSource:
    """Make this rank's source of batches."""
    return data.batch_source(
        make_worker_views(options),
        batch_size=options.batch_size,
        seed=options.seed,
        workers=options.workers or options.threads or 1,
        rank=ranks.rank,
        world=ranks.world,
    )


def make_worker_views(options: PretrainOptions) -> MakeViews:
    """Choose what the threads of a stream make of an image: two crops, or two whole views."""
    views, side_px = options.views, options.image_size_px
    crops = CutCrops(
        (views.crop_area, views.crop_area),
        height=side_px,
        width=side_px,
        channels=options.channels,
        interpolation=views.interpolation,
    )
    return FinishedCrops(crops, view_recipes(views)) if views.views_in == "workers" else crops


def make_trainer(
    options: PretrainOptions,
    config: RunConfig,
    compute: Compute,
    ranks: Ranks,
    *,
    steps_per_epoch: int,
) -> Trainer:
    """Make what learns, with the weights it begins with."""
    mean, std = (
        torch.tensor(values, device=compute.device).view(-1, 1, 1)
        for values in (config.channel_mean, config.channel_std)
    )
    return Trainer(
        options,
        steps_per_epoch=steps_per_epoch,
        normaliser=Normaliser(mean=mean, std=std),
        compute=compute,
        ranks=ranks,
    )


def start_or_resume(run: RunDirectory, config: RunConfig, trainer: Trainer) -> Progress:
    """Fill the run directory, or bring the trainer to the last checkpoint that can be read.

    A run that has none yet begins as it began, with the weights of `init_from` where it has
    them.

    Raises:
        RunError: there are checkpoints, and none can be read.
    """
    options, is_lead = trainer.options, trainer.ranks.is_lead
    step = -trainer.ranks.largest(-last_whole_step(run.checkpoints)) if options.resume else 0
    if step:
        path = checkpoint_file(run.checkpoints, step)
        progress = restore_checkpoint(path, trainer.network, trainer.optimizer, trainer.scaler)
        log.info("resuming %s after step %d of %d", run.path, progress.step, trainer.total_steps)
        return progress
    if options.resume:
        log.info("%s has no checkpoint yet: starting at step 0", run.path)
    elif is_lead:
        save_initial(run.initial_file, trainer.network)
    if options.init_from is not None:
        log.info("%s", initialise_from(options.init_from, trainer.network).summary())
    if is_lead and not options.resume:
        run.write_config(config)
    return Progress()


def describe_run(
    options: PretrainOptions, uri: str, spec: PreprocessSpec, data: TrainingData, ranks: Ranks
) -> RunConfig:
    """Put together what `config.json` keeps."""
    facts: dict[str, Json] = {
        "uri": uri,
        "sha256": data.sha256,
        "images": data.images,
        "train_images": len(data.train),
        "val_images": len(data.watched.val),
        "bank_images": len(data.watched.bank),
        "classes": list(data.class_names),
        "skipped": {**data.rejects.faults()},
    }
    environment: dict[str, Json] = {**describe_environment(), "ranks": ranks.world}
    if ranks.is_managed:
        environment["torchrun"] = ranks.job
    if options.device == "cuda":
        environment["gpu"] = torch.cuda.get_device_name()
    return RunConfig(
        options=options_json(options),
        data=facts,
        preprocessing=spec,
        channel_mean=data.channel_mean,
        channel_std=data.channel_std,
        command=shlex.join(["python", "-m", "train.pretrain", *sys.argv[1:]]),
        environment=environment,
    )


def show_views(options: PretrainOptions) -> None:
    """Write the picture that `--show-views` asks for, of images from all over the source.

    Raises:
        HoraceError: the source cannot be used, or the file not be written.
    """
    assert options.show_views is not None
    source, spec, limit = open_source(options.source), input_spec(options), options.limit_images
    is_whole, views = options.views.views_in == "workers", None
    if is_whole or agree_data_in(options, source, spec, Ranks()) == "stream":
        catalogue = list_images(source, limit=limit)
        drawn = np.random.default_rng(0).permutation(len(catalogue.records))[:MAX_IMAGES]
        rejects = Rejects(source.uri, len(catalogue.records))
        images_NHWC, used = read_rows(catalogue, drawn, spec, rejects)
        photographs = (catalogue.records[row].read() for row in drawn[used])
        whole = replace(options, views=replace(options.views, views_in="workers"))
        views = views_of_photographs(photographs, make_worker_views(whole), options.seed)
    else:
        images_NHWC = sample_images(source, spec, MAX_IMAGES, limit=limit)
    recipes = view_recipes(options.views)
    write_views_picture(images_NHWC, recipes, options.show_views, options.seed, views)
    log.info("views of %d images: %s", len(images_NHWC), options.show_views)
