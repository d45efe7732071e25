"""Compare ways to make both random views of a batch: ours, kornia's, torchvision's.

Every contender starts from uint8 images in memory, (N, H, W, C), and gives two normalised
float32 batches of the paper's views: bicubic crop, flip, jitter, grey, blur and solarise
with the asymmetric probabilities; for one channel without saturation, hue and grey.

ours            `train.views`, the whole batch at once
ours, threads   `train.views.crops` and `.workers`, as a stream makes whole views: image by
                image, in as many threads as there are CPUs
kornia          its augmentations for batches, with parameters of each image's own
v2 Pillow       torchvision's `transforms.v2` on Pillow images, in DataLoader workers
v2 tensors      the same on uint8 tensors

The blur of "v2 Pillow" is Pillow's, as in the authors' code, for torchvision's is many times
slower there. Kornia's and torchvision's own blurs have a kernel as long as ours. What
DataLoader workers had prepared before the clock starts counts in their favour. Contenders
take turns within every round, ratios are paired within rounds.

Run from the root, after `pip install kornia`:
`python -m benchmarks.views --out benchmarks/results/views.json`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import kornia.augmentation as kornia_augmentation
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from benchmarks.measuring import command_line, spread_of, turns
from models.command import progress, run_command
from models.cpu import cpu_budget, cpu_name
from models.files import atomic_file
from train.views import Normaliser, random_view
from train.views.crops import CutCrops
from train.views.parameters import CROP_LOG_RATIO, ViewRecipe
from train.views.workers import FinishedCrops

BATCH = 128
SHAPES = ((28, 28, 1), (96, 96, 3), (224, 224, 3))
MEAN, STD = 0.5, 0.25
KERNEL_PX = 13
WARM_UP_STEPS = 1
SMOOTH_PX = 5
"""Noise of this many pixels a value is smoothed over: pictures, not white noise."""

PAPER = ViewRecipe(
    crop_area=(0.08, 1.0),
    interpolation="bicubic",
    flip_probability=0.5,
    jitter_probability=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grey_probability=0.2,
    blur_probability=1.0,
    solarise_probability=0.0,
)
RECIPES = (PAPER, dataclasses.replace(PAPER, blur_probability=0.1, solarise_probability=0.2))
RATIO = (1 / np.exp(CROP_LOG_RATIO), np.exp(CROP_LOG_RATIO))

Images = NDArray[np.uint8]
Step = Callable[[], tuple[Tensor, Tensor]]
"""Makes both views of one batch."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure images a second whose two views are made, by several libraries."""

    rounds: int = 5
    """How often every contender is measured."""

    seconds: float = 4.0
    """How long each measurement takes, at least; one batch is always made."""

    out: Path | None = None
    """JSON file for the result."""


def main(options: Options) -> None:
    """Measure in turns, print and write."""
    torch.set_num_threads(cpu_budget())
    load = os.getloadavg()[0]
    order = [
        (shape, name)
        for number in range(options.rounds)
        for shape in SHAPES
        for name in turns(CONTENDERS, number)
    ]
    figures: dict[tuple[int, int, int], dict[str, list[float]]] = {shape: {} for shape in SHAPES}
    for shape, name in progress(order, what="measuring", total=len(order), unit="turn"):
        images = pictures(shape)
        speed = images_per_s(CONTENDERS[name](images), options.seconds)
        figures[shape].setdefault(name, []).append(speed)
    report = {
        "command": command_line(),
        "hardware": {"cpu": cpu_name(), "cpus": cpu_budget()},
        "load_average_before": round(load, 1),
        "versions": {
            name: version(name) for name in ("torch", "torchvision", "kornia", "pillow", "numpy")
        },
        "batch": BATCH,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "cases": {"x".join(map(str, shape)): summarise(rows) for shape, rows in figures.items()},
    }
    print(json.dumps(report, indent=2))
    if options.out is not None:
        with atomic_file(options.out) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")


def pictures(shape: tuple[int, int, int]) -> Images:
    """Give a batch of smooth noise."""
    height, width, channels = shape
    small = torch.rand(
        BATCH, channels, -(-height // SMOOTH_PX), -(-width // SMOOTH_PX),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    smooth = nn.functional.interpolate(small, (height, width), mode="bilinear")
    return (255 * smooth).byte().permute(0, 2, 3, 1).contiguous().numpy()


def images_per_s(step: Step, seconds: float) -> float:
    """Count the images that both views are made of, after some steps that do not count."""
    for _ in range(WARM_UP_STEPS):
        check(step())
    start_s, steps = time.perf_counter(), 0
    while steps == 0 or time.perf_counter() - start_s < seconds:
        step()
        steps += 1
    return steps * BATCH / (time.perf_counter() - start_s)


def check(views: tuple[Tensor, Tensor]) -> None:
    """See that a contender does the work."""
    for view in views:
        assert len(view) == BATCH
        assert view.dtype == torch.float32
        assert -2.01 < view.min() < 0 < view.max() < 2.01


def summarise(speeds: dict[str, list[float]]) -> dict[str, object]:
    """Give each contender's spread, and how many times as fast ours is, round by round."""
    ratios = {
        name: spread_of([a / b for a, b in zip(speeds["ours"], theirs, strict=True)], 3)
        for name, theirs in speeds.items()
        if name != "ours"
    }
    return {
        "images_per_s": {name: spread_of(values, 3) for name, values in speeds.items()},
        "ours_is_faster_by": ratios,
    }


def ours(images: Images) -> Step:
    """Make the views of the whole batch at once."""
    channels = images.shape[3]
    normaliser = Normaliser(
        mean=torch.full((channels, 1, 1), MEAN), std=torch.full((channels, 1, 1), STD)
    )
    generator = torch.Generator().manual_seed(0)

    def step() -> tuple[Tensor, Tensor]:
        unit_NCHW = normaliser.to_unit(torch.from_numpy(images))
        first, second = (
            normaliser.normalise(random_view(unit_NCHW, recipe, generator)) for recipe in RECIPES
        )
        return first, second

    return step


def ours_in_threads(images: Images) -> Step:
    """Make the views of one image after the other, in threads."""
    _, height, width, channels = images.shape
    crops = CutCrops(
        (PAPER.crop_area, PAPER.crop_area),
        height=height,
        width=width,
        channels=channels,
        interpolation=PAPER.interpolation,
    )
    make_views = FinishedCrops(crops, RECIPES)
    pool, seeds = ThreadPoolExecutor(cpu_budget()), iter(range(1 << 40))

    def one(item: tuple[Images, int]) -> tuple[Images, Images]:
        return make_views(item[0], np.random.default_rng(item[1]))

    def step() -> tuple[Tensor, Tensor]:
        pairs = list(pool.map(one, ((image, next(seeds)) for image in images)))
        first, second = (normalise(np.stack(views)) for views in zip(*pairs, strict=True))
        return first, second

    return step


def normalise(views_NHWC: Images) -> Tensor:
    """Do what every contender ends with."""
    unit_NCHW = torch.from_numpy(views_NHWC).permute(0, 3, 1, 2).float().div_(255)
    return unit_NCHW.sub_(MEAN).div_(STD)


def kornia_views(images: Images) -> Step:
    """Make the views of the whole batch by kornia."""
    _, height, width, channels = images.shape
    pipelines = [kornia_pipeline(recipe, height, width, channels) for recipe in RECIPES]

    def step() -> tuple[Tensor, Tensor]:
        unit_NCHW = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255).contiguous()
        first, second = (
            (pipeline(unit_NCHW).clamp_(0, 1) - MEAN).div_(STD) for pipeline in pipelines
        )
        return first, second

    return step


def kornia_pipeline(recipe: ViewRecipe, height: int, width: int, channels: int) -> nn.Module:
    """Say the recipe in kornia's words; for one channel its jitter is two operations."""
    k, share = kornia_augmentation, recipe.jitter_probability
    light = (1 - recipe.brightness, 1 + recipe.brightness)
    if channels == 3:
        colour = [
            k.ColorJiggle(
                recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue, p=share
            ),
            k.RandomGrayscale(p=recipe.grey_probability),
        ]
    else:
        colour = [k.RandomBrightness(light, p=share), k.RandomContrast(light, p=share)]
    return k.AugmentationSequential(
        k.RandomResizedCrop(
            (height, width), scale=recipe.crop_area, ratio=RATIO, resample=recipe.interpolation
        ),
        k.RandomHorizontalFlip(p=recipe.flip_probability),
        *colour,
        k.RandomGaussianBlur(
            (KERNEL_PX, KERNEL_PX), recipe.blur_sigma_px, p=recipe.blur_probability
        ),
        k.RandomSolarize(0.0, 0.0, p=recipe.solarise_probability),  # 0 off from .5
        data_keys=["input"],
    )


def v2_pillow(images: Images) -> Step:
    """Make the views by torchvision on Pillow images, in workers."""
    return loaded(images, on_pillow=True)


def v2_tensors(images: Images) -> Step:
    """Make the views by torchvision on uint8 tensors, in workers."""
    return loaded(images, on_pillow=False)


class Samples(Dataset):
    """Views of one image at a time, as DataLoader workers make them, without an end."""

    def __init__(self, images: Images, *, on_pillow: bool) -> None:
        size = (images.shape[1], images.shape[2])
        self.images, self.on_pillow = images, on_pillow
        self.transforms = [
            v2_pipeline(r, size, images.shape[3], on_pillow=on_pillow) for r in RECIPES
        ]

    def __len__(self) -> int:
        """Give more than is ever taken."""
        return 1 << 24

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """Give both views of one image."""
        image = self.images[row % len(self.images)]
        if self.on_pillow:
            sample = Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0])
        else:
            sample = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))
        first, second = (transform(sample) for transform in self.transforms)
        return first, second


def v2_pipeline(
    recipe: ViewRecipe, size: tuple[int, int], channels: int, *, on_pillow: bool
) -> v2.Compose:
    """Say the recipe in torchvision's words."""
    resizing = InterpolationMode(recipe.interpolation)
    is_colour = channels == 3
    jitter = v2.ColorJitter(
        recipe.brightness,
        recipe.contrast,
        recipe.saturation if is_colour else 0,
        recipe.hue if is_colour else 0,
    )
    grey = [v2.RandomGrayscale(recipe.grey_probability)] if is_colour else []
    blur = PillowBlur() if on_pillow else v2.GaussianBlur(KERNEL_PX, recipe.blur_sigma_px)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, recipe.crop_area, RATIO, resizing),
            v2.RandomHorizontalFlip(recipe.flip_probability),
            v2.RandomApply([jitter], recipe.jitter_probability),
            *grey,
            v2.RandomApply([blur], recipe.blur_probability),
            v2.RandomSolarize(128, recipe.solarise_probability),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([MEAN] * channels, [STD] * channels),
        ]
    )


class PillowBlur:
    """The authors' blur."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur by a random deviation."""
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*PAPER.blur_sigma_px)))


def loaded(images: Images, *, on_pillow: bool) -> Step:
    """Take batches from a DataLoader, whose workers end with the step."""
    loader = DataLoader(
        Samples(images, on_pillow=on_pillow), batch_size=BATCH, num_workers=cpu_budget()
    )
    batches: Iterator[list[Tensor]] = iter(loader)

    def step() -> tuple[Tensor, Tensor]:
        first, second = next(batches)
        return first, second

    return step


CONTENDERS: dict[str, Callable[[Images], Step]] = {
    "ours": ours,
    "ours, threads": ours_in_threads,
    "kornia": kornia_views,
    "v2 Pillow": v2_pillow,
    "v2 tensors": v2_tensors,
}


if __name__ == "__main__":
    sys.exit(run_command(Options, main, prog="python -m benchmarks.views"))
