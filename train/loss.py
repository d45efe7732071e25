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
from typing import Literal, get_args

import torch
from torch import Tensor

from train.errors import TrainError

Objective = Literal["barlow", "hsic"]
Form = Literal["auto", "direct", "gram"]

STANDARDISE_EPS = 1e-5
"""Added to each variance: BatchNorm's own, which the authors' code standardises with.

The loss does not depend on the scale of embeddings whose variances are far above it, as a
projector's are; for smaller ones choose a smaller `eps`.
"""

GRAM_BELOW_N_PER_D = 0.75
"""The Gram form costs 8 N^2 D flop forward and backward, the direct form 6 N D^2."""


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """The loss and its two parts: scalar tensors that carry gradients.

    Attributes:
        loss: invariance + redundancy.
        invariance: sum over i of (1 - C_ii)^2.
        redundancy: lambd times the sum over i != j of C_ij^2, or of (1 + C_ij)^2 for `hsic`.
    """

    loss: Tensor
    invariance: Tensor
    redundancy: Tensor


def barlow_twins_loss(
    z1_ND: Tensor,
    z2_ND: Tensor,
    *,
    lambd: float,
    objective: Objective = "barlow",
    form: Form = "auto",
    eps: float = STANDARDISE_EPS,
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
        eps: added to each variance; far below the variances of the embeddings.

    Returns:
        The loss, a scalar of float32, or of float64 for float64 embeddings.

    Raises:
        TrainError: the shapes are not two equal (N, D) with N at least 2, or there is no
            such objective or form.
    """
    return loss_terms(z1_ND, z2_ND, lambd=lambd, objective=objective, form=form, eps=eps).loss


def loss_terms(
    z1_ND: Tensor,
    z2_ND: Tensor,
    *,
    lambd: float,
    objective: Objective = "barlow",
    form: Form = "auto",
    eps: float = STANDARDISE_EPS,
) -> LossTerms:
    """Compute the loss together with its parts, for logs and for ablations.

    Arguments and errors are those of `barlow_twins_loss`.
    """
    _check_name("objective", objective, get_args(Objective))
    _check_name("form", form, get_args(Form))
    _check_shapes(z1_ND, z2_ND)
    n, dim = z1_ND.shape
    if form == "auto":
        form = "gram" if n < GRAM_BELOW_N_PER_D * dim else "direct"
    with torch.autocast(z1_ND.device.type, enabled=False):
        a_ND, b_ND = standardise(z1_ND, eps=eps), standardise(z2_ND, eps=eps)
        sums_of = _gram_sums if form == "gram" else _direct_sums
        invariance, redundancy = sums_of(a_ND, b_ND, objective)
        redundancy = lambd * redundancy
        return LossTerms(loss=invariance + redundancy, invariance=invariance, redundancy=redundancy)


def standardise(z_ND: Tensor, *, eps: float = STANDARDISE_EPS) -> Tensor:
    """Give each feature zero mean and unit biased variance over the batch.

    A feature that does not vary becomes zero. Half-precision input becomes float32.
    """
    if z_ND.dtype != torch.float64:
        z_ND = z_ND.float()
    variance_D, mean_D = torch.var_mean(z_ND, dim=0, correction=0)
    return (z_ND - mean_D) * torch.rsqrt(variance_D + eps)


def _direct_sums(a_ND: Tensor, b_ND: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Sum invariance and redundancy over the D x D matrix itself."""
    n, dim = a_ND.shape
    c_DD = a_ND.T @ b_ND / n
    diagonal_D = c_DD.diagonal()
    invariance = (1 - diagonal_D).square().sum()
    square_sum = c_DD.square().sum() - diagonal_D.square().sum()
    if objective == "barlow":
        return invariance, square_sum
    cross_sum = c_DD.sum() - diagonal_D.sum()
    redundancy = dim * (dim - 1) + 2 * cross_sum + square_sum
    return invariance, redundancy


def _gram_sums(a_ND: Tensor, b_ND: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Reach the same sums through the N x N Gram matrices of the two views."""
    n, dim = a_ND.shape
    diagonal_D = (a_ND * b_ND).sum(dim=0) / n
    invariance = (1 - diagonal_D).square().sum()
    total_squares = ((a_ND @ a_ND.T) * (b_ND @ b_ND.T)).sum() / n**2
    square_sum = total_squares - diagonal_D.square().sum()
    if objective == "barlow":
        return invariance, square_sum
    cross_sum = (a_ND.sum(dim=1) @ b_ND.sum(dim=1)) / n - diagonal_D.sum()
    redundancy = dim * (dim - 1) + 2 * cross_sum + square_sum
    return invariance, redundancy


def _check_name(what: str, name: str, known: tuple[str, ...]) -> None:
    """Refuse what would else pass for another."""
    if name not in known:
        raise TrainError(f"{what} of the loss", expected=" or ".join(known), found=repr(name))


def _check_shapes(z1_ND: Tensor, z2_ND: Tensor) -> None:
    """Refuse what is not a batch of pairs."""
    if z1_ND.ndim != 2 or z1_ND.shape != z2_ND.shape or len(z1_ND) < 2:
        raise TrainError(
            "embeddings of two views",
            expected="two tensors of one shape (N, D), N at least 2",
            found=f"{tuple(z1_ND.shape)} and {tuple(z2_ND.shape)}",
        )
