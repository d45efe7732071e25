"""What a training step is: network, optimiser, views and loss, and how they meet.

Rules:
    Order, views and learning rates are functions of seed and step: beside weights, optimiser,
    scaler and torch's generator there is no state to keep.
    Each view passes through the network on its own, as in the authors' code: BatchNorm in
    the backbone sees the statistics of one view, and the loss standardises each with its own.
    Over W ranks every statistic and the loss are those of the whole batch, and the gradient
    is the one that a single process would have: see `train.ranks`.
    The network computes in the precision that was chosen; views, loss, gradients and weights
    are float32.
    On one GPU what every step does alike is recorded and replayed: see `train.recorded`.

When to log, measure and save is decided in `train.books`.

Source: Zbontar et al., arXiv 2103.03230, algorithm 1.

Shapes: N images of this rank, C channels, H x W pixels, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from models.networks import BarlowTwins
from train.backbones import build_network
from train.config import PretrainOptions, ViewOptions
from train.data.batches import rank_slice
from train.device import Compute, DeviceBatch
from train.loss import LossTerms, loss_terms
from train.optim import lr_at, make_optimizer, peak_rates, set_lr
from train.ranks import Ranks, share_gradients
from train.recorded import recorded
from train.sync_norm import convert_batch_norm
from train.views import (
    Normaliser,
    ViewParameters,
    ViewRecipe,
    apply_view,
    draw_parameters,
    finish_view,
)
from train.views.whole import WholeParameters, apply_whole, whole_parameters

LEAST_RECORDS = 20
"""Records of the loss that a run has, however short, so that there is a curve to see."""


FLOAT_BYTES = 4

SMALL_BATCH_BYTES = 8 << 20
"""Of float32 images: at the 3 to 5 TB/s of a recent GPU a kernel reads and writes them in the
five microseconds that one takes to start."""

LOGGED = (
    "loss",
    "loss_invariance",
    "loss_redundancy",
    "loss_invariance_per_dim",
    "c_diagonal",
    "c_off_diagonal_rms",
)
"""What every step gives for the log, of the whole batch; each as in `train.loss.LossTerms`."""


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What one step gave, detached.

    Attributes:
        logged: the values that `LOGGED` names, of the whole batch.
        off_diagonal_floor: as in `train.loss.LossTerms`.
        features_ND: of view 1 of this rank's images.
        z1_ND, z2_ND: the embeddings of both views, as the loss took them.
    """

    logged: Tensor
    off_diagonal_floor: float
    features_ND: Tensor
    z1_ND: Tensor
    z2_ND: Tensor


class TwoViews(nn.Module):
    """Both passes as one call, which is what DDP wraps and the compiler sees.

    Args:
        network: what is trained.
        stop_gradient: whether the embedding of view 2 is a constant to the loss.
    """

    def __init__(self, network: BarlowTwins, *, stop_gradient: bool) -> None:
        super().__init__()
        self.network, self.stop_gradient = network, stop_gradient

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give the features of view 1 and the embeddings of both, as the loss takes them."""
        features_ND, z1_ND = self.network(view1)
        _, z2_ND = self.network(view2)
        if self.stop_gradient:
            z2_ND = z2_ND.detach()
        return features_ND, self.network.predict(z1_ND), z2_ND


class Trainer:
    """A network, its optimiser, and the step that they take.

    Args:
        options: of the run.
        steps_per_epoch: of its source of batches.
        normaliser: of the images, on the device.
        compute: the device and the network's precision.
        ranks: the processes that share each batch.
    """

    def __init__(
        self,
        options: PretrainOptions,
        *,
        steps_per_epoch: int,
        normaliser: Normaliser,
        compute: Compute,
        ranks: Ranks,
    ) -> None:
        self.options, self.compute, self.ranks = options, compute, ranks
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = steps_per_epoch * options.epochs
        self.log_every_steps = min(
            options.log_every_steps, max(1, self.total_steps // LEAST_RECORDS)
        )
        warmup_steps = round(options.warmup_epochs * steps_per_epoch)
        self.warmup_steps = min(warmup_steps, self.total_steps // 2)
        self.normaliser = normaliser
        self.recipes = view_recipes(options.views)
        self.views_generator = torch.Generator()
        self.rows = rank_slice(options.batch_size, ranks.rank, ranks.world)
        torch.manual_seed(options.seed)
        network = build_network(options.network, options.channels, options.image_size_px)
        network.to(memory_format=torch.channels_last).to(compute.device)
        converted = convert_batch_norm(network, ranks.group)
        assert isinstance(converted, BarlowTwins)  # only what is inside has changed
        self.network = converted
        self.optimizer = make_optimizer(
            self.network,
            options.optimizer,
            weight_decay=options.weight_decay,
            lars_eta=options.lars_eta,
            lars_clip=options.lars_clip,
        )
        self.rates = peak_rates(
            options.optimizer,
            options.batch_size,
            lr_peak=options.lr_peak,
            lr_biases=options.lr_biases,
            is_linear=options.lr_scaling == "linear",
        )
        self.scaler = compute.grad_scaler()
        two_views = TwoViews(self.network, stop_gradient=options.loss.stop_gradient)
        if options.compile:
            two_views.compile()
        self.two_views = share_gradients(two_views, ranks, compute.device)
        may_record = options.cuda_graph and not options.compile
        self.is_recorded = may_record and ranks.world == 1 and compute.name == "cuda"
        self._learn, self._learn_whole = self._learn_views, self._learn_images
        if self.is_recorded:
            self._learn = recorded(self._learn_views, compute.device)
            self._learn_whole = recorded(self._learn_images, compute.device)

    def step(self, batch: DeviceBatch) -> StepOutcome:
        """Learn from one batch."""
        set_lr(self.optimizer, self.lr(batch.step), self.lr(batch.step, self.rates.biases))
        if self.makes_views_whole(batch):
            logged, features_ND, z1_ND, z2_ND = self._learn_whole(*self._whole(batch))
        else:
            logged, features_ND, z1_ND, z2_ND = self._learn(*self.views(batch))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return StepOutcome(
            logged=logged,
            off_diagonal_floor=self.options.batch_size**-0.5,
            features_ND=features_ND,
            z1_ND=z1_ND,
            z2_ND=z2_ND,
        )

    def _learn_images(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Do as `_learn_views`, with what `_whole` gives."""
        return self._learn_views(*self._whole_views(*given))

    def _learn_views(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, ...]:
        """Leave the gradients of a batch with the weights: all of a step that is always alike.

        Returns:
            What `StepOutcome` has of tensors, detached.
        """
        with self.compute.autocast():
            features_ND, z1_ND, z2_ND = self.two_views(view1, view2)
        loss = self.options.loss
        terms = loss_terms(
            z1_ND,
            z2_ND,
            lambd=self.options.lambd,
            objective=loss.objective,
            form=loss.form,
            terms=loss.terms,
            normalise=loss.normalise,
            temperature=loss.temperature,
            group=self.ranks.group,
        )
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self.scaler.scale(terms.loss))
        return _logged(terms), features_ND.detach(), z1_ND.detach(), z2_ND.detach()

    def makes_views_whole(self, batch: DeviceBatch) -> bool:
        """Say whether the views are made in the recording: small ones, of whole images."""
        if not self.is_recorded or len(batch.pixels) != 1:
            return False
        return batch.pixels[0].numel() * FLOAT_BYTES <= SMALL_BATCH_BYTES

    def _whole(self, batch: DeviceBatch) -> tuple[Tensor, ...]:
        """Give the images and, of either view, the parameters as tensors."""
        (images_NHWC,) = batch.pixels
        shape, like = images_NHWC.permute(0, 3, 1, 2).shape, self.normaliser.mean
        found = (whole_parameters(drawn, shape, like) for drawn in self._draw(batch.step))
        return images_NHWC, *chain.from_iterable(found)

    def _whole_views(self, images_NHWC: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Make both views of what `_whole` gives."""
        units_NCHW = self.normaliser.to_unit(images_NHWC)
        half = len(parameters) // 2
        first, second = (
            self.normaliser.normalise(apply_whole(units_NCHW, WholeParameters(*given), recipe))
            for given, recipe in zip(
                (parameters[:half], parameters[half:]), self.recipes, strict=True
            )
        )
        return first, second

    def views(self, batch: DeviceBatch) -> tuple[Tensor, Tensor]:
        """Make both views of every image, (N, C, H, W) normalised, channels last.

        What is random is drawn for the whole batch and used for this rank's rows of it.
        """
        units = [self.normaliser.to_unit(pixels) for pixels in batch.pixels]
        if self.options.views.views_in == "workers":
            view1, view2 = (self.normaliser.normalise(unit) for unit in units)
            return view1, view2
        is_cropped = len(units) == 2
        make = finish_view if is_cropped else apply_view
        view1, view2 = (
            self.normaliser.normalise(make(units[i if is_cropped else 0], parameters))
            for i, parameters in enumerate(self._draw(batch.step))
        )
        return view1, view2

    def _draw(self, step: int) -> Iterator[ViewParameters]:
        """Give the parameters of this rank's rows, of one view after the other."""
        side_px = self.options.image_size_px
        self.views_generator.manual_seed(step_seed(self.options.seed, step))
        for recipe in self.recipes:
            yield draw_parameters(
                self.options.batch_size,
                recipe,
                self.views_generator,
                height=side_px,
                width=side_px,
            )[self.rows]

    def lr(self, step: int, peak: float | None = None) -> float:
        """Give the learning rate of a step: that of weights, or one of another peak."""
        return lr_at(
            step,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            lr_peak=self.rates.weights if peak is None else peak,
        )

    def to_input(self, images_NHWC: Tensor) -> Tensor:
        """Bring uint8 images, unchanged, to what the network takes."""
        return self.normaliser.to_input(images_NHWC.to(self.compute.device))


def view_recipes(views: ViewOptions) -> tuple[ViewRecipe, ViewRecipe]:
    """Give each view its own half of the asymmetric probabilities, and all else to both."""
    shared = asdict(views)
    for name in ("views_in", "blur_probability", "solarise_probability"):
        del shared[name]
    first, second = (
        ViewRecipe(
            **shared,
            blur_probability=views.blur_probability[i],
            solarise_probability=views.solarise_probability[i],
        )
        for i in (0, 1)
    )
    return first, second


def step_seed(seed: int, step: int) -> int:
    """Mix seed and step to the 64 bits that the views of one step are drawn from."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])


def _logged(terms: LossTerms) -> Tensor:
    """Put together the values that `LOGGED` names, float32, without waiting for them."""
    values = (
        terms.loss,
        terms.invariance,
        terms.redundancy,
        terms.diagonal_error,
        terms.diagonal_mean,
        terms.off_diagonal_rms,
    )
    return torch.stack([value.detach().float() for value in values])
