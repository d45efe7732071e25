"""One request on its way through the engine, and what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from models.errors import ImageError
from models.image_source import ImageData
from serve.tickets import Ticket

NO_PIXELS = np.empty(0, np.uint8)


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """What became of one request.

    Attributes:
        vectors_ND: (N ok, D) float32, in the request's order.
        is_unit: whether they have unit L2 norm; else they are as the encoder gives them.
        all_finite: whether all of their numbers are known to be.
        errors: per image its error, or None where it has a vector.
        decode_s: from arrival until the last image was decoded.
        queue_s: the longest that an image waited between decoding and its batch.
        inference_s: the encoder's time for the batches that these images were in.
    """

    vectors_ND: NDArray[np.float32]
    errors: Sequence[ImageError | None]
    decode_s: float
    queue_s: float
    inference_s: float
    is_unit: bool = False
    all_finite: bool = False


@dataclass(eq=False, kw_only=True)
class Job(Ticket):
    """A ticket with its images, and where the result goes.

    Attributes:
        admitted: of `loop`; set once there is room for it.
        data: the images as they came; emptied once they are not needed.
        pixels: per image what the encoder takes, from decoding until its batch is built.
        errors: per image why it has no vector.
        vectors_ND: the rows computed so far.
        is_unit: whether they are to have unit L2 norm.
        all_finite: whether all numbers in them are.
        future: of `loop`; set once, with the result or the error.
    """

    loop: asyncio.AbstractEventLoop
    admitted: asyncio.Future[None]
    future: asyncio.Future[Embedded]
    is_unit: bool = False
    all_finite: bool = True
    data: list[ImageData | ImageError | None] = field(init=False)
    pixels: list[NDArray[np.uint8]] = field(init=False)
    errors: list[ImageError | None] = field(init=False)
    vectors_ND: NDArray[np.float32] = field(init=False)
    decoded_s: float = 0.0
    queue_s: float = 0.0
    inference_s: float = 0.0

    def fill(self, images: Iterable[ImageData | ImageError], dim: int) -> None:
        """Take the images in and make room for their results, once the job is admitted."""
        self.data = list(images)
        assert len(self.data) == self.images
        self.vectors_ND = np.empty((self.images, dim), np.float32)
        self.pixels = [NO_PIXELS] * self.images
        self.errors = [None] * self.images

    def result(self) -> Embedded:
        """Collect the rows of the images that have one."""
        rows = self.vectors_ND
        if any(self.errors):
            rows = rows[[error is None for error in self.errors]]
        return Embedded(
            vectors_ND=rows,
            errors=self.errors,
            decode_s=max(0.0, self.decoded_s - self.arrived_s),
            queue_s=self.queue_s,
            inference_s=self.inference_s,
            is_unit=self.is_unit,
            all_finite=self.all_finite,
        )


def tell_admitted(jobs: Sequence[Job]) -> None:
    """Let jobs go on that have waited for room."""
    for job in jobs:
        if not job.admitted.done():
            job.admitted.set_result(None)


def answer(jobs: Sequence[Job], error: Exception | None) -> None:
    """Set the futures of jobs whose callers still wait."""
    for job in jobs:
        if job.future.done():
            continue
        if error is None:
            job.future.set_result(job.result())
        elif job.admitted.done():
            job.future.set_exception(error)
        else:
            job.admitted.set_exception(error)
