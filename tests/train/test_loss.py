"""The loss against the paper's pseudocode, a float64 reference, and its invariances."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train.errors import TrainError
from train.loss import STANDARDISE_EPS, Form, Objective, barlow_twins_loss, loss_terms

FORMS: tuple[Form, ...] = ("direct", "gram")
OBJECTIVES: tuple[Objective, ...] = ("barlow", "hsic")


def paper_pseudocode(z_a: Tensor, z_b: Tensor, lambd: float) -> Tensor:
    """Algorithm 1 of arXiv 2103.03230, with the biased deviation its code standardises by."""
    n, d = z_a.shape
    z_a_norm = (z_a - z_a.mean(0)) / (z_a.var(0, correction=0) + STANDARDISE_EPS).sqrt()
    z_b_norm = (z_b - z_b.mean(0)) / (z_b.var(0, correction=0) + STANDARDISE_EPS).sqrt()
    c = z_a_norm.T @ z_b_norm / n
    c_diff = (c - torch.eye(d, dtype=c.dtype)).pow(2)
    off_diagonal = ~torch.eye(d, dtype=torch.bool)
    return c_diff.diagonal().sum() + lambd * c_diff[off_diagonal].sum()


def hsic_by_loops(z_a: Tensor, z_b: Tensor, lambd: float) -> Tensor:
    """Equation 5 of arXiv 2104.13712, one pair of features at a time."""
    a = (z_a - z_a.mean(0)) / (z_a.var(0, correction=0) + STANDARDISE_EPS).sqrt()
    b = (z_b - z_b.mean(0)) / (z_b.var(0, correction=0) + STANDARDISE_EPS).sqrt()
    total = torch.zeros((), dtype=z_a.dtype)
    for i in range(a.shape[1]):
        for j in range(b.shape[1]):
            c_ij = (a[:, i] * b[:, j]).mean()
            total = total + ((1 - c_ij) ** 2 if i == j else lambd * (1 + c_ij) ** 2)
    return total


REFERENCES = {"barlow": paper_pseudocode, "hsic": hsic_by_loops}


def correlated_views(n: int, d: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two views that share half of their variance, with unlike scales and means."""
    draw = torch.Generator().manual_seed(seed)
    shared, noise1, noise2 = torch.randn(3, n, d, generator=draw, dtype=torch.float64)
    views = (3 * (shared + noise1) + 1, 0.5 * (shared + noise2) - 2)
    return views[0].to(dtype), views[1].to(dtype)


def value_and_gradients(loss: object, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and both gradients, stacked."""
    assert callable(loss)
    z1, z2 = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    value = loss(z1, z2)
    return value.detach(), torch.stack(torch.autograd.grad(value, (z1, z2)))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=40)  # the first call pays for torch's start
@given(
    n=st.integers(2, 40),
    d=st.integers(1, 24),
    lambd=st.floats(1e-4, 1.0),
    seed=st.integers(0, 2**31),
)
def test_each_form_equals_the_reference_in_float64(
    form: Form, objective: Objective, n: int, d: int, lambd: float, seed: int
) -> None:
    """Value and gradient of each form are those of the formula, for any N, D and lambda."""
    z1, z2 = correlated_views(n, d, seed, torch.float64)
    expected = value_and_gradients(lambda a, b: REFERENCES[objective](a, b, lambd), z1, z2)
    found = value_and_gradients(
        lambda a, b: barlow_twins_loss(a, b, lambd=lambd, objective=objective, form=form), z1, z2
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("n", "d"), [(32, 512), (256, 128), (128, 2048)])
@pytest.mark.parametrize("form", FORMS)
def test_float32_is_within_1e_5_of_float64(
    form: Form, n: int, d: int, objective: Objective
) -> None:
    """At real sizes, float32 is within 1e-5 of float64 in value and in gradient norm."""
    z1, z2 = correlated_views(n, d, 0, torch.float64)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return barlow_twins_loss(a, b, lambd=0.005, objective=objective, form=form)

    value64, gradient64 = value_and_gradients(loss, z1, z2)
    value32, gradient32 = value_and_gradients(loss, z1.float(), z2.float())
    assert value32.dtype == torch.float32
    assert abs(value32.double() - value64) <= 1e-5 * abs(value64)
    assert (gradient32.double() - gradient64).norm() <= 1e-5 * gradient64.norm()


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_and_autocast_are_computed_in_float32(form: Form) -> None:
    """Under bfloat16 autocast the loss of float32 embeddings is the float32 loss, to the bit."""
    z1, z2 = correlated_views(16, 32, 1, torch.float32)
    plain = barlow_twins_loss(z1, z2, lambd=0.005, form=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = barlow_twins_loss(z1, z2, lambd=0.005, form=form)
        of_halves = barlow_twins_loss(z1.bfloat16(), z2.bfloat16(), lambd=0.005, form=form)
    assert torch.equal(plain, under_autocast)
    assert of_halves.dtype == torch.float32
    torch.testing.assert_close(of_halves, plain, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("form", FORMS)
def test_invariances(form: Form, objective: Objective) -> None:
    """Permuting features or samples, swapping views, scale and shift leave the loss alone."""
    z1, z2 = correlated_views(24, 10, 2, torch.float64)
    draw = torch.Generator().manual_seed(3)
    features, samples = torch.randperm(10, generator=draw), torch.randperm(24, generator=draw)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return barlow_twins_loss(a, b, lambd=0.1, objective=objective, form=form)

    expected = loss(z1, z2)
    torch.testing.assert_close(loss(z1[:, features], z2[:, features]), expected)
    torch.testing.assert_close(loss(z1[samples], z2[samples]), expected)
    torch.testing.assert_close(loss(z2, z1), expected)
    # Up to the 1e-5 that is added to each variance.
    torch.testing.assert_close(loss(7 * z1 - 3, z2 + 5), expected, rtol=1e-4, atol=1e-4)


def test_each_view_is_standardised_with_its_own_statistics() -> None:
    """Views of unlike mean and scale lose nothing: identical patterns give C_ii = 1."""
    z1 = torch.randn(64, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    terms = loss_terms(z1, 10 * z1 + 100, lambd=0.1)
    assert terms.invariance < 1e-8


@pytest.mark.parametrize("form", FORMS)
def test_a_feature_that_never_varies_gives_no_nan(form: Form) -> None:
    """A dead feature costs its diagonal 1 and its gradient is finite."""
    z1, z2 = correlated_views(16, 4, 5, torch.float32)
    z1[:, 2] = 3.0
    value, gradients = value_and_gradients(
        lambda a, b: barlow_twins_loss(a, b, lambd=0.005, form=form), z1, z2
    )
    assert torch.isfinite(value)
    assert torch.isfinite(gradients).all()
    assert value >= 1


def test_auto_takes_the_cheaper_form() -> None:
    """Below N = .75 D `auto` is the Gram form to the bit, from there on the direct one."""
    cheaper_by_n: dict[int, Form] = {23: "gram", 24: "direct"}
    for n, cheaper in cheaper_by_n.items():
        z1, z2 = correlated_views(n, 32, 6, torch.float32)
        auto = barlow_twins_loss(z1, z2, lambd=0.005)
        assert torch.equal(auto, barlow_twins_loss(z1, z2, lambd=0.005, form=cheaper))


@pytest.mark.parametrize(
    ("shape1", "shape2"), [((8, 4), (8, 5)), ((1, 4), (1, 4)), ((8,), (8,)), ((2, 3, 4), (2, 3, 4))]
)
def test_wrong_shapes_are_named(shape1: tuple[int, ...], shape2: tuple[int, ...]) -> None:
    """What is not two equal batches is refused with both shapes."""
    with pytest.raises(TrainError) as error:
        barlow_twins_loss(torch.zeros(shape1), torch.zeros(shape2), lambd=0.1)
    assert str(error.value) == (
        "embeddings of two views: expected two tensors of one shape (N, D), N at least 2, "
        f"found {shape1} and {shape2}"
    )


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-3])
def test_a_small_eps_makes_small_embeddings_as_good_as_large_ones(scale: float) -> None:
    """The value does not depend on the scale while `eps` is far below the variances."""
    z1, z2 = correlated_views(24, 10, 7, torch.float64)
    expected = barlow_twins_loss(z1, z2, lambd=0.1, eps=1e-12)
    found = barlow_twins_loss(scale * z1, scale * z2, lambd=0.1, eps=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"form": "Gram"}, "form of the loss: expected auto or direct or gram, found 'Gram'"),
        ({"objective": "x"}, "objective of the loss: expected barlow or hsic, found 'x'"),
    ],
)
def test_an_unknown_name_is_refused(names: dict[str, str], message: str) -> None:
    """No form or objective passes for another."""
    z = torch.eye(4)
    with pytest.raises(TrainError) as error:
        barlow_twins_loss(z, z, lambd=0.1, **names)  # type: ignore[arg-type]  # the point
    assert str(error.value) == message


def test_the_parts_make_the_loss() -> None:
    """Redundancy is weighted already."""
    z1, z2 = correlated_views(24, 10, 8, torch.float64)
    some, more = (loss_terms(z1, z2, lambd=lambd) for lambd in (0.1, 0.2))
    assert torch.equal(some.loss, some.invariance + some.redundancy)
    torch.testing.assert_close(more.redundancy, 2 * some.redundancy)
