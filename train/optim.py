"""The optimiser, its parameter groups, and the learning rates of every step.

Rules:
    Biases and the scales of normalisation (parameters of one dimension) have no weight decay,
    no adaptation under LARS, and a learning rate of their own. Which parameters these are is
    a property of their group: it does not hang on weight_decay being 0.
    The learning rates are functions of the step alone, so resuming needs no scheduler state.

Source: the exclusions, rates and schedule of Zbontar et al., arXiv 2103.03230, section 2.2
and the ablation of its batch size: linear warm-up, then cosine down to a thousandth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast, overload

import torch
from torch import Tensor, nn

LR_FLOOR = 1e-3
"""Share of the peak that the cosine ends at."""

MOMENTUM = 0.9
"""Of SGD and LARS."""

LARS_ETA = 1e-3
"""A weight's step over its norm, before the learning rate."""

LARS_RATES = {128: 0.7, 256: 0.4, 512: 0.3, 1024: 0.25, 2048: 0.2, 4096: 0.2}
"""The paper's learning rate of weights by batch size, to be multiplied by batch/256."""

LARS_BIAS_RATE = 0.0048
"""The paper's learning rate of biases and BatchNorm, to be multiplied by batch/256."""

REFERENCE_BATCH = 256
"""Images that a linearly scaled learning rate is given for."""

ADAMW_RATE = 1e-3

SGD_RATE = 0.06
"""For 128 images; lightly's for Barlow Twins on CIFAR-10."""


@dataclass(frozen=True, kw_only=True)
class PeakRates:
    """Learning rates at the end of the warm-up.

    Attributes:
        weights: of parameters of two dimensions or more.
        biases: of biases and normalisation.
    """

    weights: float
    biases: float


def peak_rates(
    kind: str,
    batch_size: int,
    *,
    lr_peak: float | None = None,
    lr_biases: float | None = None,
    is_linear: bool = False,
) -> PeakRates:
    """Give the peak learning rates for an optimiser and a batch.

    The published .0048 for biases comes from code whose gradients were 1/W of the true ones
    on W = 32 processes. LARS divides that out of the weights' steps but biases are not
    adapted, so what they moved by was .00015 of a true gradient. Gradients here are the
    true ones on any number of processes: `lr_biases` of .00015 for 256 images, of .0012 for
    the paper's 2048, follows the published run.

    Args:
        kind: `adamw`, `sgd` or `lars`.
        batch_size: images a step over all processes.
        lr_peak: of weights; None for the optimiser's own rate at this batch, which for
            `adamw` scales like one that is given.
        lr_biases: of biases and normalisation; None for the paper's under LARS, else that of
            the weights.
        is_linear: whether the rates that are given are for 256 images, and scale.
    """
    times = batch_size / REFERENCE_BATCH
    given = times if is_linear else 1.0
    own = {
        "adamw": ADAMW_RATE * given,
        "sgd": SGD_RATE * batch_size / 128,
        "lars": lars_rate(batch_size) * times,
    }
    weights = own[kind] if lr_peak is None else lr_peak * given
    if lr_biases is not None:
        return PeakRates(weights=weights, biases=lr_biases * given)
    return PeakRates(weights=weights, biases=LARS_BIAS_RATE * times if kind == "lars" else weights)


def lars_rate(batch_size: int) -> float:
    """Give the paper's learning rate for a batch, before it is multiplied by batch/256.

    Between two batches of its table both axes are logarithmic; beyond its ends the rate is
    that of the end.
    """
    batches = sorted(LARS_RATES)
    batch_size = min(max(batch_size, batches[0]), batches[-1])
    above = next(batch for batch in batches if batch >= batch_size)
    if above == batch_size:
        return LARS_RATES[batch_size]
    below = batches[batches.index(above) - 1]
    share = math.log(batch_size / below) / math.log(above / below)
    return float(LARS_RATES[below] * (LARS_RATES[above] / LARS_RATES[below]) ** share)


class Lars(torch.optim.Optimizer):
    """SGD with momentum whose steps are in proportion to each weight's own norm.

    For a weight w of gradient g in an adapted group, with u = g + weight_decay * w:
    m <- momentum * m + q * u and w <- w - lr * m, where q = eta * |w| / |u|, or 1 where
    either norm is 0. In other groups q is 1 and there is no decay.

    Args:
        groups: dictionaries with `params` and `is_adapted`; the groups that are adapted
            may have a `weight_decay`.
        eta: step over norm, before the learning rate.
        clips: whether a weight's rate is min(q, lr) and not q * lr, by min(q / lr, 1) in place
            of q, as in LARC and solo-learn; the paper does not.

    The learning rate is set before each step by `set_lr`. Nothing here waits for a GPU.

    Source: You et al., arXiv 1708.03888, as used in arXiv 2103.03230.
    """

    def __init__(
        self, groups: list[dict[str, object]], *, eta: float = LARS_ETA, clips: bool = False
    ) -> None:
        defaults = {
            "lr": 0.0, "weight_decay": 0.0, "momentum": MOMENTUM, "eta": eta, "clips": clips,
            "is_adapted": True,
        }  # fmt: skip
        super().__init__(groups, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            steps = [cast(Tensor, p.grad) for p in params]
            if group["is_adapted"]:
                steps = _adapted(
                    params, steps, lr=group["lr"], weight_decay=group["weight_decay"],
                    eta=group["eta"], clips=group["clips"],
                )  # fmt: skip
            momenta = [self._momentum(p) for p in params]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, steps)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])
        return loss

    def _momentum(self, param: Tensor) -> Tensor:
        """Give the momentum of a parameter, zeros at first."""
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param)
        return cast(Tensor, state["momentum"])


def make_optimizer(
    network: nn.Module,
    kind: str,
    *,
    weight_decay: float,
    lars_eta: float = LARS_ETA,
    lars_clip: bool = False,
) -> torch.optim.Optimizer:
    """Make `adamw`, `sgd` or `lars` over the network, in a decayed and an undecayed group.

    The learning rates are set before each step by `set_lr`.
    """
    params = [p for p in network.parameters() if p.requires_grad]
    weights = {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay}
    biases = {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}
    if kind == "lars":
        groups = [weights | {"is_adapted": True}, biases | {"is_adapted": False}]
        return Lars(groups, eta=lars_eta, clips=lars_clip)
    if kind == "adamw":
        return torch.optim.AdamW([weights, biases], lr=0.0, fused=True)
    assert kind == "sgd", kind
    return torch.optim.SGD([weights, biases], lr=0.0, momentum=MOMENTUM)


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


def set_lr(optimizer: torch.optim.Optimizer, lr: float, lr_biases: float | None = None) -> None:
    """Give the two groups of `make_optimizer` the learning rates of the coming step.

    Args:
        optimizer: of `make_optimizer`.
        lr: of weights.
        lr_biases: of biases and normalisation; that of weights where None.
    """
    weights, biases = optimizer.param_groups
    weights["lr"] = lr
    biases["lr"] = lr if lr_biases is None else lr_biases


def _adapted(
    params: list[Tensor],
    grads: list[Tensor],
    *,
    lr: float,
    weight_decay: float,
    eta: float,
    clips: bool,
) -> list[Tensor]:
    """Give q * (g + weight_decay * w) for every weight, as in `Lars`."""
    steps = list(torch._foreach_add(grads, params, alpha=weight_decay))
    norms = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(steps))
    is_sound = (norms[0] > 0) & (norms[1] > 0)
    ratios = torch.where(is_sound, eta * norms[0] / norms[1], 1.0)
    if clips:
        ratios = (ratios / lr).clamp(max=1.0)
    torch._foreach_mul_(steps, list(ratios.unbind()))
    return steps
