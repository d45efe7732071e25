"""Embedding an iterable image by image: what goes into one request, and what comes of it.

Rules:
    Every image of the iterable becomes one item, whatever becomes of it: an image that cannot
    be used, and a request that failed, are told by the item's status, and the rest goes on.
    Images are counted in the order in which the iterable gives them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from models.image_source import ImageData
from serve.client.requests import Group, Grouper, RequestSize, group_images
from serve.client.results import EmbedResult, ItemStatus
from serve.client.threads import on_a_thread
from serve.errors import ServeError

REQUEST_FAILED = "request_failed"
"""The status of images whose request has no reply."""


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


def items_of(group: Group, result: EmbedResult) -> list[EmbeddedItem]:
    """Give each image of a request what the server said of it."""
    pairs = zip(result.by_image(), result.statuses, strict=True)
    return [
        EmbeddedItem(index=n, vector=vector, status=status, fingerprint=result.fingerprint)
        for n, (vector, status) in enumerate(pairs, group.first)
    ]


def failed_items(group: Group, error: ServeError) -> list[EmbeddedItem]:
    """Give each image the error of its request, unless it was never sent."""
    status = ItemStatus(REQUEST_FAILED, str(error))
    return [
        EmbeddedItem(
            index=group.first + n,
            vector=None,
            status=group.refused.get(n, status),
            error=None if n in group.refused else error,
        )
        for n in range(len(group.images))
    ]


async def group_async(
    images: Iterable[ImageData] | AsyncIterable[ImageData], size: RequestSize
) -> AsyncGenerator[Group, None]:
    """Do as `group_images` for either kind; a plain iterable may block a thread of its own."""
    if not isinstance(images, AsyncIterable):
        groups = group_images(images, size, keep_going=True)
        while (group := await on_a_thread(partial(next, groups, None))) is not None:
            yield group
        return
    grouper = Grouper(size)
    failure: Exception | None = None
    try:
        async for image in images:
            for group in grouper.add_any(image):
                yield group
    except Exception as error:
        failure = error
    for group in grouper.end():
        yield group
    if failure is not None:
        raise failure
