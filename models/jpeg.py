"""Decode JPEGs with libjpeg-turbo, at a reduced scale where that is enough.

Rules:
    Every warning of libjpeg-turbo is taken for the damage it nearly always is: it would
    rather paint what is missing grey than fail.
    The reduced scales are 1/2, 1/4 and 1/8, which have fast inverse transforms. Whoever
    decodes chooses; `reduction` never leaves less than `REDUCED_GAP` times the target.

What the decoder raises is not translated here: see `models.decode`. Why this decoder:
docs/decisions/0001-jpeg-decoder.md.

Source: ITU-T T.81 (markers), ITU-T T.872 (Adobe's marker and inks), ITU-R BT.601 (luma).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import simplejpeg
from PIL import Image

from models.picture import (
    ImageLimits,
    Picture,
    Pixels,
    exif_orientation,
    is_transposed,
    upright_picture,
)
from models.pieces import MAX_PIECES, too_many

ChooseDivisor: TypeAlias = Callable[[int, int], int]
"""From upright height and width to 1, 2, 4 or 8: the part of them that is decoded."""

REDUCED_GAP = 2
"""A JPEG is decoded at 1/2, 1/4 or 1/8 only if this many times the target remains."""

MAX_SCANS = 100
"""Progressive JPEGs have about ten scans; each scan walks all coefficients once more."""

_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""A marker but those that may stand within a scan."""

_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN, _TEMPORARY = 0xD8, 0xD9, 0xDA, 0x01
_APP1_EXIF = 0xE1
_APP14_ADOBE = 0xEE


def decode_jpeg(
    data: bytes, limits: ImageLimits, *, grey: bool, choose_divisor: ChooseDivisor
) -> Picture:
    """Decode a JPEG of grey, RGB, YCbCr, CMYK or YCCK.

    Args:
        data: the encoded image.
        limits: what it may cost.
        grey: whether to give luma, (h, w), instead of RGB, (h, w, 3).
        choose_divisor: how much smaller than it is the picture may come out.

    Raises:
        ImageError: TOO_MANY_PIXELS, or CORRUPT where it is of too many pieces.
        ValueError: the data is damaged.
    """
    height, width, colour_space = _read_header(data)
    limits.check_pixels(height, width, "JPEG image")
    if data.count(bytes((0xFF, _START_OF_SCAN))) > MAX_SCANS and _count_scans(data) > MAX_SCANS:
        raise ValueError(f"more than {MAX_SCANS} scans")
    segments = _segments(data)
    orientation = exif_orientation(segments.get(_APP1_EXIF, b""))
    upright = (width, height) if is_transposed(orientation) else (height, width)
    divisor = choose_divisor(*upright)
    # 0 x 0 asks for the full size without a look at the scales.
    least = (-(-height // divisor), -(-width // divisor)) if divisor > 1 else (0, 0)
    if colour_space in {"CMYK", "YCCK"}:
        inks = _decode_as("CMYK", data, least)
        if segments.get(_APP14_ADOBE, b"").startswith(b"Adobe"):
            inks = 255 - inks  # Adobe stores 255 for no ink, the standard 0
        rgb = Image.fromarray(inks, mode="CMYK").convert("RGB")
        pixels = np.asarray(rgb.convert("L") if grey else rgb)
    elif grey or colour_space == "Gray":
        pixels = _decode_as("GRAY", data, least)
        pixels = pixels[..., 0] if grey else np.repeat(pixels, 3, axis=2)
    else:
        pixels = _decode_as("RGB", data, least)
    return upright_picture(pixels, height / divisor, width / divisor, orientation)


def reduction(side: int, target: int | None) -> int:
    """Choose the divisor, 1, 2, 4 or 8, at which a side is decoded for a target size."""
    if target is None:
        return 1
    return max((n for n in (1, 2, 4, 8) if side // n >= REDUCED_GAP * target), default=1)


def _read_header(data: bytes) -> tuple[int, int, str]:
    """Give height, width and colour space as the decoder itself sees them."""
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        if "subsampling" in str(error):  # its words for every header that it cannot use
            raise ValueError("header cut short, or of an unheard-of colour sampling") from error
        raise
    return height, width, colour_space


def _decode_as(colour_space: str, data: bytes, least: tuple[int, int]) -> Pixels:
    """Decode to (h, w, C), at the smallest scale of at least that height and width."""
    pixels: Pixels = simplejpeg.decode_jpeg(
        data, colour_space, min_height=least[0], min_width=least[1], strict=True
    )
    return pixels


def _count_scans(data: bytes) -> int:
    """Count the scans up to the end of the picture; phones append films, whose bytes are any."""
    scans, at, steps = 0, 2, 0
    while (found := _MARKER.search(data, at)) is not None:
        steps += 1
        if steps > MAX_PIECES:
            raise too_many("JPEG", "segments")
        marker, at = found[0][1], found.end()
        if marker == _END_OF_IMAGE:
            break
        if marker not in (_START_OF_IMAGE, _TEMPORARY):  # these have no length
            at += max(2, int.from_bytes(data[at : at + 2], "big"))
        scans += marker == _START_OF_SCAN
    return scans


def _segments(data: bytes) -> dict[int, bytes]:
    """Map each marker before the first scan to the payload of its first segment.

    Of APP1 only Exif counts: XMP uses the same marker.
    """
    found: dict[int, bytes] = {}
    at, steps = 2, 0
    while at + 4 <= len(data) and data[at] == 0xFF:
        steps += 1
        if steps > MAX_PIECES:
            raise too_many("JPEG", "segments")
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _START_OF_SCAN or length < 2:
            break
        payload = data[at + 4 : at + 2 + length]
        if marker != _APP1_EXIF or payload.startswith(b"Exif\0"):
            found.setdefault(marker, payload)
        at += 2 + length
    return found
