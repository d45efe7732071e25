"""Every odd format gives the pixels it shows, or the error that says why it cannot.

The images are made by `make_golden.py`; all that is expected is computed here from the
colours of their four quadrants.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.decode import decode
from models.errors import ImageError, ImageFault
from models.preprocess import PreprocessSpec, preprocess

GOLDEN = Path(__file__).parent / "golden"
HEIGHT, WIDTH = 32, 64

COLOURS = np.array([(200, 40, 40), (40, 160, 60), (50, 70, 190), (230, 220, 90)])
GREYS = np.repeat(np.array([[20], [90], [160], [240]]), 3, axis=1)
DEEP_GREYS = np.repeat(np.array([[20], [91], [160], [240]]), 3, axis=1)
BITS = np.repeat(np.array([[0], [255], [255], [0]]), 3, axis=1)
ALPHA = np.array([[255], [128], [0], [64]])
WHITE = 255


def on_white(colours: NDArray[np.int64]) -> NDArray[np.int64]:
    """Composite colours with the picture's alpha over white."""
    return np.rint((colours * ALPHA + WHITE * (255 - ALPHA)) / 255).astype(np.int64)


KEYED = np.concatenate([COLOURS[:2], [[WHITE] * 3], COLOURS[3:]])

LOSSY = 4
"""What JPEG and WebP of this quality miss a flat colour by, at most."""

BLUR = 2
"""Pixels to either side of an edge into which halved colour resolution bleeds."""

GOOD = {
    "baseline.jpg": (COLOURS, LOSSY),
    "progressive.jpg": (COLOURS, LOSSY),
    "grey.jpg": (GREYS, LOSSY),
    "cmyk-adobe.jpg": (COLOURS, LOSSY),
    "cmyk-plain.jpg": (COLOURS, LOSSY),
    "ycck-adobe.jpg": (COLOURS, LOSSY),
    **{f"exif-{n}.jpg": (COLOURS, LOSSY) for n in range(1, 9)},
    "rgb.png": (COLOURS, 0),
    "grey.png": (GREYS, 0),
    "rgba.png": (on_white(COLOURS), 1),
    "grey-alpha.png": (on_white(GREYS), 1),
    "rgb-key.png": (KEYED, 0),
    "palette.png": (COLOURS, 0),
    "palette-4bit.png": (COLOURS, 0),
    "palette-alpha.png": (on_white(COLOURS), 1),
    "grey-16bit.png": (DEEP_GREYS, 0),
    "rgb-16bit.png": (COLOURS, 0),
    "one-bit.png": (BITS, 0),
    "interlaced.png": (COLOURS, 0),
    "exif-6.png": (COLOURS, 0),
    "lossy.webp": (COLOURS, LOSSY),
    "lossless.webp": (COLOURS, 0),
    "alpha.webp": (on_white(COLOURS), 1),
    "animated.webp": (COLOURS, 0),
    "exif-8.webp": (COLOURS, 0),
    "still.gif": (COLOURS, 0),
    "animated.gif": (COLOURS, 0),
    "rgb.bmp": (COLOURS, 0),
    "grey.bmp": (GREYS, 0),
    "rgb.tiff": (COLOURS, 0),
    "lzw.tiff": (COLOURS, 0),
    "deflate.tiff": (COLOURS, 0),
    "grey-16bit.tiff": (DEEP_GREYS, 0),
    "grey-16bit-big-endian.tiff": (DEEP_GREYS, 0),
    "exif-8.tiff": (COLOURS, 0),
    "pages.tiff": (COLOURS, 0),
}

BAD = {
    "truncated.jpg": (ImageFault.CORRUPT, "JPEG image: expected a whole one, found damage"),
    "truncated-progressive.jpg": (ImageFault.CORRUPT, "JPEG image: expected a whole one"),
    "truncated.png": (ImageFault.CORRUPT, "PNG image: expected a whole one, found damage"),
    "truncated.gif": (ImageFault.CORRUPT, "GIF image: expected a whole one, found damage"),
    "truncated.webp": (ImageFault.CORRUPT, "WebP image: expected a whole one, found damage"),
    "truncated.bmp": (ImageFault.CORRUPT, "BMP image: expected a whole one, found damage"),
    "truncated.tiff": (ImageFault.CORRUPT, "TIFF image: expected a whole one, found damage"),
    "flipped-bit.png": (ImageFault.CORRUPT, "PNG image: expected a whole one, found damage"),
    "bomb.png": (
        ImageFault.TOO_MANY_PIXELS,
        "PNG image: expected at most 67108864 pixels, found 20000 x 20000 = 400000000",
    ),
    "bomb.jpg": (ImageFault.TOO_MANY_PIXELS, "found 65000 x 65000 = 4225000000"),
    "bomb.gif": (ImageFault.TOO_MANY_PIXELS, "found 65535 x 65535 = 4294836225"),
    "empty.jpg": (ImageFault.EMPTY, "image: expected an image, found no bytes"),
    "text.jpg": (
        ImageFault.UNSUPPORTED_FORMAT,
        "image: expected JPEG, PNG, WebP, GIF, BMP, TIFF, found text; "
        "give a picture in one of these formats",
    ),
    "drawing.svg": (ImageFault.UNSUPPORTED_FORMAT, "found SVG"),
    "page.html": (ImageFault.UNSUPPORTED_FORMAT, "found HTML"),
    "photo.heic": (ImageFault.UNSUPPORTED_FORMAT, "found HEIC"),
    "float.tiff": (ImageFault.UNSUPPORTED_FORMAT, "TIFF image: expected 8 or 16 bits a channel"),
    "grey-12bit.tiff": (
        ImageFault.UNSUPPORTED_FORMAT,
        "found 12 bits; save it with 8 bits a channel, in grey or RGB",
    ),
    "grey-16bit-white-is-zero.tiff": (
        ImageFault.UNSUPPORTED_FORMAT,
        "found 16 bits of which 0 is white",
    ),
    "grey-16bit-key.png": (
        ImageFault.UNSUPPORTED_FORMAT,
        "found 16 bits of which one grey is transparent",
    ),
}


def quadrants(values: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Draw the picture, (32, width, C), with one row of `values` a quadrant."""
    halves = [np.repeat(values[i : i + 2], width // 2, axis=0) for i in (0, 2)]
    return np.repeat(np.stack(halves), HEIGHT // 2, axis=0)


def error(found: NDArray[np.uint8], expected: NDArray[np.int64], tolerance: int) -> int:
    """Give the largest difference, away from the quadrants' edges if the format is lossy."""
    difference = np.abs(found - expected)
    if tolerance == LOSSY:
        for axis in (0, 1):
            middle = difference.shape[axis] // 2
            difference = np.delete(difference, range(middle - BLUR, middle + BLUR), axis=axis)
    return int(difference.max())


def luma(colours: NDArray[np.int64]) -> NDArray[np.int64]:
    """BT.601: Y = .299 R + .587 G + .114 B."""
    return np.rint(colours @ np.array([[0.299], [0.587], [0.114]])).astype(np.int64)


def test_every_golden_file_is_expected_to_be_something() -> None:
    """No file lies in the folder without being tested, and none that is tested is missing."""
    assert {path.name for path in GOLDEN.iterdir()} == GOOD.keys() | BAD.keys()


@pytest.mark.parametrize("name", GOOD)
def test_a_format_decodes_to_the_upright_picture(name: str) -> None:
    """Whatever the container, depth, palette, inks or orientation: the same picture."""
    colours, tolerance = GOOD[name]
    found = decode((GOLDEN / name).read_bytes()).pixels
    assert (found.shape, found.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)
    assert error(found, quadrants(colours, WIDTH), tolerance) <= tolerance


@pytest.mark.parametrize("name", GOOD)
def test_one_channel_is_the_luma_of_the_picture(name: str) -> None:
    """A grey encoder sees BT.601 luma of the same picture, cut to its centre."""
    colours, tolerance = GOOD[name]
    spec = PreprocessSpec(height=32, width=32, channels=1, resize=32)
    found = preprocess((GOLDEN / name).read_bytes(), spec)
    assert (found.shape, found.dtype) == ((32, 32, 1), np.uint8)
    assert error(found, quadrants(luma(colours), 32), tolerance) <= max(tolerance, 1)


@pytest.mark.parametrize("name", GOOD)
def test_the_centre_is_cut_out_unresampled_where_the_size_fits(name: str) -> None:
    """The shorter side has the length asked for, so pixels pass as they are."""
    colours, tolerance = GOOD[name]
    spec = PreprocessSpec(height=16, width=32, channels=3, resize=32)
    found = preprocess((GOLDEN / name).read_bytes(), spec)
    assert error(found, quadrants(colours, 32)[8:24], tolerance) <= tolerance


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_whole_image_of_ours_is_refused_with_its_reason(name: str) -> None:
    """A damaged, foreign or oversized file names its fault, and is never half an image."""
    fault, text = BAD[name]
    with pytest.raises(ImageError) as caught:
        decode((GOLDEN / name).read_bytes())
    assert caught.value.fault is fault
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_damage_gives_an_image_or_an_image_error_and_nothing_else(data: st.DataObject) -> None:
    """Flipped, cut, repeated and inserted bytes of any format: right shape, or refused."""
    original = (GOLDEN / data.draw(st.sampled_from(sorted(GOOD | BAD)))).read_bytes()
    hostile = bytearray(original)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(hostile)))
        action = data.draw(st.sampled_from(["set", "cut", "insert", "repeat"]))
        if action == "set" and at < len(hostile):
            hostile[at] = data.draw(st.integers(0, 255))
        elif action == "cut":
            del hostile[at : at + data.draw(st.integers(1, 64))]
        elif action == "insert":
            hostile[at:at] = data.draw(st.binary(max_size=16))
        else:
            hostile[at:at] = hostile[at : at + 32]
    spec = PreprocessSpec(
        height=8, width=12, channels=data.draw(st.sampled_from([1, 3])), resize=16
    )
    try:
        found = preprocess(bytes(hostile), spec)
    except ImageError:
        return
    assert (found.shape, found.dtype) == ((8, 12, spec.channels), np.uint8)
    assert found.flags.c_contiguous
