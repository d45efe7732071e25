"""Between the wire's messages and Horace's own values: vectors, images and statuses.

Shared by the server, its client and the remote encoder, so that each of the three reads
what the others write. It knows messages only: no channel, no status code of gRPC.
"""

from __future__ import annotations

from os import PathLike
from typing import cast

import numpy as np
from numpy.typing import NDArray

from models.errors import ImageError, ImageFault, UsageError
from models.vectors import PackedVectors, pack_vectors, unpack_vectors
from protos import horace_pb2 as pb

DTYPES: dict[str, pb.DType] = {"fp32": pb.FP32, "fp16": pb.FP16, "int8": pb.INT8}
DTYPE_NAMES = {code: name for name, code in DTYPES.items()} | {pb.DTYPE_UNSPECIFIED: "fp32"}

ITEM_CODES: dict[ImageFault, pb.ItemCode] = {
    fault: cast(pb.ItemCode, pb.ItemCode.Value(fault.name)) for fault in ImageFault
}


def dtype_from_wire(code: pb.DType) -> str:
    """Name a wire dtype as `models.vectors` does.

    Raises:
        UsageError: a later version's code.
    """
    if code not in DTYPE_NAMES:
        raise UsageError("dtype", expected=" or ".join(DTYPES), found=f"code {code}")
    return DTYPE_NAMES[code]


def vectors_to_wire(vectors_ND: NDArray[np.float32], dtype: str = "fp32") -> pb.Vectors:
    """Pack (N, D) float32 vectors as `fp32`, `fp16` or `int8`."""
    packed = pack_vectors(vectors_ND, dtype)
    rows, dim = packed.shape
    return pb.Vectors(
        data=packed.data, dtype=DTYPES[dtype], rows=rows, dim=dim, scales=packed.scales
    )


def vectors_from_wire(message: pb.Vectors) -> NDArray[np.float32]:
    """Unpack a message to (N, D) float32.

    Raises:
        UsageError: its bytes, shape, dtype or scales do not agree.
    """
    dtype, count = dtype_from_wire(message.dtype), len(message.scales)
    if count != (message.rows if dtype == "int8" else 0):
        expected = f"{message.rows}, one a row" if dtype == "int8" else "none"
        raise UsageError(f"{dtype} scales", expected=expected, found=str(count))
    return unpack_vectors(
        PackedVectors(
            data=message.data,
            dtype=dtype,
            shape=(message.rows, message.dim),
            scales=tuple(message.scales),
        )
    )


def image_to_wire(image: bytes | NDArray[np.uint8]) -> pb.Image:
    """Wrap an encoded file, or (H, W) or (H, W, C) uint8 pixels.

    Raises:
        UsageError: something else, or an array of another dtype or rank.
    """
    check_image(image)
    if not isinstance(image, np.ndarray):
        return pb.Image(encoded=bytes(image))
    height, width = image.shape[:2]
    channels = 1 if image.ndim == 2 else image.shape[2]
    raw = pb.RawImage(pixels=image.tobytes(), height=height, width=width, channels=channels)
    return pb.Image(raw=raw)


def check_image(image: object) -> None:
    """Refuse what `image_to_wire` cannot wrap; nothing is copied.

    Raises:
        UsageError: it is neither bytes nor an array, or an array of another dtype or rank.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return
    if not isinstance(image, np.ndarray):
        shown = " ".join(repr(image).split())  # a tensor's has several lines
        raise UsageError(
            "image",
            expected="the bytes of a file, or a uint8 array",
            found=f"{type(image).__name__} {shown:.80}",
            mend=mend_image(image),
        )
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise UsageError(
            "image array",
            expected="(H, W) or (H, W, C) uint8",
            found=f"{image.shape} {image.dtype}",
        )


def mend_image(image: object) -> str | None:
    """Say how a path, Pillow's picture or another library's array becomes an image or a vector.

    None where it is nothing of the kind. Nothing is asked of it: that may decode a picture.
    """
    kind = type(image)
    if isinstance(image, str | PathLike):
        return "read the file with Path(...).read_bytes()"
    if hasattr(kind, "__array_interface__") and hasattr(kind, "convert"):
        return "take its file's bytes, or np.asarray(image.convert('RGB'))"
    if hasattr(kind, "__array__") and not isinstance(image, np.ndarray | np.generic):
        return "take np.asarray(...) of it"
    return None


def image_from_wire(message: pb.Image) -> bytes | NDArray[np.uint8]:
    """Give an encoded file as bytes, raw pixels as (H, W, C) uint8; both are copied once.

    Raises:
        ImageError: no image is set, or pixels and shape do not agree.
    """
    kind = message.WhichOneof("source")
    if kind == "encoded":
        return message.encoded
    if kind is None:
        raise ImageError(ImageFault.EMPTY, "image", expected="encoded or raw", found="neither")
    raw = message.raw
    pixels = raw.pixels  # every access copies
    shape = (raw.height, raw.width, raw.channels)
    expected = raw.height * raw.width * raw.channels
    if expected != len(pixels) or expected == 0:
        raise ImageError(
            ImageFault.WRONG_SHAPE,
            f"raw image of shape {shape}",
            expected=f"{expected} bytes" if expected else "a positive size",
            found=f"{len(pixels)} bytes",
        )
    return np.frombuffer(pixels, dtype=np.uint8).reshape(shape)


def image_error_to_wire(error: ImageError) -> pb.ItemStatus:
    """Say what is wrong with one image."""
    return pb.ItemStatus(code=ITEM_CODES[error.fault], message=str(error))
