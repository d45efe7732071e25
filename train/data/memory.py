"""A source of images as one uint8 array in memory, split without touching any test set.

Rules:
    An image that cannot be read or decoded is counted by its fault and skipped. A source of
    which more than half is so is refused, as in a stream.
    Images pass through `models.preprocess`, the code that serves them later.
    The split, and the order of every epoch, are functions of the seed.
    Labels are carried for the kNN monitor alone; -1 stands for none.

This is for sets that fit in memory (28 x 28 x 60,000 is 47 MB). What does not fit is refused
before it is read; `train.data.stream` takes it.

Shapes: N images of H x W pixels and C channels.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from index.embed import Reject
from index.evaluation.knn_scores import number_labels
from models.command import progress
from models.cpu import cpu_budget
from models.errors import ImageError
from models.images import ImageRecord, ImageSource
from models.memory import free_memory_bytes
from models.preprocess import PreprocessSpec, preprocess
from train.data.reading import read_image
from train.data.rejects import refuse_mostly_broken, reject_of
from train.errors import TrainError

CHUNK_IMAGES = 1024
"""Images that are decoded between two looks at the memory limit."""

CHUNK_BYTES = 512 << 20
"""Encoded, of these images: those of a compressed shard carry them. Two chunks are held at once."""

MEMORY_SHARE = 0.4
"""Of the free memory that a data set may take: chunks and the whole exist side by side."""

LARGEST_VAL_SHARE = 0.1
"""Of the labelled images that may be held out from training."""

log = logging.getLogger("horace")


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images in memory.

    Attributes:
        images_NHWC: (N, H, W, C) uint8, C-contiguous.
        labels_N: (N,) int64, an index into `class_names`, or -1.
        class_names: the labels that occur, sorted.
        rejects: the images that were skipped.
        sha256: of shape, pixels and labels: equal hashes mean equal data.
    """

    images_NHWC: NDArray[np.uint8]
    labels_N: NDArray[np.int64]
    class_names: tuple[str, ...]
    rejects: tuple[Reject, ...]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """Row numbers of one image set, each int64 and sorted.

    Attributes:
        train: images to learn from.
        val: labelled images held out from training; empty without labels.
        bank: labelled training images that `val` is compared with.
    """

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    bank: NDArray[np.int64]


def load_images(source: ImageSource, spec: PreprocessSpec, *, limit: int | None = None) -> ImageSet:
    """Read a source into memory.

    Args:
        source: where the images are.
        spec: the size and channels to bring them to.
        limit: read only the first so many records.

    Raises:
        SourceError: the source is missing or damaged.
        TrainError: the images do not fit in memory, not two of them or less than half can be
            used, or the storage fails.
    """
    budget_images = images_that_fit(spec)
    count = source.count()
    total = min(count, limit) if count is not None and limit is not None else count
    _check_fits(total or 0, budget_images, source.uri, spec)
    chunks: list[NDArray[np.uint8]] = []
    labels: list[str | None] = []
    rejects: list[Reject] = []
    records = islice(source.records(), limit)
    with ThreadPoolExecutor(cpu_budget()) as pool:
        for chunk in progress(_chunked(records), what="reading", total=total, size=len):
            outcomes = list(pool.map(lambda record: fit_record(record, spec), chunk))
            usable = [image for image in outcomes if not isinstance(image, Reject)]
            pairs = zip(chunk, outcomes, strict=True)
            labels += [r.label for r, image in pairs if not isinstance(image, Reject)]
            rejects += [outcome for outcome in outcomes if isinstance(outcome, Reject)]
            if usable:
                chunks.append(np.stack(usable))
            _check_fits(len(labels), budget_images, source.uri, spec)
    _report(source.uri, len(labels), rejects)
    if rejects:
        refuse_mostly_broken(source.uri, len(rejects), len(labels) + len(rejects), last=rejects[-1])
    return _image_set(np.concatenate(chunks), labels, rejects)


def sample_images(
    source: ImageSource, spec: PreprocessSpec, n: int, *, limit: int | None = None
) -> NDArray[np.uint8]:
    """Read up to `n` usable images from all over a source, always the same ones.

    Args:
        source: where the images are.
        spec: the size and channels to bring them to.
        n: how many images are wanted; all, where the source has fewer.
        limit: draw only from the first so many records.

    Returns:
        (at most n, H, W, C) uint8.

    Raises:
        SourceError: the source is missing or damaged.
        TrainError: not two images can be used.
    """
    drawn = np.random.default_rng(0).permutation(count_records(source, limit=limit))
    images: list[NDArray[np.uint8]] = []
    rejects: list[Reject] = []
    start, size = 0, n
    while start < len(drawn) and len(images) < n:
        for record in pick_records(source, drawn[start : start + size]):
            outcome = fit_record(record, spec)
            if isinstance(outcome, Reject):
                rejects.append(outcome)
            else:
                images.append(outcome)
                if len(images) == n:
                    break
        start, size = start + size, 2 * size  # each time the whole source is gone through
    _report(source.uri, len(images), rejects)
    return np.stack(images)


def count_records(source: ImageSource, *, limit: int | None = None) -> int:
    """Count the records of a source, or its first `limit`, by going through them."""
    return sum(1 for _ in islice(source.records(), limit))


def pick_records(source: ImageSource, rows: NDArray[np.int64]) -> Iterator[ImageRecord]:
    """Yield the records of these numbers, in the order of the source.

    The others are let go: those of a compressed shard carry their bytes.
    """
    wanted = frozenset(rows.tolist())
    records = islice(source.records(), max(wanted, default=-1) + 1)
    return (record for row, record in enumerate(records) if row in wanted)


def split_rows(
    labels_N: NDArray[np.int64], *, val_images: int, bank_images: int, seed: int
) -> Split:
    """Hold out labelled images for the monitor, and choose the bank it compares with.

    At most a tenth of the labelled images is held out. With fewer than two classes nothing
    is: there would be nothing to measure.
    """
    labelled = np.flatnonzero(labels_N >= 0)
    n_val = min(val_images, int(len(labelled) * LARGEST_VAL_SHARE))
    if len(np.unique(labels_N[labelled])) < 2:
        n_val = 0
    shuffled = np.random.default_rng(seed).permutation(labelled)
    val = np.sort(shuffled[:n_val])
    bank = np.sort(shuffled[n_val : n_val + bank_images]) if n_val else labelled[:0]
    train = np.setdiff1d(np.arange(len(labels_N)), val)
    return Split(train=train, val=val, bank=bank)


def channel_statistics(
    images_NHWC: NDArray[np.uint8], rows: NDArray[np.int64]
) -> tuple[list[float], list[float]]:
    """Compute mean and deviation of each channel, of values in [0, 1], over some images.

    They come from counts of the 256 values, so they do not depend on the order of rows.
    """
    values = np.arange(256) / 255
    means, stds = [], []
    for channel in range(images_NHWC.shape[3]):
        counts = np.zeros(256, np.int64)
        for start in range(0, len(rows), CHUNK_IMAGES):
            pixels = images_NHWC[rows[start : start + CHUNK_IMAGES], :, :, channel]
            counts += np.bincount(pixels.ravel(), minlength=256)
        mean = float(counts @ values / counts.sum())
        variance = float(counts @ (values - mean) ** 2 / counts.sum())
        means.append(mean)
        stds.append(max(variance**0.5, 1 / 255))
    return means, stds


def class_numbers(labels: Sequence[str | None]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Number the labels by name, -1 for none; give the (N,) numbers and the sorted names."""
    class_names = tuple(sorted({label for label in labels if label is not None}))
    return number_labels(labels, class_names), class_names


def epoch_order(rows: NDArray[np.int64], *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Shuffle the training rows for one epoch; a function of seed and epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(rows)


def images_that_fit(spec: PreprocessSpec) -> int:
    """Count the images of that size that the free memory may hold."""
    image_bytes = spec.height * spec.width * spec.channels
    return int(free_memory_bytes() * MEMORY_SHARE) // image_bytes


def fit_record(record: ImageRecord, spec: PreprocessSpec) -> NDArray[np.uint8] | Reject:
    """Read and fit one image, or say why not.

    Raises:
        TrainError: the storage fails.
    """
    try:
        return preprocess(read_image(record), spec)
    except ImageError as error:
        return reject_of(record, error)


def _chunked(records: Iterator[ImageRecord]) -> Iterator[list[ImageRecord]]:
    """Cut the records into lists of `CHUNK_IMAGES`, or of fewer that make `CHUNK_BYTES`."""
    chunk: list[ImageRecord] = []
    n_bytes = 0
    for record in records:
        chunk.append(record)
        n_bytes += record.size_bytes or 0
        if len(chunk) == CHUNK_IMAGES or n_bytes >= CHUNK_BYTES:
            yield chunk
            chunk, n_bytes = [], 0
    if chunk:
        yield chunk


def _image_set(
    images_NHWC: NDArray[np.uint8], labels: Sequence[str | None], rejects: Sequence[Reject]
) -> ImageSet:
    """Number the labels and hash it all."""
    labels_N, class_names = class_numbers(labels)
    digest = hashlib.sha256(repr((images_NHWC.shape, class_names)).encode())
    digest.update(images_NHWC.data)
    digest.update(labels_N.astype("<i8").data)
    return ImageSet(
        images_NHWC=images_NHWC,
        labels_N=labels_N,
        class_names=class_names,
        rejects=tuple(rejects),
        sha256=digest.hexdigest(),
    )


def _report(uri: str, n: int, rejects: Sequence[Reject]) -> None:
    """Log what was skipped; refuse a source that leaves nothing to learn from."""
    faults = Counter(reject.fault for reject in rejects)
    skipped = ", ".join(f"{count} {fault}" for fault, count in sorted(faults.items()))
    if skipped:
        skipped += f"; the first: {rejects[0].key}: {rejects[0].message}"
        log.warning("%s: skipped %d images (%s)", uri, len(rejects), skipped)
    if n < 2:
        raise TrainError(
            uri,
            expected="at least 2 images that can be decoded",
            found=f"{n}" + (f" (skipped: {skipped})" if skipped else ""),
            mend="check the path",
        )


def _check_fits(n: int, budget_images: int, uri: str, spec: PreprocessSpec) -> None:
    """Refuse a set that would fill the memory."""
    if n > budget_images:
        raise TrainError(
            f"{uri} in memory",
            expected=f"at most {budget_images} images of {spec.height}x{spec.width} here",
            found=f"{n} or more",
            mend="free memory, or begin a new run with --data-in stream or a lower "
            "--image-size-px or --limit-images",
        )
