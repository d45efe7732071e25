"""Sums and gathers over the ranks of a process group, with gradients that are right.

Rules:
    The backward of a collective is its adjoint: a sum is summed again, a gather is summed
    and cut. So where every rank computes the same global loss, the gradient on each rank is
    `world` times the share of its own samples in the true one, and the mean that DDP takes
    over the ranks is the gradient of one process on the whole batch, exactly.
    No group, or a group of one rank, costs nothing and moves nothing.
    Every rank brings the same number of rows.

The backends are torch's: NCCL on GPUs, gloo elsewhere. Starting them is the caller's matter.

Shapes: n rows on this rank, N = world * n rows on all.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

Group = dist.ProcessGroup | Literal["world"] | None
"""Ranks that share a batch: a process group, all ranks (`world`), or this one alone (None)."""

Collective = Literal["all_gather", "all_reduce"]


def ranks_of(group: Group) -> dist.ProcessGroup | None:
    """Give the process group; None where this process is alone in it."""
    if group is None:
        return None
    if isinstance(group, str):
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD
    return group if group is not None and dist.get_world_size(group) > 1 else None


def world_size(group: Group) -> int:
    """Count the ranks."""
    ranks = ranks_of(group)
    return 1 if ranks is None else dist.get_world_size(ranks)


def rank_in(group: Group) -> int:
    """Give this process's place among the ranks, from 0."""
    ranks = ranks_of(group)
    return 0 if ranks is None else dist.get_rank(ranks)


def cheaper_collective(n_global: int, dim: int) -> Collective:
    """Say how C of the whole batch is had with fewer bytes.

    By the ring algorithms of NCCL and gloo a gathered float passes each rank once, a reduced
    one twice: 2 * N * D floats for the embeddings of both views against 2 * D * D for C.
    """
    return "all_gather" if n_global < dim else "all_reduce"


def sum_in_place(x: Tensor, group: Group) -> Tensor:
    """Sum `x`, which must be contiguous, over the ranks into itself; no gradient."""
    ranks = ranks_of(group)
    if ranks is not None:
        dist.all_reduce(x, group=ranks)
    return x


def gather(x: Tensor, group: Group) -> Tensor:
    """Concatenate every rank's (n, ...) into (N, ...), in order of rank; no gradient."""
    ranks = ranks_of(group)
    if ranks is None:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format)
             for _ in range(dist.get_world_size(ranks))]  # fmt: skip
    dist.all_gather(parts, x.contiguous(), group=ranks)
    return torch.cat(parts)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Sum `x` over the ranks; the gradient is summed over them, too."""
    return x if ranks_of(group) is None else _AllReduce.apply(x, group)


def all_gather(x: Tensor, group: Group) -> Tensor:
    """Concatenate every rank's (n, ...) into (N, ...), in order of rank.

    The gradient is summed over the ranks, and each keeps the rows that it brought.
    """
    return x if ranks_of(group) is None else _AllGather.apply(x, group)


class _Context(FunctionCtx):
    """What forward leaves for backward."""

    group: Group
    rows: int


class _AllReduce(torch.autograd.Function):
    """y = sum over ranks of x; dx = sum over ranks of dy."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return sum_in_place(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, dy: Tensor) -> tuple[Tensor, None]:
        return sum_in_place(dy.clone(memory_format=torch.contiguous_format), ctx.group), None


class _AllGather(torch.autograd.Function):
    """y = the rows of every rank; dx = this rank's rows of the sum over ranks of dy."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.rows = group, len(x)
        return gather(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, dy: Tensor) -> tuple[Tensor, None]:
        total = sum_in_place(dy.clone(memory_format=torch.contiguous_format), ctx.group)
        first = rank_in(ctx.group) * ctx.rows
        return total[first : first + ctx.rows], None
