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
    Beside A, B and two gradients there is no more than one temporary of their size. In the Gram
    form, on one rank, the gradients take the place of A and B: to touch a page of memory for the
    first time costs a CPU more than the arithmetic on it.
    Across ranks the Gram form gathers the embeddings, and each rank multiplies its own rows;
    the tiled form sums C over the ranks, tile by tile.
    A and B are centred, hence so is dL/dA: of the two terms that standardising takes from a
    gradient, its mean is zero and only its share along A is left.
    What is done number by number would wait for memory on a CPU: it is done some columns at a time.

Shapes: n rows of this rank, N of all, D dimensions, W of them in a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from train.collectives import Group, gather, rank_in, sum_in_place, world_size
from train.errors import TrainError
from train.loss.products import times_transposed

Pair = tuple[Tensor | None, Tensor | None]

BLOCK_BYTES = 1 << 22
"""Of a view's columns that are worked on together on a CPU: few enough to stay in a cache, and so
many that threads seldom wait for one another, which on busy cores costs far more."""

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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the loss, and the sums that it is made of.

    Args:
        z1_nD: this rank's rows of the first view.
        z2_nD: this rank's rows of the second view.
        objective: what is minimised.
        tile_rows: rows of C in a tile; None for the Gram form.
        group: the ranks that share the batch.

    Returns:
        The loss, whose gradient is `world` times this rank's part of the true one; and
        without gradient c (D,), F and S of the whole batch, the last two in float64.
    """
    loss, c_D, square_sum, total = _Loss.apply(z1_nD, z2_nD, objective, tile_rows, group)
    return loss, c_D, square_sum, total


def quadratic_terms(
    c_D: Tensor, square_sum: Tensor, total: Tensor, objective: Quadratic
) -> tuple[Tensor, Tensor]:
    """Give invariance and redundancy, weighted by lambda, in float64."""
    dim, c_D = len(c_D), c_D.double()
    invariance = (1 - c_D).square().sum()
    redundancy = square_sum - c_D.square().sum()
    if objective.is_hsic:
        redundancy = redundancy + 2 * (total - c_D.sum()) + dim * (dim - 1)
    return invariance, objective.lambd * redundancy


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
        views = _Views(z1_nD, z2_nD, objective, group, is_gathered=tile_rows is None)
        wanted = ctx.needs_input_grad[:2]
        if tile_rows is None:
            square_sum, gradients = _gram(views, wanted)
        else:
            square_sum, gradients = _tiled(views, wanted, tile_rows)
        ctx.save_for_backward(*gradients)  # type: ignore[arg-type]  # None may be
        ctx.dtype = z1_nD.dtype
        invariance, redundancy = quadratic_terms(views.c_D, square_sum, views.total, objective)
        loss = objective.has_invariance * invariance + objective.has_redundancy * redundancy
        outputs = (loss.to(views.a.dtype), views.c_D, square_sum, views.total)
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
        # Half precision comes last: what a loss scale is there to save is below its range.
        gradients = (
            g if g is None else (g if is_one else g * dloss).to(ctx.dtype)
            for g in ctx.saved_tensors
        )
        return (*gradients, None, None, None)


class _Views:
    """Both views standardised over the whole batch, and what the forms share.

    `a` and `b` have all N rows where the embeddings were gathered, else this rank's n.
    """

    def __init__(
        self, z1_nD: Tensor, z2_nD: Tensor, objective: Quadratic, group: Group, *, is_gathered: bool
    ) -> None:
        n, rank = len(z1_nD), rank_in(group)
        self.objective, self.group, self.world = objective, group, world_size(group)
        self.n_global = n * self.world
        self.own = slice(rank * n, (rank + 1) * n) if is_gathered else slice(None)
        self.weight = 2 * objective.lambd * objective.has_redundancy / self.n_global
        if is_gathered:
            z1_nD, z2_nD = gather(z1_nD, group), gather(z2_nD, group)
            group = None  # the sums below are over all rows already
        self.a, self.a_scale_D = self._standardise(z1_nD, group)
        self.b, self.b_scale_D = self._standardise(z2_nD, group)
        self.c_D = torch.empty_like(self.a[0])
        for block in column_blocks(self.a):
            torch.sum(self.a[:, block] * self.b[:, block], dim=0, out=self.c_D[block])
        self.c_D = sum_in_place(self.c_D, group) / self.n_global
        self.w_D = (-2 * objective.has_invariance / self.n_global) * (1 - self.c_D)
        self.w_D -= self.weight * (self.c_D + objective.is_hsic)
        self.total = torch.zeros((), dtype=torch.float64, device=z1_nD.device)
        self.a_sums: Tensor | None = None
        self.b_sums: Tensor | None = None
        if objective.is_hsic:
            self.a_sums, self.b_sums = self.a.sum(dim=1), self.b.sum(dim=1)
            self.total += (self.a_sums * self.b_sums).sum()
            self.total = sum_in_place(self.total, group) / self.n_global

    def _standardise(self, z_nD: Tensor, group: Group) -> tuple[Tensor, Tensor | None]:
        """Centre and scale over the rows of `group`; give also the scale, where there is one."""
        z_nD = z_nD.to(torch.promote_types(z_nD.dtype, torch.float32))
        eps = self.objective.eps
        if self.objective.is_scaled and world_size(group) == 1:
            # One fused pass; `var_mean` over the batch takes ten times as long on a CPU.
            a_nD, _, scale_D = torch.native_batch_norm(z_nD, None, None, None, None, True, 0.0, eps)
            return a_nD, scale_D
        a_nD = z_nD - sum_in_place(z_nD.sum(dim=0), group) / self.n_global
        if not self.objective.is_scaled:
            return a_nD, None
        variance_D = sum_in_place(a_nD.square().sum(dim=0), group) / self.n_global
        scale_D = torch.rsqrt(variance_D + eps)
        return a_nD.mul_(scale_D), scale_D

    def gradients(self, products: Pair, block: slice, *, replace: bool = False) -> Pair:
        """Make of 2 lambd B C^T / N and 2 lambd A C / N, in place, the gradients by z.

        Args:
            products: those columns of the two.
            block: which columns.
            replace: whether the gradients take the place of the views, not of the products.
        """
        da_nW, db_nW = products
        a_nW, b_nW = self.a[self.own, block], self.b[self.own, block]
        w_W = self.w_D[block]
        if da_nW is not None:
            self._add_terms(da_nW, b_nW, self.b_sums, w_W)
        if db_nW is not None:
            self._add_terms(db_nW, a_nW, self.a_sums, w_W)
        return (
            self._unstandardise(da_nW, a_nW, _of(self.a_scale_D, block), replace=replace),
            self._unstandardise(db_nW, b_nW, _of(self.b_scale_D, block), replace=replace),
        )

    def _add_terms(self, d_nW: Tensor, y_nW: Tensor, y_sums: Tensor | None, w_W: Tensor) -> None:
        """Add the terms of the diagonal and of S to the product of a view; `y` is the other."""
        d_nW.addcmul_(y_nW, w_W)
        if y_sums is not None:
            d_nW += self.weight * y_sums[self.own, None]

    def _unstandardise(
        self, d_nW: Tensor | None, x_nW: Tensor, scale_W: Tensor | None, *, replace: bool
    ) -> Tensor | None:
        """Go back through the standardisation of the view whose gradient this is.

        Returns:
            The gradient, in the place of `d_nW`, or of `x_nW` where it is to be replaced.
        """
        if d_nW is None:
            return None
        if scale_W is None:
            gradient_nW = x_nW.copy_(d_nW) if replace else d_nW
        else:
            share_W = sum_in_place((d_nW * x_nW).sum(dim=0), self.group) / -self.n_global
            if replace:
                gradient_nW = x_nW.mul_(share_W * scale_W).addcmul_(d_nW, scale_W)
            else:
                gradient_nW = d_nW.addcmul_(x_nW, share_W).mul_(scale_W)
        return gradient_nW if self.world == 1 else gradient_nW.mul_(self.world)


def _of(scale_D: Tensor | None, block: slice) -> Tensor | None:
    """Take some columns of a scale, where there is one."""
    return None if scale_D is None else scale_D[block]


def column_blocks(x_nD: Tensor) -> list[slice]:
    """Cut the columns into blocks of `BLOCK_BYTES`; into one on a GPU, where each is a start."""
    n, dim = x_nD.shape
    width = dim
    if x_nD.device.type == "cpu":
        width = max(1, BLOCK_BYTES // (n * x_nD.element_size()))
    return [slice(first, first + width) for first in range(0, dim, width)]


def _gram(views: _Views, wanted: tuple[bool, ...]) -> tuple[Tensor, Pair]:
    """Compute F and the gradients through the N x N Gram matrices of the two views."""
    a_ND, b_ND = views.a, views.b
    a_gram_nN, b_gram_nN = _gram_matrix(a_ND, views.own), _gram_matrix(b_ND, views.own)
    square_sum = (a_gram_nN * b_gram_nN).sum(dtype=torch.float64)
    square_sum = sum_in_place(square_sum, views.group) / views.n_global**2
    wants_a, wants_b = wanted
    factor = views.weight / views.n_global
    a_gram_nN.mul_(factor)
    b_gram_nN.mul_(factor)

    def gradients(block: slice, *, replace: bool) -> Pair:
        da_nW = times_transposed(b_gram_nN, a_ND[:, block].T) if wants_a else None
        db_nW = times_transposed(a_gram_nN, b_ND[:, block].T) if wants_b else None
        return views.gradients((da_nW, db_nW), block, replace=replace)

    blocks = column_blocks(a_ND)
    if views.world > 1 or len(blocks) == 1:  # ranks add up all columns in one collective
        return square_sum, gradients(slice(None), replace=False)
    for block in blocks:
        gradients(block, replace=True)
    return square_sum, (a_ND if wants_a else None, b_ND if wants_b else None)


def _gram_matrix(x_ND: Tensor, own: slice) -> Tensor:
    """Multiply own rows with all; where those are all, up to half is had by symmetry."""
    n = len(x_ND)
    if own != slice(0, n) or n <= STRIP_ROWS or x_ND.device.type != "cpu":
        return times_transposed(x_ND[own], x_ND)
    gram_NN = torch.empty((n, n), dtype=x_ND.dtype, device=x_ND.device)
    for first in range(0, n, STRIP_ROWS):
        rows, rest = slice(first, first + STRIP_ROWS), slice(first + STRIP_ROWS, n)
        gram_NN[rows, first:] = times_transposed(x_ND[rows], x_ND[first:])
        gram_NN[rest, rows] = gram_NN[rows, rest].T
    return gram_NN


def _tiled(views: _Views, wanted: tuple[bool, ...], tile_rows: int) -> tuple[Tensor, Pair]:
    """Compute F and the gradients from C itself, some rows at a time."""
    a_nD, b_nD = views.a, views.b
    square_sum = torch.zeros((), dtype=torch.float64, device=a_nD.device)
    is_whole = tile_rows >= a_nD.shape[1]
    da_nD = torch.empty_like(a_nD) if wanted[0] and not is_whole else None
    db_nD: Tensor | None = None
    for first in range(0, a_nD.shape[1], tile_rows):
        rows = slice(first, first + tile_rows)
        c_WD = times_transposed(a_nD[:, rows].T, b_nD.T)
        sum_in_place(c_WD, views.group).div_(views.n_global)
        square_sum += torch.linalg.vector_norm(c_WD, dim=1).double().square().sum()
        c_WD.mul_(views.weight)
        if wanted[0]:
            da_nW = times_transposed(b_nD, c_WD)
            if da_nD is None:
                da_nD = da_nW
            else:
                da_nD[:, rows] = da_nW
        if wanted[1]:
            if db_nD is None:
                db_nD = times_transposed(a_nD[:, rows], c_WD.T)
            else:
                db_nD += times_transposed(a_nD[:, rows], c_WD.T)
    return square_sum, views.gradients((da_nD, db_nD), slice(None))
