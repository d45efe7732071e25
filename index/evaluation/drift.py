"""How much two encoders, or two runs of one, see the same images alike.

Rules:
    Images are paired by key; vectors of different length are compared all the same.
    No measure changes when one of the spaces is turned or scaled as a whole.
    Linear CKA and the Procrustes residual follow from sums that are added up block by block;
    the overlap of neighbours is measured among a sample.

Sources: linear CKA: Kornblith et al., arXiv 1905.00414, section 3. Orthogonal Procrustes: Ding,
Denain and Steinhardt, arXiv 2108.01661, here as the share of variance that is left, which is
also the disparity of `scipy.spatial.procrustes`. Mutual kNN overlap: Huh et al., arXiv
2405.07987, appendix A.

Shapes: N images, D and E dimensions, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(kw_only=True)
class PairMoments:
    """Sums over pairs of vectors of one image, in two spaces, that came by so far.

    Attributes:
        n: pairs.
        sum_D: of the first space's vectors, float64.
        sum_E: of the second's.
        gram_DD: sum of the outer products of the first space's, uncentred.
        gram_EE: of the second's.
        cross_DE: of the first with the second.
    """

    n: int
    sum_D: NDArray[np.float64]
    sum_E: NDArray[np.float64]
    gram_DD: NDArray[np.float64]
    gram_EE: NDArray[np.float64]
    cross_DE: NDArray[np.float64]

    @classmethod
    def none(cls, dim: int, other_dim: int) -> PairMoments:
        """Begin."""
        return cls(
            n=0,
            sum_D=np.zeros(dim),
            sum_E=np.zeros(other_dim),
            gram_DD=np.zeros((dim, dim)),
            gram_EE=np.zeros((other_dim, other_dim)),
            cross_DE=np.zeros((dim, other_dim)),
        )

    def add(self, first_ND: NDArray[np.float32], second_NE: NDArray[np.float32]) -> None:
        """Take a block of pairs in."""
        wide_ND, wide_NE = first_ND.astype(np.float64), second_NE.astype(np.float64)
        self.n += len(wide_ND)
        self.sum_D += wide_ND.sum(axis=0)
        self.sum_E += wide_NE.sum(axis=0)
        self.gram_DD += wide_ND.T @ wide_ND
        self.gram_EE += wide_NE.T @ wide_NE
        self.cross_DE += wide_ND.T @ wide_NE

    def linear_cka(self) -> float | None:
        """Give |Y'X|^2 / (|X'X| |Y'Y|) of the centred vectors: 1 alike, 0 unrelated.

        It is biased upwards where there are few images for the dimensions. None where a space
        does not vary.
        """
        if not self._vary():
            return None
        gram_DD, gram_EE, cross_DE = self._centred()
        scale = np.linalg.norm(gram_DD) * np.linalg.norm(gram_EE)
        return float(np.square(cross_DE).sum() / scale)

    def procrustes_residual(self) -> float | None:
        """Give the share of variance that no turning and scaling explains: 0 alike, 1 unrelated.

        Of centred spaces of Frobenius norm 1 it is 1 - |X'Y|_*^2, where |.|_* is the sum of the
        singular values; the shorter vectors count as padded with zeros. None where a space does
        not vary.
        """
        if not self._vary():
            return None
        gram_DD, gram_EE, cross_DE = self._centred()
        scale = float(np.trace(gram_DD) * np.trace(gram_EE))
        nuclear = float(np.linalg.svd(cross_DE, compute_uv=False).sum())
        return min(1.0, max(0.0, 1 - nuclear**2 / scale))

    def _vary(self) -> bool:
        """Tell whether both spaces vary by more than the sums round."""
        grams = zip(self._centred()[:2], (self.gram_DD, self.gram_EE), strict=True)
        noise = self.n * np.finfo(np.float64).eps
        return all(np.trace(centred) > noise * np.trace(whole) for centred, whole in grams)

    def _centred(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Take the means out of the sums."""
        return (
            self.gram_DD - np.outer(self.sum_D, self.sum_D) / self.n,
            self.gram_EE - np.outer(self.sum_E, self.sum_E) / self.n,
            self.cross_DE - np.outer(self.sum_D, self.sum_E) / self.n,
        )


def neighbour_overlap(
    first_NK: NDArray[np.int64], second_NK: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Give the share of each image's k nearest in one space that are so in the other: (N,).

    A row names nobody twice, but for -1, which is nobody. So what two rows share are the pairs of
    equals once both are sorted together: K log K of time, and no K x K of memory.
    """
    both_NK = np.sort(np.concatenate([first_NK, second_NK], axis=1), axis=1)
    is_shared = (both_NK[:, 1:] == both_NK[:, :-1]) & (both_NK[:, 1:] >= 0)
    overlap: NDArray[np.float64] = is_shared.sum(axis=1) / np.maximum(
        (first_NK >= 0).sum(axis=1), 1
    )
    return overlap
