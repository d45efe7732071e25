"""Random crops and flips for training with labels, through the views of pretraining.

Shapes: N images, H x W pixels, C channels, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.device import images_at_once
from train.probe.probed import RunEncoder
from train.views import random_view
from train.views.parameters import ViewRecipe

ENCODE_BATCH = 256


def crops_and_flips(crop_area: tuple[float, float], flip_probability: float) -> ViewRecipe:
    """Give the recipe of views that are only cropped and mirrored."""
    return ViewRecipe(crop_area=crop_area, flip_probability=flip_probability)


def augment(images_NHWC: Tensor, recipe: ViewRecipe, generator: torch.Generator) -> Tensor:
    """Make one random view of every image, in the layout and range of the images.

    Args:
        images_NHWC: uint8.
        recipe: what may happen.
        generator: on the CPU.

    Returns:
        (N, H, W, C) float32 of 0 to 255.
    """
    unit_NCHW = images_NHWC.permute(0, 3, 1, 2).float() / 255
    return random_view(unit_NCHW, recipe, generator).permute(0, 2, 3, 1) * 255


def augmented_features(
    encoder: RunEncoder,
    images_NHWC: NDArray[np.uint8],
    *,
    crop_area: tuple[float, float],
    seed: int,
) -> Callable[[int], Tensor]:
    """Give a function from an epoch to the (N, D) features of its own views of the images."""
    recipe = crops_and_flips(crop_area, 0.5)

    def features_of(epoch: int) -> Tensor:
        generator = torch.Generator()
        generator.manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
        blocks = []
        with torch.inference_mode():
            step = images_at_once(ENCODE_BATCH, *images_NHWC.shape[1:3])
            for start in range(0, len(images_NHWC), step):
                block = torch.from_numpy(images_NHWC[start : start + step])
                views = augment(block.to(encoder.device), recipe, generator)
                blocks.append(encoder.graph(views).float().cpu())
        return torch.cat(blocks).clone()

    return features_of
