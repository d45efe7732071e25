"""The Barlow Twins loss, exact, in whichever form costs less.

    L = sum_i (1 - C_ii)^2 + lambd * sum_{i != j} C_ij^2          (objective "barlow")
    L = sum_i (1 - C_ii)^2 + lambd * sum_{i != j} (1 + C_ij)^2    (objective "hsic")

where C = A^T B / N is the cross-correlation of the two views' embeddings, A and B, each
standardised over the batch with its own mean and biased variance.

Rules:
    Every form gives the same value and gradient: a form is a matter of cost, never of the
    result.
    The arithmetic is float32 or better, whatever autocast is in force.
    Nothing here knows of networks or of options: embeddings from anywhere will do.

Both objectives need C only through three sums, its diagonal c, F = sum_ij C_ij^2 and
S = sum_ij C_ij, and each of those can be had without C:

    c_i = <A_:i, B_:i> / N    F = <A A^T, B B^T> / N^2    S = <row sums of A, of B> / N

so the Gram form builds two N x N matrices where the direct form builds one D x D.

Source: Zbontar et al., arXiv 2103.03230, equations 1 and 2; HSIC: Tsai et al., arXiv
2104.13712, equation 5.

Shapes: N pairs of embeddings, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from train.errors import TrainError

Objective = Literal["barlow", "hsic"]
Form = Literal["auto", "direct", "gram"]

STANDARDISE_EPS = 1e-5
"""Added to each variance: BatchNorm's own, which the authors' code standardises with."""

GRAM_BELOW_N_PER_D = 0.75
"""The Gram form costs 8 N^2 D flop forward and backward, the direct form 6 N D^2."""


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """The two sums of the loss, before lambda: scalar tensors that carry gradients.

    Attributes:
        invariance: sum over i of (1 - C_ii)^2.
        redundancy: sum over i != j of C_ij^2, or of (1 + C_ij)^2 for `hsic`.
    """

    invariance: Tensor
    redundancy: Tensor


def barlow_twins_loss(
    z1_ND: Tensor,
    z2_ND: Tensor,
    *,
    lambd: float,
    objective: Objective = "barlow",
    form: Form = "auto",
) -> Tensor:
    """Compute the loss of two views' embeddings.

    It starts near D and cannot fall below about lambd * D * (D - 1) / N, which is what
    chance correlations of N samples cost: a large value is by design.

    Args:
        z1_ND: (N, D) embeddings of the first view, N at least 2, any floating dtype.
        z2_ND: (N, D) embeddings of the second view, in the same order.
        lambd: weight of the redundancy term; the paper has .0051 at D = 8192.
        objective: what the off-diagonal is drawn to: 0 (`barlow`) or -1 (`hsic`).
        form: `direct` builds the D x D matrix, `gram` two N x N ones, `auto` chooses.

    Returns:
        The loss, a scalar of float32, or of float64 for float64 embeddings.

    Raises:
        TrainError: the shapes are not two equal (N, D) with N at least 2.
    """
    terms = loss_terms(z1_ND, z2_ND, objective=objective, form=form)
    return terms.invariance + lambd * terms.redundancy


def loss_terms(
    z1_ND: Tensor, z2_ND: Tensor, *, objective: Objective = "barlow", form: Form = "auto"
) -> LossTerms:
    """Compute the two sums of the loss apart, for logs and for ablations.

    Arguments and errors are those of `barlow_twins_loss`.
    """
    _check_shapes(z1_ND, z2_ND)
    n, dim = z1_ND.shape
    if form == "auto":
        form = "gram" if n < GRAM_BELOW_N_PER_D * dim else "direct"
    with torch.autocast(z1_ND.device.type, enabled=False):
        a_ND, b_ND = standardise(z1_ND), standardise(z2_ND)
        terms_of = _gram_terms if form == "gram" else _direct_terms
        return terms_of(a_ND, b_ND, objective)


def standardise(z_ND: Tensor) -> Tensor:
    """Give each feature zero mean and unit biased variance over the batch.

    A feature that does not vary becomes zero. Half-precision input becomes float32.
    """
    if z_ND.dtype != torch.float64:
        z_ND = z_ND.float()
    variance_D, mean_D = torch.var_mean(z_ND, dim=0, correction=0)
    return (z_ND - mean_D) * torch.rsqrt(variance_D + STANDARDISE_EPS)


def _direct_terms(a_ND: Tensor, b_ND: Tensor, objective: Objective) -> LossTerms:
    """Sum over the D x D matrix itself."""
    n, dim = a_ND.shape
    c_DD = a_ND.T @ b_ND / n
    diagonal_D = c_DD.diagonal()
    invariance = (1 - diagonal_D).square().sum()
    square_sum = c_DD.square().sum() - diagonal_D.square().sum()
    if objective == "barlow":
        return LossTerms(invariance=invariance, redundancy=square_sum)
    cross_sum = c_DD.sum() - diagonal_D.sum()
    redundancy = dim * (dim - 1) + 2 * cross_sum + square_sum
    return LossTerms(invariance=invariance, redundancy=redundancy)


def _gram_terms(a_ND: Tensor, b_ND: Tensor, objective: Objective) -> LossTerms:
    """Reach the same sums through the N x N Gram matrices of the two views."""
    n, dim = a_ND.shape
    diagonal_D = (a_ND * b_ND).sum(dim=0) / n
    invariance = (1 - diagonal_D).square().sum()
    total_squares = ((a_ND @ a_ND.T) * (b_ND @ b_ND.T)).sum() / n**2
    square_sum = total_squares - diagonal_D.square().sum()
    if objective == "barlow":
        return LossTerms(invariance=invariance, redundancy=square_sum)
    cross_sum = (a_ND.sum(dim=1) @ b_ND.sum(dim=1)) / n - diagonal_D.sum()
    redundancy = dim * (dim - 1) + 2 * cross_sum + square_sum
    return LossTerms(invariance=invariance, redundancy=redundancy)


def _check_shapes(z1_ND: Tensor, z2_ND: Tensor) -> None:
    """Refuse what is not a batch of pairs."""
    if z1_ND.ndim != 2 or z1_ND.shape != z2_ND.shape or len(z1_ND) < 2:
        raise TrainError(
            "embeddings of two views",
            expected="two tensors of one shape (N, D), N at least 2",
            found=f"{tuple(z1_ND.shape)} and {tuple(z2_ND.shape)}",
        )
