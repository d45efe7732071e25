"""A network with a linear layer on its readout, trained with labels: fine-tuned or from scratch.

Rules:
    What is pretrained and what is not differ in their initial weights and in nothing else:
    readout, standardisation, layer, augmentation and loop are the same.
    The layer starts at zero or, where a recipe says so, at the optimum on frozen features, so
    that the backbone does not move to make up for a layer that knows nothing.
    Where statistics are frozen, the standardisation's are measured before the first step.
    Learning rates are functions of the step; all randomness comes from the seed.

The readout's features are standardised by a BatchNorm without weights, so that stages of
different scale weigh alike and learning rates carry over from one readout to another.

Source: Zbontar et al., arXiv 2103.03230, section 3.2 (learning rates of their own for layer
and backbone, a cosine or two drops); Kumar et al., arXiv 2202.10054, for fitting the layer first.

Shapes: N images, H x W pixels, C channels or classes, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from train.backbones import refuse_lone_pixels
from train.device import Compute, images_at_once
from train.export.graph import EncoderGraph
from train.probe.augment import augment, crops_and_flips
from train.probe.softmax import Statistics, fit_softmax, require_finite, standardisation
from train.recorded import recorded

EVALUATION_BATCH = 500
HEAD_TOLERANCE = 1e-3
"""Of the fit's gradient: ten times less changed no accuracy, and takes twice the time."""

DROPS = (0.6, 0.8)
"""Shares of the run after which `drops` multiplies by `DROP`: epochs 12 and 16 of 20."""

DROP = 0.2
MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a classifier is trained.

    Attributes:
        epochs: passes over the labelled images; with 0 the layer's fit is all there is.
        batch_size: images a step; an incomplete batch goes into the next pass.
        optimizer: `sgd` has momentum .9.
        lr_head: of the linear layer, at its peak.
        lr_backbone: of the network, at its peak.
        weight_decay: of both; biases and BatchNorm have none.
        schedule: `cosine` to zero, or two `drops` to a fifth.
        warmup_share: of the steps, in which learning rates rise linearly.
        label_smoothing: share of the target that is spread over all classes.
        smallest_crop: share of an image that a random crop covers at least; 1 for no crops.
        flip_probability: how often an image is mirrored.
        head_c: C of the fit that the layer starts from; None where it starts at zero.
        freezes_batch_norm: whether all statistics stay as they are before the first step.
    """

    epochs: int
    batch_size: int
    optimizer: Literal["adamw", "sgd"]
    lr_head: float
    lr_backbone: float
    weight_decay: float
    schedule: Literal["cosine", "drops"]
    warmup_share: float
    label_smoothing: float
    smallest_crop: float
    flip_probability: float
    head_c: float | None
    freezes_batch_norm: bool


class Classifier(nn.Module):
    """Normalisation, backbone and readout of a graph, standardisation, and a linear layer."""

    def __init__(self, graph: EncoderGraph, n_classes: int) -> None:
        super().__init__()
        self.graph = graph
        dim = cast(int, graph.readout.dim)
        self.standardise = nn.BatchNorm1d(dim, affine=False)
        self.head = nn.Linear(dim, n_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images_NHWC: Tensor, compute: Compute) -> Tensor:
        """Give logits, (N, C) float32, of images with values of 0 to 255."""
        with compute.autocast():
            features_ND = self.graph(images_NHWC)
        logits_NC: Tensor = self.head(self.standardise(features_ND.float()))
        return logits_NC


def train_classifier(
    classifier: Classifier,
    images_NHWC: NDArray[np.uint8],
    targets_N: NDArray[np.int64] | NDArray[np.float32],
    recipe: Recipe,
    *,
    seed: int,
    compute: Compute,
) -> None:
    """Train in place, on images and what they are to be taken for.

    Args:
        classifier: in any mode; it ends in eval mode.
        images_NHWC: uint8.
        targets_N: one class number an image, none negative; or (N, C) probabilities, which a
            layer cannot be fitted to.
        recipe: how.
        seed: of order and augmentation.
        compute: the device and the arithmetic of the backbone.

    Raises:
        UsageError: the backbone cannot be trained in this arithmetic here.
        TrainError: features are not finite.
    """
    classifier.to(compute.device).to(memory_format=torch.channels_last)
    # They stay where they are, and go to the device a batch at a time: there may be many.
    images, targets = torch.from_numpy(images_NHWC), torch.from_numpy(targets_N)
    views = crops_and_flips((recipe.smallest_crop, 1.0), recipe.flip_probability)
    generator = torch.Generator().manual_seed(seed)
    optimizer, peaks = _make_optimizer(classifier, recipe)
    scaler = compute.grad_scaler()
    batch_size = min(recipe.batch_size, len(images))
    total_steps = recipe.epochs * len(images) // batch_size
    if total_steps:
        channels, side_px = images_NHWC.shape[3], images_NHWC.shape[1]
        refuse_lone_pixels(classifier.graph.backbone, channels, side_px, compute)
    is_mirrored = recipe.flip_probability > 0
    if recipe.head_c is not None:
        fit_head(classifier, images, targets, c=recipe.head_c, is_mirrored=is_mirrored)
    elif recipe.freezes_batch_norm:
        fit_standardisation(classifier, images, is_mirrored=is_mirrored)
    batches = _batches(len(images), batch_size, generator)

    def leave_gradients(views_NHWC: Tensor, targets_N: Tensor) -> tuple[Tensor, ...]:
        loss = nn.functional.cross_entropy(
            classifier(views_NHWC, compute), targets_N, label_smoothing=recipe.label_smoothing
        )
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(scaler.scale(loss))
        return ()

    learn = recorded(leave_gradients, compute.device)
    classifier.train(not recipe.freezes_batch_norm)
    for step in range(total_steps):
        rows = next(batches)
        batch_NHWC, wanted = images[rows].to(compute.device), targets[rows].to(compute.device)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * lr_share(recipe, step, total_steps)
        learn(augment(batch_NHWC, views, generator), wanted)
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)  # else they hold the memory of what was recorded
    classifier.eval()


def fit_head(
    classifier: Classifier, images_NHWC: Tensor, labels_N: Tensor, *, c: float, is_mirrored: bool
) -> None:
    """Put the layer, and the standardisation before it, at the optimum on frozen features.

    The features are those of the images and, where mirroring is allowed, of their mirror
    images.
    """
    features_ND = _frozen_features(classifier, images_NHWC, is_mirrored=is_mirrored)
    model = fit_softmax(
        features_ND,
        labels_N.repeat(1 + is_mirrored),
        n_classes=classifier.head.out_features,
        c=c,
        statistics=Statistics.of(features_ND, by_dimension=True),  # as BatchNorm will have them
        tolerance=HEAD_TOLERANCE,
    )
    _set_standardisation(classifier, model.mean_D, model.scale_D)
    with torch.no_grad():
        classifier.head.weight.copy_(model.weights_DC.T)
        classifier.head.bias.copy_(model.biases_C)


def fit_standardisation(classifier: Classifier, images_NHWC: Tensor, *, is_mirrored: bool) -> None:
    """Give the standardisation the statistics that `fit_head` gives it, and leave the layer.

    Raises:
        TrainError: features are not finite.
    """
    features_ND = _frozen_features(classifier, images_NHWC, is_mirrored=is_mirrored)
    mean_D, scale_D = standardisation(features_ND)
    require_finite(mean_D, scale_D)
    _set_standardisation(classifier, mean_D, scale_D)


def predict(
    classifier: Classifier, images_NHWC: NDArray[np.uint8], compute: Compute
) -> NDArray[np.float64]:
    """Give the logits of images as they are, (N, C); in eval mode, whatever mode it was in."""
    classifier.eval()
    blocks = []
    with torch.inference_mode():
        step = images_at_once(EVALUATION_BATCH, *images_NHWC.shape[1:3])
        for start in range(0, len(images_NHWC), step):
            block = torch.from_numpy(np.ascontiguousarray(images_NHWC[start : start + step]))
            blocks.append(classifier(block.to(compute.device), compute).double().cpu())
    return np.asarray(torch.cat(blocks).numpy())


def lr_share(recipe: Recipe, step: int, total_steps: int) -> float:
    """Give the share of the peak learning rate in a step, counted from 0."""
    warmup_steps = max(1, round(recipe.warmup_share * total_steps))
    rise = min(1.0, (step + 1) / warmup_steps)
    share = step / max(1, total_steps)
    if recipe.schedule == "drops":
        return rise * DROP ** sum(share >= drop for drop in DROPS)
    return rise * 0.5 * (1 + math.cos(math.pi * share))


def _frozen_features(classifier: Classifier, images_NHWC: Tensor, *, is_mirrored: bool) -> Tensor:
    """Give (N, D) float32 on the CPU; those of the mirror images come after the others."""
    classifier.eval()
    device = classifier.graph.scale.device
    step = images_at_once(EVALUATION_BATCH, *images_NHWC.shape[1:3])
    with torch.inference_mode():
        blocks = [
            classifier.graph(block.flip(axes).to(device)).float().cpu()
            for axes in ([], [2])[: 1 + is_mirrored]
            for block in torch.split(images_NHWC, step)
        ]
    return torch.cat(blocks).clone()


def _set_standardisation(classifier: Classifier, mean_D: Tensor, scale_D: Tensor) -> None:
    """Let the standardisation subtract a mean and divide by a deviation."""
    norm = classifier.standardise
    assert norm.running_mean is not None, "it keeps statistics"
    assert norm.running_var is not None, "it keeps statistics"
    with torch.no_grad():
        norm.running_mean.copy_(mean_D)
        norm.running_var.copy_((scale_D.square() - norm.eps).clamp(min=0))


def _make_optimizer(
    classifier: Classifier, recipe: Recipe
) -> tuple[torch.optim.Optimizer, tuple[float, ...]]:
    """Make an optimiser, and give the peak learning rate of each of its groups."""
    groups, peaks = [], []
    for part, peak in (
        (classifier.graph, recipe.lr_backbone), (classifier.head, recipe.lr_head)
    ):  # fmt: skip
        for is_decayed in (True, False):
            parameters = [p for p in part.parameters() if (p.ndim > 1) == is_decayed]
            decay = recipe.weight_decay if is_decayed else 0.0
            groups.append({"params": parameters, "weight_decay": decay})
            peaks.append(peak)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0), tuple(peaks)
    return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM), tuple(peaks)


def _batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield rows of shuffled passes without end; what a pass has left opens the next."""
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < batch_size:
            waiting = torch.cat([waiting, torch.randperm(n, generator=generator)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]
