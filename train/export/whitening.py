"""PCA-whitening with shrinkage, fitted without labels on the features of training images.

What the loss does to the projector's output, whitening does to the representation: turn it
to its principal axes, and bring them to equal variance.

Rules:
    Moments are sums in float64, so that neither the size of a batch nor the number of images
    costs digits, and memory is bounded by the covariance, whatever the number of images.
    Dimensions come by falling variance of the features: the first k of them are the
    whitening to k, so truncating a vector is meaningful.
    An axis points to where its largest component is positive: the fit is a function of the
    features, not of the linear algebra library's mood.

Variance i is divided by itself plus `shrinkage` times the largest: directions that hold
little but noise are not blown up to the size of those that hold something.

Source: Friedman, Regularized Discriminant Analysis, 1989 (shrinkage); Jegou and Chum, 2012
(whitening of image descriptors, and why it helps where features co-occur).

Shapes: N images, D dimensions of the features, K of the whitened vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.bundle import Json
from models.errors import UsageError
from train.errors import ExportError

LEAST_SPREAD = 1e-5
"""Of the length of the mean feature: less than that varies by no more than rounding."""

MAX_FEATURE_DIMS = 8192
"""The covariance is then 512 MB, and its axes take minutes on two cores."""


class FeatureMoments:
    """Count, mean and covariance of features that come in batches.

    Args:
        dim: dimensions of the features.

    Raises:
        UsageError: there are more than `MAX_FEATURE_DIMS`.
    """

    def __init__(self, dim: int) -> None:
        if dim > MAX_FEATURE_DIMS:
            raise UsageError(
                "dimensions of the readout before whitening",
                expected=f"at most {MAX_FEATURE_DIMS}",
                found=str(dim),
                mend="choose a smaller --readout.grid, or fewer --readout.stages",
            )
        self.count = 0
        self._sum_D = torch.zeros(dim, dtype=torch.float64)
        self._scatter_DD = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features_ND: Tensor) -> None:
        """Count a batch in; the sums move to the device that it is on."""
        batch_ND = features_ND.detach().to(torch.float64)
        self._sum_D = self._sum_D.to(batch_ND.device) + batch_ND.sum(dim=0)
        self._scatter_DD = self._scatter_DD.to(batch_ND.device).addmm_(batch_ND.T, batch_ND)
        self.count += len(batch_ND)

    @property
    def mean_D(self) -> NDArray[np.float64]:
        """The mean, (D,) float64."""
        return np.asarray((self._sum_D / self.count).cpu().numpy())

    def principal_axes(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Give the D variances, falling, and the axes as rows of (D, D), both float64."""
        mean_D = self._sum_D / self.count
        covariance_DD = self._scatter_DD / self.count - torch.outer(mean_D, mean_D)
        rising_D, columns_DD = torch.linalg.eigh(covariance_DD)
        variances_D = np.maximum(rising_D.cpu().numpy()[::-1], 0)
        axes_DD = columns_DD.cpu().numpy().T[::-1]
        largest_D1 = np.abs(axes_DD).argmax(axis=1)[:, None]
        return variances_D, axes_DD * np.sign(np.take_along_axis(axes_DD, largest_D1, axis=1))


@dataclass(frozen=True, kw_only=True)
class Whitening:
    """An affine map from D features to K dimensions of almost equal variance.

    Attributes:
        mean_D: of the features, float64.
        weights_KD: a row a dimension, by falling variance of the features, float64.
        variances_D: all variances of the features, falling.
        images: how many it was fitted on.
        shrinkage: share of the largest variance that is added to each.
    """

    mean_D: NDArray[np.float64]
    weights_KD: NDArray[np.float64]
    variances_D: NDArray[np.float64]
    images: int
    shrinkage: float

    @classmethod
    def fit(cls, moments: FeatureMoments, *, dim: int, shrinkage: float) -> Whitening:
        """Fit to the moments of features.

        Args:
            moments: of at least two images.
            dim: dimensions to keep.
            shrinkage: share of the largest variance that is added to each; more than 0.

        Raises:
            UsageError: `dim` is more than the features have.
            ExportError: the features do not vary, as those of a collapsed network, or are
                not finite, as those of one that diverged.
        """
        mean_D = moments.mean_D
        if dim > len(mean_D):
            raise UsageError(
                "--readout.dim",
                expected=f"at most {len(mean_D)}, which stages and grid give",
                found=str(dim),
                mend="choose a larger --readout.grid or more --readout.stages",
            )
        _require(bool(np.isfinite(mean_D).all()), expected="finite numbers", found="others")
        variances_D, axes_DD = moments.principal_axes()
        _require(
            variances_D[0] > LEAST_SPREAD**2 * np.square(mean_D).sum(),
            expected="some that vary",
            found="the same for every image: the network has collapsed",
        )
        scale_K = 1 / np.sqrt(variances_D[:dim] + shrinkage * variances_D[0])
        return cls(
            mean_D=mean_D,
            weights_KD=axes_DD[:dim] * scale_K[:, None],
            variances_D=variances_D,
            images=moments.count,
            shrinkage=shrinkage,
        )

    def __call__(self, features_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """Whiten (N, D) features to (N, K) float32, not normalised."""
        whitened_NK = (features_ND - self.mean_D) @ self.weights_KD.T
        return whitened_NK.astype(np.float32)

    def describe(self) -> dict[str, Json]:
        """Say what was fitted, for a bundle's provenance."""
        shares_D = self.variances_D / self.variances_D.sum()
        entropy = -np.sum(shares_D * np.log(np.maximum(shares_D, np.finfo(np.float64).tiny)))
        kept = len(self.weights_KD)
        return {
            "images": self.images,
            "dims_in": len(self.mean_D),
            "dims_out": kept,
            "shrinkage": self.shrinkage,
            "largest_variance": float(self.variances_D[0]),
            "last_kept_variance": float(self.variances_D[kept - 1]),
            "variance_kept": float(shares_D[:kept].sum()),
            "effective_dims": float(np.exp(entropy)),
        }


def _require(is_so: bool, *, expected: str, found: str) -> None:
    """Refuse features that nothing can be fitted to."""
    if not is_so:
        raise ExportError(
            "features of the training images",
            expected=expected,
            found=found,
            mend="look at the run's curves, and train it again with other options",
        )
