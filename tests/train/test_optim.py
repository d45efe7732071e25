"""The learning rate of every step, and which parameters decay."""

from __future__ import annotations

import pytest
import torch

from models.networks import BarlowTwins, ResNet
from train.optim import LR_FLOOR, lr_at, make_optimizer, set_lr


def test_the_rate_warms_up_linearly_and_falls_as_a_cosine() -> None:
    """It reaches the peak with the last warm-up step, half of it half-way, the floor last."""
    rates = [lr_at(s, total_steps=110, warmup_steps=10, lr_peak=2.0) for s in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2.0 * (LR_FLOOR + 0.5 * (1 - LR_FLOOR)))
    assert rates[110] == pytest.approx(2.0 * LR_FLOOR)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_without_warmup_the_first_step_is_the_peak() -> None:
    """No division by a warm-up of no steps."""
    assert lr_at(0, total_steps=5, warmup_steps=0, lr_peak=1.0) == 1.0


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_biases_and_batchnorm_do_not_decay(kind: str) -> None:
    """One group decays and holds matrices and kernels only; every parameter is in a group."""
    network = BarlowTwins(ResNet(layout="resnet10", width=4, in_channels=1), (8, 8))
    optimizer = make_optimizer(network, kind, weight_decay=0.1)
    set_lr(optimizer, 0.5)
    decayed, undecayed = optimizer.param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    assert decayed["lr"] == undecayed["lr"] == 0.5
    assert all(p.ndim > 1 for p in decayed["params"])
    norms = {id(p) for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)
             for p in m.parameters()}  # fmt: skip
    assert norms <= {id(p) for p in undecayed["params"]}
    n_grouped = len(decayed["params"]) + len(undecayed["params"])
    assert n_grouped == len(list(network.parameters()))
