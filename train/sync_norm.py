"""BatchNorm over the whole batch of all ranks, on a CPU as on a GPU.

Rules:
    The parameters, buffers and state dict are those of the BatchNorm that was there.
    In train() mode mean and variance are over every rank's samples, and gradients flow
    through them; in eval() mode the running statistics serve, and nothing is communicated.
    On CUDA this is torch's own SyncBatchNorm, which refuses CPU tensors.
    A BatchNorm of timm that has dropout and activation in it keeps both; any other that
    computes something of its own is refused, since what it adds would be lost without a word.

Source: Ioffe and Szegedy, arXiv 1502.03167, algorithm 1, with N the global batch.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.errors import UsageError
from train.collectives import Group, all_reduce, ranks_of, world_size

TIMM_PARTS = ("drop", "act")
"""Submodules of timm's `BatchNormAct2d`, in the order in which they follow the norm."""


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm of any number of dimensions whose batch is spread over ranks."""

    group: Group = "world"

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, ...), in float32 or better, and give it back in its own dtype."""
        if not self.training:
            y: Tensor = super().forward(x)
        else:
            with torch.autocast(x.device.type, enabled=False):
                y = self._normalise(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
        for part in self.children():  # none, or timm's
            y = part(y)
        return y

    def _normalise(self, x: Tensor) -> Tensor:
        """Standardise by the global mean and biased variance, and apply the affine map."""
        over = [i for i in range(x.ndim) if i != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = x.numel() // x.shape[1] * world_size(self.group)
        mean_C = all_reduce(x.sum(over), self.group) / count
        centred = x - mean_C.view(shape)
        variance_C = all_reduce(centred.square().sum(over), self.group) / count
        self._track(mean_C.detach(), variance_C.detach() * (count / max(count - 1, 1)))
        scale_C = torch.rsqrt(variance_C + self.eps)
        if self.weight is None:
            return centred * scale_C.view(shape)
        return centred * (scale_C * self.weight).view(shape) + self.bias.view(shape)

    def _track(self, mean_C: Tensor, variance_C: Tensor) -> None:
        """Move the running statistics, as `torch.nn.BatchNorm2d` does."""
        if not self.track_running_stats:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:  # torch's cumulative average
            share = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance_C.to(self.running_var.dtype), share)

    def _check_input_dim(self, input: Tensor) -> None:
        """Take any shape with a channel axis."""
        assert input.ndim >= 2


def convert_batch_norm(module: nn.Module, group: Group = "world") -> nn.Module:
    """Give `module` with every BatchNorm replaced by one over all ranks of `group`.

    Parameters and buffers are moved, not copied. Where this process is alone in the group,
    `module` comes back as it is. Move the module to its device first: it decides which kind
    of BatchNorm takes over.

    Raises:
        UsageError: there is a BatchNorm of a kind that cannot be replaced.
    """
    ranks = ranks_of(group)
    if ranks is None:
        return module
    if not any(parameter.is_cuda for parameter in module.parameters()):
        return replaced(module, group)
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            _parts_of(norm)
    owner: Any = nn.SyncBatchNorm
    if "timm" in sys.modules:  # its converter knows torch's norms and its own
        owner = importlib.import_module("timm.layers")
    converted: nn.Module = owner.convert_sync_batchnorm(module, ranks)
    return converted


def replaced(module: nn.Module, group: Group) -> nn.Module:
    """Give `module` with `GlobalBatchNorm` for every BatchNorm, on any device."""
    if isinstance(module, _BatchNorm):
        return _global_batch_norm(module, group)
    for name, child in module.named_children():
        setattr(module, name, replaced(child, group))
    return module


def _global_batch_norm(norm: _BatchNorm, group: Group) -> GlobalBatchNorm:
    """Take over everything a BatchNorm holds."""
    taken = GlobalBatchNorm(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    taken.weight, taken.bias = norm.weight, norm.bias
    taken.running_mean, taken.running_var = norm.running_mean, norm.running_var
    taken.num_batches_tracked = norm.num_batches_tracked
    taken.group, taken.training = group, norm.training
    for name in _parts_of(norm):
        taken.add_module(name, norm.get_submodule(name))
    return taken


def _parts_of(norm: _BatchNorm) -> tuple[str, ...]:
    """Name what follows inside of a BatchNorm: nothing in torch's.

    Raises:
        UsageError: it computes something else of its own.
    """
    if type(norm).forward is _BatchNorm.forward:
        return ()
    if tuple(name for name, _ in norm.named_children()) == TIMM_PARTS:
        return TIMM_PARTS
    raise UsageError(
        "BatchNorm over several ranks",
        expected="torch's BatchNorm, or timm's BatchNormAct2d",
        found=f"{type(norm).__module__}.{type(norm).__name__}",
        mend="choose another --network.layout, or train in one process",
    )
