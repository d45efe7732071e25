"""The images of a run, in memory or streamed, behind one face.

Rules:
    `auto` holds in memory what fits there, and streams what does not.
    In memory every image is fitted to the input once and crops are cut from that; a stream
    decodes anew for each view and crops are cut from the whole photograph, as in the paper.
    The two see different pixels, so a run goes on in the mode it began with.
    What a stream is watched with (images held out, their bank) and measured by (a sample for
    the channel statistics) lies in memory, and is bounded whatever the options ask for.
    Which images these are is a function of seed and source.

Source of the crops from the whole photograph: arXiv 2103.03230, section 2.2.

Shapes: N images, H x W pixels, C channels.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from index.embed import Reject
from models.command import progress
from models.cpu import cpu_budget
from models.images import ImageSource
from models.preprocess import PreprocessSpec
from train.data.batches import BatchSource, MemorySource, Pixels, Plan
from train.data.catalogue import Catalogue, list_images
from train.data.memory import (
    ImageSet,
    Split,
    channel_statistics,
    epoch_order,
    fit_record,
    images_that_fit,
    load_images,
    split_rows,
)
from train.data.rejects import Rejects, refuse_mostly_broken
from train.data.stream import MakeViews, StreamSource
from train.errors import TrainError

DataIn = Literal["memory", "stream"]

MONITOR_BYTES = 512 << 20
"""Decoded images that a stream is watched with; a constant, for the split depends on it."""

MONITOR_VAL_SHARE = 1 / 3
"""Of those images, at most so many are held out; the others are the bank."""

STATISTICS_IMAGES = 2_000
"""Images of a stream whose channels are measured: the error of a mean is then about .005 of
[0, 1] for photographs, whose own means differ by .2."""

log = logging.getLogger("horace")


@dataclass(frozen=True, kw_only=True)
class WatchedImages:
    """Images in memory that kNN accuracy is measured on.

    Attributes:
        images_NHWC: (N, H, W, C) uint8.
        labels_N: (N,) int64, or -1.
        val: rows of these arrays that are held out from training.
        bank: rows of these arrays that `val` is compared with.
    """

    images_NHWC: Pixels
    labels_N: NDArray[np.int64]
    val: NDArray[np.int64]
    bank: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a run learns from.

    Attributes:
        data_in: where the images are.
        images: how many there are.
        train: rows of the source to learn from.
        watched: what the training is watched with.
        class_names: the labels that occur, sorted.
        sha256: equal hashes mean equal data: of pixels and labels in memory; of keys, labels
            and encoded sizes in a stream.
        channel_mean, channel_std: over training images, of values in [0, 1].
        rejects: the images that were skipped; a stream goes on finding them.
    """

    data_in: DataIn
    images: int
    train: NDArray[np.int64]
    watched: WatchedImages
    class_names: tuple[str, ...]
    sha256: str
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    rejects: Rejects
    _images: Pixels | Catalogue

    def read(self, rows: NDArray[np.int64], spec: PreprocessSpec) -> Pixels:
        """Give some images as they will be served, (n, H, W, C) uint8.

        In a stream those that cannot be used are left out.

        Raises:
            TrainError: more than half of all that there are cannot be used.
        """
        if isinstance(self._images, Catalogue):
            return read_rows(self._images, rows, spec, self.rejects, are_sample=False)[0]
        return self._images[rows]

    def batch_source(
        self,
        make_views: MakeViews,
        *,
        batch_size: int,
        seed: int,
        workers: int,
        rank: int = 0,
        world: int = 1,
    ) -> BatchSource:
        """Give the batches of one rank.

        Args:
            make_views: makes two views of an image, where the images are streamed.
            batch_size: images of a step, over all ranks; a multiple of `world`.
            seed: decides the order of every epoch, and the crops of a stream.
            workers: threads that decode a stream.
            rank: whose slice of each batch to give.
            world: how many ranks there are.

        Raises:
            TrainError: less than one batch is left to train on.
        """
        if len(self.train) < batch_size:
            raise TrainError(
                "training images",
                expected=f"at least one batch of {batch_size}",
                found=str(len(self.train)),
                mend="lower --batch-size or give more images",
            )
        plan = Plan(rows=self.train, batch_size=batch_size, seed=seed, rank=rank, world=world)
        if not isinstance(self._images, Catalogue):
            return MemorySource(self._images, plan)
        return StreamSource(self._images, plan, make_views, self.rejects, workers=workers)


def open_training_data(
    source: ImageSource,
    spec: PreprocessSpec,
    *,
    data_in: Literal["auto", "memory", "stream"],
    limit_images: int | None,
    val_images: int,
    bank_images: int,
    seed: int,
) -> TrainingData:
    """Read a source into memory, or list it for a stream; split and measure it.

    Args:
        source: where the images are.
        spec: the size and channels of what the network sees.
        data_in: where to hold the images; a run that goes on gives what it began with.
        limit_images: take only the first so many.
        val_images: labelled images to hold out; 0 where nothing is watched.
        bank_images: labelled training images to compare them with.
        seed: of the run.

    Raises:
        SourceError: the source is missing or damaged.
        TrainError: the images do not fit in memory, too few can be used, or the storage fails.
    """
    if data_in == "auto":
        data_in = choose_data_in(source, spec, limit_images)
    held_out = {"val_images": val_images, "bank_images": bank_images, "seed": seed}
    if data_in == "memory":
        return _hold(load_images(source, spec, limit=limit_images), source.uri, **held_out)
    return _stream(list_images(source, limit=limit_images), source.uri, spec, **held_out)


def choose_data_in(
    source: ImageSource, spec: PreprocessSpec, limit: int | None, *, processes: int = 1
) -> DataIn:
    """Stream what does not fit in memory, and say so.

    What cannot be counted is taken for small: reading it will show.

    Args:
        source: where the images are.
        spec: the size and channels of what the network sees.
        limit: take only the first so many.
        processes: how many on this machine hold the images, each for itself.
    """
    count = source.count()
    total = count if count is None or limit is None else min(count, limit)
    if total is None or total * processes <= images_that_fit(spec):
        return "memory"
    log.info("%s: %d images do not fit in memory; they are streamed", source.uri, total)
    return "stream"


def _hold(
    data: ImageSet, uri: str, *, val_images: int, bank_images: int, seed: int
) -> TrainingData:
    """Describe images in memory, which are all there to be watched."""
    split = split_rows(data.labels_N, val_images=val_images, bank_images=bank_images, seed=seed)
    mean, std = channel_statistics(data.images_NHWC, split.train)
    images = len(data.images_NHWC)
    return TrainingData(
        data_in="memory",
        images=images,
        train=split.train,
        watched=WatchedImages(
            images_NHWC=data.images_NHWC, labels_N=data.labels_N, val=split.val, bank=split.bank
        ),
        class_names=data.class_names,
        sha256=data.sha256,
        channel_mean=tuple(mean),
        channel_std=tuple(std),
        rejects=Rejects(uri, images + len(data.rejects), data.rejects),
        _images=data.images_NHWC,
    )


def _stream(
    catalogue: Catalogue,
    uri: str,
    spec: PreprocessSpec,
    *,
    val_images: int,
    bank_images: int,
    seed: int,
) -> TrainingData:
    """Describe a stream, and read what it is watched with and measured by."""
    val_images, bank_images = watched_counts(spec, val_images, bank_images)
    split = split_rows(
        catalogue.labels_N, val_images=val_images, bank_images=bank_images, seed=seed
    )
    rejects = Rejects(uri, len(catalogue.records))
    sample = np.sort(epoch_order(split.train, seed=seed, epoch=0)[:STATISTICS_IMAGES])
    sample_NHWC, _ = read_rows(catalogue, sample, spec, rejects)
    mean, std = channel_statistics(sample_NHWC, np.arange(len(sample_NHWC)))
    return TrainingData(
        data_in="stream",
        images=len(catalogue.records),
        train=split.train,
        watched=_watch(catalogue, split, spec, rejects),
        class_names=catalogue.class_names,
        sha256=catalogue.sha256,
        channel_mean=tuple(mean),
        channel_std=tuple(std),
        rejects=rejects,
        _images=catalogue,
    )


def watched_counts(spec: PreprocessSpec, val_images: int, bank_images: int) -> tuple[int, int]:
    """Lower the numbers of watched images to what `MONITOR_BYTES` hold of them."""
    most = MONITOR_BYTES // (spec.height * spec.width * spec.channels)
    val = min(val_images, int(most * MONITOR_VAL_SHARE))
    bank = min(bank_images, most - val)
    if (val, bank) != (val_images, bank_images):
        log.info("kNN accuracy is measured on %d images against %d, which memory bounds", val, bank)
    return val, bank


def _watch(
    catalogue: Catalogue, split: Split, spec: PreprocessSpec, rejects: Rejects
) -> WatchedImages:
    """Read the images that a stream is watched with, first those held out."""
    rows = np.concatenate([split.val, split.bank])
    images_NHWC, used = read_rows(catalogue, rows, spec, rejects)
    n_val = int((used < len(split.val)).sum())
    has_bank = n_val < len(used)
    return WatchedImages(
        images_NHWC=images_NHWC,
        labels_N=catalogue.labels_N[rows[used]],
        val=np.arange(n_val if has_bank else 0),
        bank=np.arange(n_val, len(used)),
    )


def read_rows(
    catalogue: Catalogue,
    rows: NDArray[np.int64],
    spec: PreprocessSpec,
    rejects: Rejects,
    *,
    are_sample: bool = True,
) -> tuple[Pixels, NDArray[np.int64]]:
    """Read some images as they will be served, leaving out what cannot be used.

    Args:
        catalogue: where they are.
        rows: which of its images.
        spec: the size and channels to bring them to.
        rejects: counts those that cannot be used.
        are_sample: whether they are from all over, so that the source is judged by them, too.

    Returns:
        (n, H, W, C) uint8, and (n,) which of `rows` they are.

    Raises:
        TrainError: more than half of all, or of a sample, cannot be used.
    """
    records = [catalogue.records[row] for row in rows]
    images_NHWC = np.empty((len(rows), spec.height, spec.width, spec.channels), np.uint8)
    used: list[int] = []
    with ThreadPoolExecutor(cpu_budget()) as pool:
        outcomes = pool.map(lambda record: fit_record(record, spec), records)
        for i, outcome in enumerate(progress(outcomes, what="sampling", total=len(rows))):
            if isinstance(outcome, Reject):
                rejects.add(int(rows[i]), outcome)
                if are_sample:
                    refuse_mostly_broken(rejects.uri, i + 1 - len(used), len(rows), last=outcome)
            else:
                images_NHWC[len(used)] = outcome
                used.append(i)
    return images_NHWC[: len(used)], np.array(used, np.int64)
