"""How a training is doing: kNN accuracy on held-out training images, and signs of collapse.

Rules:
    Features come from the backbone in eval mode, and the mode is restored.
    Queries are images held out of the *training* set; a test set is never looked at.
    Watching changes nothing: no weight, no BatchNorm statistic, no random number, and no
    thread count.

Source of the vote: Wu et al., arXiv 1805.01978; k and T as in DINO (arXiv 2104.14294).

Shapes: N images, D dimensions, Q queries, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from index.knn import knn_search, weighted_knn_vote
from models.vectors import finish_vectors

KNN_K = 20
KNN_TEMPERATURE = 0.07
FEATURE_BATCH = 512
"""Images that are embedded at once."""

COLLAPSE_SPREAD = 0.02
"""A healthy encoder is between .2 and 1, from its first step on."""


def embed(
    network: nn.Module,
    images_NHWC: NDArray[np.uint8],
    rows: NDArray[np.int64],
    to_input: Callable[[Tensor], Tensor],
) -> NDArray[np.float32]:
    """Compute the features of some images in eval mode.

    Args:
        network: gives (features, anything) for normalised (N, C, H, W).
        images_NHWC: all images, uint8.
        rows: which of them.
        to_input: from (N, H, W, C) uint8 to what the network takes.

    Returns:
        (len(rows), D) float32.
    """
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            blocks = [
                network(to_input(torch.from_numpy(images_NHWC[rows[i : i + FEATURE_BATCH]])))[0]
                for i in range(0, len(rows), FEATURE_BATCH)
            ]
        return torch.cat(blocks).float().cpu().numpy()
    finally:
        network.train(was_training)


def pixels(images_NHWC: NDArray[np.uint8], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Give the raw pixels of some images as vectors: the baseline that needs no encoder."""
    return images_NHWC[rows].reshape(len(rows), -1).astype(np.float32)


def knn_accuracy(
    bank_ND: NDArray[np.float32],
    bank_labels_N: NDArray[np.int64],
    queries_QD: NDArray[np.float32],
    query_labels_Q: NDArray[np.int64],
) -> float:
    """Classify the queries by their 20 nearest by cosine, voting exp(s / .07).

    Returns:
        The share of queries whose label wins, 0 to 1.
    """
    similarities_QK, rows_QK = knn_search(
        finish_vectors(queries_QD),
        finish_vectors(bank_ND),
        min(KNN_K, len(bank_ND)),
        # faiss shares OpenMP with torch: another count here would be torch's from now on, and
        # the bits of every later sum with it.
        threads=torch.get_num_threads(),
    )
    scores_QC = weighted_knn_vote(
        similarities_QK,
        bank_labels_N[rows_QK],
        k=KNN_K,
        temperature=KNN_TEMPERATURE,
        n_classes=int(bank_labels_N.max()) + 1,
    )
    return float((scores_QC.argmax(axis=1) == query_labels_Q).mean())


def spread(features_ND: Tensor) -> float:
    """Measure how far features of unit length vary over a batch: 1 for noise, 0 collapsed.

    It is the mean deviation of a dimension, times sqrt(D), which isotropic vectors have as 1.
    """
    unit_ND = nn.functional.normalize(features_ND.detach().float(), dim=1)
    return float(unit_ND.std(dim=0).mean() * unit_ND.shape[1] ** 0.5)
