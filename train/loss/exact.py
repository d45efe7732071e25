"""Value and gradient of the quadratic objectives, with or without C, on one rank or many.

Both objectives need C = A^T B / N only through three sums, and each can be had without C:

    c_i = <A_:i, B_:i> / N     F = sum_ij C_ij^2     S = sum_ij C_ij = <A 1, B 1> / N

and the gradient asks of C only two products:

    dL/dA = 2 lambd B C^T / N + B diag(w) / N   [+ 2 lambd B 1 1^T / N for hsic]
    dL/dB = 2 lambd A C / N   + A diag(w) / N   [+ 2 lambd A 1 1^T / N for hsic]
    w = -2 (1 - c) - 2 lambd c   [- 2 lambd for hsic]

    Gram:  F = <A A^T, B B^T> / N^2,  B C^T = (B B^T) A / N         8 N^2 D flop at most
    tiled: C itself, some rows at a time, and its two products      6 N D^2 flop

Rules:
    The gradient is made together with the value: nothing is computed twice, nothing of the
    size of C is kept, and no collective runs in backward.
    A gradient begins as its other terms, and the products are added to it. In the Gram form, on
    one rank, the last one takes the place of a view.
    To touch a page of memory for the first time costs a CPU more than the arithmetic on it: see
    `KEPT_BYTES`.
    Across ranks the Gram form gathers the embeddings, and each rank multiplies its own rows;
    the tiled form sums C over the ranks, tile by tile.
    A and B are centred, hence so is dL/dA: of the two terms that standardising takes from a
    gradient, its mean is zero and only its share along A is left.

Shapes: n rows of this rank, N of all, D dimensions, W of them in a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from train.collectives import Group, gather, rank_in, sum_in_place, world_size
from train.errors import TrainError
from train.loss.products import add_times_transposed, column_dots, times_transposed

Pair = tuple[Tensor | None, Tensor | None]

KEPT_BYTES = 1 << 25
"""Up to which matrices are made in one piece on a CPU. glibc, once it has freed a piece of this
size or less, keeps what is freed up to twice that, where it would give as much in parts back to
the system, to come as new pages; a larger piece it gives back itself."""

STRIP_ROWS = 128
"""Of a Gram matrix that a CPU multiplies at once, from the diagonal on; the rest is its mirror."""


@dataclass(frozen=True, kw_only=True)
class Quadratic:
    """What is minimised.

    Attributes:
        lambd: weight of the off-diagonal.
        is_hsic: whether the off-diagonal is drawn to -1, and not to 0.
        has_invariance: whether the diagonal's term is part of the loss.
        has_redundancy: whether the off-diagonal's term is.
        is_scaled: whether features are brought to unit variance, or only centred.
        eps: added to each variance.
    """

    lambd: float
    is_hsic: bool
    has_invariance: bool
    has_redundancy: bool
    is_scaled: bool
    eps: float


def quadratic_loss(
    z1_nD: Tensor, z2_nD: Tensor, objective: Quadratic, *, tile_rows: int | None, group: Group
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the loss, and what it is made of.

    Args:
        z1_nD: this rank's rows of the first view.
        z2_nD: this rank's rows of the second view.
        objective: what is minimised.
        tile_rows: rows of C in a tile; None for the Gram form.
        group: the ranks that share the batch.

    Returns:
        The loss, whose gradient is `world` times this rank's part of the true one; and of the
        whole batch, without gradient and in float64, invariance, redundancy (weighted by lambda),
        c (D,) and F.
    """
    if not torch.is_grad_enabled():
        z1_nD, z2_nD = z1_nD.detach(), z2_nD.detach()  # what they ask for, they would be given
    loss, invariance, redundancy, c_D, square_sum = _Loss.apply(
        z1_nD, z2_nD, objective, tile_rows, group
    )
    return loss, invariance, redundancy, c_D, square_sum


class _Context(FunctionCtx):
    """What forward leaves for backward."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: Pair
    dtype: torch.dtype


class _Loss(torch.autograd.Function):
    """The loss as one node of the graph; only its first output has a gradient."""

    @staticmethod
    def forward(
        ctx: _Context,
        z1_nD: Tensor,
        z2_nD: Tensor,
        objective: Quadratic,
        tile_rows: int | None,
        group: Group,
    ) -> tuple[Tensor, ...]:
        """Compute value and gradients."""
        wanted = ctx.needs_input_grad[:2]
        is_gram = tile_rows is None
        has_spare = is_gram and all(wanted) and world_size(group) == 1
        views = _Views(z1_nD, z2_nD, objective, group, is_gathered=is_gram, has_spare=has_spare)
        if tile_rows is None:
            square_sum, gradients = _gram(views, wanted)
        else:
            square_sum, gradients = _tiled(views, wanted, tile_rows)
        ctx.save_for_backward(*gradients)  # type: ignore[arg-type]  # None may be
        ctx.dtype = z1_nD.dtype
        dim, c_D = len(views.c_D), views.c_D.double()
        invariance = (1 - c_D).square().sum()
        redundancy = square_sum - c_D.square().sum()
        if objective.is_hsic:
            redundancy = redundancy + 2 * (views.total - c_D.sum()) + dim * (dim - 1)
        redundancy = objective.lambd * redundancy
        loss = objective.has_invariance * invariance + objective.has_redundancy * redundancy
        outputs = (loss.to(views.a.dtype), invariance, redundancy, c_D, square_sum)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: _Context, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients."""
        if torch.is_grad_enabled():  # else they would pass for constants, without a word
            raise TrainError(
                "a derivative of the loss's gradient",
                expected="first derivatives only",
                found="create_graph=True",
                mend="leave it out, or differentiate the formula written out",
            )
        # On a GPU reading the factor would wait for the device: there a pass costs less.
        is_one = dloss.device.type == "cpu" and dloss.item() == 1
        # Parts of one piece are views, which could not be changed in place: detached they can.
        # Half precision comes last: what a loss scale is there to save is below its range.
        gradients = (
            g if g is None else (g.detach() if is_one else g * dloss).to(ctx.dtype)
            for g in ctx.saved_tensors
        )
        return (*gradients, None, None, None)


class _Views:
    """Both views standardised over the whole batch, and what the forms share.

    `a` and `b` have all N rows where the embeddings were gathered, else this rank's n; `spare`,
    where there is one, is memory like theirs.
    """

    def __init__(
        self,
        z1_nD: Tensor,
        z2_nD: Tensor,
        objective: Quadratic,
        group: Group,
        *,
        is_gathered: bool,
        has_spare: bool,
    ) -> None:
        n, rank = len(z1_nD), rank_in(group)
        self.objective, self.group, self.world = objective, group, world_size(group)
        self.n_global = n * self.world
        self.own = slice(rank * n, (rank + 1) * n) if is_gathered else slice(None)
        self.weight = 2 * objective.lambd * objective.has_redundancy / self.n_global
        if is_gathered:
            z1_nD, z2_nD = gather(z1_nD, group), gather(z2_nD, group)
            group = None  # the sums below are over all rows already
        self.a, self.b, *spare = _matrices(3 if has_spare else 2, z1_nD)
        self.spare = spare[0] if spare else None
        self.a_scale_D = self._standardise(z1_nD, group, self.a)
        self.b_scale_D = self._standardise(z2_nD, group, self.b)
        self.c_D = sum_in_place(column_dots(self.a, self.b), group) / self.n_global
        invariance_weight = 2 * objective.has_invariance / self.n_global
        self.w_D = self.c_D * (invariance_weight - self.weight)
        self.w_D -= invariance_weight + self.weight * objective.is_hsic
        self.total = torch.zeros((), dtype=torch.float64, device=z1_nD.device)
        self.a_sums: Tensor | None = None
        self.b_sums: Tensor | None = None
        if objective.is_hsic:
            self.a_sums, self.b_sums = self.a.sum(dim=1), self.b.sum(dim=1)
            self.total += (self.a_sums * self.b_sums).sum()
            self.total = sum_in_place(self.total, group) / self.n_global

    def _standardise(self, z_nD: Tensor, group: Group, out_nD: Tensor) -> Tensor | None:
        """Centre and scale over the rows of `group`; give the scale, where there is one."""
        # Of other strides than its own, native_batch_norm takes no mean where it is told where to.
        z_nD = z_nD.to(out_nD.dtype).contiguous()
        eps = self.objective.eps
        if self.objective.is_scaled and world_size(group) == 1:
            # One fused pass; `var_mean` over the batch takes ten times as long on a CPU.
            scale_D = torch.empty_like(out_nD[0])
            out = (out_nD, torch.empty_like(scale_D), scale_D)
            torch.native_batch_norm(z_nD, None, None, None, None, True, 0.0, eps, out=out)
            return scale_D
        torch.sub(z_nD, sum_in_place(z_nD.sum(dim=0), group) / self.n_global, out=out_nD)
        if not self.objective.is_scaled:
            return None
        variance_D = sum_in_place(out_nD.square().sum(dim=0), group) / self.n_global
        scale_D = torch.rsqrt(variance_D + eps)
        out_nD.mul_(scale_D)
        return scale_D

    def diagonal_terms(
        self, y_ND: Tensor, y_sums: Tensor | None, *, out_nD: Tensor | None = None
    ) -> Tensor:
        """Give the terms of the diagonal and of S in the gradient of a view.

        Args:
            y_ND: the other view.
            y_sums: its rows' sums, for hsic.
            out_nD: where to; it may be `y_ND` itself. None for new memory.
        """
        d_nD = torch.mul(y_ND[self.own], self.w_D, out=out_nD)
        if y_sums is not None:
            d_nD += self.weight * y_sums[self.own, None]
        return d_nD

    def unstandardise(self, d_nD: Tensor, x_ND: Tensor, scale_D: Tensor | None) -> None:
        """Go back, in place, through the standardisation of the view whose gradient this is."""
        if scale_D is not None:
            x_nD = x_ND[self.own]
            share_D = sum_in_place(column_dots(d_nD, x_nD), self.group) / -self.n_global
            d_nD.addcmul_(x_nD, share_D).mul_(scale_D)
        if self.world > 1:
            d_nD.mul_(self.world)


def _matrices(count: int, z_nD: Tensor) -> list[Tensor]:
    """Make room for as many matrices of float32, or what is better, as large as `z`."""
    shape, dtype = tuple(z_nD.shape), torch.promote_types(z_nD.dtype, torch.float32)
    is_kept = count * z_nD.numel() * dtype.itemsize <= KEPT_BYTES
    if is_kept and z_nD.device.type == "cpu":
        return list(torch.empty((count, *shape), dtype=dtype))
    return [torch.empty(shape, dtype=dtype, device=z_nD.device) for _ in range(count)]


def _gram(views: _Views, wanted: tuple[bool, ...]) -> tuple[Tensor, Pair]:
    """Compute F and the gradients through the N x N Gram matrices of the two views."""
    a_ND, b_ND = views.a, views.b
    a_gram_nN, b_gram_nN = _gram_matrix(a_ND, views.own), _gram_matrix(b_ND, views.own)
    square_sum = (a_gram_nN * b_gram_nN).sum(dtype=torch.float64)
    square_sum = sum_in_place(square_sum, views.group) / views.n_global**2
    factor = views.weight / views.n_global
    may_replace = views.world == 1
    da_nD: Tensor | None = None
    db_nD: Tensor | None = None
    if wanted[0]:
        place = b_ND if may_replace and not wanted[1] else views.spare
        da_nD = views.diagonal_terms(b_ND, views.b_sums, out_nD=place)
        add_times_transposed(da_nD, b_gram_nN.mul_(factor), a_ND.T)
        views.unstandardise(da_nD, a_ND, views.a_scale_D)
    if wanted[1]:
        place = a_ND if may_replace else None
        db_nD = views.diagonal_terms(a_ND, views.a_sums, out_nD=place)
        add_times_transposed(db_nD, a_gram_nN.mul_(factor), b_ND.T)
        views.unstandardise(db_nD, b_ND, views.b_scale_D)
    return square_sum, (da_nD, db_nD)


def _gram_matrix(x_ND: Tensor, own: slice) -> Tensor:
    """Multiply own rows with all; where those are all, up to half is had by symmetry."""
    n = len(x_ND)
    if own != slice(0, n) or n <= STRIP_ROWS or x_ND.device.type != "cpu":
        return times_transposed(x_ND[own], x_ND)
    gram_NN = torch.empty((n, n), dtype=x_ND.dtype, device=x_ND.device)
    for first in range(0, n, STRIP_ROWS):
        rows, rest = slice(first, first + STRIP_ROWS), slice(first + STRIP_ROWS, n)
        times_transposed(x_ND[rows], x_ND[first:], out_PQ=gram_NN[rows, first:])
        if rest.start < n:
            gram_NN[rest, rows] = gram_NN[rows, rest].T
    return gram_NN


def _tiled(views: _Views, wanted: tuple[bool, ...], tile_rows: int) -> tuple[Tensor, Pair]:
    """Compute F and the gradients from C itself, some rows at a time."""
    a_nD, b_nD = views.a, views.b
    square_sum = torch.zeros((), dtype=torch.float64, device=a_nD.device)
    da_nD = views.diagonal_terms(b_nD, views.b_sums) if wanted[0] else None
    db_nD = views.diagonal_terms(a_nD, views.a_sums) if wanted[1] else None
    for first in range(0, a_nD.shape[1], tile_rows):
        rows = slice(first, first + tile_rows)
        c_WD = times_transposed(a_nD[:, rows].T, b_nD.T)
        sum_in_place(c_WD, views.group).div_(views.n_global)
        square_sum += torch.linalg.vector_norm(c_WD, dim=1).double().square().sum()
        c_WD.mul_(views.weight)
        if da_nD is not None:
            add_times_transposed(da_nD[:, rows], b_nD, c_WD)
        if db_nD is not None:
            add_times_transposed(db_nD, a_nD[:, rows], c_WD.T)
    if da_nD is not None:
        views.unstandardise(da_nD, a_nD, views.a_scale_D)
    if db_nD is not None:
        views.unstandardise(db_nD, b_nD, views.b_scale_D)
    return square_sum, (da_nD, db_nD)
