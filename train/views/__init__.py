"""The random views: batched, on whatever device the images lie, drawn per image.

Rules:
    Every image of a batch has parameters of its own.
    Every draw comes from the generator that the caller gives, so equal seeds give equal
    views to the bit on one machine.
    Whoever draws the parameters of a whole batch may apply them to some of its rows and
    gets, on a CPU to the bit, those rows of the whole batch's views: so do ranks.
    Views stay in [0, 1]; they are normalised after the last operation.
    Operations come in the paper's order: crop, flip, jitter, grey, blur, solarise.
    Any number of channels: where it is not three, saturation, hue and grey fall away.

What is drawn, and how, is in `train.views.parameters`; what is done to pixels is in
`train.views.operations`; `train.views.whole` makes the same views for a CUDA graph.

Source: arXiv 2103.03230, section 2.2.

Shapes: N images, n of them at a time, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.threads import single_threads
from train.views.operations import (
    JITTER_OPERATIONS,
    blur_,
    crop_and_resize,
    jitter_numbers,
    mirror_,
    solarise_,
    to_device,
    to_grey_,
)
from train.views.parameters import (
    UNITS,
    ViewParameters,
    ViewRecipe,
    view_parameters,
)

__all__ = [
    "Normaliser",
    "ViewParameters",
    "ViewRecipe",
    "apply_view",
    "draw_parameters",
    "finish_view",
    "random_view",
]

CACHE_BYTES = 1 << 19
"""Images that a thread of a CPU works on at a time, or one image if that is larger."""


@dataclass(frozen=True, kw_only=True)
class Normaliser:
    """From uint8 images to what a network takes; mean and std are (C, 1, 1), of [0, 1]."""

    mean: Tensor
    std: Tensor

    def to_unit(self, images_NHWC: Tensor) -> Tensor:
        """Give (N, C, H, W) float32 in [0, 1]."""
        return images_NHWC.permute(0, 3, 1, 2).float().div_(255)

    def normalise(self, images_NCHW: Tensor) -> Tensor:
        """Give zero mean and unit deviation over the training set, channels last in memory."""
        normalised = (images_NCHW - self.mean).div_(self.std)
        return normalised.contiguous(memory_format=torch.channels_last)

    def to_input(self, images_NHWC: Tensor) -> Tensor:
        """Do both, for images that are not to be changed."""
        return self.normalise(self.to_unit(images_NHWC))


def random_view(images_NCHW: Tensor, recipe: ViewRecipe, generator: torch.Generator) -> Tensor:
    """Make one random view of every image.

    Args:
        images_NCHW: (N, C, H, W) floating, in [0, 1].
        recipe: what may happen, how often and how much.
        generator: the source of all randomness; see `draw_parameters`.

    Returns:
        (N, C, H, W) of the same dtype, in [0, 1].
    """
    n, _, height, width = images_NCHW.shape
    parameters = draw_parameters(n, recipe, generator, height=height, width=width)
    return apply_view(images_NCHW, parameters)


def draw_parameters(
    n: int, recipe: ViewRecipe, generator: torch.Generator, *, height: int, width: int
) -> ViewParameters:
    """Draw one view of each of n images, without the images.

    Rows of the result are taken by `parameters[rows]`, rows being a slice or an array.

    Args:
        n: images of the whole batch, over all ranks.
        recipe: what may happen, how often and how much.
        generator: gives `UNITS` numbers an image, whatever the recipe. Best on the CPU
            wherever the images are: then views are the same on every device, and nothing
            waits for the draws.
        height: of the images and of their views, in pixels.
        width: the same.
    """
    device = generator.device
    units_NU = torch.rand((n, UNITS), generator=generator, dtype=torch.float64, device=device)
    return view_parameters(units_NU.cpu().numpy(), recipe, height=height, width=width)


def apply_view(images_NCHW: Tensor, parameters: ViewParameters) -> Tensor:
    """Make the views that parameters describe; a row of parameters for each image.

    Args:
        images_NCHW: (N, C, H, W) floating, in [0, 1], of the size the parameters were
            drawn for; not changed.
        parameters: of N views.

    Returns:
        (N, C, H, W) of the same dtype, in [0, 1], contiguous.
    """

    def make(images_nCHW: Tensor, some: ViewParameters, views_nCHW: Tensor) -> None:
        interpolation = some.recipe.interpolation
        crops_nCHW = crop_and_resize(images_nCHW, some.boxes, some.is_mirrored, interpolation)
        _change_values(crops_nCHW, some)
        views_nCHW.copy_(crops_nCHW)

    return _in_pieces(images_NCHW, parameters, make)


def finish_view(crops_NCHW: Tensor, parameters: ViewParameters) -> Tensor:
    """Do all but the crop, for images that were cropped when they were decoded.

    Args:
        crops_NCHW: (N, C, H, W) floating, in [0, 1]; not changed.
        parameters: of N views; their boxes are not looked at.

    Returns:
        (N, C, H, W) of the same dtype, in [0, 1], contiguous.
    """

    def finish(crops_nCHW: Tensor, some: ViewParameters, views_nCHW: Tensor) -> None:
        views_nCHW.copy_(crops_nCHW)
        _change(views_nCHW, some.is_mirrored, mirror_)
        _change_values(views_nCHW, some)

    return _in_pieces(crops_NCHW, parameters, finish)


def _in_pieces(
    images_NCHW: Tensor,
    parameters: ViewParameters,
    make: Callable[[Tensor, ViewParameters, Tensor], None],
) -> Tensor:
    """Let views be made of a few images at a time: on a CPU, else of all at once.

    What stays in a core's cache between operations takes less time. Each
    thread works on pieces of its own, for operations on so few values are no longer than
    it takes threads to wait for one another; far less where others use the cores, too.

    Args:
        images_NCHW: the whole batch.
        parameters: of as many views.
        make: is given images, their parameters, and where to put their views.
    """
    views_NCHW = torch.empty_like(images_NCHW, memory_format=torch.contiguous_format)
    n, threads = len(images_NCHW), torch.get_num_threads()
    bytes_each = max(1, images_NCHW[:1].numel() * images_NCHW.element_size())
    fits, share = CACHE_BYTES // bytes_each, -(-n // threads)
    step = n if images_NCHW.is_cuda else min(fits, share)
    starts = range(0, n, max(1, step))
    is_inference = torch.is_inference_mode_enabled()

    def make_piece(start: int) -> None:
        rows = slice(start, start + starts.step)
        with torch.inference_mode(is_inference):  # threads do not inherit it
            make(images_NCHW[rows], parameters[rows], views_NCHW[rows])

    if images_NCHW.is_cuda or threads == 1:
        for start in starts:
            make_piece(start)
        return views_NCHW
    for _ in _workers(threads).map(make_piece, starts):
        pass
    return views_NCHW


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    """Give the threads that make pieces."""
    return single_threads(threads, "views")


def _change_values(views_nCHW: Tensor, parameters: ViewParameters) -> None:
    """Do what comes after crop and flip, in place."""
    _jitter(views_nCHW, parameters)
    if views_nCHW.shape[1] == 3:
        _change(views_nCHW, parameters.is_grey, to_grey_)
    _change(views_nCHW, parameters.is_blurred, blur_, parameters.blur_weights)
    _change(views_nCHW, parameters.is_solarised, solarise_)


def _jitter(views_nCHW: Tensor, parameters: ViewParameters) -> None:
    """Change brightness, contrast, saturation and hue, in each image's own order."""
    numbers = jitter_numbers(parameters.recipe, views_nCHW.shape[1])
    for slot_n in parameters.order.T:
        for j in numbers:
            is_chosen = parameters.is_jittered & (slot_n == j)
            amounts = parameters.jitter[:, j, None, None, None]
            _change(views_nCHW, is_chosen, JITTER_OPERATIONS[j], amounts)


def _change(
    views_nCHW: Tensor,
    is_chosen: NDArray[np.bool_],
    operation: Callable[..., None],
    *amounts: NDArray[np.floating],
) -> None:
    """Change the chosen images in place: no work is done on the others.

    Args:
        views_nCHW: all images of this piece.
        is_chosen: (n,), on the host.
        operation: changes the images it is given, and takes the amounts.
        amounts: arrays of n rows.
    """
    rows = np.flatnonzero(is_chosen)
    if len(rows) == 0:
        return
    chosen_amounts = [to_device(amount[rows], views_nCHW) for amount in amounts]
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows):
        operation(views_nCHW[first : last + 1], *chosen_amounts)
        return
    index = to_device(rows, views_nCHW)
    chosen = views_nCHW.index_select(0, index)
    operation(chosen, *chosen_amounts)
    views_nCHW.index_copy_(0, index, chosen)
