"""How a training is doing: kNN accuracy on held-out training images, and warnings in words.

Rules:
    Features come from the backbone in eval mode, and the mode is restored.
    Queries are images held out of the *training* set; a test set is never looked at.
    Watching changes nothing: no weight, no BatchNorm statistic, no random number, and no
    thread count.
    A warning says what is seen, what it means and what to do; each kind is said once.

What is measured of a batch is in `train.diagnostics`; here is only what it means.

Source of the vote: Wu et al., arXiv 1805.01978; k and T as in DINO (arXiv 2104.14294).

Shapes: N images, D dimensions, P pixels a reduced image, Q queries, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from index.evaluation.baselines import pixel_neighbours, reduce_pixels, unit_pixels
from index.knn import knn_search, weighted_knn_vote
from models.vectors import finish_vectors
from train.device import images_at_once

KNN_K = 20
KNN_TEMPERATURE = 0.07
FEATURE_BATCH = 512
"""Images that are embedded at once; fewer where they are large."""

COLLAPSE_SPREAD = 0.02
"""A healthy encoder is between .2 and 1, from its first step on."""

LEAST_RANK_SHARE = 0.1
"""Of the RankMe that features can reach. Measured on Fashion-MNIST (ResNet of width 16, batch
128): .4 untrained, .2 to .35 in a healthy training, .05 at a hundred times its learning rate."""

LEAST_Z_RANK_SHARE = 0.05
"""Of the RankMe that embeddings can reach: .12 at worst and .5 at last in that training, .03
without the redundancy term."""

MOST_DEAD_SHARE = 0.1
"""Of the dimensions: 0 in that training, .2 at a hundred times its learning rate."""

PATIENCE = 3
"""Records in a row that must agree: early steps pass through strange places."""

LOSS_RECORDS = 5
"""Records that a loss is averaged over before it is compared."""

LEAST_RECORDS_TO_JUDGE = 20
"""Records before anything is said of the loss: those of a short run are single batches."""

LEAST_FALL = 0.02
"""Share of its first mean that a loss has lost by then, or it stands."""

MOST_RISE = 0.5
"""Share of its lowest mean that a loss may rise by; where that is below 0, of the larger of it
and the first, in size."""


def embed(
    network: nn.Module,
    images_NHWC: NDArray[np.uint8],
    rows: NDArray[np.int64],
    to_input: Callable[[Tensor], Tensor],
) -> NDArray[np.float32]:
    """Compute the features of some images in eval mode.

    Args:
        network: gives (features, ...) for normalised (N, C, H, W), on whatever device.
        images_NHWC: all images, uint8.
        rows: which of them.
        to_input: from (N, H, W, C) uint8 on the host to what the network takes.

    Returns:
        (len(rows), D) float32.
    """
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            blocks = []
            step = images_at_once(FEATURE_BATCH, *images_NHWC.shape[1:3])
            for i in range(0, len(rows), step):
                images = torch.from_numpy(images_NHWC[rows[i : i + step]])
                blocks.append(network(to_input(images))[0].float().cpu())
        return torch.cat(blocks).numpy()
    finally:
        network.train(was_training)


def pixels(images_NHWC: NDArray[np.uint8], rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Give the raw pixels of some images, averaged down to 32 px a side; (len(rows), P) uint8."""
    blocks = (rows[i : i + FEATURE_BATCH] for i in range(0, len(rows), FEATURE_BATCH))
    return np.concatenate([reduce_pixels(images_NHWC[block]) for block in blocks])


def knn_accuracy(
    bank_ND: NDArray[np.float32],
    bank_labels_N: NDArray[np.int64],
    queries_QD: NDArray[np.float32],
    query_labels_Q: NDArray[np.int64],
) -> float:
    """Give the share of queries, 0 to 1, that `knn_hits` gets right."""
    return float(knn_hits(bank_ND, bank_labels_N, queries_QD, query_labels_Q).mean())


def knn_hits(
    bank_ND: NDArray[np.float32],
    bank_labels_N: NDArray[np.int64],
    queries_QD: NDArray[np.float32],
    query_labels_Q: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Classify the queries by their 20 nearest by cosine, voting exp(s / .07).

    Returns:
        (Q,) whether each one's own label wins.
    """
    neighbours = knn_search(
        finish_vectors(queries_QD),
        finish_vectors(bank_ND),
        min(KNN_K, len(bank_ND)),
        # faiss shares OpenMP with torch: another count here would be torch's from now on, and
        # the bits of every later sum with it.
        threads=torch.get_num_threads(),
    )
    return _vote(*neighbours, bank_labels_N, query_labels_Q)


def pixel_accuracy(
    bank_NP: NDArray[np.uint8],
    bank_labels_N: NDArray[np.int64],
    queries_QP: NDArray[np.uint8],
    query_labels_Q: NDArray[np.int64],
) -> float:
    """Classify by raw pixels as `knn_accuracy` does: the baseline that needs no encoder."""
    neighbours = pixel_neighbours(queries_QP, bank_NP, min(KNN_K, len(bank_NP)), unit_pixels)
    return float(_vote(*neighbours, bank_labels_N, query_labels_Q).mean())


def _vote(
    similarities_QK: NDArray[np.float32],
    rows_QK: NDArray[np.int64],
    bank_labels_N: NDArray[np.int64],
    query_labels_Q: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Let the neighbours vote, and say of which queries the label wins."""
    scores_QC = weighted_knn_vote(
        similarities_QK,
        bank_labels_N[rows_QK],
        k=KNN_K,
        temperature=KNN_TEMPERATURE,
        n_classes=int(bank_labels_N.max()) + 1,
    )
    return np.asarray(scores_QC.argmax(axis=1) == query_labels_Q)


class Sign(NamedTuple):
    """What a record shows, and how many in a row must show it before it is said."""

    text: str
    patience: int = 1


class HealthWatch:
    """Looks through a run's records for signs of trouble, and says each kind once.

    Args:
        past: records of earlier sittings: what they showed is known and not said again.
    """

    def __init__(self, past: Iterable[Mapping[str, float | None]] = ()) -> None:
        self._said: set[str] = set()
        self._in_a_row: dict[str, int] = {}
        self._losses: list[float] = []
        for record in past:
            self.warnings_in_words(record)

    def warnings_in_words(self, values: Mapping[str, float | None]) -> list[str]:
        """Say what is newly wrong.

        Args:
            values: one record: `loss`, and what `train.diagnostics.embedding_diagnostics`
                gives; what is missing or None is passed over.

        Returns:
            A line for each kind of trouble that shows now and was not said before.
        """
        known = {name: value for name, value in values.items() if value is not None}
        if "loss" not in known:
            return []
        self._losses.append(known["loss"])
        signs = _batch_signs(known) | _loss_signs(self._losses)
        self._in_a_row = {kind: self._in_a_row.get(kind, 0) + 1 for kind in signs}
        texts = []
        for kind, sign in signs.items():
            if kind not in self._said and self._in_a_row[kind] >= sign.patience:
                self._said.add(kind)
                texts.append(sign.text)
        return texts


def _batch_signs(values: Mapping[str, float]) -> dict[str, Sign]:
    """Find, by kind, what the batch of one record shows."""
    signs = {}
    spread = values.get("spread", 1.0)
    if spread < COLLAPSE_SPREAD:
        signs["collapse"] = Sign(
            f"the features of all images are nearly equal (spread {spread:.4f}, healthy is "
            "above .2): the encoder has collapsed; lower --lr-peak or raise --batch-size"
        )
    for prefix, what, least, mend in (
        ("", "features", LEAST_RANK_SHARE, "lower --lr-peak or lengthen --warmup-epochs"),
        ("z_", "embeddings", LEAST_Z_RANK_SHARE, "raise --loss.lambd or --batch-size"),
    ):
        rank, limit = values.get(f"{prefix}rankme"), values.get(f"{prefix}rankme_limit")
        if rank is not None and limit is not None and rank < least * limit:
            signs[f"{prefix}rank"] = Sign(
                f"the {what} fill about {rank:.1f} of {limit:.0f} directions (RankMe): "
                f"dimensional collapse; {mend}",
                PATIENCE,
            )
        dead = values.get(f"{prefix}dead_share", 0.0)
        if dead > MOST_DEAD_SHARE:
            signs[f"{prefix}dead"] = Sign(
                f"{dead:.0%} of the dimensions of the {what} are the same for all images: "
                "they are dead; lower --lr-peak",
                PATIENCE,
            )
    return signs


def _loss_signs(losses: list[float]) -> dict[str, Sign]:
    """Find what the history of the loss shows, once there is enough of it."""
    if len(losses) < LEAST_RECORDS_TO_JUDGE:
        return {}
    means = np.convolve(losses, np.full(LOSS_RECORDS, 1 / LOSS_RECORDS), mode="valid")
    first, lowest, now = float(means[0]), float(means.min()), float(means[-1])
    scale = lowest if lowest >= 0 else max(abs(first), -lowest)
    if now - lowest > max(MOST_RISE * scale, LEAST_FALL * abs(first)):
        return {
            "loss rises": Sign(
                f"the loss rises: {now:.4g} over the last records, after {lowest:.4g}: the "
                "training diverges; lower --lr-peak"
            )
        }
    if lowest > first - LEAST_FALL * abs(first):
        return {
            "loss stands": Sign(
                f"the loss does not fall: {now:.4g} after {len(losses)} records, {first:.4g} at "
                "first; raise --lr-peak, or lower it if the loss swings"
            )
        }
    return {}
