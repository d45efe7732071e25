"""What the trainer learns from, batch by batch: one seam for images in memory and streamed.

Rules:
    Which images make up the batch of a step is a function of seed and step alone, whatever
    the number of ranks; a source gives the slice of its own rank, so that the slices of all
    ranks, in the order of the ranks, are the batch that one process would have.
    An incomplete last batch of an epoch is dropped: C of few samples is mostly noise.
    A source may work ahead in threads; closing it ends them.

Nothing here knows of torch, devices or random views.

Shapes: R images to learn from, N of this rank's slice, H x W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from train.data.memory import epoch_order

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """This rank's slice of the batch of one step.

    Either `images_NHWC` is there, from which both views are still to be cut, or `views` is:
    crops that were cut at decoding, of the size that the network sees.

    Attributes:
        step: counted from 0.
        images_NHWC: (N, H, W, C) uint8, or None.
        views: two of (N, H, W, C) uint8, cropped and not yet flipped or coloured, or None.
    """

    step: int
    images_NHWC: Pixels | None = None
    views: tuple[Pixels, Pixels] | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which images make up the batches of one rank.

    Attributes:
        rows: (R,) int64, the images to learn from.
        batch_size: images of a step, over all ranks; a multiple of `world`, and at most R.
        seed: decides the order of every epoch.
        rank: whose slice of each batch this is.
        world: how many ranks there are.
    """

    rows: NDArray[np.int64]
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world
        assert self.batch_size % self.world == 0
        assert self.steps_per_epoch > 0

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass over the images."""
        return len(self.rows) // self.batch_size

    def steps(self, first_step: int, total_steps: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield each step from `first_step` to before `total_steps` with its (N,) rows."""
        share = rank_slice(self.batch_size, self.rank, self.world)
        epoch, order = -1, self.rows
        for step in range(first_step, total_steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = epoch_order(self.rows, seed=self.seed, epoch=epoch)
            start = step % self.steps_per_epoch * self.batch_size
            yield step, order[start : start + self.batch_size][share]


class BatchSource(Protocol):
    """Gives the batches of a run from any step on; whoever opens it closes it.

    Attributes:
        steps_per_epoch: full batches in one pass over the training images, at least 1.
    """

    steps_per_epoch: int

    def batches(self, first_step: int, total_steps: int) -> Iterator[Batch]:
        """Yield the batches of the steps from `first_step` to before `total_steps`."""
        ...

    def close(self) -> None:
        """Stop working ahead, and end the threads."""
        ...


class MemorySource:
    """Batches of images that lie in memory; see `BatchSource`.

    Args:
        images_NHWC: all images, uint8.
        plan: which of them to give, and when.
    """

    def __init__(self, images_NHWC: Pixels, plan: Plan) -> None:
        self.steps_per_epoch = plan.steps_per_epoch
        self._images_NHWC, self._plan = images_NHWC, plan

    def batches(self, first_step: int, total_steps: int) -> Iterator[Batch]:
        """Yield the batches of the steps from `first_step` to before `total_steps`."""
        for step, rows in self._plan.steps(first_step, total_steps):
            yield Batch(step=step, images_NHWC=self._images_NHWC[rows])

    def close(self) -> None:
        """There are no threads to end."""


def rank_slice(batch_size: int, rank: int, world: int) -> slice:
    """Give a rank's place in every batch: an equal share, in the order of the ranks."""
    share = batch_size // world
    return slice(rank * share, (rank + 1) * share)
