"""Vectors averaged over their neighbourhood: what images have in common, without the rest.

A whitened embedding gives every direction the same weight, those that tell classes apart and those
that tell two photographs of one shirt apart. Neighbours share the former and not the latter, so
that averaging each vector with its nearest, again and again, keeps what groups have in common.
With few labels or in two dimensions that is what there is room for.

It is the propagation of Wu et al., Simplifying Graph Convolutional Networks (arXiv 1902.07153,
equation 7), with equal weights on the k nearest. How much it gives, and why these defaults:
docs/decisions/0020-curation.md.

Shapes: N vectors, D dimensions, K neighbours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS, NEIGHBOURS = 8, 15
FEW_IMAGES = 1_000
"""In a smaller collection eight rounds go all the way round: one is taken there."""

NEIGHBOUR_SHARE = 0.05
"""Of the images, at most: were everybody a neighbour, all averages would be one."""

BLOCK_ROWS = 2048


def neighbours_for(count: int) -> int:
    """Say with how many neighbours a vector is averaged, of so many images."""
    return max(2, min(NEIGHBOURS, int(NEIGHBOUR_SHARE * count)))


def rounds_for(count: int) -> int:
    """Say how often, where nobody did."""
    return ROUNDS if count >= FEW_IMAGES else 1


def smooth(
    vectors_ND: NDArray[np.float32], places_NK: NDArray[np.int64], rounds: int, *, unit: bool
) -> NDArray[np.float32]:
    """Average every vector with its neighbours, so many times.

    Args:
        vectors_ND: (N, D) float32; it is not changed.
        places_NK: (N, K) neighbours as places within `vectors_ND`; -1 stands for none. Nobody
            needs to be a neighbour: what is appended is smoothed by the others, and they are not
            by it.
        rounds: how often; with 0 the vectors come back as they are.
        unit: whether to give the averages unit length, each time.

    Returns:
        (N, D) float32.
    """
    known_NK1 = (places_NK >= 0)[:, :, None].astype(np.float32)
    now_ND = vectors_ND
    for _ in range(rounds):
        next_ND = np.empty_like(now_ND)
        for start in range(0, len(now_ND), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            near_BKD = now_ND[places_NK[block]] * known_NK1[block]
            sums_BD = now_ND[block] + near_BKD.sum(axis=1)
            next_ND[block] = sums_BD / (1 + known_NK1[block].sum(axis=1))
        if unit:
            lengths_N1 = np.linalg.norm(next_ND, axis=1, keepdims=True)
            next_ND /= np.maximum(lengths_N1, np.finfo(np.float32).tiny)
        now_ND = next_ND
    return now_ND
