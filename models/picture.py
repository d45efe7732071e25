"""Decoded pixels, what they may cost, and which way is up.

Rules:
    Limits are checked by whoever reads a header, before anything is decoded.
    Exif is read by hand: only one number of it matters, and a damaged block means upright,
    not an error.

Source: CIPA DC-008 (Exif), TIFF 6.0 section 2.

Shapes: h, w decoded height and width.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from models.errors import ImageError, ImageFault

Pixels: TypeAlias = NDArray[np.uint8]
"""uint8, (h, w) or (h, w, C)."""

ORIENTATION_TAG = 0x0112

# The number says where the first stored row and column lie in the picture: 1 top left,
# 2 top right, 3 bottom right, 4 bottom left, 5 left top, 6 right top, 7 right bottom,
# 8 left bottom. From 5 on rows are columns.
_FIRST_TRANSPOSED = 5
_ROWS_TURNED = frozenset({3, 4, 7, 8})
_COLUMNS_TURNED = frozenset({2, 3, 6, 7})


@dataclass(frozen=True)
class Picture:
    """Decoded pixels, and where in them the picture lies.

    A JPEG decoded at 1/n has its last row and column rounded up to whole pixels: 375 rows
    at 1/2 are 188, of which the picture fills 187.5. To take it for 188 shifts edges by a
    fifth of an output pixel (p99 difference 9 of 255 instead of 2, benchmarks/decoders.py).

    Attributes:
        pixels: (h, w) or (h, w, 3) uint8.
        top: first row of the picture, in pixels of `pixels`; less than 1.
        left: first column.
        height: h, or less by a fraction of a pixel.
        width: w, or less by a fraction of a pixel.
    """

    pixels: Pixels
    top: float
    left: float
    height: float
    width: float

    @classmethod
    def whole(cls, pixels: Pixels) -> Picture:
        """Take all of the pixels for the picture."""
        return cls(pixels, 0.0, 0.0, *pixels.shape[:2])


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What one image may cost; both are checked before it is decoded.

    Attributes:
        max_image_bytes: encoded size.
        max_pixels: height x width. The default lets 61 megapixels pass, a large camera's
            frame; decoding takes 4 to 14 bytes a pixel, the most for transparency (900 MiB
            for a PNG at this limit, which can be 260 kB long). A server in little memory
            or open to strangers should set less.
    """

    max_image_bytes: int = 64 << 20
    max_pixels: int = 64 << 20

    def check_bytes(self, size_bytes: int, what: str = "image") -> None:
        """Refuse an image by its encoded size; `what` is what errors call it.

        Raises:
            ImageError: EMPTY or TOO_MANY_BYTES.
        """
        if size_bytes == 0:
            raise ImageError(ImageFault.EMPTY, what, expected="an image", found="no bytes")
        if size_bytes > self.max_image_bytes:
            raise ImageError(
                ImageFault.TOO_MANY_BYTES,
                what,
                expected=f"at most {self.max_image_bytes} bytes",
                found=f"{size_bytes} bytes",
            )

    def check_pixels(self, height: int, width: int, what: str) -> None:
        """Refuse an image by its size in pixels.

        Raises:
            ImageError: TOO_MANY_PIXELS.
        """
        if height * width > self.max_pixels:
            raise ImageError(
                ImageFault.TOO_MANY_PIXELS,
                what,
                expected=f"at most {self.max_pixels} pixels",
                found=f"{width} x {height} = {width * height}",
            )


DEFAULT_LIMITS = ImageLimits()


def upright_picture(pixels: Pixels, height: float, width: float, orientation: int) -> Picture:
    """Turn a picture that fills `height` x `width` of its pixels, from the upper left."""
    if is_transposed(orientation):
        height, width = width, height
    upright = turn_upright(pixels, orientation)
    top = upright.shape[0] - height if orientation in _ROWS_TURNED else 0.0
    left = upright.shape[1] - width if orientation in _COLUMNS_TURNED else 0.0
    return Picture(upright, top, left, height, width)


def is_transposed(orientation: int) -> bool:
    """Tell whether an Exif orientation stores the picture's columns as rows."""
    return orientation >= _FIRST_TRANSPOSED


def exif_orientation(exif: bytes) -> int:
    """Read the orientation, 1 to 8, from an Exif block; 1 where it has none that is right."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(f"{order}I", tiff, 4)
        (n_entries,) = struct.unpack_from(f"{order}H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * n_entries, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
            if tag == ORIENTATION_TAG:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:  # an offset that leads outside
        pass
    return 1


def turn_upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an Exif orientation, 1 to 8; gives a view."""
    if is_transposed(orientation):
        pixels = pixels.swapaxes(0, 1)
    if orientation in _ROWS_TURNED:
        pixels = pixels[::-1]
    if orientation in _COLUMNS_TURNED:
        pixels = pixels[:, ::-1]
    return pixels
