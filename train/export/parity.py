"""Whether an exported graph does what the trained network does, and does it for any batch.

Rules:
    Thresholds are constants with a name: an export that falls short of one fails.
    Both sides see the same real images; the graph runs in the runtime that will serve it.

Shapes: N images, D dimensions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from index.knn import knn_search
from models.bundle import Precision
from models.vectors import finish_vectors
from train.errors import ExportError

MIN_COSINE = 0.9999
"""Least cosine between an image's vectors from torch and from the graph."""

MIN_OVERLAP = 0.99
"""Least mean share of each image's nearest neighbours that both sides agree on."""

OVERLAP_NEIGHBOURS = 10

TIE = 1e-6
"""Cosines this close are equal: float32 rounds them by some 1e-7."""

BATCH_SIZES = (1, 2, 3, 5, 8, 16, 32, 64)
"""Sizes in which an image must have the same vector."""

MAX_BATCH_GAP: dict[Precision, float] = {"fp32": 1e-5, "int8": 1e-5, "fp16": 2e-3}
"""Largest difference that they may make to a value of a vector of unit length.

What remains float in int8 is float32. A last bit of float16 is worth up to 1e-3.
"""

log = logging.getLogger("horace")


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
    are_zero_N = ~(reference_ND.any(axis=1) | found_ND.any(axis=1))  # they agree, without an angle
    cosines_N = (reference_ND.astype(np.float64) * found_ND).sum(axis=1) + are_zero_N
    return Parity(
        images=len(reference_ND),
        min_cosine=float(cosines_N.min()),
        mean_cosine=float(cosines_N.mean()),
        overlap=neighbour_overlap(reference_ND, found_ND),
    )


def neighbour_overlap(reference_ND: NDArray[np.float32], found_ND: NDArray[np.float32]) -> float:
    """Give the mean share of neighbours by one encoder that are neighbours by the other.

    One that ties with the last counts: of images that are alike none is the nearest. It is 1
    where there is but one image.

    Args:
        reference_ND: unit vectors, which decide what is a neighbour.
        found_ND: unit vectors of the same images.
    """
    if len(reference_ND) < 2:
        return 1.0

    def cosines(rows_NK: NDArray[np.int64]) -> NDArray[np.float32]:
        cosines_NK: NDArray[np.float32] = np.einsum(
            "nd,nkd->nk", reference_ND, reference_ND[rows_NK]
        )
        return cosines_NK

    least_N1 = cosines(_neighbours(reference_ND)).min(axis=1, keepdims=True)
    return float((cosines(_neighbours(found_ND)) >= least_N1 - TIE).mean())


def require_finite_network(vectors_ND: NDArray[np.float32]) -> None:
    """Refuse a network that gives no numbers, as one that diverged: no graph of it could.

    Args:
        vectors_ND: of training images, from torch.

    Raises:
        ExportError: saying of how many images a vector is not finite.
    """
    n_bad = count_not_finite(vectors_ND)
    if n_bad:
        raise ExportError(
            "the network's vectors of the training images",
            expected="finite numbers",
            found=f"NaN or infinity in {n_bad} of {len(vectors_ND)}",
            mend="look at the run's curves, and train it again with other options",
        )


def count_not_finite(vectors_ND: NDArray[np.float32]) -> int:
    """Count the vectors that have NaN or infinity."""
    return int((~np.isfinite(vectors_ND)).any(axis=1).sum())


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
    encode: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    images_NHWC: NDArray[np.uint8],
    *,
    precision: Precision = "fp32",
) -> float:
    """Refuse a graph that gives one image different vectors in different batches.

    A server batches whatever arrives together, and a vector must not depend on that. Our own
    networks give the same bits. A transformer's products are of matrices as long as the
    batch, which ONNX Runtime rounds otherwise at another length: that much is allowed.

    Args:
        encode: gives (N, D) float32 of (N, H, W, C) uint8.
        images_NHWC: what to embed alone and in batches of every size.
        precision: the graph's, which says how much is rounding.

    Returns:
        The largest difference found, between vectors of unit length.

    Raises:
        ExportError: naming a batch size at which vectors change by more than rounding.
    """
    alone = [encode(images_NHWC[i : i + 1]) for i in range(len(images_NHWC))]
    alone_ND, largest = finish_vectors(np.concatenate(alone)), 0.0
    allowed = MAX_BATCH_GAP[precision]
    for size in BATCH_SIZES:
        for start in range(0, len(images_NHWC), size):
            batched_nD = finish_vectors(encode(images_NHWC[start : start + size]))
            gap = float(np.abs(batched_nD - alone_ND[start : start + size]).max())
            if not gap <= allowed:  # NaN is refused, too
                raise ExportError(
                    f"vectors in batches of {size}",
                    expected=f"those that each image has alone, to {allowed:g}",
                    found=f"a difference of up to {gap:.3g}",
                    mend="no operation of the graph may mix images or depend on their number",
                )
            largest = max(largest, gap)
    if largest > 0:
        log.warning(
            "an image's vector differs by up to %.1g from batch to batch, of unit length: "
            "rounding, as transformers have it",
            largest,
        )
    return largest


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
