"""Whether an exported graph does what the trained network does, and does it for any batch.

Rules:
    Thresholds are constants with a name: an export that falls short of one fails.
    Both sides see the same real images; the graph runs in the runtime that will serve it.

Shapes: N images, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from index.knn import knn_search
from models.vectors import finish_vectors
from train.errors import ExportError

MIN_COSINE = 0.9999
"""Least cosine between an image's vectors from torch and from the graph."""

MIN_OVERLAP = 0.99
"""Least mean share of each image's nearest neighbours that both sides agree on."""

OVERLAP_NEIGHBOURS = 10

BATCH_SIZES = (1, 2, 3, 5, 8, 16, 32, 64)
"""Sizes in which an image must have the same vector to the bit."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How close two encoders are over the same images.

    Attributes:
        images: how many were compared.
        min_cosine: least over the images.
        mean_cosine: over the images.
        overlap: mean share of common neighbours among the `OVERLAP_NEIGHBOURS` nearest.
    """

    images: int
    min_cosine: float
    mean_cosine: float
    overlap: float


def measure_parity(reference_ND: NDArray[np.float32], found_ND: NDArray[np.float32]) -> Parity:
    """Compare two encoders' vectors of the same images."""
    reference_ND, found_ND = finish_vectors(reference_ND), finish_vectors(found_ND)
    cosines_N = (reference_ND.astype(np.float64) * found_ND).sum(axis=1)
    neighbours = [_neighbours(vectors) for vectors in (reference_ND, found_ND)]
    shares = [
        len(np.intersect1d(ours, theirs)) / len(ours)
        for ours, theirs in zip(*neighbours, strict=True)
    ]
    return Parity(
        images=len(reference_ND),
        min_cosine=float(cosines_N.min()),
        mean_cosine=float(cosines_N.mean()),
        overlap=float(np.mean(shares)),
    )


def require_parity(parity: Parity) -> None:
    """Refuse a graph that is not the network.

    Raises:
        ExportError: naming the figure that falls short and its threshold.
    """
    # Written so that NaN, too, falls short.
    if not parity.min_cosine >= MIN_COSINE:
        _refuse("least cosine to torch", MIN_COSINE, parity.min_cosine, parity.images)
    if not parity.overlap >= MIN_OVERLAP:
        what = f"mean overlap of the {OVERLAP_NEIGHBOURS} nearest neighbours with torch's"
        _refuse(what, MIN_OVERLAP, parity.overlap, parity.images)


def require_batch_invariance(
    encode: Callable[[NDArray[np.uint8]], NDArray[np.float32]], images_NHWC: NDArray[np.uint8]
) -> None:
    """Refuse a graph that gives one image different bits in different batches.

    A server batches whatever arrives together, and a vector must not depend on that.

    Raises:
        ExportError: naming the batch size at which the bits change.
    """
    alone_ND = np.concatenate([encode(images_NHWC[i : i + 1]) for i in range(len(images_NHWC))])
    for size in BATCH_SIZES:
        for start in range(0, len(images_NHWC), size):
            batched = encode(images_NHWC[start : start + size])
            if not np.array_equal(batched, alone_ND[start : start + size]):
                gap = np.abs(batched - alone_ND[start : start + size]).max()
                raise ExportError(
                    f"vectors in batches of {size}",
                    expected="the bits that each image has alone",
                    found=f"a difference of up to {gap:.3g}",
                    mend="no operation of the graph may mix images or depend on their number",
                )


def _neighbours(vectors_ND: NDArray[np.float32]) -> NDArray[np.int64]:
    """Find each vector's nearest among the others."""
    k = min(OVERLAP_NEIGHBOURS, len(vectors_ND) - 1)
    _, rows_NK = knn_search(vectors_ND, vectors_ND, k + 1)
    own_N1 = np.arange(len(vectors_ND))[:, None]
    others = [row[row != own][:k] for row, own in zip(rows_NK, own_N1, strict=True)]
    return np.stack(others)


def _refuse(what: str, threshold: float, found: float, images: int) -> None:
    """Fail the export for one figure."""
    raise ExportError(
        f"the exported graph's {what}, over {images} images",
        expected=f"at least {threshold}",
        found=f"{found:.6f}",
        mend="the graph is not the network: try another version of torch or onnx, and report it",
    )
