"""The loss against the paper's pseudocode, a float64 reference, and its invariances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from train.errors import TrainError
from train.loss import (
    STANDARDISE_EPS,
    Form,
    LossTerms,
    Normalise,
    Objective,
    Terms,
    barlow_twins_loss,
    forms,
    loss_terms,
)

FORMS: tuple[Form, ...] = ("direct", "gram", "tiled")
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


def cross_entropy_by_loops(z_a: Tensor, z_b: Tensor, lambd: float, t: float) -> Tensor:
    """The formula of section 4 of arXiv 2103.03230, one correlation at a time."""
    n, d = z_a.shape
    a = (z_a - z_a.mean(0)) / (z_a.var(0, correction=0) + STANDARDISE_EPS).sqrt()
    b = (z_b - z_b.mean(0)) / (z_b.var(0, correction=0) + STANDARDISE_EPS).sqrt()
    c = a.T @ b / n
    attraction = sum((torch.exp(c[i, i] / t) for i in range(d)), torch.zeros(()))
    repulsion = sum(
        (torch.exp(c[i, j].clamp(min=0) / t) for i in range(d) for j in range(d) if i != j),
        torch.zeros(()),
    )
    return -attraction.log() + lambd * repulsion.log()


REFERENCES = {"barlow": paper_pseudocode, "hsic": hsic_by_loops}


def correlated_views(n: int, d: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two views that share half of their variance, with unlike scales and means."""
    draw = torch.Generator().manual_seed(seed)
    shared, noise1, noise2 = torch.randn(3, n, d, generator=draw, dtype=torch.float64)
    views = (3 * (shared + noise1) + 1, 0.5 * (shared + noise2) - 2)
    return views[0].to(dtype), views[1].to(dtype)


def value_and_gradients(
    loss: Callable[[Tensor, Tensor], Tensor], z1: Tensor, z2: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss and both gradients, stacked."""
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
@pytest.mark.parametrize("normalise", ["batch", "none"])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("n", "d"), [(9, 21), (4, 5)])
def test_strips_of_a_gram_matrix_are_the_whole(
    monkeypatch: pytest.MonkeyPatch,
    objective: Objective,
    normalise: Normalise,
    wanted: tuple[bool, bool],
    n: int,
    d: int,
) -> None:
    """Strips that do and do not divide the rows, and one gradient alone."""
    views = correlated_views(n, d, 0, torch.float64)

    def run() -> list[Tensor | None]:
        own = [z.clone().requires_grad_(wants) for z, wants in zip(views, wanted, strict=True)]
        found = loss_terms(*own, lambd=0.1, objective=objective, normalise=normalise, form="gram")
        found.loss.backward()
        return [found.loss.detach(), found.redundancy, found.diagonal_mean, *(z.grad for z in own)]

    expected = run()
    monkeypatch.setattr("train.loss.exact.STRIP_ROWS", 2)
    for ours, whole in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_scale_reaches_gradients_below_half_precision(form: Form) -> None:
    """The factor on the loss is applied in float32: float16 loses nothing it can hold."""
    z1, z2 = (1000 * z for z in correlated_views(16, 8, 20, torch.float32))
    expected = value_and_gradients(
        lambda a, b: barlow_twins_loss(a, b, lambd=0.1, form=form) * 1e-7, z1.half(), z2.half()
    )[1]
    assert not expected.any()  # below what float16 can hold
    scaled = value_and_gradients(
        lambda a, b: barlow_twins_loss(a, b, lambd=0.1, form=form) * 1e-7 * 2**24,
        z1.half(), z2.half(),
    )[1]  # fmt: skip
    exact = value_and_gradients(
        lambda a, b: barlow_twins_loss(a, b, lambd=0.1, form=form),
        z1.half().float(), z2.half().float(),
    )[1]  # fmt: skip
    assert scaled.dtype == torch.float16
    assert (scaled.float() / (1e-7 * 2**24) - exact).norm() <= 2e-3 * exact.norm()


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
    ("shape1", "shape2"),
    [((8, 4), (8, 5)), ((1, 4), (1, 4)), ((8,), (8,)), ((2, 3, 4), (2, 3, 4)), ((8, 0), (8, 0))],
)
def test_wrong_shapes_are_named(shape1: tuple[int, ...], shape2: tuple[int, ...]) -> None:
    """What is not two equal batches is refused with both shapes."""
    with pytest.raises(TrainError) as error:
        barlow_twins_loss(torch.zeros(shape1), torch.zeros(shape2), lambd=0.1)
    assert str(error.value) == (
        "embeddings of two views: expected two tensors of one shape (N, D), N at least 2 and D at "
        f"least 1, found {shape1} and {shape2}"
    )


def test_cross_entropy_needs_two_features() -> None:
    """Of one there is no off-diagonal to push apart, and the loss would be -inf."""
    z1, z2 = correlated_views(8, 1, 0, torch.float32)
    with pytest.raises(TrainError, match=r"N at least 2 and D at least 2, found \(8, 1\) and"):
        barlow_twins_loss(z1, z2, lambd=0.1, objective="cross-entropy")


@pytest.mark.parametrize("objective", [*OBJECTIVES, "cross-entropy"])
@pytest.mark.parametrize(
    ("dtype1", "dtype2", "common"),
    [
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
def test_views_of_two_dtypes_have_a_common_one(
    dtype1: torch.dtype, dtype2: torch.dtype, common: torch.dtype, objective: Objective
) -> None:
    """In every form, whichever comes first; each view's gradient has the dtype of the view."""
    z1, z2 = correlated_views(8, 4, 21, torch.float64)
    for first, second in ((z1.to(dtype1), z2.to(dtype2)), (z1.to(dtype2), z2.to(dtype1))):
        expected = barlow_twins_loss(
            first.to(common), second.to(common), lambd=0.1, objective=objective
        )
        for form in FORMS if objective in OBJECTIVES else ("direct",):
            views = [z.clone().requires_grad_() for z in (first, second)]
            found = barlow_twins_loss(*views, lambd=0.1, objective=objective, form=form)
            assert found.dtype == common
            torch.testing.assert_close(found, expected)
            for view, gradient in zip(views, torch.autograd.grad(found, views), strict=True):
                assert gradient.dtype == view.dtype


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
        (
            {"form": "Gram"},
            "form of the loss: expected auto or direct or gram or tiled, found 'Gram'",
        ),
        (
            {"objective": "x"},
            "objective of the loss: expected barlow or hsic or cross-entropy, found 'x'",
        ),
        (
            {"terms": "none"},
            "terms of the loss: expected both or invariance or redundancy, found 'none'",
        ),
        (
            {"normalise": "l2"},
            "normalise of the loss: expected batch or features or none, found 'l2'",
        ),
        (
            {"objective": "cross-entropy", "form": "gram"},
            "form gram of the loss: expected auto or direct for cross-entropy with normalise "
            "batch; the other forms are for barlow and hsic with normalise batch or none",
        ),
        (
            {"normalise": "features", "form": "tiled"},
            "form tiled of the loss: expected auto or direct for barlow with normalise "
            "features; the other forms are for barlow and hsic with normalise batch or none",
        ),
    ],
)
def test_what_does_not_exist_is_refused(names: dict[str, str], message: str) -> None:
    """No name passes for another, and a form that cannot be is not silently replaced."""
    z = torch.eye(4)
    with pytest.raises(TrainError) as error:
        loss_terms(z, z, lambd=0.1, **names)  # type: ignore[arg-type]  # the point
    assert str(error.value) == message


def test_the_parts_make_the_loss() -> None:
    """Redundancy is weighted already."""
    z1, z2 = correlated_views(24, 10, 8, torch.float64)
    some, more = (loss_terms(z1, z2, lambd=lambd) for lambd in (0.1, 0.2))
    assert torch.equal(some.loss, some.invariance + some.redundancy)
    torch.testing.assert_close(more.redundancy, 2 * some.redundancy)


@pytest.mark.parametrize("form", FORMS)
def test_tiles_that_do_not_divide_d_change_nothing(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows of C at a time, of ten."""
    monkeypatch.setattr(forms, "TILE_BYTES", 3 * 10 * 8)
    z1, z2 = correlated_views(24, 10, 9, torch.float64)
    expected = value_and_gradients(lambda a, b: paper_pseudocode(a, b, 0.2), z1, z2)
    found = value_and_gradients(lambda a, b: barlow_twins_loss(a, b, lambd=0.2, form=form), z1, z2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("terms", ["both", "invariance", "redundancy"])
@pytest.mark.parametrize("normalise", ["batch", "none", "features"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ablations_are_what_their_formulas_say(
    objective: Objective, normalise: Normalise, terms: Terms
) -> None:
    """Terms and normalisations, written out, in every form that there is."""
    z1, z2 = correlated_views(20, 7, 10, torch.float64)

    def normalised(z: Tensor) -> Tensor:
        centred = z - z.mean(0)
        if normalise == "none":
            return centred
        a = centred / (centred.square().mean(0) + STANDARDISE_EPS).sqrt()
        if normalise == "batch":
            return a
        return a / (a.square().mean(1, keepdim=True) + STANDARDISE_EPS).sqrt()

    def written_out(z1: Tensor, z2: Tensor) -> Tensor:
        c = normalised(z1).T @ normalised(z2) / len(z1)
        off = c[~torch.eye(7, dtype=torch.bool)] + (objective == "hsic")
        invariance, redundancy = (1 - c.diagonal()).square().sum(), 0.3 * off.square().sum()
        return (terms != "redundancy") * invariance + (terms != "invariance") * redundancy

    expected = value_and_gradients(written_out, z1, z2)
    for form in ("auto", "direct") if normalise == "features" else FORMS:
        found = value_and_gradients(
            lambda a, b, form=form: (
                loss_terms(
                    a,
                    b,
                    lambd=0.3,
                    objective=objective,
                    form=form,
                    terms=terms,
                    normalise=normalise,
                ).loss
            ),
            z1,
            z2,
        )
        torch.testing.assert_close(found, expected)


def test_features_lie_on_a_sphere_on_which_the_target_can_be_reached() -> None:
    """Equal views of equally strong samples have a diagonal of 1 on average."""
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    terms = loss_terms(z, z, lambd=0.1, normalise="features")
    torch.testing.assert_close(terms.diagonal_mean.item(), 1.0, rtol=1e-4, atol=0)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_cross_entropy_is_the_papers(temperature: float) -> None:
    """-log sum exp(C_ii / t) + lambda log sum exp(max(C_ij, 0) / t), and its two terms."""
    z1, z2 = correlated_views(20, 6, 12, torch.float64)

    def ours(terms: Terms) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda a, b: (
            loss_terms(
                a, b, lambd=0.4, objective="cross-entropy", temperature=temperature, terms=terms
            ).loss
        )

    expected = value_and_gradients(
        lambda a, b: cross_entropy_by_loops(a, b, 0.4, temperature), z1, z2
    )
    found = value_and_gradients(ours("both"), z1, z2)
    torch.testing.assert_close(found, expected)
    parts = ours("invariance")(z1, z2) + ours("redundancy")(z1, z2)
    torch.testing.assert_close(parts, expected[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("d", [1, 12])
def test_what_is_logged_is_of_c_itself(form: Form, d: int) -> None:
    """Mean and error of the diagonal, RMS of the off-diagonal, and its floor."""
    z1, z2 = correlated_views(400, d, 13, torch.float64)
    a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + STANDARDISE_EPS).sqrt() for z in (z1, z2))
    c = a.T @ b / 400
    off = c[~torch.eye(d, dtype=torch.bool)]
    terms = loss_terms(z1, z2, lambd=0.1, form=form)
    torch.testing.assert_close(terms.diagonal_mean, c.diagonal().mean())
    torch.testing.assert_close(terms.diagonal_error, (1 - c.diagonal()).square().mean())
    torch.testing.assert_close(terms.invariance / d, terms.diagonal_error)
    assert terms.off_diagonal_floor == 0.05
    if d > 1:
        torch.testing.assert_close(terms.off_diagonal_rms, off.square().mean().sqrt())
        assert terms.off_diagonal_rms == pytest.approx(terms.off_diagonal_floor, rel=0.3)
    else:
        assert terms.off_diagonal_rms < 1e-6


def test_only_the_loss_has_a_gradient() -> None:
    """The parts are for logs."""
    z1, z2 = correlated_views(8, 4, 14, torch.float32)
    terms = loss_terms(z1.requires_grad_(), z2, lambd=0.1)
    lazy = [terms.diagonal_mean, terms.diagonal_error, terms.off_diagonal_rms]
    parts = [value for value in (*vars(terms).values(), *lazy) if isinstance(value, Tensor)]
    assert [part.requires_grad for part in parts] == [True] + [False] * (len(parts) - 1)


@pytest.mark.parametrize("form", FORMS)
def test_a_view_without_gradient_costs_the_other_nothing(form: Form) -> None:
    """Stop-gradient: the gradient by one view is the same, the other has none."""
    z1, z2 = correlated_views(16, 8, 15, torch.float64)
    _, both = value_and_gradients(
        lambda a, b: barlow_twins_loss(a, b, lambd=0.1, form=form), z1, z2
    )
    for i, held in ((0, z2), (1, z1)):
        leaf = (z1, z2)[i].clone().requires_grad_()
        pair = (leaf, held) if i == 0 else (held, leaf)
        (one,) = torch.autograd.grad(barlow_twins_loss(*pair, lambd=0.1, form=form), leaf)
        assert torch.equal(one, both[i])


@pytest.mark.parametrize("form", FORMS)
def test_backward_scales_repeats_and_is_not_differentiated(form: Form) -> None:
    """A factor on the loss is one on the gradient; backward twice adds; no second derivative."""
    z1, z2 = correlated_views(16, 8, 16, torch.float64)
    leaf = z1.clone().requires_grad_()
    loss = barlow_twins_loss(leaf, z2, lambd=0.1, form=form)
    (once,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    once = once.clone()
    (tripled,) = torch.autograd.grad(3 * loss, leaf, retain_graph=True)
    torch.testing.assert_close(tripled, 3 * once)
    torch.autograd.backward(loss, retain_graph=True)
    torch.autograd.backward(loss)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, 2 * once)
    loss = barlow_twins_loss(leaf, z2, lambd=0.1, form=form)
    with pytest.raises(TrainError) as error:
        torch.autograd.grad(loss, leaf, create_graph=True)
    assert str(error.value) == (
        "a derivative of the loss's gradient: expected first derivatives only, found "
        "create_graph=True; leave it out, or differentiate the formula written out"
    )


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest result of any operation had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it gave."""
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.numel())
        return results


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("form", "n", "d", "bound"),
    [("gram", 16, 256, 3 * 16 * 256), ("tiled", 16, 256, 32 * 256), ("direct", 16, 256, 256 * 256)],
)
def test_no_form_makes_anything_larger_than_it_says(
    form: Form, n: int, d: int, bound: int, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gram: both views and a gradient, of one piece; tiled: beyond a tile; direct: beyond C."""
    monkeypatch.setattr(forms, "TILE_BYTES", 32 * d * 4)
    z1, z2 = correlated_views(n, d, 17, torch.float32)
    with LargestTensor() as largest:
        value_and_gradients(
            lambda a, b: barlow_twins_loss(a, b, lambd=0.1, form=form, objective=objective), z1, z2
        )
    assert largest.elements == bound


@pytest.mark.parametrize("form", FORMS)
def test_little_is_kept_for_backward(form: Form) -> None:
    """Between forward and backward two gradients, and of small ones a third matrix, are held."""
    z1, z2 = correlated_views(16, 64, 18, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        barlow_twins_loss(z1.requires_grad_(), z2.requires_grad_(), lambd=0.1, form=form)
    assert [t.shape for t in kept] == [(16, 64), (16, 64)]
    assert bytes_held(kept) == (3 if form == "gram" else 2) * 16 * 64 * 4


def bytes_held(tensors: list[Tensor]) -> int:
    """How much memory tensors hold, which may share some of it."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("form", ["direct", "tiled"])
def test_larger_gradients_hold_no_more_than_themselves(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one alone, of any size, in the Gram form."""
    one, _ = (z.requires_grad_() for z in correlated_views(16, 64, 18, torch.float32))
    other = one.detach().roll(1, 0)
    barlow_twins_loss(one, other, lambd=0.1, form="gram").backward()
    assert one.grad is not None
    assert bytes_held([one.grad]) == 2 * 16 * 64 * 4
    monkeypatch.setattr("train.loss.exact.KEPT_BYTES", 0)
    for z1, z2 in ((one, other), (other, one)):
        one.grad = None
        barlow_twins_loss(z1, z2, lambd=0.1, form=form).backward()
        assert bytes_held([one.grad]) == 16 * 64 * 4


def slice_of_columns(z: Tensor) -> Tensor:
    """As one half of a projector's output is."""
    return torch.cat([z, z + 1], dim=1)[:, : z.shape[1]]


def one_of_a_stack(z: Tensor) -> Tensor:
    """As one view of (N, 2, D) is."""
    return torch.stack([z, z + 1], dim=1)[:, 0]


def transposed(z: Tensor) -> Tensor:
    """Columns that are contiguous."""
    return z.T.contiguous().T


@pytest.mark.parametrize("layout", [slice_of_columns, one_of_a_stack, transposed])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_strides_do_not_matter(
    form: Form, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    """Embeddings that are part of another tensor, or its transpose; to the bit."""
    z1, z2 = (3 + z for z in correlated_views(13, 21, 20, dtype))

    def run(*views: Tensor) -> tuple[Tensor, ...]:
        for z in views:
            z.requires_grad_()
        loss = barlow_twins_loss(*views, lambd=0.1, form=form)
        return loss, *torch.autograd.grad(loss, views)

    strided = (layout(z1), layout(z2))
    assert not strided[0].is_contiguous()
    for found, expected in zip(run(*strided), run(z1, z2), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("form", FORMS)
def test_without_gradients_nothing_is_made_for_them(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under no_grad the value is the same, to the bit."""
    z1, z2 = (z.requires_grad_() for z in correlated_views(16, 8, 19, torch.float32))
    expected: LossTerms = loss_terms(z1, z2, lambd=0.1, form=form)
    monkeypatch.setattr("train.loss.exact.add_times_transposed", None)  # makes gradients only
    with torch.no_grad():
        found = loss_terms(z1, z2, lambd=0.1, form=form)
    assert torch.equal(found.loss, expected.loss)
    assert not found.loss.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_gradients_can_be_changed_in_place(form: Form) -> None:
    """They are nobody's views, whatever memory they share."""
    z1, z2 = (z.requires_grad_() for z in correlated_views(16, 8, 19, torch.float32))
    loss = barlow_twins_loss(z1, z2, lambd=0.1, form=form)
    for gradient in torch.autograd.grad(loss, (z1, z2)):
        factor = torch.ones((), requires_grad=True)
        gradient.detach_().mul_(factor)
        assert gradient.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu_it_is_the_same(form: Form, objective: Objective) -> None:
    """Value and gradient on CUDA are within 1e-5 of float64, under bfloat16 autocast, too."""
    z1, z2 = correlated_views(64, 256, 21, torch.float64)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return barlow_twins_loss(a, b, lambd=0.1, form=form, objective=objective)

    value64, gradient64 = value_and_gradients(loss, z1, z2)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        value, gradient = value_and_gradients(loss, z1.float().cuda(), z2.float().cuda())
    assert abs(value.double().cpu() - value64) <= 1e-5 * abs(value64)
    assert (gradient.double().cpu() - gradient64).norm() <= 1e-5 * gradient64.norm()
