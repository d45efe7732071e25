from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from models.errors import ImageError, ImageFault, UsageError
from models.wire import (
    dtype_from_wire,
    image_error_to_wire,
    image_from_wire,
    image_to_wire,
    vectors_from_wire,
    vectors_to_wire,
)
from protos import horace_pb2 as pb

FLOATS = st.floats(-100, 100, width=32)
VECTORS = hnp.arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 9)), elements=FLOATS)
PIXELS = hnp.arrays(
    np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3, 4]))
)


class Tensor:
    """Another library's array: NumPy reads it, and its repr has several lines."""

    def __array__(self) -> np.ndarray:
        raise AssertionError("asked for its content")

    def __repr__(self) -> str:
        return "tensor([[1, 2],\n        [3, 4]])"


@given(VECTORS)
def test_fp32_vectors_cross_the_wire_unchanged(vectors):
    """To the bit, whatever the shape, also none at all."""
    message = pb.Vectors.FromString(vectors_to_wire(vectors).SerializeToString())
    read = vectors_from_wire(message)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, vectors)


@given(VECTORS, st.sampled_from(["fp16", "int8"]))
def test_smaller_dtypes_lose_no_more_than_their_step(vectors, dtype):
    """FP16 keeps 11 bits; INT8 is within half a step of its row's largest value."""
    message = vectors_to_wire(vectors, dtype)
    assert len(message.data) == vectors.size * (2 if dtype == "fp16" else 1)
    largest = np.abs(vectors).max(axis=1, initial=0, keepdims=True)
    step = largest / (127 if dtype == "int8" else 1024)
    assert (np.abs(vectors_from_wire(message) - vectors) <= step * 0.51 + 1e-6).all()


@given(PIXELS)
def test_pixels_cross_the_wire_unchanged(pixels):
    """Colour, grey and alpha, in their shape."""
    message = pb.Image.FromString(image_to_wire(pixels).SerializeToString())
    np.testing.assert_array_equal(image_from_wire(message), pixels)


def test_grey_pixels_without_a_channel_axis_get_one():
    """(H, W) is the same image as (H, W, 1)."""
    assert image_from_wire(image_to_wire(np.zeros((2, 3), np.uint8))).shape == (2, 3, 1)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_files_cross_the_wire_unchanged(kind):
    """Any bytes, in any of Python's wrappings."""
    assert image_from_wire(image_to_wire(kind(b"\x00\xff\xd8"))) == b"\x00\xff\xd8"


@pytest.mark.parametrize(
    "array", [np.zeros((2, 2), np.float32), np.zeros(4, np.uint8), np.zeros((1, 2, 2, 1), np.uint8)]
)
def test_other_arrays_are_no_images(array):
    """The line says which arrays are."""
    with pytest.raises(UsageError, match=r"expected \(H, W\) or \(H, W, C\) uint8, found"):
        image_to_wire(array)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("a.jpg", "str 'a.jpg'; read the file with"),
        (Path("a.jpg"), r"PosixPath PosixPath\('a.jpg'\); read the file with"),
        (None, "NoneType None$"),
        (7, "int 7$"),
        (np.float32(7), r"float32 np.float32\(7.0\)$"),
        (Tensor(), r"Tensor tensor\(\[\[1, 2\], \[3, 4\]\]\); take np.asarray\(...\) of it$"),
        (
            Image.new("RGB", (8, 8)),
            r"Image <.*>; take its file's bytes, or np.asarray\(image.convert\('RGB'\)\)$",
        ),
    ],
)
def test_what_is_neither_bytes_nor_an_array_is_no_image(value, found):
    """In one line; a path, a picture and a tensor are told how they become one."""
    with pytest.raises(UsageError, match=f"expected the bytes of a file, or a uint8 .*{found}"):
        image_to_wire(value)


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (pb.Image(), ImageFault.EMPTY),
        (pb.Image(raw=pb.RawImage()), ImageFault.WRONG_SHAPE),
        (
            pb.Image(raw=pb.RawImage(pixels=b"12345", height=2, width=2, channels=1)),
            ImageFault.WRONG_SHAPE,
        ),
        (
            pb.Image(raw=pb.RawImage(pixels=b"", height=2**31, width=2**31, channels=4)),
            ImageFault.WRONG_SHAPE,
        ),
    ],
)
def test_images_that_contradict_themselves_are_refused(message, fault):
    """No image at all, no pixels, and pixels that do not fill their shape."""
    with pytest.raises(ImageError) as error:
        image_from_wire(message)
    assert error.value.fault is fault


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (pb.Vectors(data=b"123", rows=1, dim=1), "expected 4 bytes, found 3 bytes"),
        (
            pb.Vectors(data=b"12", rows=1, dim=2, dtype=pb.INT8),
            "int8 scales: expected 1, one a row, found 0",
        ),
        (pb.Vectors(dtype=99), "found code 99"),
    ],
)
def test_vectors_that_contradict_themselves_are_refused(message, text):
    """Too few bytes, missing scales, and a dtype of a later version."""
    with pytest.raises(UsageError, match=text):
        vectors_from_wire(message)


@pytest.mark.parametrize(
    ("dtype", "text"),
    [
        (pb.FP32, "fp32 scales: expected none, found 100000$"),
        (pb.FP16, "fp16 scales: expected none, found 100000$"),
        (pb.INT8, "int8 scales: expected 1, one a row, found 100000$"),
    ],
)
def test_scales_are_counted_before_they_are_listed(dtype, text):
    """Each would be an object of its own."""
    message = pb.Vectors(data=bytes(4), dtype=dtype, rows=1, dim=1, scales=[1.0] * 100_000)
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=text):
            vectors_from_wire(message)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_an_unspecified_dtype_is_fp32():
    """A caller that says nothing gets floats."""
    assert dtype_from_wire(pb.DTYPE_UNSPECIFIED) == "fp32"


@pytest.mark.parametrize("fault", ImageFault)
def test_every_fault_has_its_own_code(fault):
    """The wire's name of a fault is its name here, and the message goes along."""
    status = image_error_to_wire(ImageError(fault, "image", found="x"))
    assert pb.ItemCode.Name(status.code) == fault.name
    assert status.message == "image: found x"
