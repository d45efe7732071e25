"""Labelled images for evaluation: read once, hashed, and split by seed.

Rules:
    Images without a label, and images that cannot be used, are left out and counted.
    A subset or a held-out split is a function of labels and seed; both are drawn class by
    class, so that one of 600 has its share of every class.
    Two sets of equal hash hold the same pixels, as the encoder takes them, and labels.
    Images are kept as the encoder takes them: of a photograph the square from its middle.

Nothing here opens a test set: who reads it, and when, is for the caller to order.

Shapes: N images, H x W pixels, C channels, P pixels of a reduced image, D dimensions.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from index.embed import decode_batches
from index.evaluation.baselines import reduce_pixels
from index.evaluation.knn_scores import number_labels
from models.command import progress
from models.encoder import Encoder
from models.images import ImageRecord, ImageSource, describe_ignored
from models.preprocess import PreprocessSpec
from train.data.memory import images_that_fit
from train.errors import TrainError

READ_BATCH = 256

T = TypeVar("T", np.uint8, np.float32)

log = logging.getLogger("horace")


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """What one pass over a source gave, N images in its order.

    Attributes:
        uri: of the source.
        sha256: of the pixels and labels of these images.
        size_HWC: height, width and channels of an image.
        labels: as the source has them.
        class_names: what `labels_N` counts.
        labels_N: int64; -1 for a label that is none of `class_names`.
        rows_N: int64; the number of each image among the labelled records, rising.
        digests: a hash of each image's pixels.
        features: (N, D) float32 of each encoder that was asked for, not normalised.
        pixels_NP: reduced pixels, uint8; None where they were not asked for.
        images_NHWC: uint8; None where they were not asked for.
        n_rejects: images that could not be used, of all that were to be read.
        n_unlabelled: images of the source without a label.
    """

    uri: str
    sha256: str
    size_HWC: tuple[int, int, int]
    labels: list[str]
    class_names: tuple[str, ...]
    labels_N: NDArray[np.int64]
    rows_N: NDArray[np.int64]
    digests: list[bytes]
    features: list[NDArray[np.float32]]
    pixels_NP: NDArray[np.uint8] | None
    images_NHWC: NDArray[np.uint8] | None
    n_rejects: int
    n_unlabelled: int

    def __len__(self) -> int:
        return len(self.labels_N)

    def take(self, places_N: NDArray[np.int64]) -> LabelledSet:
        """Give the images in these places, with a hash of their own."""
        if np.array_equal(places_N, np.arange(len(self))):
            return self  # no copy
        labels = [self.labels[place] for place in places_N]
        digests = [self.digests[place] for place in places_N]
        return replace(
            self,
            sha256=_hash(self.size_HWC, labels, digests),
            labels=labels,
            labels_N=self.labels_N[places_N],
            rows_N=self.rows_N[places_N],
            digests=digests,
            features=[features_ND[places_N] for features_ND in self.features],
            pixels_NP=None if self.pixels_NP is None else self.pixels_NP[places_N],
            images_NHWC=None if self.images_NHWC is None else self.images_NHWC[places_N],
        )

    def describe(self) -> dict[str, str | int]:
        """Say what these images are, for a report."""
        return {
            "uri": self.uri,
            "sha256": self.sha256,
            "images": len(self),
            "rejects": self.n_rejects,
            "unlabelled": self.n_unlabelled,
        }


def read_labelled(
    source: ImageSource,
    encoders: Sequence[Encoder],
    *,
    preprocess_for: Encoder,
    what: str,
    class_names: Sequence[str] | None = None,
    rows: NDArray[np.int64] | None = None,
    with_pixels: bool = False,
    with_images: bool = False,
) -> LabelledSet:
    """Decode labelled images once, and take everything that is needed of them.

    Args:
        source: where the images are.
        encoders: each embeds every image.
        preprocess_for: whose preprocessing is applied; the encoders share it.
        what: a word or two for the progress line.
        class_names: the classes to count by; the labels that occur, sorted, where None.
        rows: which of the labelled records to read, as `record_classes` numbers them.
        with_pixels: whether to keep reduced pixels.
        with_images: whether to keep the images.

    Raises:
        SourceError: the source is damaged.
        TrainError: no labelled image can be used.
    """
    if (ignored := describe_ignored(source)) is not None:
        log.warning("%s: %s", source.uri, ignored)
    wanted = None if rows is None else frozenset(rows.tolist())
    records = _labelled_records(source, wanted)
    total = source.count() if wanted is None else len(wanted)
    labels: list[str] = []
    rows_read: list[int] = []
    digests: list[bytes] = []
    n_rejects = 0
    pixels, images = [], []
    features: list[list[NDArray[np.float32]]] = [[] for _ in encoders]
    batches = decode_batches(records, preprocess_for, batch_size=READ_BATCH)
    for batch in progress(batches, what=what, total=total, size=len):
        labels += [label for label in batch.labels if label is not None]
        rows_read += [int(key) for key in batch.keys]
        n_rejects += len(batch.rejects)
        digests += pixel_digests(batch.images_NHWC)
        for encoder, made in zip(encoders, features, strict=True):
            made.append(encoder.encode(batch.images_NHWC))
        if with_pixels:
            pixels.append(reduce_pixels(batch.images_NHWC))
        if with_images:
            images.append(batch.images_NHWC)
    if not labels:
        raise TrainError(
            source.uri, expected="labelled images that can be decoded", found="none",
            mend="name a labelled source",
        )  # fmt: skip
    spec = preprocess_for.preprocessing
    size_HWC = spec.height, spec.width, spec.channels
    names = tuple(sorted(set(labels)) if class_names is None else class_names)
    if n_rejects:
        log.warning("%s: skipped %d images that cannot be used", source.uri, n_rejects)
    return LabelledSet(
        uri=source.uri,
        sha256=_hash(size_HWC, labels, digests),
        size_HWC=size_HWC,
        labels=labels,
        class_names=names,
        labels_N=number_labels(labels, names),
        rows_N=np.array(rows_read, np.int64),
        digests=digests,
        features=[join(made) for made in features],
        pixels_NP=join(pixels) if pixels else None,
        images_NHWC=join(images) if images else None,
        n_rejects=n_rejects,
        n_unlabelled=sum(record.label is None for record in source.records()),
    )


def join(blocks: list[NDArray[T]]) -> NDArray[T]:
    """Concatenate, and let each block go once it is copied: nothing is there twice."""
    whole = np.empty((sum(map(len, blocks)), *blocks[0].shape[1:]), blocks[0].dtype)
    start = len(whole)
    while blocks:
        block = blocks.pop()
        whole[start - len(block) : start] = block
        start -= len(block)
    return whole


def require_memory(spec: PreprocessSpec, *sets: tuple[ImageSource, int]) -> None:
    """Refuse images that the free memory cannot hold together, beside a copy of them.

    Args:
        spec: the size of an image.
        sets: how many of each source.

    Raises:
        TrainError: there are more than fit.
    """
    fits, n = images_that_fit(spec), sum(n for _, n in sets)
    if n > fits:
        n_bytes = n * spec.height * spec.width * spec.channels
        raise TrainError(
            f"{' + '.join(source.uri for source, _ in sets)} in memory",
            expected=f"at most {fits:,} images of {spec.height}x{spec.width} here",
            found=f"{' + '.join(f'{n:,}' for _, n in sets)} ({n_bytes:,} bytes)",
            mend="free memory, name fewer images, or ask for fewer --labels or --seeds; a linear "
            "layer without --augment keeps no images",
        )


def count_labelled(source: ImageSource) -> int:
    """Count the labelled records, without reading an image."""
    return sum(record.label is not None for record in source.records())


def pixel_digests(images_NHWC: NDArray[np.uint8]) -> list[bytes]:
    """Hash the pixels of each image."""
    return [hashlib.blake2b(image.data, digest_size=16).digest() for image in images_NHWC]


def record_classes(source: ImageSource) -> tuple[list[str], NDArray[np.int64]]:
    """List the classes, and the class of every labelled record, without reading an image.

    Raises:
        SourceError: the source is damaged.
        TrainError: there are no labels, or all are of one class.
    """
    labels = [record.label for record in source.records() if record.label is not None]
    class_names = sorted(set(labels))
    require_classes(source.uri, class_names)
    return class_names, number_labels(labels, class_names)


def require_classes(what: str, class_names: Sequence[str]) -> None:
    """Refuse images among which there is nothing to tell apart.

    Raises:
        TrainError: there are fewer than two classes.
    """
    if len(class_names) < 2:
        raise TrainError(
            f"labels of {what}",
            expected="two classes or more",
            found=", ".join(class_names) or "none",
            mend="name a labelled source",
        )


def require_pair(what: str, labels_N: NDArray[np.int64]) -> None:
    """Refuse images of which `hold_out` holds out none.

    Raises:
        TrainError: no class has two of them.
    """
    if len(np.unique(labels_N)) == len(labels_N):
        raise TrainError(
            f"labels of {what}",
            expected="a class of two images, to choose C on",
            found="one image a class",
            mend="name more images, or choose --solver sgd, which has no C",
        )


def hold_out(
    labels_N: NDArray[np.int64], *, share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split rows into (kept, held out), each sorted, with `share` of every class held out.

    A class of one image stays whole on the kept side; any other gives at least one and
    keeps at least one.
    """
    rng = np.random.default_rng(seed)
    held = []
    for number in np.unique(labels_N):
        rows = rng.permutation(np.flatnonzero(labels_N == number))
        n = min(max(1, round(share * len(rows))), len(rows) - 1)
        held.append(rows[:n])
    held_N = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels_N)), held_N), held_N


def choose_labels(
    labels_N: NDArray[np.int64], rows: NDArray[np.int64], *, n: int, balanced: bool, seed: int
) -> NDArray[np.int64]:
    """Choose the `n` rows whose labels may be used; sorted.

    Args:
        labels_N: the class of every image.
        rows: what may be chosen from.
        n: how many; all of `rows` where they are no more.
        balanced: as many of each class as of any other, as far as there are so many, the
            rest going to the classes in their order; else drawn from all alike.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    if n >= len(rows):
        return np.sort(rows)
    shuffled = rng.permutation(rows)
    if not balanced:
        return np.sort(shuffled[:n])
    # The k-th image of every class comes before the (k+1)-th of any.
    labels = labels_N[shuffled]
    place = np.empty(len(rows), np.int64)
    for number in np.unique(labels):
        of_class = np.flatnonzero(labels == number)
        place[of_class] = np.arange(len(of_class))
    return np.sort(shuffled[np.lexsort((labels, place))[:n]])


def _labelled_records(source: ImageSource, wanted: frozenset[int] | None) -> Iterator[ImageRecord]:
    """Yield the labelled records, or those that are wanted, each with its number as key."""
    labelled = (record for record in source.records() if record.label is not None)
    for number, record in enumerate(labelled):
        if wanted is None or number in wanted:
            yield ImageRecord(str(number), record.label, record.read)


def _hash(size_HWC: tuple[int, int, int], labels: Sequence[str], digests: Sequence[bytes]) -> str:
    """Hash the size of the images, their pixels and their labels."""
    whole = hashlib.sha256(repr(size_HWC).encode())
    whole.update(b"".join(digests))
    whole.update("\0".join(labels).encode())
    return whole.hexdigest()
