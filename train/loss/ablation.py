"""What only the paper's ablations want of the loss, by plain autograd through the whole C.

Rules:
    The embeddings are gathered from all ranks, and every rank computes the same loss: the
    adjoint of the gather makes the mean of the gradients over the ranks the true one.
    Nothing here is fast, and C is D x D. Products obey the caller's float32 precision, unlike
    those of `train.loss.products`; a training has it whole.

Where the paper leaves something open, this is what was taken:
    `features`: the paper standardises over the batch, then brings each sample to the unit
    sphere and takes the unnormalised covariance. On the unit sphere no C_ii could come near
    1, so the sphere here has radius sqrt(D), which standardised samples have on average.
    `none`: C is the cross-covariance: centred, not scaled.

Source: Zbontar et al., arXiv 2103.03230, section 4, "Loss Function Ablations", and table 5.

Shapes: n rows of this rank, N of all, D dimensions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from train.collectives import Group, all_gather

Normalise = Literal["batch", "features", "none"]


def cross_correlation(
    z1_nD: Tensor, z2_nD: Tensor, *, normalise: Normalise, eps: float, group: Group
) -> Tensor:
    """Compute the D x D matrix C of the whole batch, with its graph."""
    a_ND, b_ND = (
        normalised(all_gather(z.to(torch.promote_types(z.dtype, torch.float32)), group),
                   normalise, eps=eps)
        for z in (z1_nD, z2_nD)
    )  # fmt: skip
    return a_ND.T @ b_ND / len(a_ND)


def normalised(z_ND: Tensor, normalise: Normalise, *, eps: float) -> Tensor:
    """Normalise a whole batch of one view's embeddings.

    A feature that does not vary becomes zero.
    """
    variance_D, mean_D = torch.var_mean(z_ND, dim=0, correction=0)
    if normalise == "none":
        return z_ND - mean_D
    a_ND = (z_ND - mean_D) * torch.rsqrt(variance_D + eps)
    if normalise == "batch":
        return a_ND
    mean_square_N1 = a_ND.square().mean(dim=1, keepdim=True)
    return a_ND * torch.rsqrt(mean_square_N1 + eps)


def quadratic_parts(c_DD: Tensor, *, lambd: float, is_hsic: bool) -> tuple[Tensor, Tensor]:
    """Give invariance and redundancy of `barlow` and `hsic`."""
    errors_D = (1 - c_DD.diagonal()).square()
    off_diagonal = (c_DD + 1).square() if is_hsic else c_DD.square()
    return errors_D.sum(), lambd * (off_diagonal.sum() - off_diagonal.diagonal().sum())


def cross_entropy_parts(c_DD: Tensor, *, lambd: float, temperature: float) -> tuple[Tensor, Tensor]:
    """Give the two terms of the cross-entropy: of the diagonal and of the off-diagonal."""
    is_diagonal = torch.eye(len(c_DD), dtype=torch.bool, device=c_DD.device)
    logits = (c_DD.clamp(min=0) / temperature).masked_fill(is_diagonal, -torch.inf)
    attraction = -torch.logsumexp(c_DD.diagonal() / temperature, dim=0)
    return attraction, lambd * torch.logsumexp(logits.flatten(), dim=0)
