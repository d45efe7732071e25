"""Thumbnails of many images in few pictures: sheets of squares, of bounded size.

Rules:
    All sheets together have at most `MAX_PIXELS`: of more images each is smaller, and where that
    would be too small to see anything only a part of the images has one.
    A picture keeps its proportions, on black; one that cannot be read now has no square.
    Images are read a block at a time.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from index.collection import Row
from index.curation.stored_images import StoredImages
from models.command import progress
from models.decode import decode
from models.errors import ImageError, SourceError
from models.image_source import ImageData

MAX_PIXELS = 48 << 20
SMALLEST_PX, LARGEST_PX = 20, 96
SHEET_PX = 2048
JPEG_QUALITY = 82

log = logging.getLogger("horace.index")


@dataclass(frozen=True, kw_only=True)
class Sprites:
    """Sheets of thumbnails.

    Attributes:
        px: side of a thumbnail.
        columns: thumbnails in a row of a sheet, and rows of one.
        tiles_N: (N,) int32: which square is the image's, counted through the sheets; -1 of none.
        sheets: the sheets, as (side, side, 3) uint8.
    """

    px: int
    columns: int
    tiles_N: NDArray[np.int32]
    sheets: Sequence[NDArray[np.uint8]]

    def tile(self, number: int) -> NDArray[np.uint8]:
        """Give one thumbnail, (px, px, 3) uint8."""
        sheet, place = divmod(number, self.columns**2)
        row, column = divmod(place, self.columns)
        top, left = row * self.px, column * self.px
        return self.sheets[sheet][top : top + self.px, left : left + self.px]


def thumbnail_px(count: int) -> int:
    """Say how large each of so many thumbnails may be."""
    return max(SMALLEST_PX, min(LARGEST_PX, math.isqrt(MAX_PIXELS // max(1, count))))


def make_sprites(rows: Sequence[Row]) -> Sprites:
    """Read the images and lay their thumbnails out."""
    px = thumbnail_px(len(rows))
    columns = SHEET_PX // px
    most = MAX_PIXELS // px**2
    wanted = np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows)), dtype=int))
    tiles_N = np.full(len(rows), -1, np.int32)
    sheets: list[NDArray[np.uint8]] = []
    stored = StoredImages()
    used = failures = 0
    for number in progress(wanted, what="making thumbnails", total=len(wanted)):
        picture = _read(stored, rows[number], px)
        if picture is None:
            failures += 1
            continue
        place = used % columns**2
        if place == 0:
            sheets.append(np.zeros((columns * px, columns * px, 3), np.uint8))
        row, column = divmod(place, columns)
        top, left = row * px + (px - picture.height) // 2, column * px + (px - picture.width) // 2
        pixels = np.asarray(picture)
        sheets[-1][top : top + picture.height, left : left + picture.width] = pixels
        tiles_N[number] = used
        used += 1
    if failures:
        log.warning("%d of %d images cannot be read now", failures, len(wanted))
    if sheets and used % columns**2:
        height = -(-(used % columns**2) // columns) * px
        sheets[-1] = sheets[-1][:height]
    return Sprites(px=px, columns=columns, tiles_N=tiles_N, sheets=sheets)


def as_jpeg(sheet: NDArray[np.uint8]) -> bytes:
    """Encode a sheet; one without colours takes a third less."""
    picture = Image.fromarray(sheet)
    if (sheet[..., 0] == sheet[..., 1]).all() and (sheet[..., 0] == sheet[..., 2]).all():
        picture = picture.convert("L")
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return content.getvalue()


def _read(stored: StoredImages, row: Row, px: int) -> Image.Image | None:
    """Give a thumbnail; None where there is no such image now."""
    try:
        image = stored.load(row)
        return None if image is None else _reduce(image, px)
    except (ImageError, SourceError):
        return None


def _reduce(image: ImageData, px: int) -> Image.Image:
    """Make an image fit into a square; a smaller one fills it."""
    if isinstance(image, bytes):
        image = decode(image, shorter_side=px).pixels
    picture = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image).convert("RGB")
    factor = px / max(picture.size)
    size = [max(1, min(px, round(side * factor))) for side in picture.size]
    if tuple(size) == picture.size:
        return picture
    return picture.resize((size[0], size[1]), Image.Resampling.BILINEAR)
