"""Random crops cut out of one image as it is decoded: few pixels of large photographs.

Rules:
    Crops are drawn in the pixels of the whole upright image, whatever scale is decoded, from
    a generator of each view's own.
    A JPEG is decoded once for all its views, at the smallest of the scales 1, 1/2, 1/4 and
    1/8 at which the smallest crop still has the pixels of the view. `models.preprocess`,
    which serves, keeps twice as many: a view is about to be jittered and blurred anyway, and
    at 3000 x 2000 decoding takes a third less.
    A crop is of whole pixels of what was decoded, and resizing is antialiased, by torch:
    Pillow's copies in and out hold the GIL, so that threads would wait for one another.
    Only crops are made here; mirroring and colours are for whole batches, in `train.views`.

Shapes: H x W pixels and C channels of a view, h x w of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from models.decode import decode
from models.images import ImageData
from models.picture import DEFAULT_LIMITS, Picture, Pixels
from models.preprocess import recolour
from train.views.parameters import Interpolation, crop_box

LARGEST_DIVISOR = 8
"""Of the scales of libjpeg-turbo that have fast inverse transforms."""


class Box(NamedTuple):
    """A part of an image, in its pixels and fractions of them."""

    top: float
    left: float
    height: float
    width: float


DrawBoxes = Callable[[int, int], Sequence[Box]]
"""From the height and width of an image to a box for each of its views."""


class _Cut:
    """The boxes of one image, drawn as soon as its size is known."""

    def __init__(self, draw_boxes: DrawBoxes, height: int, width: int) -> None:
        self._draw_boxes, self._view_size = draw_boxes, (height, width)
        self.boxes: Sequence[Box] = ()
        self.image_height = 0

    def choose_divisor(self, image_height: int, image_width: int) -> int:
        """Draw the boxes, and give the largest divisor that leaves each its pixels."""
        self.image_height = image_height
        self.boxes = self._draw_boxes(image_height, image_width)
        height, width = self._view_size
        spare = min(min(box.height / height, box.width / width) for box in self.boxes)
        divisor = 1
        while divisor < LARGEST_DIVISOR and spare >= 2 * divisor:
            divisor *= 2
        return divisor


def cut_crops(
    data: ImageData,
    draw_boxes: DrawBoxes,
    *,
    height: int,
    width: int,
    channels: int,
    interpolation: Interpolation = "bilinear",
) -> list[Pixels]:
    """Decode an image and cut its crops out, each brought to one size.

    Args:
        data: an encoded image, or uint8 pixels.
        draw_boxes: gives the crops; called once, with the size of the upright image.
        height: of every crop that is given.
        width: of every crop that is given.
        channels: 1 (luma) or 3 (RGB).
        interpolation: of the resizing.

    Returns:
        One (H, W, C) uint8 for each box.

    Raises:
        ImageError: why the image cannot be used.
    """
    cut = _Cut(draw_boxes, height, width)
    grey = channels == 1
    if isinstance(data, bytes):
        picture = decode(data, grey=grey, choose_divisor=cut.choose_divisor)
    else:
        picture = Picture.whole(recolour(data, DEFAULT_LIMITS, grey))
    if not cut.boxes:  # nothing that can be decoded at another scale than its own
        cut.choose_divisor(*picture.pixels.shape[:2])
    scale = picture.height / cut.image_height
    pixels_hwC = picture.pixels.reshape(*picture.pixels.shape[:2], channels)
    views = []
    for box in cut.boxes:
        crop_hwC = torch.from_numpy(np.array(pixels_hwC[_part(box, picture, scale)]))
        view_1CHW = functional.interpolate(
            crop_hwC.permute(2, 0, 1)[None], (height, width), mode=interpolation, antialias=True
        )
        views.append(view_1CHW[0].permute(1, 2, 0).numpy())
    return views


def _part(box: Box, picture: Picture, scale: float) -> tuple[slice, slice]:
    """Give the rows and columns of a box in a picture decoded at a scale: one at least."""
    pixels_h, pixels_w = picture.pixels.shape[:2]
    return (
        _between(picture.top + box.top * scale, box.height * scale, pixels_h),
        _between(picture.left + box.left * scale, box.width * scale, pixels_w),
    )


def _between(start: float, length: float, size: int) -> slice:
    """Round to whole pixels of a line."""
    first = min(max(0, round(start)), size - 1)
    return slice(first, min(max(first + 1, round(start + length)), size))


class CutCrops:
    """Makes two random crops of each image: the `MakeViews` of `train.data.stream`.

    Args:
        crop_areas: smallest and largest share of the image that a crop covers, by view.
        height: of the crops.
        width: of the crops.
        channels: 1 (luma) or 3 (RGB).
        interpolation: of the resizing.
    """

    def __init__(
        self,
        crop_areas: tuple[tuple[float, float], tuple[float, float]],
        *,
        height: int,
        width: int,
        channels: int,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        self._crop_areas, self._interpolation = crop_areas, interpolation
        self._height, self._width, self._channels = height, width, channels

    def __call__(self, data: ImageData, generator: np.random.Generator) -> tuple[Pixels, Pixels]:
        """Give two (H, W, C) uint8.

        Raises:
            ImageError: why the image cannot be used.
        """

        def draw_boxes(height: int, width: int) -> list[Box]:
            areas = self._crop_areas
            return [Box(*crop_box(generator, height, width, area)) for area in areas]

        first, second = cut_crops(
            data,
            draw_boxes,
            height=self._height,
            width=self._width,
            channels=self._channels,
            interpolation=self._interpolation,
        )
        return first, second
