"""An encoder's other precisions: writes those that are asked for, and scores each.

Rules:
    Every precision that is written is scored against fp32 on the run's own images: cosine,
    neighbour overlap, and kNN accuracy on held-out ones where the run has any.
    Each is held to batch invariance, to its own rounding.
    A precision that costs more than `MOST_KNN_LOST`, and more than chance explains, is written
    with a warning: whether its speed is worth that is for its user to say.

Shapes: N images, D dimensions, Q held-out images.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.bundle import PRECISION_FILES, Bundle, Json, Precision
from models.command import progress
from models.encoder import Encoder
from models.runtime import open_bundle
from train.data.training_data import WatchedImages
from train.device import images_at_once
from train.errors import ExportError
from train.export.held_out import is_worse
from train.export.parity import (
    Parity,
    count_not_finite,
    measure_parity,
    require_batch_invariance,
)
from train.export.quantise import write_fp16, write_int8
from train.export.write_graph import INVARIANCE_IMAGES
from train.monitor import knn_hits

CALIBRATION_IMAGES = 256
"""Training images that INT8 is calibrated on."""

ENCODE_BATCH = 64

MOST_KNN_LOST = 0.005
"""Half a point of kNN accuracy: what a precision may cost before it is warned of."""

log = logging.getLogger("horace")


@dataclass(frozen=True, kw_only=True)
class PrecisionScores:
    """How an encoder does in one precision.

    Attributes:
        fingerprint: of the encoder in this precision.
        size_bytes: of its file.
        parity: with fp32, over the same images; None for fp32 itself.
        knn_top1: on held-out training images, 0 to 1; None where the run held none out.
        knn_delta: what that is more than fp32's.
    """

    fingerprint: str
    size_bytes: int
    parity: Parity | None
    knn_top1: float | None
    knn_delta: float | None

    def to_json(self) -> dict[str, Json]:
        """Give the values as they stand in a bundle's provenance."""
        return asdict(self)


def write_precisions(
    encoder: Path, precisions: Sequence[Precision], calibration_NHWC: NDArray[np.uint8]
) -> dict[str, Path]:
    """Write a float32 encoder in other precisions, beside it.

    Returns:
        The files by their name in a bundle.

    Raises:
        ExportError: ONNX Runtime cannot quantise the graph.
    """
    files = {name: encoder.with_name(PRECISION_FILES[name]) for name in precisions}
    for precision, file in files.items():
        log.info("writing %s", file.name)
        if precision == "int8":
            write_int8(encoder, file, calibration_NHWC)
        else:
            write_fp16(encoder, file)
    return {file.name: file for file in files.values()}


def score_precisions(
    draft: Bundle, watched: WatchedImages, images_NHWC: NDArray[np.uint8]
) -> dict[str, Json]:
    """Score every precision of a bundle.

    Args:
        draft: has the files.
        watched: held-out images and their bank; may be empty.
        images_NHWC: what to compare with fp32 on.

    Raises:
        ExportError: a precision gives an image other bits in other batches, or no numbers.
        EncoderError: ONNX Runtime refuses a file.
    """
    reference_ND = np.empty((0, draft.dim), np.float32)
    reference_Q: NDArray[np.bool_] | None = None
    scores: dict[str, Json] = {}
    for precision in draft.precisions:
        with ExitStack() as stack:
            encoder = stack.enter_context(closing(open_bundle(draft.path, precision=precision)))
            vectors_ND = encode_all(encoder, images_NHWC, precision)
            require_finite(vectors_ND, precision)  # first: else NaN would pass for mixed images
            few_NHWC = images_NHWC[:INVARIANCE_IMAGES]
            require_batch_invariance(encoder.encode, few_NHWC, precision=precision)
            hits_Q = hits_of(encoder, watched, precision)
        if precision == "fp32":
            reference_ND, reference_Q = vectors_ND, hits_Q
        parity = None if precision == "fp32" else measure_parity(reference_ND, vectors_ND)
        knn, delta = None, None
        if hits_Q is not None and reference_Q is not None:
            knn = float(hits_Q.mean())
            delta = knn - float(reference_Q.mean())
            _warn_if_dear(precision, hits_Q, reference_Q)
        scores[precision] = PrecisionScores(
            fingerprint=encoder.fingerprint,
            size_bytes=draft.path_of(precision).stat().st_size,
            parity=parity,
            knn_top1=knn,
            knn_delta=delta,
        ).to_json()
    return scores


def require_finite(vectors_ND: NDArray[np.float32], precision: str) -> None:
    """Refuse a precision whose range is too small for the network.

    Raises:
        ExportError: a vector has a number that is none.
    """
    n_bad = count_not_finite(vectors_ND)
    if n_bad:
        raise ExportError(
            f"precision {precision}",
            expected="vectors of finite numbers",
            found=f"NaN or infinity in {n_bad} of {len(vectors_ND)}",
            mend=f"export without --{precision}",
        )


def hits_of(encoder: Encoder, watched: WatchedImages, what: str) -> NDArray[np.bool_] | None:
    """Say which held-out images an encoder gets right by kNN, (Q,); None where there are none."""
    if len(watched.val) == 0:
        return None
    bank_ND, queries_ND = (
        encode_all(encoder, watched.images_NHWC[rows], what) for rows in (watched.bank, watched.val)
    )
    labels_N = watched.labels_N
    return knn_hits(bank_ND, labels_N[watched.bank], queries_ND, labels_N[watched.val])


def encode_all(encoder: Encoder, images_NHWC: NDArray[np.uint8], what: str) -> NDArray[np.float32]:
    """Embed images batch by batch, (N, D) float32."""
    step = images_at_once(ENCODE_BATCH, *images_NHWC.shape[1:3])
    starts = range(0, len(images_NHWC), step)
    batches = (encoder.encode(images_NHWC[i : i + step]) for i in starts)
    shown = progress(batches, what=f"scoring {what}", total=len(images_NHWC), size=len)
    return np.concatenate(list(shown))


def _warn_if_dear(
    precision: str, hits_Q: NDArray[np.bool_], reference_Q: NDArray[np.bool_]
) -> None:
    """Say so where a precision costs too much."""
    lost = float(reference_Q.mean()) - float(hits_Q.mean())
    if lost > MOST_KNN_LOST and is_worse(hits_Q, reference_Q):
        log.warning(
            "%s loses %.2f points of kNN accuracy on %d held-out images: prefer fp32, or calibrate "
            "on images that are more like those to come",
            precision, 100 * lost, len(hits_Q),
        )  # fmt: skip
