"""What happens to an embedding between the encoder and its reader: cut, normalise, pack.

Rules:
    The order is truncate, then normalise, then quantise: a truncated vector that is not
    normalised again has the wrong cosine (infinity#538).
    One implementation serves the server, index building and evaluation, so that a vector
    is the same to the bit wherever it was made.

Shapes: N vectors, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.errors import UsageError

VECTOR_DTYPES = ("fp32", "fp16", "int8")


@dataclass(frozen=True, kw_only=True)
class PackedVectors:
    """Vectors as bytes: what crosses the wire.

    Attributes:
        data: row-major little-endian values of `dtype`.
        dtype: `fp32`, `fp16` or `int8`.
        shape: (N, D).
        scales: for `int8` one float per vector: value = int8 * scale; empty otherwise.
    """

    data: bytes
    dtype: str
    shape: tuple[int, int]
    scales: tuple[float, ...] = ()


def finish_vectors(
    vectors_ND: NDArray[np.float32], *, dims: int | None = None, normalize: bool = True
) -> NDArray[np.float32]:
    """Truncate to the first `dims` dimensions, then scale each row to unit L2 norm.

    Args:
        vectors_ND: (N, D) float32, as an encoder gives them.
        dims: how many leading dimensions to keep, 1 to D; all where None.
        normalize: whether to divide by the L2 norm; a zero vector stays zero.

    Returns:
        (N, dims) float32, C-contiguous.

    Raises:
        UsageError: `dims` is outside 1 to D.
    """
    dim = vectors_ND.shape[1]
    if dims is not None and not 1 <= dims <= dim:
        raise UsageError("dims", expected=f"1 to {dim}", found=str(dims))
    kept = np.ascontiguousarray(vectors_ND[:, :dims], dtype=np.float32)
    if not normalize:
        return kept
    # In float64 throughout: a float32 norm overflows, or is zero, long before its vector.
    wide_ND = kept.astype(np.float64)
    norms = np.sqrt(np.add.reduce(wide_ND * wide_ND, axis=1, keepdims=True))
    if not norms.all():
        norms[norms == 0] = 1
    wide_ND /= norms
    return wide_ND.astype(np.float32)


def pack_vectors(vectors_ND: NDArray[np.float32], dtype: str = "fp32") -> PackedVectors:
    """Quantise (N, D) float32 vectors to `dtype` and lay them out as bytes.

    `int8` is symmetric with one scale a vector, its largest magnitude / 127.

    Raises:
        UsageError: `dtype` is none of `VECTOR_DTYPES`.
    """
    n, dim = vectors_ND.shape
    if dtype == "fp32":
        data = np.ascontiguousarray(vectors_ND, "<f4").tobytes()
        return PackedVectors(data=data, dtype=dtype, shape=(n, dim))
    if dtype == "fp16":
        return PackedVectors(data=vectors_ND.astype("<f2").tobytes(), dtype=dtype, shape=(n, dim))
    if dtype == "int8":
        scales = np.abs(vectors_ND).max(axis=1, initial=0.0) / np.float32(127)
        steps = np.where(scales == 0, np.float32(1), scales)[:, None]
        codes = np.rint(vectors_ND / steps).astype(np.int8)
        return PackedVectors(
            data=codes.tobytes(), dtype=dtype, shape=(n, dim), scales=tuple(map(float, scales))
        )
    raise UsageError("dtype", expected=" or ".join(VECTOR_DTYPES), found=repr(dtype))


def unpack_vectors(packed: PackedVectors) -> NDArray[np.float32]:
    """Read packed vectors back as (N, D) float32, C-contiguous and writable.

    Raises:
        UsageError: the dtype is unknown, or bytes and shape do not agree.
    """
    sizes = {"fp32": 4, "fp16": 2, "int8": 1}
    if packed.dtype not in sizes:
        raise UsageError("dtype", expected=" or ".join(VECTOR_DTYPES), found=repr(packed.dtype))
    n, dim = packed.shape
    expected = n * dim * sizes[packed.dtype]
    if len(packed.data) != expected:
        raise UsageError(
            f"vectors of shape ({n}, {dim}) {packed.dtype}",
            expected=f"{expected} bytes",
            found=f"{len(packed.data)} bytes",
        )
    if packed.dtype == "int8":
        if len(packed.scales) != n:
            raise UsageError(
                "int8 scales", expected=f"{n}, one a row", found=str(len(packed.scales))
            )
        codes = np.frombuffer(packed.data, dtype=np.int8).reshape(n, dim)
        return codes * np.asarray(packed.scales, dtype=np.float32)[:, None]
    kind = "<f4" if packed.dtype == "fp32" else "<f2"
    return np.frombuffer(packed.data, dtype=kind).reshape(n, dim).astype(np.float32)
