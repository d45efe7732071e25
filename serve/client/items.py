"""Embedding an iterable image by image: what goes into one request, and what comes of it.

Rules:
    Every image of the iterable becomes one item, whatever becomes of it: an image that cannot
    be used, and a request that failed, are told by the item's status, and the rest goes on.
    Images are counted in the order in which the iterable gives them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from models.errors import UsageError
from models.image_source import ImageData
from serve.client.requests import Group, Grouper, RequestSize
from serve.client.results import EmbedResult, ItemStatus
from serve.client.threads import on_a_thread
from serve.errors import ServeError

REQUEST_FAILED = "request_failed"
"""The status of images whose request has no reply."""

NOT_AN_IMAGE = "not_an_image"
"""The status of what is neither bytes nor pixels."""


@dataclass(frozen=True, kw_only=True)
class EmbeddedItem:
    """What became of one image of an iterable.

    Attributes:
        index: its place in the iterable, from 0.
        vector: (D,) float32; None where it has none.
        status: why.
        fingerprint: of the encoder; empty where there was no reply.
        error: what its request failed with, where it did.
    """

    index: int
    vector: NDArray[np.float32] | None
    status: ItemStatus
    fingerprint: str = ""
    error: ServeError | None = None

    @property
    def ok(self) -> bool:
        """Whether there is a vector."""
        return self.vector is not None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images of one request.

    Attributes:
        first: the index of the first of them.
        group: the images.
    """

    first: int
    group: Group

    def items(self, result: EmbedResult) -> list[EmbeddedItem]:
        """Give each image what the server said of it."""
        pairs = zip(result.by_image(), result.statuses, strict=True)
        return [
            EmbeddedItem(index=n, vector=vector, status=status, fingerprint=result.fingerprint)
            for n, (vector, status) in enumerate(pairs, self.first)
        ]

    def failed(self, error: ServeError) -> list[EmbeddedItem]:
        """Give each image the error of its request, unless it was never sent."""
        status = ItemStatus(REQUEST_FAILED, str(error))
        return [
            EmbeddedItem(
                index=self.first + n,
                vector=None,
                status=self.group.refused.get(n, status),
                error=None if n in self.group.refused else error,
            )
            for n in range(len(self.group.images))
        ]


class Gatherer:
    """Cuts an iterable into batches, image by image."""

    def __init__(self, size: RequestSize) -> None:
        """Start with no image."""
        self._grouper = Grouper(size)
        self._first = 0

    def add(self, image: ImageData) -> Iterator[Batch]:
        """Take in what the iterable gave; give the batches that are full now."""
        try:
            groups = list(self._grouper.add(image))
        except UsageError as error:
            groups = list(self._grouper.refuse(ItemStatus(NOT_AN_IMAGE, str(error))))
        for group in groups:
            yield self._numbered(group)

    def end(self) -> Iterator[Batch]:
        """Give the batch that is not full, unless it is empty."""
        for group in self._grouper.end():
            yield self._numbered(group)

    def _numbered(self, group: Group) -> Batch:
        """Say which images these are."""
        batch = Batch(first=self._first, group=group)
        self._first += len(group.images)
        return batch


def gather(images: Iterable[ImageData], size: RequestSize) -> Iterator[Batch]:
    """Cut an iterable into batches as they are asked for."""
    gatherer = Gatherer(size)
    for image in images:
        yield from gatherer.add(image)
    yield from gatherer.end()


async def gather_async(
    images: Iterable[ImageData] | AsyncIterable[ImageData], size: RequestSize
) -> AsyncGenerator[Batch, None]:
    """Cut an iterable of either kind into batches; a plain one may block a thread of its own."""
    if not isinstance(images, AsyncIterable):
        batches = gather(images, size)
        while (batch := await on_a_thread(partial(next, batches, None))) is not None:
            yield batch
        return
    gatherer = Gatherer(size)
    async for image in images:
        for batch in gatherer.add(image):
            yield batch
    for batch in gatherer.end():
        yield batch
