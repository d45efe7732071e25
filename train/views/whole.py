"""The same views without a choice of images: every operation on all, by amounts that may be none.

`train.views` works on the images that an operation was drawn for, which are others in every
step. A CUDA graph does the same in every step: it brightens all images, most of them by a
factor of 1. That pays where images are so small that a kernel takes longer to start than to run.

Shapes: n images, C channels, H x W pixels, S places in the order of the J operations of the
jitter, K taps on one side of a kernel; n111 is (n, 1, 1, 1).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.views.operations import (
    JITTER_OPERATIONS,
    blur_,
    crop_taps,
    grey,
    jitter_numbers,
    solarise_,
    to_device,
    weigh_taps,
)
from train.views.parameters import JITTERS, ViewParameters, ViewRecipe


class WholeParameters(NamedTuple):
    """What `ViewParameters` say, as tensors of shapes that depend on the recipe alone.

    Attributes:
        lines_nKCH, line_weights_nK1H1, columns_nK11W, column_weights_nK11W: as in `crop_taps`.
        jitter_SJn111: of every operation in every place; what changes nothing where it was
            not drawn.
        is_grey_n111: 1 or 0.
        blur_weights_nK: half of each kernel; 1 and zeros where there is no blur.
        is_solarised_n111: bool.
    """

    lines_nKCH: Tensor
    line_weights_nK1H1: Tensor
    columns_nK11W: Tensor
    column_weights_nK11W: Tensor
    jitter_SJn111: Tensor
    is_grey_n111: Tensor
    blur_weights_nK: Tensor
    is_solarised_n111: Tensor


def whole_parameters(
    parameters: ViewParameters, shape: tuple[int, ...], like: Tensor
) -> WholeParameters:
    """Bring the parameters of views of (n, C, H, W) to the device and dtype of a tensor."""
    found = crop_taps(
        parameters.boxes, parameters.is_mirrored, parameters.recipe.interpolation, shape
    )
    place_SJn = parameters.order.T[:, None] == np.arange(len(JITTERS))[:, None]
    none_J1 = np.array([[0.0 if name == "hue" else 1.0] for name in JITTERS])
    jitter_SJn = np.where(place_SJn & parameters.is_jittered, parameters.jitter.T, none_J1)
    no_blur_K = np.eye(1, parameters.blur_weights.shape[1], dtype=np.float32)
    blur_nK = np.where(parameters.is_blurred[:, None], parameters.blur_weights, no_blur_K)
    arrays = (
        *found,
        jitter_SJn[..., None, None, None],
        parameters.is_grey.astype(np.float32)[:, None, None, None],
        blur_nK,
        parameters.is_solarised[:, None, None, None],
    )
    return WholeParameters(*(to_device(array, like) for array in arrays))


def apply_whole(images_nCHW: Tensor, given: WholeParameters, recipe: ViewRecipe) -> Tensor:
    """Make the views that `train.views.apply_view` makes of the same parameters, to rounding.

    Args:
        images_nCHW: (n, C, H, W) floating, in [0, 1]; not changed.
        given: of n views.
        recipe: that they were drawn for.

    Returns:
        (n, C, H, W) of the same dtype, in [0, 1].
    """
    views_nCHW = weigh_taps(images_nCHW, *given[:4])
    channels = images_nCHW.shape[1]
    for amounts_Jn111 in given.jitter_SJn111:
        for j in jitter_numbers(recipe, channels):
            JITTER_OPERATIONS[j](views_nCHW, amounts_Jn111[j])
    if channels == 3 and recipe.grey_probability > 0:
        views_nCHW.lerp_(grey(views_nCHW), given.is_grey_n111)
    if recipe.blur_probability > 0:
        blur_(views_nCHW, given.blur_weights_nK)
    if recipe.solarise_probability > 0:
        solarised_nCHW = views_nCHW.clone()
        solarise_(solarised_nCHW)
        views_nCHW = torch.where(given.is_solarised_n111, solarised_nCHW, views_nCHW)
    return views_nCHW
