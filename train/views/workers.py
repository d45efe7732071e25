"""What comes after the crop of one image, uint8 to uint8: for workers that make whole views.

The option beside `train.views`, for machines whose accelerator has no time to spare and
whose CPUs have. The draws, their probabilities and the order of operations are the same;
the operations are torchvision's on Pillow images, as in the authors' code, and round to
uint8 after each. The blur is the exception: torchvision's, on a Pillow image, is many times
slower than Pillow's own, which the authors used as well.

Rules:
    All randomness comes from the caller's generator, never from a global one: threads do
    not disturb one another and a view is a function of its seed.
    Crops are made elsewhere, as in `train.views.crops`, and have the size of the view.
    Images of neither one nor three channels are done channel by channel, by one set of draws.

Source: arXiv 2103.03230, section 2.2 and the authors' `Transform`.

Shapes: H x W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import functional

from models.images import ImageData
from train.views.parameters import (
    JITTERS,
    UNITS,
    ViewParameters,
    ViewRecipe,
    view_parameters,
)

Pixels: TypeAlias = NDArray[np.uint8]
"""(H, W, C) uint8."""

Recipes: TypeAlias = tuple[ViewRecipe, ViewRecipe]
"""Of view 1 and of view 2."""

SOLARISE_FROM = 128
"""Values from here on are inverted."""


def finish_sample(crop_HWC: Pixels, recipe: ViewRecipe, rng: np.random.Generator) -> Pixels:
    """Do all but the crop, for an image that was cropped when it was decoded."""
    height, width = crop_HWC.shape[:2]
    parameters = view_parameters(rng.random((1, UNITS)), recipe, height=height, width=width)
    return _by_bands(crop_HWC, lambda band: _finish(band, parameters))


class FinishedCrops:
    """Makes both views of an image whole: a `MakeViews` of `train.data.stream` around another.

    Args:
        make_crops: cuts the two crops out, as `train.views.crops.CutCrops` does.
        recipes: what else may happen, by view; their crops are not looked at.
    """

    def __init__(
        self,
        make_crops: Callable[[ImageData, np.random.Generator], tuple[Pixels, Pixels]],
        recipes: Recipes,
    ) -> None:
        self._make_crops, self._recipes = make_crops, recipes

    def __call__(self, data: ImageData, generator: np.random.Generator) -> tuple[Pixels, Pixels]:
        """Give two (H, W, C) uint8.

        Raises:
            ImageError: why the image cannot be used.
        """
        crops = self._make_crops(data, generator)
        first, second = (
            finish_sample(crop, recipe, generator)
            for crop, recipe in zip(crops, self._recipes, strict=True)
        )
        return first, second


def _finish(image: Image.Image, parameters: ViewParameters) -> Image.Image:
    """Do what comes after the crop, in the paper's order."""
    is_colour = image.mode == "RGB"
    if parameters.is_mirrored[0]:
        image = functional.horizontal_flip(image)
    if parameters.is_jittered[0]:
        image = _jitter(image, parameters)
    if parameters.is_grey[0] and is_colour:
        image = functional.rgb_to_grayscale(image, num_output_channels=3)
    if parameters.is_blurred[0]:
        image = image.filter(ImageFilter.GaussianBlur(float(parameters.sigma_px[0])))
    if parameters.is_solarised[0]:
        image = functional.solarize(image, SOLARISE_FROM)
    return image


def _jitter(image: Image.Image, parameters: ViewParameters) -> Image.Image:
    """Change brightness, contrast, saturation and hue in the order that was drawn."""
    operations = {
        "brightness": functional.adjust_brightness,
        "contrast": functional.adjust_contrast,
    }
    if image.mode == "RGB":
        operations["saturation"] = functional.adjust_saturation
        operations["hue"] = functional.adjust_hue
    for j in parameters.order[0].tolist():
        name = JITTERS[j]
        if name in operations and getattr(parameters.recipe, name) > 0:
            image = operations[name](image, float(parameters.jitter[0, j]))
    return image


def _by_bands(crop_HWC: Pixels, make: Callable[[Image.Image], Image.Image]) -> Pixels:
    """Make a view by way of Pillow, which knows one and three channels."""
    channels = crop_HWC.shape[2]
    if channels == 3:
        return np.asarray(make(Image.fromarray(np.ascontiguousarray(crop_HWC))))
    bands = [np.ascontiguousarray(crop_HWC[:, :, c]) for c in range(channels)]
    return np.stack([np.asarray(make(Image.fromarray(band))) for band in bands], axis=2)
