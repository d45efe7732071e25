"""Brings the images of a job to the encoder's input, before they are queued.

Rules:
    Images are decoded by a pool, a few at a time, each with its own error: a bad image is
    settled here and its batchmates never hear of it. Pixels that need no more than a cut do
    not change threads for it.
    What waits to be decoded is in the same order as what waits to be computed: by priority,
    clients in turns (`serve.fair_queue`). A pool that several models share is taken by them in
    the order in which their images came.
    Every image is reported once, good or bad, whatever becomes of the thread that was at it:
    where that dies or hangs, those that it had taken have an error.
    Nothing is decoded for a job that is gone.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.errors import ImageError, ImageFault
from models.image_source import ImageData
from models.preprocess import ImageLimits, PreprocessSpec, preprocess
from serve.fair_queue import FairQueue
from serve.job import Job
from serve.pool import ThreadPool
from serve.tickets import Part

log = logging.getLogger("horace.serve")

CHUNK_IMAGES = 8
"""Images a task: enough to forget the hand-over (some 20 us), few enough that the encoder
starts before a large request is decoded."""


class Prepared(Protocol):
    """Hears of images that are prepared, on whatever thread that happened."""

    def __call__(self, job: Job, good: Sequence[int], bad: int) -> None:
        """Take the positions of those that can be computed, and the number of the others."""


class _Task:
    """What one task of the pool is at, and whether that was told."""

    __slots__ = ("part", "told")

    def __init__(self) -> None:
        self.part: Part[Job] | None = None
        self.told = threading.Lock()


class Decoder:
    """Prepares the images of one model."""

    def __init__(
        self, pool: ThreadPool, spec: PreprocessSpec, limits: ImageLimits, prepared: Prepared
    ) -> None:
        """Take a pool, which has an owner.

        Args:
            pool: where images are decoded.
            spec: the encoder's.
            limits: what one image may cost.
            prepared: told once of each image.
        """
        self._pool = pool
        self._spec = spec
        self._limits = limits
        self._prepared = prepared
        self._lock = threading.Lock()
        self._queue: FairQueue[Job] = FairQueue(quantum_images=CHUNK_IMAGES)

    def prepare(self, job: Job) -> None:
        """Prepare at once what needs no decoding; give the rest to the pool in chunks."""
        here: list[int] = []
        there: list[int] = []
        for n, data in enumerate(job.data):
            (there if _needs_decoding(data, self._spec) else here).append(n)
        if here:
            self._prepared(job, *self._decode(job, here))
        if not there:
            return
        step = max(1, min(CHUNK_IMAGES, math.ceil(len(there) / self._pool.size)))
        chunks = [there[start : start + step] for start in range(0, len(there), step)]
        with self._lock:
            for chunk in chunks:
                self._queue.push(Part(job, chunk, job.arrived_s))
        for _ in chunks:
            self._submit()

    def _submit(self) -> None:
        """Have the pool decode what is next by then."""
        task = _Task()
        self._pool.submit(partial(self._run, task), partial(self._lose, task))

    def _run(self, task: _Task) -> None:
        """Decode what is next; who takes `told` first tells what became of it."""
        with self._lock:
            head = self._queue.head()
            part = task.part = self._queue.take(CHUNK_IMAGES)
        if part is not head:  # it was cut: the rest is a task more
            self._submit()
        good, bad = self._decode(part.ticket, part.positions)
        if task.told.acquire(blocking=False):
            self._prepared(part.ticket, good, bad)

    def _lose(self, task: _Task) -> None:
        """Give the images of a task an error whose thread died or hangs."""
        part = task.part
        if part is None or not task.told.acquire(blocking=False):
            return
        for n in part.positions:
            part.ticket.errors[n] = ImageError(
                ImageFault.UNREADABLE,
                "image",
                expected="one that decodes",
                found="one that stopped the decoder, or shared a task with it",
            )
        self._prepared(part.ticket, (), len(part.positions))

    def _decode(self, job: Job, positions: Sequence[int]) -> tuple[list[int], int]:
        """Bring images to the encoder's input, or to their errors.

        Returns:
            The positions of those that can be computed, and the number of the others.
        """
        good = []
        for n in positions:
            data, job.data[n] = job.data[n], None
            if job.gone or data is None:
                continue
            try:
                job.pixels[n] = self._preprocess(data)
                good.append(n)
            except ImageError as error:
                job.errors[n] = error.with_traceback(None)  # whose frames hold the job, and data
        return good, len(positions) - len(good)

    def _preprocess(self, data: ImageData | ImageError) -> NDArray[np.uint8]:
        """Bring one image to the encoder's input; every failure is that image's own."""
        if isinstance(data, ImageError):
            raise data
        try:
            return preprocess(data, self._spec, self._limits)
        except ImageError:
            raise
        except Exception as error:
            log.exception("preprocessing failed in our own code")
            raise ImageError(
                ImageFault.UNREADABLE, "image", expected="one that decodes", found="a decoder fault"
            ) from error


def _needs_decoding(data: ImageData | ImageError | None, spec: PreprocessSpec) -> bool:
    """Whether preparing an image takes more than a cut: files, and pixels to resize."""
    if isinstance(data, bytes):
        return True
    if data is None or isinstance(data, ImageError):
        return False
    return data.ndim != 3 or data.shape[2] != spec.channels or min(data.shape[:2]) != spec.resize
