"""What is done to the pixels of a view: batched, in place, an amount for each image.

Rules:
    An image's bits do not depend on its company: sums run within one image and in one order,
    the rest works value by value.
    Operations change the tensor that they are given and keep it within [0, 1].
    Colour is a matter of three channels. With any other number of them saturation, hue and
    grey have no meaning and are not called; contrast has one, see `stretch_contrast_`.

Crops are never larger than what they are resized to, so nothing is scaled down here and no
low-pass filter is needed; where a stream's images are cropped at decoding, torch has one.

Source: torchvision's `functional`, whose definitions these are; the cubic kernel is that of
Keys, IEEE Trans. ASSP 29 (1981), with a = -.75 as in torch.

Shapes: n images, C channels, H x W pixels, K taps; n111 is (n, 1, 1, 1).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from train.views.parameters import JITTERS, CropBoxes, Interpolation, ViewRecipe

GREY_WEIGHTS = (0.299, 0.587, 0.114)
"""Luma of ITU-R BT.601, as in Pillow's conversion to grey."""

COLOUR_JITTERS = ("saturation", "hue")
"""Those that have a meaning only for red, green and blue."""

CUBIC_A = -0.75
"""The slope of Keys' kernel at 1; Pillow has -.5."""


def crop_taps(
    boxes: CropBoxes,
    is_mirrored: NDArray[np.bool_],
    interpolation: Interpolation,
    shape: tuple[int, ...],
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    """Say which pixels of (n, C, H, W) images make up their crops, and by what weights.

    Returns:
        Numbers of the rows of all planes, (n, K, C, H), and the weight of each, (n, K, 1, H, 1);
        numbers of the columns and the weight of each, both (n, K, 1, 1, W).
    """
    n, channels, height, width = shape
    row_nKH, row_weight_nKH = taps(boxes.top, boxes.height, height, interpolation)
    column_nKW, column_weight_nKW = taps(boxes.left, boxes.width, width, interpolation)
    column_nKW[is_mirrored] = column_nKW[is_mirrored, :, ::-1]
    column_weight_nKW[is_mirrored] = column_weight_nKW[is_mirrored, :, ::-1]
    first_n1C1 = np.arange(n * channels).reshape(n, 1, channels, 1) * height
    return (
        first_n1C1 + row_nKH[:, :, None],
        row_weight_nKH[:, :, None, :, None],
        column_nKW[:, :, None, None],
        column_weight_nKW[:, :, None, None],
    )


def crop_and_resize(
    images_nCHW: Tensor,
    boxes: CropBoxes,
    is_mirrored: NDArray[np.bool_],
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """Resize each box to H x W and mirror those that are to be; the images stay as they are.

    Values just outside a box may weigh in at its border, as its pixels' true neighbours.
    Rows first, then columns: 4 + 4 taps for the cubic kernel where `grid_sample` has 16.

    Returns:
        (n, C, H, W) contiguous; a cubic's overshoot is cut off at 0 and 1.
    """
    found = crop_taps(boxes, is_mirrored, interpolation, images_nCHW.shape)
    return weigh_taps(images_nCHW, *(to_device(array, images_nCHW) for array in found))


def weigh_taps(
    images_nCHW: Tensor,
    lines_nKCH: Tensor,
    line_weights_nK1H1: Tensor,
    columns_nK11W: Tensor,
    column_weights_nK11W: Tensor,
) -> Tensor:
    """Make crops of what `crop_taps` says, as tensors where the images are."""
    shape, width = images_nCHW.shape, images_nCHW.shape[3]
    planes = images_nCHW.reshape(-1, width)
    rows_nCHW = _weighted_sum(
        (planes.index_select(0, lines.flatten()).view(shape) for lines in lines_nKCH.unbind(1)),
        line_weights_nK1H1,
    )
    views_nCHW = _weighted_sum(
        (rows_nCHW.gather(3, columns.expand(shape)) for columns in columns_nK11W.unbind(1)),
        column_weights_nK11W,
    )
    has_overshoot = lines_nKCH.shape[1] > 2
    return views_nCHW.clamp_(0, 1) if has_overshoot else views_nCHW


def _weighted_sum(taken: Iterator[Tensor], weights_nK: Tensor) -> Tensor:
    """Add up K tensors that are the callee's own, each by its weights of every image."""
    first, *others = weights_nK.unbind(1)
    total = next(taken).mul_(first)
    for weights_n in others:
        total.addcmul_(next(taken), weights_n)
    return total


def taps(
    start_n: NDArray[np.float64],
    length_n: NDArray[np.float64],
    size: int,
    interpolation: Interpolation,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Say which pixels of a line weigh how much in each of `size` pixels over a part of it.

    Returns:
        Indices and weights, (n, K, size) each; beyond the line its last pixel is repeated.
    """
    centre_nS = start_n[:, None] + (np.arange(size) + 0.5) * (length_n[:, None] / size) - 0.5
    below_nS = np.floor(centre_nS)
    offset_K = np.arange(2) if interpolation == "bilinear" else np.arange(-1, 3)
    index_nKS = below_nS[:, None, :] + offset_K[:, None]
    distance_nKS = np.abs(centre_nS[:, None, :] - index_nKS)
    weights_nKS = 1 - distance_nKS if interpolation == "bilinear" else _cubic(distance_nKS)
    return index_nKS.clip(0, size - 1).astype(np.int64), weights_nKS.astype(np.float32)


def _cubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give Keys' kernel for distances up to 2."""
    a, d = CUBIC_A, distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, far)


def mirror_(images_nCHW: Tensor) -> None:
    """Turn left to right."""
    images_nCHW.copy_(images_nCHW.flip(3))


def brighten_(images_nCHW: Tensor, factor_n111: Tensor) -> None:
    """Multiply all values by the factor."""
    images_nCHW.mul_(factor_n111).clamp_(0, 1)


def stretch_contrast_(images_nCHW: Tensor, factor_n111: Tensor) -> None:
    """Multiply the distance to the image's mean grey by the factor.

    Where channels are not red, green and blue there is no grey that they share: each
    channel keeps its own mean.
    """
    height, width = images_nCHW.shape[2:]
    # Two sums, because one of a single image would be split among the threads.
    mean_nC11 = images_nCHW.sum(dim=3, keepdim=True).sum(dim=2, keepdim=True) / (height * width)
    images_nCHW.lerp_(grey(mean_nC11), 1 - factor_n111).clamp_(0, 1)


def saturate_(images_n3HW: Tensor, factor_n111: Tensor) -> None:
    """Multiply each pixel's distance to its grey by the factor."""
    images_n3HW.lerp_(grey(images_n3HW), 1 - factor_n111).clamp_(0, 1)


def turn_hue_(images_n3HW: Tensor, turn_n111: Tensor) -> None:
    """Turn the hue of HSV by a share of the circle, saturation and value kept."""
    red, green, blue = images_n3HW.unbind(dim=1)
    value = torch.maximum(red, green).maximum(blue)
    chroma = value - torch.minimum(red, green).minimum(blue)
    # The hue in sixths of the circle, from the largest channel's place at 0, 2 or 4. Where
    # all are equal it may be anything: a chroma of 0 takes nothing away below.
    is_red, is_green = value == red, value == green
    difference = torch.where(is_green, blue - red, red - green)
    difference = torch.where(is_red, green - blue, difference)
    place = torch.where(is_green, 2.0, 4.0).masked_fill_(is_red, 0.0)
    hue = difference.div_(torch.where(chroma == 0, 1.0, chroma)).add_(place)
    hue = hue.add_(6 * turn_n111.squeeze(1)).remainder_(6)
    # A channel has all of the value within a sixth of its place, and misses the chroma
    # from two sixths on.
    from_red = (hue - 3).abs_().neg_().add_(3)
    for channel, distance in ((red, from_red), (green, hue - 2), (blue, hue - 4)):
        missing = distance.abs_().sub_(1).clamp_(0, 1)
        torch.addcmul(value, chroma, missing, value=-1, out=channel)


def to_grey_(images_n3HW: Tensor) -> None:
    """Give all three channels the luma."""
    images_n3HW.copy_(grey(images_n3HW))


def grey(images_nCHW: Tensor) -> Tensor:
    """Give the luma of three channels, (n, 1, H, W); others are returned as they are."""
    if images_nCHW.shape[1] != 3:
        return images_nCHW
    red, green, blue = images_nCHW.unbind(dim=1)
    of_red, of_green, of_blue = GREY_WEIGHTS
    return (red * of_red).add_(green, alpha=of_green).add_(blue, alpha=of_blue).unsqueeze(1)


def blur_(images_nCHW: Tensor, weights_nK: Tensor) -> None:
    """Blur each image with a kernel of its own, reflected at borders.

    Args:
        images_nCHW: changed in place.
        weights_nK: half of each kernel, the middle first.
    """
    reach = weights_nK.shape[1] - 1
    weights_Kn111 = weights_nK.T[:, :, None, None, None]
    for axis, pad in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        padded = functional.pad(images_nCHW, pad, mode="reflect")
        size = images_nCHW.shape[axis]
        images_nCHW.mul_(weights_Kn111[0])
        for k in range(1, reach + 1):
            both = padded.narrow(axis, reach - k, size) + padded.narrow(axis, reach + k, size)
            images_nCHW.addcmul_(both, weights_Kn111[k])


def solarise_(images_nCHW: Tensor) -> None:
    """Invert values from .5 on: the less of a value and its inverse."""
    torch.minimum(images_nCHW, 1 - images_nCHW, out=images_nCHW)


def to_device(values: NDArray[np.generic], like: Tensor) -> Tensor:
    """Bring an array from the host to where a tensor lies; weights take its dtype."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.to(like.device, dtype, non_blocking=True)


JITTER_OPERATIONS = (brighten_, stretch_contrast_, saturate_, turn_hue_)
"""In the order of `JITTERS`."""


def jitter_numbers(recipe: ViewRecipe, channels: int) -> list[int]:
    """Give the numbers of the jitter's operations that can change an image."""
    return [
        j
        for j, name in enumerate(JITTERS)
        if getattr(recipe, name) > 0 and (channels == 3 or name not in COLOUR_JITTERS)
    ]
