"""What a training step is: network, optimiser, images, and how they meet.

Rules:
    Order, views and learning rate are functions of seed and step: beside weights, optimiser
    and torch's generator there is no state to keep.
    Each view passes through the network on its own, as in the authors' code: BatchNorm in
    the backbone sees the statistics of one view, and the loss standardises each with its own.
    An incomplete last batch of an epoch is dropped: C of few samples is mostly noise.

When to log, measure and save is decided in `train.loop`.

Source: Zbontar et al., arXiv 2103.03230, algorithm 1.

Shapes: N images, C channels, H x W pixels, D dimensions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.networks import BarlowTwins, ResNet
from train import monitor
from train.config import PretrainOptions, ViewOptions
from train.data import ImageSet, Split, epoch_order, split_rows
from train.errors import TrainError
from train.loss import loss_terms
from train.optim import lr_at, make_optimizer, set_lr
from train.views import Normaliser, ViewRecipe, random_view

LEAST_RECORDS = 20
"""Records of the loss that a run has, however short, so that there is a curve to see."""

log = logging.getLogger("horace")


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What one step gave, detached: losses are loss, invariance and redundancy."""

    losses_3: Tensor
    features_ND: Tensor


class Trainer:
    """A network, its optimiser and the images it learns from."""

    def __init__(
        self,
        options: PretrainOptions,
        data: ImageSet,
        split: Split,
        *,
        channel_mean: tuple[float, ...],
        channel_std: tuple[float, ...],
    ) -> None:
        self.options, self.data, self.split = options, data, split
        self.steps_per_epoch = len(self.split.train) // options.batch_size
        self.total_steps = self.steps_per_epoch * options.epochs
        self.log_every_steps = min(
            options.log_every_steps, max(1, self.total_steps // LEAST_RECORDS)
        )
        warmup_steps = round(options.warmup_epochs * self.steps_per_epoch)
        self.warmup_steps = min(warmup_steps, self.total_steps // 2)
        self.normaliser = Normaliser(
            mean=torch.tensor(channel_mean).view(-1, 1, 1),
            std=torch.tensor(channel_std).view(-1, 1, 1),
        )
        self.recipes = view_recipes(options.views)
        self.views_generator = torch.Generator()
        torch.manual_seed(options.seed)
        self.network = build_network(options).to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(
            self.network, options.optimizer, weight_decay=options.weight_decay
        )

    def step(self, step: int, rows: NDArray[np.int64]) -> StepOutcome:
        """Learn from one batch."""
        images_NCHW = self.normaliser.to_unit(torch.from_numpy(self.data.batch(rows)))
        self.views_generator.manual_seed(step_seed(self.options.seed, step))
        view1, view2 = (
            self.normaliser.normalise(random_view(images_NCHW, recipe, self.views_generator))
            for recipe in self.recipes
        )
        set_lr(self.optimizer, self.lr(step))
        features_ND, z1_ND = self.network(view1)
        _, z2_ND = self.network(view2)
        terms = loss_terms(z1_ND, z2_ND, lambd=self.options.lambd, objective=self.options.objective)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(terms.loss)
        self.optimizer.step()
        losses_3 = torch.stack([terms.loss, terms.invariance, terms.redundancy]).detach()
        return StepOutcome(losses_3=losses_3, features_ND=features_ND.detach())

    def lr(self, step: int) -> float:
        """Give the learning rate of a step."""
        return lr_at(
            step,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            lr_peak=self.options.lr_peak,
        )

    def batches(self, first_step: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield (step, rows) from a step to the end of the run."""
        for epoch in range(first_step // self.steps_per_epoch, self.options.epochs):
            order = epoch_order(self.split.train, seed=self.options.seed, epoch=epoch)
            start = epoch * self.steps_per_epoch
            for step in range(max(start, first_step), start + self.steps_per_epoch):
                offset = (step - start) * self.options.batch_size
                yield step, order[offset : offset + self.options.batch_size]

    @property
    def is_watched(self) -> bool:
        """Whether there are labelled images to measure kNN accuracy on."""
        return len(self.split.val) > 0

    def is_knn_due(self, steps_done: int) -> bool:
        """Say whether kNN accuracy is measured after so many steps."""
        epoch, rest = divmod(steps_done, self.steps_per_epoch)
        if not self.is_watched or rest != 0:
            return False
        return epoch % self.options.knn_every_epochs == 0 or steps_done == self.total_steps

    def baselines(self) -> dict[str, float]:
        """Measure what a trained encoder has to beat: raw pixels and the untrained one."""
        values = {"knn_pixels": self._knn(monitor.pixels), "knn_random": self.knn_top1()}
        log.info(
            "kNN on %d held-out training images, before training: raw pixels %.2f%%, "
            "untrained encoder %.2f%%",
            len(self.split.val), 100 * values["knn_pixels"], 100 * values["knn_random"],
        )  # fmt: skip
        return values

    def knn_top1(self) -> float:
        """Measure the backbone on the held-out images."""
        to_input = self.normaliser.to_input
        return self._knn(lambda images, rows: monitor.embed(self.network, images, rows, to_input))

    def _knn(
        self, vectors_of: Callable[[NDArray[np.uint8], NDArray[np.int64]], NDArray[np.float32]]
    ) -> float:
        """Classify the held-out images by their neighbours in the bank."""
        images, labels = self.data.images_NHWC, self.data.labels_N
        bank, val = self.split.bank, self.split.val
        return monitor.knn_accuracy(
            vectors_of(images, bank), labels[bank], vectors_of(images, val), labels[val]
        )


def split_data(options: PretrainOptions, data: ImageSet) -> Split:
    """Split the images as the options say.

    Raises:
        TrainError: less than one batch is left to train on.
    """
    split = split_rows(
        data.labels_N,
        val_images=options.val_images if options.knn_every_epochs else 0,
        bank_images=options.bank_images,
        seed=options.seed,
    )
    if len(split.train) < options.batch_size:
        raise TrainError(
            "training images",
            expected=f"at least one batch of {options.batch_size}",
            found=str(len(split.train)),
            mend="lower --batch-size or give more images",
        )
    return split


def build_network(options: PretrainOptions) -> BarlowTwins:
    """Build the untrained network from torch's generator."""
    return BarlowTwins(build_backbone(options), options.network.projector_widths)


def build_backbone(options: PretrainOptions) -> ResNet:
    """Build the untrained backbone, the part that is exported, from torch's generator."""
    network = options.network
    return ResNet(
        layout=network.layout,
        width=network.width,
        in_channels=options.channels,
        stem=network.stem,
        zero_init_residual=network.zero_init_residual,
    )


def view_recipes(views: ViewOptions) -> tuple[ViewRecipe, ViewRecipe]:
    """Give each view its own half of the asymmetric probabilities."""
    first, second = (
        ViewRecipe(
            crop_area=views.crop_area,
            flip_probability=views.flip_probability,
            jitter_probability=views.jitter_probability,
            brightness=views.brightness,
            contrast=views.contrast,
            saturation=views.saturation,
            hue=views.hue,
            grey_probability=views.grey_probability,
            blur_probability=views.blur_probability[i],
            blur_sigma_px=views.blur_sigma_px,
            solarise_probability=views.solarise_probability[i],
        )
        for i in (0, 1)
    )
    return first, second


def step_seed(seed: int, step: int) -> int:
    """Mix seed and step to the 64 bits that the views of one step are drawn from."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])
