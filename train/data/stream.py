"""Batches of images that are decoded while the network learns: for what memory cannot hold.

Rules:
    What a batch holds is a function of the seed, the step and the data: not of the number of
    threads, of ranks, or of what was read before. A run goes on from any step.
    An image that cannot be used is counted, and its place is taken by the next usable one in
    the order of the source, so that batches stay full; with views of its own. Storage that
    fails is no fault of an image: see `train.data.reading`.
    So many batches are worked on ahead, and no more, as `PREFETCH_BATCHES` says.
    Threads, not processes: libjpeg-turbo and torch let go of the GIL, and
    nothing is pickled or copied between address spaces.

How an image becomes two views is the matter of a `MakeViews`, such as `train.views.crops`.

Shapes: N images of this rank's slice, H x W pixels, C channels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeAlias

import numpy as np

from models.errors import ImageError
from models.images import ImageData
from train.data.batches import Batch, Pixels, Plan
from train.data.catalogue import Catalogue
from train.data.reading import read_image
from train.data.rejects import Rejects, reject_of
from train.threads import single_threads

PREFETCH_BATCHES = 3
"""Batches beyond the one in use that are decoded or being decoded."""

MakeViews: TypeAlias = Callable[[ImageData, np.random.Generator], tuple[Pixels, Pixels]]
"""From an image and a generator of its own to two uint8 views of (H, W, C)."""


class StreamSource:
    """Batches of images that are decoded ahead by threads; see `train.data.batches.BatchSource`.

    Args:
        catalogue: where the images are.
        plan: which of them to give, and when; its rows are sorted, its seed decides the views.
        make_views: makes the two views of an image; called from many threads.
        rejects: counts the images that cannot be used.
        workers: threads that decode.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        plan: Plan,
        make_views: MakeViews,
        rejects: Rejects,
        *,
        workers: int,
    ) -> None:
        self.steps_per_epoch = plan.steps_per_epoch
        self._catalogue, self._plan = catalogue, plan
        self._make_views, self._rejects = make_views, rejects
        self._pool = single_threads(workers, "decode")

    def batches(self, first_step: int, total_steps: int) -> Iterator[Batch]:
        """Yield the batches of the steps from `first_step` to before `total_steps`.

        Raises:
            TrainError: more than half of the images turn out to be unusable, or the storage
                fails.
        """
        ahead: deque[tuple[int, list[Future[_Views]]]] = deque()
        for step, rows in self._plan.steps(first_step, total_steps):
            views = [self._pool.submit(self._views, step, row) for row in rows.tolist()]
            ahead.append((step, views))
            if len(ahead) > PREFETCH_BATCHES:
                yield _gather(*ahead.popleft())
        while ahead:
            yield _gather(*ahead.popleft())

    def close(self) -> None:
        """Stop working ahead: what is decoded at this moment is waited for."""
        self._pool.shutdown(cancel_futures=True)

    def _views(self, step: int, wanted_row: int) -> _Views:
        """Give the views of a row, or of the next one that can be used."""
        rows = self._plan.rows
        place = int(np.searchsorted(rows, wanted_row))
        for offset in range(len(rows)):
            row = int(rows[(place + offset) % len(rows)])
            if row in self._rejects:
                continue
            record = self._catalogue.records[row]
            # By the row that is wanted: one that stands in, too, has views of its own.
            generator = np.random.default_rng((self._plan.seed, step, wanted_row))
            try:
                return self._make_views(read_image(record), generator)
            except ImageError as error:
                self._rejects.add(row, reject_of(record, error))
        raise AssertionError("`Rejects` refuses a source of which half is unusable")


_Views: TypeAlias = tuple[Pixels, Pixels]
"""Both views of one image."""


def _gather(step: int, futures: list[Future[_Views]]) -> Batch:
    """Wait for the images of a batch and stack them."""
    first, second = zip(*(future.result() for future in futures), strict=True)
    return Batch(step=step, views=(np.stack(first), np.stack(second)))
