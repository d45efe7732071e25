"""The images that an export needs of a run: the same, split as the run had them.

Whatever the number of images, at most `CHUNK_BYTES` of them are decoded at a time, beside
what the run's own data holds.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import cast

import numpy as np
from numpy.typing import NDArray

from models.images import open_source
from models.preprocess import PreprocessSpec
from train.config import options_from_json
from train.data.training_data import TrainingData, open_training_data
from train.errors import RunError, or_else
from train.run import RunConfig, RunDirectory, other_images

CHUNK_BYTES = 256 << 20


def load_run_images(
    run: RunDirectory, config: RunConfig, source: str | None = None
) -> TrainingData:
    """Open a run's images, and tell those it learned from and those it held out.

    Args:
        run: named where the images are not its own.
        config: of the run.
        source: where the images are now; where they were if None.

    Raises:
        SourceError: the images are not there.
        RunError: they are others than the run has seen: what was held out is not known.
        TrainError: they do not fit in memory, as they did.
    """
    options = options_from_json(config.options)
    uri = source or cast(str, config.data["uri"])
    with or_else(f"name their new place with --source; or {_mend_by_another(run, 'SOURCE')}"):
        opened = open_source(uri)
        data = open_training_data(
            opened,
            config.preprocessing,
            data_in=options.data_in,
            limit_images=options.limit_images,
            val_images=options.val_images if options.knn_every_epochs else 0,
            bank_images=options.bank_images,
            seed=options.seed,
        )
    if not config.is_of(opened.uri, data.sha256, data.channel_mean, data.channel_std):
        raise RunError(
            f"the images of {uri}",
            expected=f"the {config.data['images']} that the run was trained on",
            found=other_images(config, data.images),
            mend=("bring the old ones back" if source is None else "name theirs with --source")
            + ": whitening is fitted on them, and scores are taken "
            f"on those that were held out; or {_mend_by_another(run, shlex.quote(uri))}",
        )
    return data


def _mend_by_another(run: RunDirectory, source: str) -> str:
    """Say how to have a run that can be exported, of this one's weights and other images."""
    return (
        "go on from its weights on what there is now and export that: `python -m train.pretrain "
        f"{source} --init-from {shlex.quote(str(run.path))} --epochs 1 --out NEW`, with the run's "
        "other options"
    )


def read_in_chunks(
    data: TrainingData, rows: NDArray[np.int64], spec: PreprocessSpec
) -> Iterator[NDArray[np.uint8]]:
    """Yield some images, (n, H, W, C) uint8, in chunks that fit in memory."""
    step = max(1, CHUNK_BYTES // (spec.height * spec.width * spec.channels))
    for start in range(0, len(rows), step):
        yield data.read(rows[start : start + step], spec)


def spread_rows(rows: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Choose at most `n` rows, evenly spread over all, so over the classes of a sorted set."""
    if len(rows) <= n:
        return rows
    return rows[np.linspace(0, len(rows) - 1, n).round().astype(np.int64)]
