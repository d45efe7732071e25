"""What a space of embeddings looks like, from its sums alone: rank, dead dimensions, spread.

Rules:
    Everything here follows from sums over the vectors, which are added up block by block in
    float64: memory is D x D, whatever the number of vectors.
    A measure that its input does not define is None.

Sources: RankMe: Garrido et al., arXiv 2210.02885, equation 1. Alignment and uniformity: Wang
and Isola, arXiv 2005.10242, section 4.

Shapes: N vectors, D dimensions, C classes, K = min(N, D) singular values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DEAD_SHARE_OF_SCALE = 1e-3
"""A dimension is dead where its deviation is at most this share of the entries' RMS."""

UNIFORMITY_T = 2.0
UNIFORMITY_BLOCK = 1024
"""Vectors whose pairs with as many others are in memory at once."""


@dataclass(kw_only=True)
class Moments:
    """Sums over vectors that came by so far.

    Attributes:
        n: how many.
        sum_D: float64.
        gram_DD: sum of the outer products, float64; uncentred.
    """

    n: int
    sum_D: NDArray[np.float64]
    gram_DD: NDArray[np.float64]

    @classmethod
    def none(cls, dim: int) -> Moments:
        """Begin."""
        return cls(n=0, sum_D=np.zeros(dim), gram_DD=np.zeros((dim, dim)))

    def add(self, vectors_ND: NDArray[np.float32]) -> None:
        """Take a block of vectors in."""
        wide_ND = vectors_ND.astype(np.float64)
        self.n += len(wide_ND)
        self.sum_D += wide_ND.sum(axis=0)
        self.gram_DD += wide_ND.T @ wide_ND

    def singular_values(self) -> NDArray[np.float64]:
        """Give the K singular values of the vectors as they are, uncentred, largest first.

        They are roots of the Gram matrix's eigenvalues: those below its rounding are 0.
        """
        values = np.linalg.eigvalsh(self.gram_DD)[::-1][: min(self.n, len(self.sum_D))]
        noise = values[0] * np.finfo(np.float64).eps * max(self.n, len(self.sum_D))
        return np.sqrt(np.where(values > noise, values, 0.0))

    def deviations(self) -> NDArray[np.float64]:
        """Give the standard deviation of every dimension."""
        means_D = self.sum_D / self.n
        return np.sqrt(np.maximum(np.diag(self.gram_DD) / self.n - means_D**2, 0.0))

    def dead(self) -> NDArray[np.int64]:
        """Give the numbers of the dimensions that do not vary; see `DEAD_SHARE_OF_SCALE`."""
        scale = math.sqrt(float(np.trace(self.gram_DD)) / (self.n * len(self.sum_D)))
        return np.flatnonzero(self.deviations() <= DEAD_SHARE_OF_SCALE * scale)


def entropy_rank(sigma_K: NDArray[np.float64]) -> float:
    """Give RankMe of singular values: exp of the entropy of p = sigma / sum(sigma).

    Returns:
        1 for a constant to K; 0 where all is zero, NaN where a value is.
    """
    total = float(sigma_K.sum())
    if total == 0 or math.isnan(total):
        return total
    shares = sigma_K[sigma_K > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


@dataclass(kw_only=True)
class ClassSums:
    """Sums of unit vectors by class, of which mean squared distances of pairs follow.

    Over the pairs of n vectors, sum |u - v|^2 = n sum |u|^2 - |sum u|^2.

    Attributes:
        counts_C: vectors of each class.
        squares_C: sums of their squared lengths; 1 each, but for rounding and zero vectors.
        sums_CD: sums of the vectors.
    """

    counts_C: NDArray[np.int64]
    squares_C: NDArray[np.float64]
    sums_CD: NDArray[np.float64]

    @classmethod
    def none(cls, n_classes: int, dim: int) -> ClassSums:
        """Begin."""
        return cls(
            counts_C=np.zeros(n_classes, np.int64),
            squares_C=np.zeros(n_classes),
            sums_CD=np.zeros((n_classes, dim)),
        )

    def add(self, unit_ND: NDArray[np.float32], classes_N: NDArray[np.int64]) -> None:
        """Take a block of unit vectors in; those of class -1 are left out."""
        order = np.flatnonzero(classes_N >= 0)
        order = order[np.argsort(classes_N[order], kind="stable")]
        if not len(order):
            return
        numbers, starts = np.unique(classes_N[order], return_index=True)
        wide_ND = unit_ND[order].astype(np.float64)
        self.counts_C += np.bincount(classes_N[order], minlength=len(self.counts_C))
        self.sums_CD[numbers] += np.add.reduceat(wide_ND, starts, axis=0)
        self.squares_C[numbers] += np.add.reduceat(np.square(wide_ND).sum(axis=1), starts)

    def alignment(self) -> float | None:
        """Give the mean squared distance of pairs of one class: 0 alike, 2 unrelated."""
        pairs = int((self.counts_C * (self.counts_C - 1) // 2).sum())
        totals_C = self.counts_C * self.squares_C - np.square(self.sums_CD).sum(axis=1)
        return max(0.0, float(totals_C.sum())) / pairs if pairs else None


def alignment(first_ND: NDArray[np.float32], second_ND: NDArray[np.float32]) -> float:
    """Give the mean squared distance of pairs of unit vectors: 0 alike, 2 unrelated."""
    return float(np.square(first_ND - second_ND, dtype=np.float64).sum(axis=1).mean())


def uniformity(unit_ND: NDArray[np.float32]) -> float | None:
    """Give log E exp(-2 |u - v|^2) over all pairs: 0 collapsed, about -4 even.

    Vectors of zeros have no direction and are left out. None below two others, which are no pair.
    """
    unit_ND = unit_ND[unit_ND.any(axis=1)]
    n = len(unit_ND)
    if n < 2:
        return None
    total = 0.0
    starts = range(0, n, UNIFORMITY_BLOCK)
    for row in starts:
        block = unit_ND[row : row + UNIFORMITY_BLOCK]
        for column in starts[row // UNIFORMITY_BLOCK :]:
            cosines = block @ unit_ND[column : column + UNIFORMITY_BLOCK].T
            kernel = np.exp(-UNIFORMITY_T * np.maximum(0, 2 - 2 * cosines))
            pairs = np.triu(kernel, k=1) if row == column else kernel
            total += float(pairs.sum(dtype=np.float64))
    return math.log(total) - math.log(n * (n - 1) / 2)
