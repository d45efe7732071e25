"""Images out of a request of KServe v2.

Rules:
    There is one input, `images`: UINT8 or FP32 pixels (N, H, W, C), C being 1, 3 or 4, or
    BYTES of N encoded images. Pixels of another height and width than the encoder's are
    brought to it as those of horace.v1 are.
    FP32 pixels are whole numbers from 0 to 255, exactly. Everything else is refused: a tensor
    scaled to 0..1 or normalised, which is what most mistakes look like, would give vectors
    that nothing tells from good ones. Who resizes in floating point rounds, and knows how.
    A tensor comes in raw_input_contents, in typed contents, or in shared memory.
    Lengths are held against shapes before there is room for a request, so that a shape alone
    never takes any, and nothing of a message is listed whose length was not looked at.
    What concerns one image goes on in its place.
    Pixels are read once there is room for them, and are views of one buffer.

Shapes: N images, H x W pixels, C channels.

Source: https://github.com/kserve/open-inference-protocol and Triton's binary tensor data,
in which every element of a BYTES tensor follows its length as a little-endian uint32.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from models.errors import ImageError, ImageFault
from models.image_source import ImageData
from serve.errors import RequestError
from serve.kserve.memory import find_slice
from serve.kserve.regions import OwnRegions, Slice
from serve.kserve.tensors import INPUT, ITEM_BYTES, PRECISION_DTYPES

CHANNELS = (1, 3, 4)
MAX_RANK = 4
MAX_TYPED_VALUES = 1 << 20
"""Each is a Python object on its way, 50 times what it takes as a raw byte."""
LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The images of one request.

    Attributes:
        images: read once; raises RequestError where what is read cannot be meant.
        count: how many there are.
        payload_bytes: what they take in memory, in the message and read out of it.
    """

    images: Iterator[ImageData | ImageError]
    count: int
    payload_bytes: int


def read_inputs(request: Any, regions: OwnRegions, *, max_images: int, max_bytes: int) -> Inputs:
    """Find the images of a request.

    Args:
        request: which may name shared memory.
        regions: the caller's.
        max_images: of a request.
        max_bytes: of its images in shared memory; those in a message are within its bound.

    Raises:
        RequestError: they are not what a model takes, or too many.
        UnknownNameError: they are in shared memory that is not registered.
    """
    tensor = _only_input(request)
    shape = tuple(tensor.shape[: MAX_RANK + 1])
    count = shape[0] if shape else 0
    if not 1 <= count <= max_images:
        mend = "split the request" if count > max_images else None
        raise RequestError(
            f"shape of {INPUT}",
            expected=f"1 to {max_images} images a request",
            found=str(list(shape)),
            mend=mend,
        )
    part = find_slice(tensor.parameters, regions)
    if part is not None and part.byte_size > max_bytes:
        raise RequestError(
            f"{INPUT} in shared memory",
            expected=f"at most {max_bytes} bytes",
            found=str(part.byte_size),
            mend="split the request",
        )
    if tensor.datatype == "BYTES":
        return _read_encoded(request, tensor, shape, part)
    if tensor.datatype not in PRECISION_DTYPES:
        raise RequestError(
            f"datatype of {INPUT}",
            expected="UINT8 or FP32 pixels, or BYTES of encoded images",
            found=f"{tensor.datatype[:40]!r}",
        )
    return _read_pixels(request, tensor, shape, part)


def _only_input(request: Any) -> Any:
    """Give the tensor of a request.

    Raises:
        RequestError: there are several, or one of another name.
    """
    inputs = request.inputs
    if len(inputs) != 1 or inputs[0].name != INPUT:
        names = ", ".join(f"{tensor.name[:40]!r}" for tensor in inputs[:8])
        raise RequestError("inputs", expected=f"{INPUT!r} alone", found=names or "none")
    return inputs[0]


def _read_pixels(request: Any, tensor: Any, shape: tuple[int, ...], part: Slice | None) -> Inputs:
    """Find pixels."""
    if len(shape) != 4 or min(shape) < 1 or shape[3] not in CHANNELS:
        raise RequestError(
            f"shape of {INPUT}",
            expected="(N, H, W, C), C being 1, 3 or 4",
            found=str(list(shape)),
        )
    expected = shape[0] * shape[1] * shape[2] * shape[3] * ITEM_BYTES[tensor.datatype]
    payload_bytes = 2 * expected
    if part is not None:
        found, read, payload_bytes = part.byte_size, part.read, expected
    elif request.raw_input_contents:
        read = partial(_only_raw, request)
        found = len(read())  # a copy, of which nothing else tells the length; it is let go of
    else:
        found = len(_typed_contents(tensor)) * ITEM_BYTES[tensor.datatype]
        read = partial(_typed_pixels, tensor)
    if found != expected:
        raise RequestError(
            f"contents of {INPUT} of shape {list(shape)}",
            expected=f"{expected} bytes",
            found=str(found),
        )
    images = _iterate_pixels(read, tensor.datatype, shape)
    return Inputs(images=images, count=shape[0], payload_bytes=payload_bytes)


def _iterate_pixels(
    read: Callable[[], bytes], datatype: str, shape: tuple[int, ...]
) -> Iterator[ImageData | ImageError]:
    """Read a tensor of pixels; give its images."""
    pixels_NHWC = np.frombuffer(read(), PRECISION_DTYPES[datatype]).reshape(shape)
    if datatype == "UINT8":
        yield from pixels_NHWC
        return
    for image in pixels_NHWC:
        try:
            yield _whole_pixels(image)
        except ImageError as error:
            yield error


def _whole_pixels(image: Any) -> Any:
    """Bring float pixels to uint8, exactly.

    Raises:
        ImageError: some are not whole numbers from 0 to 255.
    """
    with np.errstate(invalid="ignore"):  # what does not fit is found by the comparison
        whole = image.astype(np.uint8)
    wrong = whole != image
    if wrong.any():
        raise ImageError(
            ImageFault.UNREADABLE,
            "FP32 pixels",
            expected="whole numbers from 0 to 255",
            found=f"{image[wrong][0]:g}",
            mend="send pixels as they are in the image, neither scaled nor normalised",
        )
    return whole


def _typed_contents(tensor: Any) -> Any:
    """Give the pixels of typed contents, none of which is looked at.

    Raises:
        RequestError: they are too many.
    """
    is_float = tensor.datatype == "FP32"
    contents = tensor.contents.fp32_contents if is_float else tensor.contents.uint_contents
    if len(contents) > MAX_TYPED_VALUES:
        raise RequestError(
            f"typed contents of {INPUT}",
            expected=f"at most {MAX_TYPED_VALUES} values",
            found=str(len(contents)),
            mend="send raw_input_contents",
        )
    return contents


def _typed_pixels(tensor: Any) -> bytes:
    """Give the pixels of typed contents as raw ones.

    Raises:
        RequestError: some are none.
    """
    values = np.asarray(_typed_contents(tensor)[:])
    if tensor.datatype == "FP32":
        return values.astype("<f4").tobytes()
    if values.size and values.max() > 255:
        raise RequestError(f"contents of {INPUT}", expected="0 to 255", found=str(values.max()))
    return values.astype(np.uint8).tobytes()


def _read_encoded(request: Any, tensor: Any, shape: tuple[int, ...], part: Slice | None) -> Inputs:
    """Find encoded images."""
    if shape not in ((shape[0],), (shape[0], 1)):
        raise RequestError(
            f"shape of {INPUT}", expected="(N) or (N, 1) of BYTES", found=str(list(shape))
        )
    if part is not None:
        return Inputs(
            images=_iterate_encoded(part, shape[0]),
            count=shape[0],
            payload_bytes=2 * part.byte_size,  # while it is split
        )
    if request.raw_input_contents:
        images = split_bytes(_only_raw(request), shape[0])
    else:
        images = list(tensor.contents.bytes_contents)
    if len(images) != shape[0]:
        raise RequestError(
            f"contents of {INPUT}", expected=f"{shape[0]} elements", found=str(len(images))
        )
    payload_bytes = 2 * sum(map(len, images))
    return Inputs(images=iter(images), count=shape[0], payload_bytes=payload_bytes)


def _iterate_encoded(part: Slice, count: int) -> Iterator[bytes]:
    """Read encoded images out of shared memory, once there is room for them."""
    yield from split_bytes(part.read(), count)


def split_bytes(raw: bytes, count: int) -> list[bytes]:
    """Split a BYTES tensor into its `count` elements.

    Raises:
        RequestError: it is not so many elements, each after its length.
    """
    elements: list[bytes] = []
    at = 0
    while at < len(raw) and len(elements) < count:
        end = at + LENGTH.size
        if end <= len(raw):
            start, end = end, end + LENGTH.unpack_from(raw, at)[0]
        if end > len(raw):
            raise RequestError(
                f"element {len(elements)} of {INPUT}",
                expected="a 4-byte little-endian length, and as many bytes",
                found=f"{len(raw) - at} bytes",
            )
        elements.append(raw[start:end])
        at = end
    if at < len(raw) or len(elements) < count:
        found = f"{len(elements)} and {len(raw) - at} bytes more" if at < len(raw) else None
        raise RequestError(
            f"BYTES of {INPUT}",
            expected=f"{count} elements",
            found=found or str(len(elements)),
        )
    return elements


def _only_raw(request: Any) -> bytes:
    """Give the raw contents of the only input; every access copies.

    Raises:
        RequestError: there are several.
    """
    contents = request.raw_input_contents
    if len(contents) != 1:
        found = str(len(contents))
        raise RequestError("raw_input_contents", expected="1, as there is one input", found=found)
    raw: bytes = contents[0]
    return raw
