"""Softmax regression: that it reaches the optimum, and how C is chosen."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import command
from train.errors import TrainError
from train.probe.softmax import (
    GRADIENT_TOLERANCE,
    SoftmaxModel,
    choose_c,
    fit_softmax,
    loss_and_gradient,
    standardisation,
)
from train.probe.softmax_sgd import fit_sgd


def some_data(n: int, dim: int, n_classes: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw features of unlike scale, and labels that depend on them with noise."""
    generator = torch.Generator().manual_seed(seed)
    features_ND = torch.randn(n, dim, generator=generator) * torch.logspace(-1, 1, dim) + 7
    weights_DC = torch.randn(dim, n_classes, generator=generator)
    standard_ND = (features_ND - features_ND.mean(0)) / features_ND.std(0)
    noise_NC = torch.randn(n, n_classes, generator=generator)
    return features_ND, (standard_ND @ weights_DC + noise_NC).argmax(dim=1)


def newton(features_ND: Tensor, labels_N: Tensor, n_classes: int, c: float) -> Tensor:
    """Solve the same problem by Newton's method with the whole Hessian: (D + 1, C) float64."""
    x = features_ND.double().numpy()
    x = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0).mean())
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    n, d = x.shape
    penalty = np.repeat(np.append(np.ones(d - 1), 0.0) / (c * n), n_classes)
    y = np.eye(n_classes)[labels_N.numpy()]
    w = np.zeros((d, n_classes))
    for _ in range(50):
        p = np.exp(x @ w - (x @ w).max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        gradient = (x.T @ (p - y) / n).ravel() + penalty * w.ravel()
        inner = np.einsum("nc,ce->nce", p, np.eye(n_classes)) - np.einsum("nc,ne->nce", p, p)
        hessian = np.einsum("nd,nce,nf->dcfe", x, inner, x).reshape(w.size, w.size) / n
        # Adding one number to all biases changes nothing: the least-norm step leaves it out.
        step = np.linalg.lstsq(hessian + np.diag(penalty), gradient, rcond=1e-12)[0]
        w -= step.reshape(w.shape)
    return torch.from_numpy(w)


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_it_is_the_optimum_that_newton_finds(c: float) -> None:
    """Weights agree with those of an independent solver, in float64, and the gradient is 0."""
    features_ND, labels_N = some_data(300, 4, 3)
    model = fit_softmax(features_ND, labels_N, n_classes=3, c=c, tolerance=1e-7)
    expected = newton(features_ND, labels_N, 3, c)
    biases_C = model.biases_C - model.biases_C.mean()
    torch.testing.assert_close(model.weights_DC, expected[:-1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(biases_C, expected[-1] - expected[-1].mean(), rtol=1e-4, atol=1e-6)
    assert model.gradient_max is not None
    assert model.gradient_max <= 1e-6


def test_without_information_the_biases_are_the_frequencies() -> None:
    """The closed form: features that do not vary leave the logarithms of the class shares."""
    labels_N = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    model = fit_softmax(torch.full((100, 5), 3.7), labels_N, n_classes=3, c=1.0, tolerance=1e-7)
    assert model.weights_DC.abs().max() == 0
    shares = torch.softmax(model.biases_C, dim=0)
    torch.testing.assert_close(shares, torch.tensor([0.6, 0.3, 0.1]).double(), atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 1200),
    dim=st.integers(1, 8),
    n_classes=st.integers(2, 5),
    c=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**31),
)
def test_the_gradient_is_the_gradient(
    n: int, dim: int, n_classes: int, c: float, seed: int
) -> None:
    """Value and gradient, blocked, equal autograd's on the formula written out."""
    features_ND, labels_N = some_data(n, dim, n_classes, seed=seed)
    mean_D, scale_D = standardisation(features_ND)
    generator = torch.Generator().manual_seed(seed)
    shape = (dim + 1, n_classes)
    solution = torch.randn(shape, dtype=torch.float64, generator=generator)
    value, gradient = loss_and_gradient(
        features_ND, labels_N, solution, mean_D=mean_D, scale_D=scale_D, c=c
    )
    free = solution.clone().requires_grad_()
    x_ND = (features_ND.double() - mean_D) / scale_D
    written_out = torch.nn.functional.cross_entropy(x_ND @ free[:-1] + free[-1], labels_N)
    written_out = written_out + free[:-1].square().sum() / (2 * c * n)
    torch.autograd.backward(written_out)
    torch.testing.assert_close(value, written_out.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, free.grad, rtol=1e-9, atol=1e-11)


def test_standardisation_takes_a_constant_as_it_is() -> None:
    """Mean and deviation over all blocks; 1 where nothing varies, so that nothing explodes."""
    features_ND, _ = some_data(1300, 3, 2)
    features_ND[:, 1] = 0.1
    mean_D, scale_D = standardisation(features_ND)
    torch.testing.assert_close(mean_D, features_ND.double().mean(dim=0))
    assert scale_D[1] == 1
    expected = features_ND.double().std(dim=0, unbiased=False)
    torch.testing.assert_close(scale_D[[0, 2]], expected[[0, 2]])


def test_scale_and_offset_of_features_change_nothing() -> None:
    """Centred and scaled, equal information gives equal scores."""
    features_ND, labels_N = some_data(400, 3, 3)
    one = fit_softmax(features_ND.double(), labels_N, n_classes=3, c=1.0)
    other = fit_softmax(features_ND.double() * 1000 - 5, labels_N, n_classes=3, c=1.0)
    scores = [one.scores(features_ND.double()), other.scores(features_ND.double() * 1000 - 5)]
    torch.testing.assert_close(*scores, rtol=1e-6, atol=1e-6)


def test_what_an_encoder_made_small_stays_small() -> None:
    """From few rows: many directions without information do not drown the few that have it."""
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.arange(5).repeat(220)
    features_ND = 0.05 * torch.randn(1100, 400, generator=generator)
    features_ND[:, :4] = torch.randn(5, 4, generator=generator)[labels_N]
    features_ND[:, :4] += 0.3 * torch.randn(1100, 4, generator=generator)
    model = fit_softmax(features_ND[:50], labels_N[:50], n_classes=5, c=1.0)
    assert accuracy(model, features_ND[50:], labels_N[50:]) > 0.9


def test_c_is_chosen_on_the_held_out_rows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The best held-out accuracy wins, of equals the smallest C, and the search ends early."""
    monkeypatch.setattr(command, "LOG_EVERY_S", 0.0)
    caplog.set_level(logging.INFO, logger="horace")
    features_ND, labels_N = some_data(120, 60, 3)
    choice = choose_c(
        features_ND[:60], labels_N[:60], features_ND[60:], labels_N[60:],
        n_classes=3, grid=(100.0, 1e-6, 1e-3, 1.0, 1e4, *(10.0**k for k in range(6, 14))),
    )  # fmt: skip
    tried = dict(choice.tried)
    assert list(tried) == sorted(tried)
    assert choice.top1 == max(tried.values()) == tried[choice.c]
    assert all(top1 < choice.top1 for c, top1 in tried.items() if c < choice.c)
    assert 2 < len(tried) < 13
    said = [message.partition(" values")[0] for message in caplog.messages]
    assert list(dict.fromkeys(said))[:3] == [f"choosing C for features {n}/13" for n in range(3)]
    assert said.count(said[0]) > 1, "a value is seen to be at work"


def test_a_start_changes_the_way_and_not_the_end() -> None:
    """From another C's solution it takes fewer iterations to the same weights."""
    features_ND, labels_N = some_data(500, 6, 4)
    before = fit_softmax(features_ND, labels_N, n_classes=4, c=0.5)
    cold = fit_softmax(features_ND, labels_N, n_classes=4, c=1.0)
    warm = fit_softmax(features_ND, labels_N, n_classes=4, c=1.0, start=before)
    torch.testing.assert_close(warm.weights_DC, cold.weights_DC, rtol=1e-2, atol=1e-3)
    assert warm.iterations < cold.iterations
    assert max(warm.gradient_max or 1, cold.gradient_max or 1) <= GRADIENT_TOLERANCE


def accuracy(model: SoftmaxModel, features_ND: Tensor, labels_N: Tensor) -> float:
    """Count what a model gets right."""
    return float((model.scores(features_ND).argmax(dim=1) == labels_N).double().mean())


def test_sgd_comes_close_to_the_optimum(caplog: pytest.LogCaptureFixture) -> None:
    """The paper's recipe on fixed features ends within two points of L-BFGS."""
    caplog.set_level(logging.INFO, logger="horace")
    features_ND, labels_N = some_data(600, 6, 4)
    optimum = fit_softmax(features_ND, labels_N, n_classes=4, c=1e4)
    epochs = []

    def features_of(epoch: int) -> Tensor:
        epochs.append(epoch)
        return features_ND

    model = fit_sgd(
        features_of, labels_N, n_classes=4, epochs=20, lr=0.3, batch_size=64, weight_decay=1e-6,
        seed=0,
    )  # fmt: skip
    found = accuracy(model, features_ND, labels_N)
    assert found == pytest.approx(accuracy(optimum, features_ND, labels_N), abs=0.02)
    assert epochs == [0, *range(20)]
    assert model.c is None
    assert caplog.messages[-1].startswith("fitting a layer on features 20/20 epochs, ")


def test_correlated_features_cost_few_iterations() -> None:
    """Features that are almost one another's multiples: the factor of the Hessian undoes it."""
    generator = torch.Generator().manual_seed(0)
    common_N1 = torch.randn(2000, 1, generator=generator)
    features_ND = common_N1 + 0.01 * torch.randn(2000, 20, generator=generator)
    labels_N = ((features_ND[:, 0] - features_ND[:, 1]) > 0).long()
    model = fit_softmax(features_ND, labels_N, n_classes=2, c=1e3)
    assert model.iterations < 100
    assert accuracy(model, features_ND, labels_N) > 0.98


@pytest.mark.parametrize("c", [1e16, 1e30])
def test_features_of_low_rank_are_fitted_at_any_c(c: float) -> None:
    """What no regularisation keeps apart, rounding would make a Hessian that is not positive."""
    generator = torch.Generator().manual_seed(0)
    common_NR = torch.randn(400, 3, generator=generator)
    features_ND = common_NR.double() @ torch.randn(3, 200, generator=generator).double()
    labels_N = (common_NR[:, 0] + torch.randn(400, generator=generator) > 0).long()
    model = fit_softmax(features_ND, labels_N, n_classes=2, c=c)
    reduced = fit_softmax(common_NR, labels_N, n_classes=2, c=c)
    assert model.gradient_max is not None
    assert model.gradient_max <= GRADIENT_TOLERANCE
    found, expected = (
        torch.log_softmax(one.scores(x), 1)
        for one, x in ((model, features_ND), (reduced, common_NR))
    )
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_threads_are_given_back() -> None:
    """A fit is on one thread, what comes after it is not."""
    features_ND, labels_N = some_data(50, 3, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fit_softmax(features_ND, labels_N, n_classes=2, c=1.0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_of_a_diverged_network_are_refused(bad: float) -> None:
    """One NaN ends it in words, not in a model of NaNs."""
    features_ND, labels_N = some_data(50, 3, 2)
    features_ND[7, 1] = bad
    with pytest.raises(TrainError, match="features: expected finite numbers, found NaN or infin"):
        fit_softmax(features_ND, labels_N, n_classes=2, c=1.0)
