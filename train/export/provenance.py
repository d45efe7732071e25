"""Where an encoder comes from and how good it looked, as its bundle keeps it."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from typing import cast

from models.bundle import Json
from train.checkpoint import Progress
from train.export.readout_fit import FittedReadout
from train.log import read_log
from train.monitor import KNN_K, KNN_TEMPERATURE
from train.run import RunConfig, RunDirectory, describe_environment


def describe_run(
    run: RunDirectory, config: RunConfig, checkpoint: str, progress: Progress
) -> dict[str, Json]:
    """Say how the weights of a checkpoint came about."""
    options, data = config.options, config.data
    batch_size = cast(int, options["batch_size"])
    steps_per_epoch = cast(int, data["train_images"]) // batch_size
    training: dict[str, Json] = {
        "steps": progress.step,
        "epochs": progress.step / steps_per_epoch,
        "epochs_planned": options["epochs"],
        "images_seen": progress.step * batch_size,
        "elapsed_s": round(progress.elapsed_s, 1),
        "hardware": config.environment["hardware"],
        "checkpoint": checkpoint,
    }
    return {
        "command": config.command,
        "run": str(run.path),
        "export_command": shlex.join(["python", "-m", "train.export", *sys.argv[1:]]),
        "seed": options["seed"],
        "data": dict(data),
        "options": dict(options),
        "training": training,
        "versions": describe_environment()["versions"],
    }


def describe_readout(fitted: FittedReadout) -> dict[str, Json]:
    """Say how vectors are made of the stages' maps, and how that was fitted."""
    return {
        "stages": list(fitted.pooled.stages),
        "grids": list(fitted.pooled.grids),
        "whitening": None if fitted.whitening is None else fitted.whitening.describe(),
    }


def describe_validation(
    run: RunDirectory,
    config: RunConfig,
    progress: Progress,
    trained: FittedReadout,
    untrained: FittedReadout | None,
) -> dict[str, Json] | None:
    """Give the kNN scores on held-out images, with what they are to be held against.

    Returns:
        None where the run held none out.
    """
    if trained.scores is None:
        return None
    measured: dict[str, Json] = {}
    for record in read_log(run.log_file):
        if record["step"] <= progress.step:
            measured |= {k: v for k, v in record.items() if k.startswith("knn_")}
    readouts: dict[str, Json] = {"trained": asdict(trained.scores)}
    if untrained is not None and untrained.scores is not None:
        readouts["untrained"] = asdict(untrained.scores)
    return {
        "split": "held out of the training images; no test image was seen",
        "queries": config.data["val_images"],
        "bank": config.data["bank_images"],
        "k": KNN_K,
        "temperature": KNN_TEMPERATURE,
        **measured,
        "readouts": readouts,
    }
