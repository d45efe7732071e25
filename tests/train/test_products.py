"""The products of the loss against float64, fast way and plain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.loss import barlow_twins_loss, products
from train.loss.forms import Form
from train.loss.products import (
    add_times_transposed,
    column_dots,
    full_precision,
    times_transposed,
)

SIZES = st.integers(1, 70)


@settings(deadline=None)
@given(p=SIZES, k=SIZES, q=SIZES, is_transposed=st.booleans(), seed=st.integers(0, 999))
def test_it_is_the_product(p: int, k: int, q: int, is_transposed: bool, seed: int) -> None:
    """Within rounding of float32, for either layout of the second matrix."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(p, k, generator=draw)
    w = torch.randn(k, q, generator=draw).T if is_transposed else torch.randn(q, k, generator=draw)
    exact = x.double() @ w.double().T
    found = times_transposed(x, w)
    assert found.dtype == torch.float32
    assert (found - exact).norm() <= 1e-6 * (1 + exact.norm())
    wider = torch.ones(p, q + 2)
    assert torch.equal(times_transposed(x, w, out_PQ=wider[:, 1:-1]), wider[:, 1:-1])
    assert (wider[:, 1:-1] - exact).norm() <= 1e-6 * (1 + exact.norm())
    wider.fill_(1)
    add_times_transposed(wider[:, 1:-1], x, w)
    assert (wider[:, 1:-1] - 1 - exact).norm() <= 1e-6 * (1 + exact.norm())
    assert torch.equal(wider[:, [0, -1]], torch.ones(p, 2))


@settings(deadline=None)
@given(n=SIZES, d=SIZES, dtype=st.sampled_from([torch.float32, torch.float64]), seed=SIZES)
def test_column_dots_are_sums_of_products(n: int, d: int, dtype: torch.dtype, seed: int) -> None:
    """Of columns whose means are not zero, too."""
    draw = torch.Generator().manual_seed(seed)
    x, y = (1 + torch.randn(n, d, dtype=dtype, generator=draw) for _ in range(2))
    exact = (x.double() * y.double()).sum(dim=0)
    found = column_dots(x, y)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


def test_column_dots_of_many_rows_lose_no_digits() -> None:
    """Numbers of one sign, of which float32 added in order would lose four digits."""
    x = torch.full((65536, 4), 1.1)
    exact = (x.double() * x.double()).sum(dim=0)
    torch.testing.assert_close(column_dots(x, x).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_strides_and_dtypes_take_the_plain_way(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice of columns, float64, or a torch without oneDNN: the same product."""
    x = torch.randn(9, 12, dtype=dtype, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(times_transposed(x[:, 2:7], x[:, 2:7]), x[:, 2:7] @ x[:, 2:7].T)
    monkeypatch.setattr(products, "ONEDNN_IS_FASTER", False)
    assert torch.equal(times_transposed(x, x), x @ x.T)
    out = torch.ones(9, 9, dtype=dtype)
    add_times_transposed(out, x, x)
    torch.testing.assert_close(out, 1 + x @ x.T)


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Let torch multiply float32 as a caller may have asked for."""
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("has_onednn", [True, False], ids=["fast", "plain"])
def test_a_product_is_float32_whatever_the_caller_allows(
    has_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, also on a CPU that multiplies in bfloat16; the setting stays the caller's."""
    monkeypatch.setattr(products, "ONEDNN_IS_FASTER", products.ONEDNN_IS_FASTER and has_onednn)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    expected = times_transposed(x, x)
    with matmul_precision("medium"):
        assert torch.equal(times_transposed(x, x), expected)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


@pytest.mark.parametrize("form", ["gram", "direct", "tiled"])
def test_the_loss_does_not_depend_on_the_callers_precision(form: Form) -> None:
    """Value and gradient, to the bit."""

    def value_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        z = torch.randn(2, 64, 96, generator=torch.Generator().manual_seed(0), requires_grad=True)
        loss = barlow_twins_loss(z[0], z[1], lambd=0.005, form=form)
        return loss.detach(), torch.autograd.grad(loss, z)[0]

    expected = value_and_gradient()
    with matmul_precision("medium"):
        found = value_and_gradient()
    assert all(map(torch.equal, found, expected))


def test_a_setting_of_all_backends_is_followed_as_before() -> None:
    """It is not written into the backend's own, where a later change would not reach it."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "none"
    try:
        with torch.backends.flags(fp32_precision="bf16"):
            with full_precision(torch.device("cpu")):
                assert matmul.fp32_precision == "ieee"
            assert matmul.fp32_precision == "bf16"
        assert matmul.fp32_precision == "none"
    finally:
        matmul.fp32_precision = before


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Please use the new API settings")  # of torch 2.9
def test_a_product_on_a_gpu_is_not_in_tf32() -> None:
    """TF32, which the caller may allow, has 10 bits of a significand."""
    x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    exact, given = x.double() @ x.double().T, x.cuda()
    with matmul_precision("high"):
        found = times_transposed(given, given).cpu()
        assert torch.get_float32_matmul_precision() == "high"
    assert (found - exact).norm() <= 1e-6 * exact.norm()
