"""Feeds a stream with requests, never more than a few ahead of the replies.

Rules:
    An iterable may be endless: of it only what is under way is in memory.
    An error of the caller's own iterable reaches the caller, after the replies to what was
    sent before it.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from functools import partial

from models.image_source import ImageData
from protos import horace_pb2 as pb
from serve.client.arguments import check_integer
from serve.client.requests import (
    EmbedOptions,
    Group,
    Grouper,
    RequestSize,
    embed_request,
    group_images,
)
from serve.client.threads import on_a_thread


class Feed:
    """Requests of a blocking stream; gRPC iterates over it on a thread of its own.

    Attributes:
        error: what the caller's iterable raised.
    """

    def __init__(
        self, images: Iterable[ImageData], size: RequestSize, options: EmbedOptions, in_flight: int
    ) -> None:
        """Group `images`; at most `in_flight` requests wait for their replies."""
        self._groups = group_images(images, size)
        self._options = options
        self._room = threading.Semaphore(check_integer("in_flight", in_flight, 1))
        self._sent: deque[Group] = deque()
        self._stopped = False
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[pb.EmbedRequest]:
        while self._room.acquire() and not self._stopped:
            try:
                group = next(self._groups, None)
            except Exception as error:
                self.error = error
                return
            if group is None:
                return
            self._sent.append(group)
            yield embed_request(group, self._options)

    def answered(self) -> Group:
        """Note the reply to the oldest request, and give that request's group."""
        self._room.release()
        return self._sent.popleft()

    def stop(self) -> None:
        """Send no more; lets go of the thread that waits to send."""
        self._stopped = True
        self._room.release()


class AsyncFeed:
    """Requests of an asyncio stream, over an iterable of either kind.

    Attributes:
        error: what the caller's iterable raised.
    """

    def __init__(
        self,
        images: Iterable[ImageData] | AsyncIterable[ImageData],
        size: RequestSize,
        options: EmbedOptions,
        in_flight: int,
    ) -> None:
        """Group `images`; at most `in_flight` requests wait for their replies."""
        self._images = images
        self._size = size
        self._options = options
        self._room = asyncio.Semaphore(check_integer("in_flight", in_flight, 1))
        self._sent: deque[Group] = deque()
        self.error: Exception | None = None

    async def __aiter__(self) -> AsyncIterator[pb.EmbedRequest]:
        await self._room.acquire()
        try:
            async for group in self._groups():
                self._sent.append(group)
                yield embed_request(group, self._options)
                await self._room.acquire()
        except Exception as error:
            self.error = error

    def answered(self) -> Group:
        """Note the reply to the oldest request, and give that request's group."""
        self._room.release()
        return self._sent.popleft()

    async def _groups(self) -> AsyncIterator[Group]:
        """Group the images of either kind of iterable; a plain one may block its thread."""
        if not isinstance(self._images, AsyncIterable):
            groups = group_images(self._images, self._size)
            while (group := await on_a_thread(partial(next, groups, None))) is not None:
                yield group
            return
        grouper = Grouper(self._size)
        async for image in self._images:
            for group in grouper.add(image):
                yield group
        for group in grouper.end():
            yield group
