"""The matrix product of the loss against float64, fast way and plain."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.loss import products
from train.loss.products import times_transposed

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_strides_and_dtypes_take_the_plain_way(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice of columns, float64, or a torch without oneDNN: the same product."""
    x = torch.randn(9, 12, dtype=dtype, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(times_transposed(x[:, 2:7], x[:, 2:7]), x[:, 2:7] @ x[:, 2:7].T)
    monkeypatch.setattr(products, "HAS_ONEDNN", False)
    assert torch.equal(times_transposed(x, x), x @ x.T)
