"""The products of the loss, by the fastest exact float32 kernels of the machine.

Rules:
    Products of float32 are float32 whatever the caller allows elsewhere, by
    `torch.set_float32_matmul_precision`, `allow_tf32` or `fp32_precision`: neither TF32 nor
    bfloat16. What the caller had set is as it was afterwards.

On a CPU torch multiplies float32 matrices by MKL, which on AMD's processors stays with AVX2
where oneDNN, the other library that torch carries, uses AVX-512; without AVX-512, and on
Intel's processors, MKL is the faster. Both add in float32. torch reaches oneDNN's plain product
only through the operator that `torch.compile` uses. Where that is not there, and on any other
device or dtype, this is `x @ w.T`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from models.cpu import cpu_name

ONEDNN_IS_FASTER: bool = (
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    and "Intel" not in cpu_name()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def times_transposed(x_PK: Tensor, w_QK: Tensor, *, out_PQ: Tensor | None = None) -> Tensor:
    """Compute x w^T, without a gradient.

    Args:
        x_PK: (P, K).
        w_QK: (Q, K); copied for oneDNN unless it is contiguous, or the transpose of what is: with
            other strides that takes minutes.
        out_PQ: where to; None for new memory.
    """
    with full_precision(x_PK.device):
        if not _is_for_onednn(x_PK):
            return torch.mm(x_PK, w_QK.T, out=out_PQ)
        if not (w_QK.is_contiguous() or w_QK.T.is_contiguous()):
            w_QK = w_QK.contiguous()
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x_PK.contiguous(), w_QK, None, "none", [], ""
        )
        return product if out_PQ is None else out_PQ.copy_(product)


def add_times_transposed(out_PQ: Tensor, x_PK: Tensor, w_QK: Tensor) -> None:
    """Add x w^T to `out`, (P, Q), in place; the rest is as with `times_transposed`."""
    if _is_for_onednn(x_PK):
        out_PQ += times_transposed(x_PK, w_QK)
        return
    with full_precision(x_PK.device):
        out_PQ.addmm_(x_PK, w_QK.T)


def _is_for_onednn(x: Tensor) -> bool:
    """Say whether oneDNN is the one to multiply it."""
    return ONEDNN_IS_FASTER and x.device.type == "cpu" and x.dtype == torch.float32


MOST_ROWS_IN_ORDER = 512
"""Up to which a column is added number by number in float32; more lose digits that way."""


def column_dots(x_nD: Tensor, y_nD: Tensor) -> Tensor:
    """Compute the inner product of each column of `x` with that of `y`, without a gradient.

    Of few rows on a CPU in one pass and without a temporary: it is what BatchNorm's backward pass
    sums for its weights when it is told of a mean of 0 and a deviation of 1. That adds in order,
    where torch's own sum adds in a tree.
    """
    if x_nD.device.type != "cpu" or len(x_nD) > MOST_ROWS_IN_ORDER:
        return (x_nD * y_nD).sum(dim=0)
    mean_D, scale_D = x_nD.new_zeros(x_nD.shape[1]), x_nD.new_ones(x_nD.shape[1])
    # The gradient, the input, nothing learnt or running, mean, 1 / deviation; only of the weights.
    _, dots_D, _ = torch.ops.aten.native_batch_norm_backward(
        x_nD, y_nD, None, None, None, mean_D, scale_D, True, 0.0, [False, True, False]
    )
    return dots_D  # type: ignore[no-any-return]  # torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Hold float32 products on a CPU or a GPU of CUDA to float32; takes some microseconds.

    The setting is one of the whole process, so that other threads multiply exactly meanwhile.
    It is the backend's own, which the kernels ask: torch's older ones only set it, and refuse
    to be read where it was set by itself.
    """
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    before = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        # What was read may be the setting of all backends, which "none" goes on following.
        backend.matmul.fp32_precision = "none"
        if backend.matmul.fp32_precision != before:
            backend.matmul.fp32_precision = before
