"""What the trainer learns from, batch by batch: one seam for images in memory and streamed.

Rules:
    Which images make up the batch of a step is a function of seed and step alone, whatever
    the number of ranks; a source gives the slice of its own rank, so that the slices of all
    ranks, in the order of the ranks, are the batch that one process would have.
    An incomplete last batch of an epoch is dropped: C of few samples is mostly noise.
    A source may work ahead in threads; closing it ends them.

Nothing here knows of torch, devices or random views.

Shapes: N images of this rank's slice, H x W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

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
        image_rows: (N,) int64, which images these are.
        images_NHWC: (N, H, W, C) uint8, or None.
        views: two of (N, H, W, C) uint8, cropped and not yet flipped or coloured, or None.
    """

    step: int
    image_rows: NDArray[np.int64]
    images_NHWC: Pixels | None = None
    views: tuple[Pixels, Pixels] | None = None


class BatchSource(Protocol):
    """Gives the batches of a run from any step on; a context manager that ends its threads.

    Attributes:
        steps_per_epoch: full batches in one pass over the training images, at least 1.
    """

    steps_per_epoch: int

    def batches(self, first_step: int, total_steps: int) -> Iterator[Batch]:
        """Yield the batches of the steps from `first_step` to before `total_steps`."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop working ahead."""
        ...


class MemorySource:
    """Batches of images that lie in memory; see `BatchSource`.

    Args:
        images_NHWC: all images, uint8.
        rows: those to learn from.
        batch_size: images of a step, over all ranks; a multiple of `world`, and at most as
            many as there are rows.
        seed: decides the order of every epoch.
        rank, world: which slice of each batch to give, of how many.
    """

    def __init__(
        self,
        images_NHWC: Pixels,
        rows: NDArray[np.int64],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert 0 <= rank < world
        assert batch_size % world == 0
        self.steps_per_epoch = len(rows) // batch_size
        assert self.steps_per_epoch > 0
        self._images_NHWC, self._rows, self._seed = images_NHWC, rows, seed
        self._batch_size, self._slice = batch_size, rank_slice(batch_size, rank, world)

    def batches(self, first_step: int, total_steps: int) -> Iterator[Batch]:
        """Yield the batches of the steps from `first_step` to before `total_steps`."""
        epoch, order = -1, self._rows
        for step in range(first_step, total_steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = epoch_order(self._rows, seed=self._seed, epoch=epoch)
            start = step % self.steps_per_epoch * self._batch_size
            rows = order[start : start + self._batch_size][self._slice]
            yield Batch(step=step, image_rows=rows, images_NHWC=self._images_NHWC[rows])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """There are no threads to end."""


def rank_slice(batch_size: int, rank: int, world: int) -> slice:
    """Give a rank's place in every batch: an equal share, in the order of the ranks."""
    share = batch_size // world
    return slice(rank * share, (rank + 1) * share)
