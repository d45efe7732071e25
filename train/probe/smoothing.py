"""What a classifier says of images, averaged with what it says of their nearest neighbours.

Rules:
    Neighbours are those by cosine of whitened features, in which kNN is best (decision 0006);
    no label has a part in who they are.
    Every step takes each image's own share and the mean of its neighbours from the step
    before, so a sum of probabilities stays 1.

A classifier of few labels errs where the labels do not reach, and its neighbours' errors
differ from its own; whom pretraining put next to whom knows nothing of the labels.

Source: Zhou et al., Learning with Local and Global Consistency, 2003, with what a classifier
says in place of the labels; Huang et al., arXiv 2010.13993, for why both together.

Shapes: N images, C classes, D dimensions of features, K of whitened vectors, J neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from index.knn import knn_search
from models.vectors import finish_vectors
from train.export.graph import EncoderGraph, run_in_batches
from train.export.whitening import FeatureMoments, Whitening

WHITENED_DIMS = 256
WHITENING_IMAGES = 10_000
"""Images that whitening is fitted on: for 3,584 dimensions it takes longer than embedding them."""

SHRINKAGE = 1e-3
"""As in `train.export`."""

STEPS = 10
"""Enough: with a share of .7 for the neighbours the last step moves less than .7 ** 10 = 3%."""


def whitened_vectors(graph: EncoderGraph, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Embed images, whiten by themselves and scale to unit length, (N, K).

    Raises:
        UsageError: the readout has more dimensions than can be whitened.
        ExportError: the features do not vary.
    """
    dim = int(next(run_in_batches(graph, graph, images_NHWC[:1])).shape[1])
    moments = FeatureMoments(dim)
    spread = np.unique(np.linspace(0, len(images_NHWC) - 1, WHITENING_IMAGES).astype(np.int64))
    for features_ND in run_in_batches(graph, graph, images_NHWC, spread):
        moments.add(features_ND)
    whitening = Whitening.fit(moments, dim=min(WHITENED_DIMS, dim), shrinkage=SHRINKAGE)
    blocks = run_in_batches(graph, graph, images_NHWC)
    return finish_vectors(
        np.concatenate([whitening(block_ND.float().cpu().numpy()) for block_ND in blocks])
    )


def smooth(
    scores_NC: NDArray[np.float32],
    vectors_NK: NDArray[np.float32],
    *,
    neighbours: int,
    share: float,
) -> NDArray[np.float32]:
    """Average each image's scores with those of its neighbours, and of theirs, and so on.

    Args:
        scores_NC: of each image.
        vectors_NK: of the same, of unit length.
        neighbours: J, how many of the nearest; the image itself is none of them.
        share: 0 to 1, what the neighbours count; the image itself counts the rest.
    """
    neighbours = min(neighbours, len(scores_NC) - 1)
    if neighbours < 1 or share == 0:
        return scores_NC
    _, rows_NJ = knn_search(
        vectors_NK, vectors_NK, neighbours + 1,
        threads=torch.get_num_threads(),  # faiss and torch share OpenMP: see `train.monitor`
    )  # fmt: skip
    rows_NJ = _without_itself(rows_NJ)
    smoothed_NC = scores_NC
    for _ in range(STEPS):
        total_NC = np.zeros_like(scores_NC)
        for rows_N in rows_NJ.T:
            total_NC += smoothed_NC[rows_N]
        smoothed_NC = share / neighbours * total_NC + (1 - share) * scores_NC
    return smoothed_NC


def _without_itself(rows_NJ: NDArray[np.int64]) -> NDArray[np.int64]:
    """Drop each image from its own neighbours; the last one where equal images crowd it out."""
    n, found = rows_NJ.shape
    is_other_NJ = rows_NJ != np.arange(n)[:, None]
    is_other_NJ[is_other_NJ.all(axis=1), found - 1] = False
    others_NJ: NDArray[np.int64] = rows_NJ[is_other_NJ].reshape(n, found - 1)
    return others_NJ
