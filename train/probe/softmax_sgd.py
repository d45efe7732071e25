"""A linear classifier on frozen features by SGD, as in the paper.

Features are standardised, so that the paper's learning rate means the same for every encoder.

Source: Zbontar et al., arXiv 2103.03230, appendix A.2: 100 epochs, learning rate .3 with a
cosine, batch 256, weight decay 1e-6. There the images are cropped and flipped anew in each
epoch; here the caller decides by what it gives for an epoch.

Shapes: N images, D dimensions, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.command import progress
from train.probe.softmax import SoftmaxModel, require_finite, standardisation

SGD_MOMENTUM = 0.9


def fit_sgd(
    features_of: Callable[[int], Tensor],
    labels_N: Tensor,
    *,
    n_classes: int,
    epochs: int,
    lr: float,
    batch_size: int,
    weight_decay: float,
    seed: int,
    what: str = "features",
) -> SoftmaxModel:
    """Fit by SGD with momentum .9 and a cosine over all steps, in float32.

    Args:
        features_of: gives the (N, D) features of an epoch; those of epoch 0 decide mean
            and scale.
        labels_N: int64, the same in every epoch.
        n_classes: how many classes there are.
        epochs: passes over the rows.
        lr: learning rate at the start.
        batch_size: rows a step; the last step of an epoch may have fewer.
        weight_decay: of weights and biases, as in the paper's code.
        seed: of the order.
        what: named in the progress that is shown.

    Raises:
        TrainError: features are not finite.
    """
    mean_D, scale_D = standardisation(features_of(0))
    require_finite(mean_D, scale_D)
    mean, scale = mean_D.float(), scale_D.float()
    layer = nn.Linear(len(mean), n_classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(
        layer.parameters(), lr=lr, momentum=SGD_MOMENTUM, weight_decay=weight_decay
    )
    generator = torch.Generator().manual_seed(seed)
    total_steps = epochs * math.ceil(len(labels_N) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
    for epoch in progress(
        range(epochs), what=f"fitting a layer on {what}", total=epochs, unit="epoch"
    ):
        features_ND = features_of(epoch)
        for rows in torch.split(torch.randperm(len(labels_N), generator=generator), batch_size):
            logits_NC = layer((features_ND[rows].float() - mean) / scale)
            loss = nn.functional.cross_entropy(logits_NC, labels_N[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return SoftmaxModel(
        mean_D=mean_D,
        scale_D=scale_D,
        weights_DC=layer.weight.detach().double().T.contiguous(),
        biases_C=layer.bias.detach().double(),
        c=None,
        iterations=epochs,
        gradient_max=None,
    )
