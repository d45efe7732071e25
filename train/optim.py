"""The optimiser, its parameter groups, and the learning rate of every step.

Rules:
    Biases and BatchNorm have no weight decay.
    The learning rate is a function of the step alone, so resuming needs no scheduler state.

Source: the exclusions and the schedule of arXiv 2103.03230, section 2.2: linear warm-up,
then cosine down to a thousandth.
"""

from __future__ import annotations

import math

import torch
from torch import nn

LR_FLOOR = 1e-3
"""Share of the peak that the cosine ends at."""

MOMENTUM = 0.9
"""Of SGD."""


def make_optimizer(network: nn.Module, kind: str, *, weight_decay: float) -> torch.optim.Optimizer:
    """Make `adamw` or `sgd` over the network, in a decayed and an undecayed group.

    The learning rate is set before each step by `set_lr`.
    """
    weights = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.0)
    assert kind == "sgd", kind
    return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM)


def lr_at(step: int, *, total_steps: int, warmup_steps: int, lr_peak: float) -> float:
    """Give the learning rate of a step, counted from 0.

    It rises linearly over `warmup_steps` and reaches the peak with the last of them, then
    falls as a cosine to `LR_FLOOR` of the peak at `total_steps`.
    """
    if step < warmup_steps:
        return lr_peak * (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * share))
    return lr_peak * (LR_FLOOR + (1 - LR_FLOOR) * cosine)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
