"""Batches of images that are decoded while the network learns: for what memory cannot hold.

Rules:
    What a batch holds is a function of the seed, the step and the data: not of the number of
    threads, of ranks, or of what was read before. A run goes on from any step.
    An image that cannot be used is counted, and its place is taken by the next usable one in
    the order of the source, so that batches stay full; with views of its own.
    So many batches are worked on ahead, and no more, as `PREFETCH_BATCHES` says.
    Threads, not processes: libjpeg-turbo and Pillow let go of the GIL, and
    nothing is pickled or copied between address spaces.

How an image becomes two views is the matter of a `MakeViews`, such as `train.views.crops`.

Shapes: N images of this rank's slice, H x W pixels, C channels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from models.errors import ImageError
from models.images import ImageData
from train.data.batches import Batch, Pixels, rank_slice
from train.data.catalogue import Catalogue
from train.data.memory import epoch_order
from train.data.rejects import Rejects, reject_of

PREFETCH_BATCHES = 3
"""Batches beyond the one in use that are decoded or being decoded."""

MakeViews: TypeAlias = Callable[[ImageData, np.random.Generator], tuple[Pixels, Pixels]]
"""From an image and a generator of its own to two uint8 views of (H, W, C)."""


class StreamSource:
    """Batches of images that are decoded ahead by threads; see `train.data.batches.BatchSource`.

    Args:
        catalogue: where the images are.
        rows: those to learn from, sorted.
        make_views: makes the two views of an image; called from many threads.
        rejects: counts the images that cannot be used.
        batch_size: images of a step, over all ranks; a multiple of `world`, and at most as
            many as there are rows.
        seed: decides the order of every epoch and the views.
        workers: threads that decode.
        rank: whose slice of each batch to give.
        world: how many ranks there are.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        rows: NDArray[np.int64],
        make_views: MakeViews,
        rejects: Rejects,
        *,
        batch_size: int,
        seed: int,
        workers: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert 0 <= rank < world
        assert batch_size % world == 0
        self.steps_per_epoch = len(rows) // batch_size
        assert self.steps_per_epoch > 0
        self._catalogue, self._rows, self._seed = catalogue, rows, seed
        self._make_views, self._rejects = make_views, rejects
        self._batch_size, self._slice = batch_size, rank_slice(batch_size, rank, world)
        self._pool = ThreadPoolExecutor(workers, "decode")

    def batches(self, first_step: int, total_steps: int) -> Iterator[Batch]:
        """Yield the batches of the steps from `first_step` to before `total_steps`.

        Raises:
            TrainError: more than half of the images turn out to be unusable.
        """
        ahead: deque[tuple[int, list[Future[_Views]]]] = deque()
        try:
            for step, rows in self._plan(first_step, total_steps):
                ahead.append((step, [self._pool.submit(self._views, step, row) for row in rows]))
                if len(ahead) > PREFETCH_BATCHES:
                    yield _gather(*ahead.popleft())
            while ahead:
                yield _gather(*ahead.popleft())
        finally:
            for _, futures in ahead:
                for future in futures:
                    future.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop working ahead: what is decoded at this moment is waited for."""
        self._pool.shutdown(cancel_futures=True)

    def _plan(self, first_step: int, total_steps: int) -> Iterator[tuple[int, list[int]]]:
        """Yield each step with the rows of this rank's slice."""
        epoch, order = -1, self._rows
        for step in range(first_step, total_steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = epoch_order(self._rows, seed=self._seed, epoch=epoch)
            start = step % self.steps_per_epoch * self._batch_size
            yield step, order[start : start + self._batch_size][self._slice].tolist()

    def _views(self, step: int, wanted_row: int) -> _Views:
        """Give the views of a row, or of the next one that can be used."""
        place = int(np.searchsorted(self._rows, wanted_row))
        for offset in range(len(self._rows)):
            row = int(self._rows[(place + offset) % len(self._rows)])
            record = self._catalogue.records[row]
            if record.key in self._rejects:
                continue
            # By the row that is wanted: one that stands in, too, has views of its own.
            generator = np.random.default_rng((self._seed, step, wanted_row))
            try:
                return row, *self._make_views(record.read(), generator)
            except ImageError as error:
                self._rejects.add(reject_of(record, error))
        raise AssertionError("`Rejects` refuses a source of which half is unusable")


_Views: TypeAlias = tuple[int, Pixels, Pixels]
"""The row that was used, and its two views."""


def _gather(step: int, futures: list[Future[_Views]]) -> Batch:
    """Wait for the images of a batch and stack them."""
    rows, first, second = zip(*(future.result() for future in futures), strict=True)
    return Batch(
        step=step,
        image_rows=np.array(rows, np.int64),
        views=(np.stack(first), np.stack(second)),
    )
