"""The random views: batched, on whatever device the images lie, drawn per image.

Rules:
    Every image of a batch has parameters of its own.
    Every draw comes from the generator that the caller gives, so equal seeds give equal
    views to the bit on one machine.
    Views stay in [0, 1]; they are normalised after the last operation.
    For one channel the colour operations (saturation, hue, grey) fall away.

Crops are resized bilinearly to the size of the input. A crop is never larger than that, so
nothing is ever scaled down and no low-pass filter is needed.

Source: arXiv 2103.03230, section 2.2; the crop's geometry and the ranges of the colour
operations are those of torchvision's `RandomResizedCrop` and `ColorJitter`.

Shapes: N images, C channels, H x W pixels, T tries, K taps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

CROP_LOG_RATIO = math.log(4 / 3)
"""A crop's width / height lies between 3/4 and 4/3, uniform in the logarithm."""

CROP_TRIES = 10
"""Draws of a crop before the largest one that fits is taken."""

GREY_WEIGHTS = (0.299, 0.587, 0.114)
"""Luma of ITU-R BT.601, as in Pillow's conversion to grey."""

SOLARISE_FROM = 0.5
"""Values from here on are inverted."""


Operation = Callable[[Tensor, Tensor], Tensor]
"""From images and an amount of each image to images."""


@dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """What one view may do; probabilities in [0, 1], strengths as in `train.config`."""

    crop_area: tuple[float, float] = (1.0, 1.0)
    flip_probability: float = 0.0
    jitter_probability: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey_probability: float = 0.0
    blur_probability: float = 0.0
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    solarise_probability: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Normaliser:
    """From uint8 images to what a network takes; mean and std are (C, 1, 1), of [0, 1]."""

    mean: Tensor
    std: Tensor

    def to_unit(self, images_NHWC: Tensor) -> Tensor:
        """Give (N, C, H, W) float32 in [0, 1]."""
        return images_NHWC.permute(0, 3, 1, 2).float() / 255

    def normalise(self, images_NCHW: Tensor) -> Tensor:
        """Give zero mean and unit deviation over the training set, channels last in memory."""
        normalised = (images_NCHW - self.mean) / self.std
        return normalised.contiguous(memory_format=torch.channels_last)

    def to_input(self, images_NHWC: Tensor) -> Tensor:
        """Do both, for images that are not to be changed."""
        return self.normalise(self.to_unit(images_NHWC))


class Draw:
    """Per-image random numbers from one generator, on the device of the images."""

    def __init__(self, generator: torch.Generator, n: int) -> None:
        self.generator, self.n = generator, n

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Draw (N, *shape) uniform in [low, high)."""
        device = self.generator.device
        unit = torch.rand((self.n, *shape), generator=self.generator, device=device)
        return low + (high - low) * unit

    def chosen(self, probability: float) -> Tensor:
        """Choose each image with this probability; (N,) bool."""
        return self.uniform(0.0, 1.0) < probability


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Where each image is cropped, in pixels, and whether the crop is mirrored; each (N,)."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    is_mirrored: Tensor


def random_view(images_NCHW: Tensor, recipe: ViewRecipe, generator: torch.Generator) -> Tensor:
    """Make one random view of every image.

    Args:
        images_NCHW: (N, C, H, W) floating, in [0, 1], C of 1 or 3.
        recipe: what may happen, how often and how much.
        generator: the source of all randomness, on the images' device.

    Returns:
        (N, C, H, W) of the same dtype, in [0, 1].
    """
    n, channels, height, width = images_NCHW.shape
    draw = Draw(generator, n)
    crops = draw_crops(draw, height, width, recipe.crop_area, recipe.flip_probability)
    views = crop_and_resize(images_NCHW, crops)
    views = jitter(views, recipe, draw)
    if recipe.grey_probability > 0 and channels == 3:
        views = _where(draw.chosen(recipe.grey_probability), grey(views).expand_as(views), views)
    if recipe.blur_probability > 0:
        sigma_N = draw.uniform(*recipe.blur_sigma_px)
        views = _where(draw.chosen(recipe.blur_probability), blur(views, sigma_N), views)
    if recipe.solarise_probability > 0:
        inverted = torch.where(views >= SOLARISE_FROM, 1 - views, views)
        views = _where(draw.chosen(recipe.solarise_probability), inverted, views)
    return views


def draw_crops(
    draw: Draw, height: int, width: int, area: tuple[float, float], flip_probability: float
) -> Crops:
    """Draw crops of a share of the area, an aspect ratio and a place, all per image.

    Of `CROP_TRIES` draws of area and ratio the first that fits the image is taken; where
    none fits, the largest crop of an allowed ratio: the whole image, unless it is longer.
    """
    area_NT = draw.uniform(*area, CROP_TRIES) * (height * width)
    ratio_NT = torch.exp(draw.uniform(-CROP_LOG_RATIO, CROP_LOG_RATIO, CROP_TRIES))
    width_NT, height_NT = (area_NT * ratio_NT).sqrt(), (area_NT / ratio_NT).sqrt()
    fits_NT = (width_NT <= width) & (height_NT <= height)
    first_N1, fits_N = fits_NT.int().argmax(dim=1, keepdim=True), fits_NT.any(dim=1)
    longest = math.exp(CROP_LOG_RATIO)
    largest_width, largest_height = min(width, height * longest), min(height, width * longest)
    crop_width = width_NT.gather(1, first_N1).squeeze(1).where(fits_N, largest_width)
    crop_height = height_NT.gather(1, first_N1).squeeze(1).where(fits_N, largest_height)
    return Crops(
        top=draw.uniform(0.0, 1.0) * (height - crop_height),
        left=draw.uniform(0.0, 1.0) * (width - crop_width),
        height=crop_height,
        width=crop_width,
        is_mirrored=draw.chosen(flip_probability),
    )


def crop_and_resize(images_NCHW: Tensor, crops: Crops) -> Tensor:
    """Resize each crop to H x W, bilinearly, and mirror those that are to be.

    Values just outside a crop may weigh in at its border, as its pixels' true neighbours.
    """
    n, _, height, width = images_NCHW.shape
    side = torch.where(crops.is_mirrored, -1.0, 1.0)
    theta_N23 = torch.zeros(n, 2, 3, dtype=images_NCHW.dtype, device=images_NCHW.device)
    theta_N23[:, 0, 0] = side * crops.width / width
    theta_N23[:, 0, 2] = (2 * crops.left + crops.width) / width - 1
    theta_N23[:, 1, 1] = crops.height / height
    theta_N23[:, 1, 2] = (2 * crops.top + crops.height) / height - 1
    grid = functional.affine_grid(theta_N23, list(images_NCHW.shape), align_corners=False)
    return functional.grid_sample(
        images_NCHW, grid, mode="bilinear", padding_mode="border", align_corners=False
    )


def jitter(images_NCHW: Tensor, recipe: ViewRecipe, draw: Draw) -> Tensor:
    """Change brightness, contrast, saturation and hue of the chosen images.

    Each image has its own factors and its own order of the operations.
    """
    operations = _jitter_operations(recipe, images_NCHW.shape[1])
    if recipe.jitter_probability == 0 or not operations:
        return images_NCHW
    is_chosen_N = draw.chosen(recipe.jitter_probability)
    amounts = [draw.uniform(low, high) for _, low, high in operations]
    order = draw.uniform(0.0, 1.0, len(operations)).argsort(dim=1)
    views = images_NCHW.clone()
    for slot in range(len(operations)):
        for i, (operation, _, _) in enumerate(operations):
            rows = (is_chosen_N & (order[:, slot] == i)).nonzero().squeeze(1)
            changed = operation(views[rows], amounts[i][rows].view(-1, 1, 1, 1))
            views.index_copy_(0, rows, changed)
    return views


def brighten(images_NCHW: Tensor, factor_N111: Tensor) -> Tensor:
    """Multiply all values by the factor, within [0, 1]."""
    return (images_NCHW * factor_N111).clamp(0, 1)


def stretch_contrast(images_NCHW: Tensor, factor_N111: Tensor) -> Tensor:
    """Multiply the distance to the image's mean grey by the factor, within [0, 1]."""
    mean_N111 = grey(images_NCHW).mean(dim=(1, 2, 3), keepdim=True)
    return (mean_N111 + (images_NCHW - mean_N111) * factor_N111).clamp(0, 1)


def saturate(images_N3HW: Tensor, factor_N111: Tensor) -> Tensor:
    """Multiply each pixel's distance to its grey by the factor, within [0, 1]."""
    grey_N1HW = grey(images_N3HW)
    return (grey_N1HW + (images_N3HW - grey_N1HW) * factor_N111).clamp(0, 1)


def turn_hue(images_N3HW: Tensor, turn_N111: Tensor) -> Tensor:
    """Turn the hue of HSV by a share of the circle, saturation and value kept."""
    value, largest = images_N3HW.max(dim=1)
    chroma = value - images_N3HW.amin(dim=1)
    red, green, blue = images_N3HW.unbind(dim=1)
    safe_chroma = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    by_largest = torch.stack([(green - blue), (blue - red), (red - green)], dim=1)
    within = by_largest.gather(1, largest.unsqueeze(1)).squeeze(1) / safe_chroma
    hue_sixths = within + 2 * largest + 6 * turn_N111.squeeze(1)
    # HSV to RGB without cases: channel n is value - chroma * max(0, min(k, 4 - k, 1)) with
    # k = (n + hue) mod 6 and n = 5, 3, 1 for red, green, blue.
    turned = []
    for offset in (5, 3, 1):
        k = (offset + hue_sixths) % 6
        turned.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(turned, dim=1).clamp(0, 1)


def grey(images_NCHW: Tensor) -> Tensor:
    """Give the luma, (N, 1, H, W); one channel is its own."""
    if images_NCHW.shape[1] == 1:
        return images_NCHW
    weights = torch.tensor(GREY_WEIGHTS, dtype=images_NCHW.dtype, device=images_NCHW.device)
    return (images_NCHW * weights.view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


def blur(images_NCHW: Tensor, sigma_N: Tensor) -> Tensor:
    """Blur each image with a Gaussian of its own deviation in pixels, reflected at borders."""
    n, channels, height, width = images_NCHW.shape
    radius = min(math.ceil(3 * float(sigma_N.max())), height - 1, width - 1)
    taps_K = torch.arange(-radius, radius + 1, device=sigma_N.device, dtype=images_NCHW.dtype)
    kernel_NK = torch.exp(-0.5 * (taps_K / sigma_N[:, None]).square())
    kernel_NK = kernel_NK / kernel_NK.sum(dim=1, keepdim=True)
    kernel = kernel_NK.repeat_interleave(channels, dim=0)[:, None, None, :]
    flat = images_NCHW.reshape(1, n * channels, height, width)
    padded = functional.pad(flat, (radius, radius, radius, radius), mode="reflect")
    rows = functional.conv2d(padded, kernel, groups=n * channels)
    both = functional.conv2d(rows, kernel.transpose(2, 3), groups=n * channels)
    return both.reshape(n, channels, height, width)


def _jitter_operations(recipe: ViewRecipe, channels: int) -> list[tuple[Operation, float, float]]:
    """List the operations that can change anything, each with the range of its amount."""
    strengths: list[tuple[Operation, float, float]] = []
    strengths += [(brighten, 1.0, recipe.brightness), (stretch_contrast, 1.0, recipe.contrast)]
    if channels == 3:
        strengths += [(saturate, 1.0, recipe.saturation), (turn_hue, 0.0, recipe.hue)]
    return [
        (operation, middle - strength, middle + strength)
        for operation, middle, strength in strengths
        if strength > 0
    ]


def _where(is_chosen_N: Tensor, changed: Tensor, otherwise: Tensor) -> Tensor:
    """Take whole images from one batch or the other."""
    return torch.where(is_chosen_N.view(-1, 1, 1, 1), changed, otherwise)
