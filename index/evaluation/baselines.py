"""Rows to hold an encoder's kNN against: raw pixels, whitened pixels, an untrained encoder.

Rules:
    A baseline sees what the encoder sees: its preprocessed images, no labels, and no query
    when something is fitted.
    It is made in the same run as the encoder's row, never quoted.

Shapes: N images, H, W, C of the encoder's input, P pixels a reduced image, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from index.embed import Reject, decode_batches, embed
from index.errors import EvaluationError
from index.evaluation.same_images import describe_missing
from index.knn import MISSING, knn_search, merge_neighbours, padding
from models.bundle import Json
from models.command import progress
from models.encoder import Encoder
from models.image_source import digest_of
from models.images import ImageData, ImageRecord, ImageSource
from models.vectors import finish_vectors

MAX_SIDE_PX = 32
"""Larger images are averaged down to this before pixels are compared."""

WHITENED_DIMS = 256
EIGENVALUE_FLOOR = 1e-3
"""Added to the variances, as a share of the largest, so that noise is not blown up."""

MAX_FITTED = 100_000
"""Images that the covariance is taken from; evenly spaced where there are more."""

EMBED_BATCH = 64
COVARIANCE_ROWS = 8192
BANK_BYTES = 128 << 20
"""Pixels of the bank, as float32, at a time."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one pass over images gave.

    Attributes:
        keys: of the N images that could be used, in the source's order.
        labels: of the same.
        rejects: the others.
        digests: a hash of each image's content as its source holds it, before decoding.
        vectors_ND: float32 unit vectors of each encoder that was asked for, in that order.
        pixels_NP: reduced pixels, uint8; None where they were not asked for.
    """

    keys: list[str]
    labels: list[str | None]
    rejects: list[Reject]
    digests: list[str]
    vectors_ND: list[NDArray[np.float32]]
    pixels_NP: NDArray[np.uint8] | None

    def pick(self, numbers: NDArray[np.int64]) -> Seen:
        """Give what was seen of the images with these numbers, in this order."""
        return Seen(
            keys=[self.keys[n] for n in numbers],
            labels=[self.labels[n] for n in numbers],
            rejects=self.rejects,
            digests=[self.digests[n] for n in numbers],
            vectors_ND=[vectors_ND[numbers] for vectors_ND in self.vectors_ND],
            pixels_NP=None if self.pixels_NP is None else self.pixels_NP[numbers],
        )


def see_images(
    sources: Sequence[ImageSource],
    encoders: Sequence[Encoder],
    *,
    preprocess_for: Encoder,
    with_pixels: bool,
    what: str,
    normalize: bool = True,
) -> Seen:
    """Decode images once, and take everything that is needed of them.

    Args:
        sources: in order.
        encoders: each embeds every image.
        preprocess_for: whose preprocessing is applied; the encoders share it.
        with_pixels: whether to keep reduced pixels.
        what: a word or two for the progress line.
        normalize: whether vectors have unit length; else they are the encoders' own output.
    """
    counts = [source.count() for source in sources]
    known = [count for count in counts if count is not None]
    digests: dict[str, str] = {}
    records = (_hashed(record, digests) for record in _first_of_each_key(sources))
    batches = decode_batches(records, preprocess_for, batch_size=EMBED_BATCH)
    keys: list[str] = []
    labels: list[str | None] = []
    rejects: list[Reject] = []
    pixels: list[NDArray[np.uint8]] = []
    vectors: list[list[NDArray[np.float32]]] = [
        [np.empty((0, encoder.dim), np.float32)] for encoder in encoders
    ]
    total = sum(known) if len(known) == len(counts) else None
    for batch in progress(batches, what=what, total=total, size=len):
        keys += batch.keys
        labels += batch.labels
        rejects += batch.rejects
        if with_pixels:
            pixels.append(reduce_pixels(batch.images_NHWC))
        for encoder, made in zip(encoders, vectors, strict=True):
            made.append(embed(encoder, batch.images_NHWC, normalize=normalize))
    return Seen(
        keys=keys,
        labels=labels,
        rejects=rejects,
        digests=[digests[key] for key in keys],
        vectors_ND=[np.concatenate(made) for made in vectors],
        pixels_NP=np.concatenate(pixels) if pixels else None,
    )


def _first_of_each_key(sources: Sequence[ImageSource]) -> Iterator[ImageRecord]:
    """Yield the records, without those whose key came before, as `index.build` does."""
    keys: set[str] = set()
    for source in sources:
        for record in source.records():
            if record.key not in keys:
                keys.add(record.key)
                yield record


def _hashed(record: ImageRecord, digests: dict[str, str]) -> ImageRecord:
    """Make reading a record leave the hash of what was read in `digests`."""

    def read() -> ImageData:
        data = record.read()
        digests[record.key] = digest_of(data)
        return data

    return ImageRecord(record.key, record.label, read)


def match_images(seen: Seen, keys: Sequence[str], collection: str) -> Seen:
    """Give what was seen of a collection's images, in its order.

    What the sources have beyond them was deleted from the collection, or came later.

    Raises:
        EvaluationError: an image was not seen, so that labels and pixels would not match.
    """
    if seen.keys == list(keys):
        return seen
    numbers = {key: n for n, key in enumerate(seen.keys)}
    missing = [key for key in keys if key not in numbers]
    if missing:
        raise EvaluationError(
            f"sources of collection {collection}",
            expected=f"the {len(keys)} images that were indexed, for the baselines",
            found=describe_missing(missing),
            mend="bring the collection up to date with `index.build --sync`, or leave the "
            "baselines out with --no-baselines",
        )
    return seen.pick(np.array([numbers[key] for key in keys], np.int64))


def reduced_side(side_px: int) -> int:
    """Give the length of a side after reduction."""
    return side_px // _factor(side_px)


def reduce_pixels(images_NHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Average images down to at most `MAX_SIDE_PX` a side, by whole blocks; (N, P) uint8."""
    n, height, width, channels = images_NHWC.shape
    by_h, by_w = _factor(height), _factor(width)
    h, w = height // by_h, width // by_w
    if by_h == by_w == 1:
        return images_NHWC.reshape(n, h * w * channels)
    blocks = images_NHWC[:, : h * by_h, : w * by_w].reshape(n, h, by_h, w, by_w, channels)
    means: NDArray[np.float32] = blocks.mean(axis=(2, 4), dtype=np.float32)
    return np.rint(means).astype(np.uint8).reshape(n, h * w * channels)


def unit_pixels(pixels_NP: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Give raw pixels as (N, P) float32 of unit length, not centred."""
    return finish_vectors(pixels_NP.astype(np.float32), normalize=True)


def pixel_neighbours(
    queries_QP: NDArray[np.uint8],
    bank_NP: NDArray[np.uint8],
    k: int,
    features: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Find the k nearest images by features of their pixels, made block by block.

    Args:
        queries_QP: reduced pixels of the queries.
        bank_NP: reduced pixels of the collection.
        k: neighbours a query.
        features: (n, P) uint8 to (n, D) float32 of unit length.

    Returns:
        (Q, k) cosines and (Q, k) rows, as `knn_search`.
    """
    queries_QD = features(queries_QP)
    best = padding(len(queries_QP), k)
    step = max(1, BANK_BYTES // (4 * bank_NP.shape[1]))
    for start in range(0, len(bank_NP), step):
        scores, rows = knn_search(queries_QD, features(bank_NP[start : start + step]), k)
        best = merge_neighbours([best, (scores, np.where(rows < 0, MISSING, rows + start))], k)
    return best


@dataclass(frozen=True, kw_only=True)
class Whitening:
    """PCA-whitening of pixels: subtract the mean, turn, and scale to equal variance.

    Attributes:
        mean_P: float32.
        weights_PD: float32; a column a dimension, by falling variance.
    """

    mean_P: NDArray[np.float32]
    weights_PD: NDArray[np.float32]

    @classmethod
    def fit(cls, pixels_NP: NDArray[np.uint8], dims: int = WHITENED_DIMS) -> Whitening:
        """Fit on images without their labels, with at most `dims` dimensions, and fewer of few.

        Dimension i is divided by sqrt(variance_i + EIGENVALUE_FLOOR * largest variance).
        """
        step = -(-len(pixels_NP) // MAX_FITTED)
        sample = pixels_NP[::step]
        mean_P = sample.mean(axis=0, dtype=np.float64).astype(np.float32)
        covariance_PP = np.zeros((len(mean_P), len(mean_P)), np.float64)
        for start in range(0, len(sample), COVARIANCE_ROWS):
            centred = sample[start : start + COVARIANCE_ROWS] - mean_P
            covariance_PP += centred.T @ centred
        variances, axes_PP = np.linalg.eigh(covariance_PP / len(sample))
        variances, axes_PP = np.maximum(variances[::-1], 0), axes_PP[:, ::-1]
        dims = max(1, min(dims, len(mean_P), len(sample) - 1))  # so many directions n images span
        scale = np.sqrt(variances[:dims] + EIGENVALUE_FLOOR * variances[0])
        scale[scale == 0] = 1.0  # all images are one image
        return cls(mean_P=mean_P, weights_PD=(axes_PP[:, :dims] / scale).astype(np.float32))

    def __call__(self, pixels_NP: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Whiten pixels to (N, D) float32 of unit length."""
        return finish_vectors(
            np.subtract(pixels_NP, self.mean_P, dtype=np.float32) @ self.weights_PD
        )


def twin_note(provenance: Mapping[str, Json]) -> str:
    """Say what the untrained twin of a bundle is, by what `train.export` kept in its provenance.

    What it does without the readout was measured then, on other images, so it is a note and
    no row; bundles that were written without it say nothing of it.
    """
    readout = cast(dict[str, Json], provenance.get("readout") or {})
    note = "the same network and readout, untrained"
    if readout.get("whitening"):
        note += ", whitened by a fit of its own"
    validation = cast(dict[str, Json], provenance.get("validation") or {})
    readouts = cast(dict[str, dict[str, float]], validation.get("readouts") or {})
    if "untrained" in readouts:
        plain = readouts["untrained"]["plain"]
        note += (
            f"; its last stage pooled plainly had {plain:.2%} when it was exported (k = "
            f"{validation['k']}, {validation['queries']:,} held-out training images)"
        )
    return note


def _factor(side_px: int) -> int:
    """Give the edge of the blocks that a side is averaged over."""
    return -(-side_px // MAX_SIDE_PX)
