"""LARS against its formula, the rates of the paper, and which parameters decay."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.networks import BarlowTwins, ResNet
from train.optim import (
    LR_FLOOR,
    Lars,
    lars_rate,
    lr_at,
    make_optimizer,
    peak_rates,
    set_lr,
)

PAPER_RATES = {128: 0.7, 256: 0.4, 512: 0.3, 1024: 0.25, 2048: 0.2, 4096: 0.2}


def small_network() -> BarlowTwins:
    """Give a network with convolutions, linear layers, BatchNorm and biases."""
    torch.manual_seed(0)
    return BarlowTwins(
        ResNet(layout="resnet10", width=4, in_channels=1, zero_init_residual=True),
        (8, 8),
        predictor_width=8,
    )


def learn(network: BarlowTwins, optimizer: torch.optim.Optimizer, seed: int) -> dict[str, Tensor]:
    """Take one step on random images; give the gradients it was of."""
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    torch.autograd.backward(network.predict(network(images)[1]).square().sum())
    grads = {k: p.grad.clone() for k, p in network.named_parameters() if p.grad is not None}
    optimizer.step()
    return grads


def lars_by_hand(
    w: Tensor, g: Tensor, m: Tensor, lr: float, wd: float, eta: float, clip: bool
) -> tuple[Tensor, Tensor]:
    """Write out one step of LARS for one parameter: what it becomes, and its momentum."""
    u = g
    if w.ndim != 1:  # biases and BatchNorm: neither decay nor adaptation
        u = g + wd * w
        w_norm, u_norm = w.square().sum().sqrt(), u.square().sum().sqrt()
        q = eta * w_norm / u_norm if w_norm > 0 and u_norm > 0 else torch.ones(())
        u = u * (min(q / lr, torch.ones(())) if clip else q)
    m = 0.9 * m + u
    return w - lr * m, m


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
@pytest.mark.parametrize("clip", [False, True])
def test_lars_is_its_formula(weight_decay: float, clip: bool) -> None:
    """Several steps with changing rates; weight_decay of 0 does not switch it off."""
    network = small_network()
    network.projector[0].weight.data.zero_()  # a norm of 0 is not divided by
    optimizer = make_optimizer(
        network, "lars", weight_decay=weight_decay, lars_eta=0.02, lars_clip=clip
    )
    weights = {k: p.detach().double() for k, p in network.named_parameters()}
    momenta = {k: torch.zeros_like(w) for k, w in weights.items()}
    for step, (lr, lr_biases) in enumerate([(0.3, 0.004), (0.01, 0.002), (0.2, 0.001)]):
        set_lr(optimizer, lr, lr_biases)
        for name, g in learn(network, optimizer, step).items():
            rate = lr_biases if g.ndim == 1 else lr
            weights[name], momenta[name] = lars_by_hand(
                weights[name], g.double(), momenta[name], rate, weight_decay, 0.02, clip
            )
        for name, p in network.named_parameters():
            torch.testing.assert_close(
                p.detach().double(), weights[name], rtol=1e-5, atol=1e-6, msg=name
            )


def test_lars_divides_the_scale_of_the_loss_out_of_weights_only() -> None:
    """Gradients of 1/32 move weights as far, biases 1/32 as far: the published .0048."""
    moves = []
    for scale in (1.0, 1 / 32):
        weight, bias = torch.ones(3, 2, requires_grad=True), torch.ones(3, requires_grad=True)
        groups = [{"params": [weight]}, {"params": [bias], "is_adapted": False}]
        optimizer = Lars(groups)
        set_lr(optimizer, 1.0)
        torch.autograd.backward(scale * (weight.sum() + bias.sum()))
        optimizer.step()
        moves.append((1 - weight.detach(), 1 - bias.detach()))
    torch.testing.assert_close(moves[0][0], moves[1][0], rtol=1e-4, atol=0)
    torch.testing.assert_close(moves[0][1], 32 * moves[1][1])


def test_lars_moves_a_weight_of_norm_0_by_the_plain_rate() -> None:
    """It has no length to adapt to, and would stay 0 for ever."""
    weight = torch.zeros(2, 2, requires_grad=True)
    optimizer = Lars([{"params": [weight]}, {"params": []}])
    set_lr(optimizer, 0.5)
    optimizer.step(lambda: backward(weight))
    assert torch.equal(weight, torch.full((2, 2), -0.5))


@pytest.mark.parametrize("kind", ["lars", "sgd", "adamw"])
def test_an_optimiser_goes_on_from_its_state_to_the_bit(kind: str) -> None:
    """State saved, loaded into another optimiser: the next steps are the same bytes."""
    ends = []
    for is_interrupted in (False, True):
        network = small_network()
        optimizer = make_optimizer(network, kind, weight_decay=1e-3)
        for step in range(4):
            set_lr(optimizer, 0.01 / (step + 1), 0.001)
            learn(network, optimizer, step)
            if is_interrupted and step == 1:
                buffer = io.BytesIO()
                torch.save(optimizer.state_dict(), buffer)
                buffer.seek(0)
                optimizer = make_optimizer(network, kind, weight_decay=1e-3)
                optimizer.load_state_dict(torch.load(buffer, weights_only=True))
        ends.append(network.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_lars_leaves_alone_what_has_no_gradient() -> None:
    """A parameter that the loss does not reach neither moves nor decays."""
    used, unused = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    optimizer = Lars([{"params": [used, unused], "weight_decay": 0.1}, {"params": []}])
    set_lr(optimizer, 1.0)
    loss = optimizer.step(lambda: backward(used))
    assert loss == 4.0
    assert torch.equal(unused, torch.ones(2, 2))
    assert not torch.equal(used, torch.ones(2, 2))


def backward(x: Tensor) -> float:
    """Give the gradient of a sum, as a closure of an optimiser does."""
    torch.autograd.backward(x.sum())
    return float(x.detach().sum())


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


@pytest.mark.parametrize(("batch_size", "rate"), PAPER_RATES.items())
def test_lars_has_the_papers_rate_for_each_batch(batch_size: int, rate: float) -> None:
    """Weights: the table's times batch/256; biases and BatchNorm: .0048 times batch/256."""
    rates = peak_rates("lars", batch_size)
    assert rates.weights == pytest.approx(rate * batch_size / 256)
    assert rates.biases == pytest.approx(0.0048 * batch_size / 256)


@given(st.integers(2, 20_000))
def test_between_batches_the_rate_lies_between_theirs(batch_size: int) -> None:
    """It never rises with the batch, and stays within the table beyond its ends."""
    assert 0.2 <= lars_rate(batch_size) <= 0.7
    assert lars_rate(batch_size) >= lars_rate(batch_size + 1)


def test_the_rate_between_two_batches_is_interpolated_in_logarithms() -> None:
    """The geometric mean of two batches has the geometric mean of their rates."""
    assert lars_rate(round((256 * 512) ** 0.5)) == pytest.approx((0.4 * 0.3) ** 0.5, rel=1e-3)


def test_rates_that_are_given_stay_or_scale() -> None:
    """`linear` takes them for 256 images; biases follow the weights but under LARS."""
    assert peak_rates("adamw", 128).weights == peak_rates("adamw", 4096).biases == 1e-3
    assert peak_rates("sgd", 256).weights == pytest.approx(0.12)
    given_rates = peak_rates("adamw", 1024, lr_peak=2e-3)
    assert (given_rates.weights, given_rates.biases) == (2e-3, 2e-3)
    assert peak_rates("adamw", 1024, is_linear=True).weights == pytest.approx(4e-3)
    scaled = peak_rates("sgd", 1024, lr_peak=0.1, lr_biases=0.01, is_linear=True)
    assert (scaled.weights, scaled.biases) == pytest.approx((0.4, 0.04))
    lars = peak_rates("lars", 1024, lr_peak=0.25, is_linear=True)
    assert (lars.weights, lars.biases) == pytest.approx((1.0, 0.0192))


@pytest.mark.parametrize("kind", ["adamw", "sgd", "lars"])
def test_biases_and_batchnorm_do_not_decay(kind: str) -> None:
    """One group decays and holds matrices and kernels only; every parameter is in a group."""
    network = small_network()
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
