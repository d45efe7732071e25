"""The Barlow Twins loss, exact, in whichever form costs less.

    L = sum_i (1 - C_ii)^2 + lambd * sum_{i != j} C_ij^2          (objective "barlow")
    L = sum_i (1 - C_ii)^2 + lambd * sum_{i != j} (1 + C_ij)^2    (objective "hsic")
    L = -log sum_i exp(C_ii / t)
        + lambd * log sum_{i != j} exp(max(C_ij, 0) / t)          (objective "cross-entropy")

where C = A^T B / N is the cross-correlation of the two views' embeddings, A and B, each
standardised over the batch with its own mean and biased variance.

    >>> import torch
    >>> z1, z2 = torch.randn(2, 256, 512, requires_grad=True)  # embeddings from anywhere
    >>> loss = barlow_twins_loss(z1, z2, lambd=0.005)

Rules:
    Every form gives the same value and gradient: a form is a matter of cost, never of the
    result. `train.loss.exact` has them; what only ablations want goes through C and plain
    autograd (`train.loss.ablation`).
    The arithmetic is float32 or better, whatever autocast is in force.
    Across ranks all statistics are those of the whole batch, and the mean over the ranks
    that DistributedDataParallel takes of the gradients is the gradient of one process on
    it. The authors' code gives 1/world of that: docs/decisions/0004-loss-forms-and-ranks.md.
    The choice of a form depends on shapes, ranks and the machine's memory, all of it: on
    what happens to be free, a run that goes on after a stop would not give the same bits.
    Nothing here knows of networks or of options. There is no second derivative.

Source: Zbontar et al., arXiv 2103.03230, equations 1 and 2 and section 4 (ablations); HSIC:
Tsai et al., arXiv 2104.13712, equation 5.

Shapes: N pairs of embeddings, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from train.collectives import Group, world_size
from train.errors import TrainError
from train.loss.ablation import (
    Normalise,
    cross_correlation,
    cross_entropy_parts,
    quadratic_parts,
)
from train.loss.exact import Quadratic, quadratic_loss
from train.loss.forms import Form, choose_form, device_memory_bytes, tile_rows

Objective = Literal["barlow", "hsic", "cross-entropy"]
Terms = Literal["both", "invariance", "redundancy"]

STANDARDISE_EPS = 1e-5
"""Added to each variance: BatchNorm's own, which the authors' code standardises with.

The loss does not depend on the scale of embeddings whose variances are far above it, as a
projector's are; for smaller ones choose a smaller `eps`.
"""

TEMPERATURE = 0.1
"""Of the cross-entropy; the paper does not give its own."""


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """The loss, and what it is made of; only `loss` carries a gradient.

    Attributes:
        loss: the terms that were asked for, added.
        invariance: the term of the diagonal.
        redundancy: the term of the off-diagonal, weighted by lambda.
        diagonal_D: (D,) C_ii, in float64.
        square_sum: sum of C_ij^2, in float64.
        n_global: N, over all ranks.
    """

    loss: Tensor
    invariance: Tensor
    redundancy: Tensor
    diagonal_D: Tensor
    square_sum: Tensor
    n_global: int

    @property
    def diagonal_mean(self) -> Tensor:
        """The mean of C_ii; 1 where the views agree."""
        return self.diagonal_D.mean().to(self.loss.dtype)

    @property
    def diagonal_error(self) -> Tensor:
        """The mean of (1 - C_ii)^2, which for `barlow` is invariance / D."""
        return (1 - self.diagonal_D).square().mean().to(self.loss.dtype)

    @property
    def off_diagonal_rms(self) -> Tensor:
        """The root of the mean of C_ij^2 over i != j."""
        dim = len(self.diagonal_D)
        off_diagonal = self.square_sum - self.diagonal_D.square().sum()
        mean = off_diagonal.clamp(min=0) / max(1, dim * (dim - 1))  # rounding may pass below 0
        return mean.sqrt().to(self.loss.dtype)

    @property
    def off_diagonal_floor(self) -> float:
        """1 / sqrt(N), what `off_diagonal_rms` is for independent features."""
        return float(self.n_global**-0.5)


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

    Arguments and errors are those of `loss_terms`, which has more of them.

    Returns:
        The loss, a scalar of float32, or of float64 where a view is.
    """
    return loss_terms(z1_ND, z2_ND, lambd=lambd, objective=objective, form=form, eps=eps).loss


def loss_terms(
    z1_ND: Tensor,
    z2_ND: Tensor,
    *,
    lambd: float,
    objective: Objective = "barlow",
    form: Form = "auto",
    terms: Terms = "both",
    normalise: Normalise = "batch",
    temperature: float = TEMPERATURE,
    group: Group = None,
    eps: float = STANDARDISE_EPS,
) -> LossTerms:
    """Compute the loss together with its parts, for logs and for ablations.

    Args:
        z1_ND: (N, D) embeddings of the first view, any floating dtype; N, over all ranks,
            at least 2; D at least 1, and 2 for `cross-entropy`.
        z2_ND: (N, D) embeddings of the second view, in the same order. Of another dtype both
            are brought to the one that holds either.
        lambd: weight of the redundancy term; the paper has .0051 at D = 8192.
        objective: what the off-diagonal is drawn to: 0 (`barlow`) or -1 (`hsic`); or the
            paper's ablation `cross-entropy`.
        form: `direct` builds the D x D matrix, `tiled` some rows of it at a time, `gram` two
            N x N ones; `auto` chooses.
        terms: which of the two terms make the loss.
        normalise: `batch` standardises each feature; `features` then also brings each
            sample to norm sqrt(D), so that the target of C_ii can be reached; `none` only
            centres. The last two are the paper's ablations.
        temperature: of `cross-entropy`, else without effect.
        group: the ranks that share the batch, each with as many rows: None for this process
            alone, `world` for all, or a process group.
        eps: added to each variance; far below the variances of the embeddings.

    Returns:
        The terms; loss, invariance and redundancy in float32, or in float64 where a view is.

    Raises:
        TrainError: the shapes are not two equal (N, D), or too small; a name or a
            combination of names does not exist.
    """
    _check_names(objective, form, terms, normalise)
    world = world_size(group)
    _check_shapes(z1_ND, z2_ND, world, least_dim=2 if objective == "cross-entropy" else 1)
    common = torch.promote_types(z1_ND.dtype, z2_ND.dtype)
    z1_ND, z2_ND = z1_ND.to(common), z2_ND.to(common)
    is_ablation = objective == "cross-entropy" or normalise == "features"
    if is_ablation and form not in ("auto", "direct"):
        raise TrainError(
            f"form {form} of the loss",
            expected=f"auto or direct for {objective} with normalise {normalise}",
            mend="the other forms are for barlow and hsic with normalise batch or none",
        )
    quadratic = Quadratic(
        lambd=lambd, is_hsic=objective == "hsic", is_scaled=normalise == "batch", eps=eps,
        has_invariance=terms != "redundancy", has_redundancy=terms != "invariance",
    )  # fmt: skip
    with torch.autocast(z1_ND.device.type, enabled=False):
        if not is_ablation:
            return _exact_terms(z1_ND, z2_ND, quadratic, form, group=group)
        c_DD = cross_correlation(z1_ND, z2_ND, normalise=normalise, eps=eps, group=group)
        if objective == "cross-entropy":
            parts = cross_entropy_parts(c_DD, lambd=lambd, temperature=temperature)
        else:
            parts = quadratic_parts(c_DD, lambd=lambd, is_hsic=quadratic.is_hsic)
        loss = {"both": parts[0] + parts[1], "invariance": parts[0], "redundancy": parts[1]}[terms]
        c_DD = c_DD.detach()
        return LossTerms(
            loss=loss,
            invariance=parts[0].detach(),
            redundancy=parts[1].detach(),
            diagonal_D=c_DD.diagonal().double(),
            square_sum=c_DD.square().sum(dtype=torch.float64),
            n_global=len(z1_ND) * world,
        )


def _exact_terms(
    z1_ND: Tensor, z2_ND: Tensor, objective: Quadratic, form: Form, *, group: Group
) -> LossTerms:
    """Compute barlow or hsic in one of the three forms."""
    world, dim = world_size(group), z1_ND.shape[1]
    n_global, item_bytes = len(z1_ND) * world, max(4, z1_ND.element_size())
    if form == "auto":
        form = choose_form(
            n_global, dim, world=world, item_bytes=item_bytes,
            memory_bytes=device_memory_bytes(z1_ND.device),
        )  # fmt: skip
    rows = tile_rows(form, dim, item_bytes=item_bytes)
    loss, invariance, redundancy, c_D, square_sum = quadratic_loss(
        z1_ND, z2_ND, objective, tile_rows=rows, group=group
    )
    return LossTerms(
        loss=loss,
        invariance=invariance.to(loss.dtype),
        redundancy=redundancy.to(loss.dtype),
        diagonal_D=c_D,
        square_sum=square_sum,
        n_global=n_global,
    )


def _check_names(objective: str, form: str, terms: str, normalise: str) -> None:
    """Refuse what would else pass for another."""
    for what, name, known in (
        ("objective", objective, get_args(Objective)),
        ("form", form, get_args(Form)),
        ("terms", terms, get_args(Terms)),
        ("normalise", normalise, get_args(Normalise)),
    ):
        if name not in known:
            raise TrainError(f"{what} of the loss", expected=" or ".join(known), found=repr(name))


def _check_shapes(z1_ND: Tensor, z2_ND: Tensor, world: int, *, least_dim: int) -> None:
    """Refuse what is not a batch of pairs, or has too few of them or of features."""
    are_alike = z1_ND.ndim == 2 and z1_ND.shape == z2_ND.shape
    if not are_alike or len(z1_ND) * world < 2 or z1_ND.shape[1] < least_dim:
        raise TrainError(
            "embeddings of two views",
            expected=f"two tensors of one shape (N, D), N at least 2 and D at least {least_dim}",
            found=f"{tuple(z1_ND.shape)} and {tuple(z2_ND.shape)}",
        )
