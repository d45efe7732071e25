"""The client for asyncio; `serve.client` gives it out, and says what both clients do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

from models.errors import UsageError
from models.image_source import ImageData
from serve.client.arguments import check_integer, check_timeout
from serve.client.channel import (
    ITER_IMAGES,
    ITER_IN_FLIGHT,
    make_planner,
    methods_of,
    read_failure,
)
from serve.client.combining import Combination
from serve.client.connection import ClientTls, Connection
from serve.client.items import EmbeddedItem, group_async
from serve.client.plans import TIMEOUT_S, Call, Failure, Plan, Step
from serve.client.requests import (
    EmbedOptions,
    Group,
    Images,
    SearchOptions,
    Vectors,
    check_iterable,
    make_queries,
)
from serve.client.results import CollectionInfo, EmbedResult, ModelInfo, SearchResult
from serve.client.retry import RetryPolicy
from serve.client.window import run_async_window

Value = TypeVar("Value")


class AsyncClient:
    """A client for asyncio. See `Client`.

    It belongs to the event loop that it is made in, and cannot be made outside of one: make it
    in the coroutine that uses it, and close it there, or use `async with`. In another loop every
    call raises `UsageError`. Cancelling a call cancels it on the server, too.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: ClientTls | None = None,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        retry: RetryPolicy | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Talk to the server at `host:port`; the arguments are those of `Client`.

        Raises:
            UsageError: as `Client`, or no event loop runs.
        """
        self._sleep = sleep
        self._closed = False
        connection = Connection(target=target, tls=tls, api_key=api_key)
        self._planner = make_planner(connection, retry, timeout_s)
        self._loop = _running_loop()
        self._channel = connection.open_async_channel()
        self._methods = methods_of(self._channel)

    def __repr__(self) -> str:
        return f"<AsyncClient {self._planner.target}>"

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls under way end, with `UnavailableError`."""
        self._closed = True
        await self._channel.close()

    async def embed(
        self,
        images: Images,
        *,
        model: str | None = None,
        version: str | None = None,
        dims: int | None = None,
        normalize: bool = True,
        dtype: str = "fp32",
        request_id: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> EmbedResult:
        """Embed one to many images; see `Client.embed`."""
        options = EmbedOptions(
            model=model,
            version=version,
            dims=dims,
            normalize=normalize,
            dtype=dtype,
            request_id=request_id,
            priority=priority,
        )
        return await self._drive(self._planner.embed(images, options, timeout_s))

    async def search(
        self,
        images: Images | None = None,
        *,
        vectors: Vectors | None = None,
        ids: Sequence[int] | NDArray[np.int64] | None = None,
        combined: Sequence[Combination] | None = None,
        fingerprint: str | None = None,
        collection: str | None = None,
        k: int = 10,
        filter: str | None = None,
        exact: bool = False,
        effort: int | None = None,
        min_score: float | None = None,
        diversity: float = 0.0,
        include_vectors: bool = False,
        include_metadata: bool = False,
        request_id: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> SearchResult:
        """Find nearest neighbours; see `Client.search`."""
        queries = make_queries(images, vectors, ids, fingerprint, combined)
        options = SearchOptions(
            collection=collection,
            k=k,
            filter=filter,
            exact=exact,
            effort=effort,
            min_score=min_score,
            diversity=diversity,
            include_vectors=include_vectors,
            include_metadata=include_metadata,
            request_id=request_id,
            priority=priority,
        )
        plan = self._planner.search(queries, options, timeout_s)
        return await self._drive(plan)

    def embed_iter(
        self,
        images: Iterable[ImageData] | AsyncIterable[ImageData],
        *,
        ordered: bool = True,
        in_flight: int = ITER_IN_FLIGHT,
        images_per_request: int = ITER_IMAGES,
        model: str | None = None,
        version: str | None = None,
        dims: int | None = None,
        normalize: bool = True,
        dtype: str = "fp32",
        request_id: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncIterator[EmbeddedItem]:
        """Embed an iterable of either kind, image by image; see `Client.embed_iter`.

        A plain iterable is read on other threads, one request's images at a time. Items are given
        as they are complete, whether or not there is more to read. A live source, such as a queue,
        wants `images_per_request=1`: a request waits for its images.
        """
        check_iterable(images)
        check_integer("in_flight", in_flight, 1)
        options = EmbedOptions(
            model=model,
            version=version,
            dims=dims,
            normalize=normalize,
            dtype=dtype,
            request_id=request_id,
            priority=priority,
        )
        limit_s = None if timeout_s is None else check_timeout(timeout_s)

        async def work(group: Group) -> list[EmbeddedItem]:
            return await self._drive(self._planner.embed_group(group, options, limit_s))

        async def items() -> AsyncIterator[EmbeddedItem]:
            size = await self._drive(self._planner.request_size(images_per_request, limit_s))
            async with (
                aclosing(group_async(images, size)) as groups,
                aclosing(
                    run_async_window(groups, work, in_flight=in_flight, ordered=ordered)
                ) as results,
            ):
                async for result in results:
                    for item in result:
                        yield item

        return items()

    async def list_models(self, *, timeout_s: float | None = None) -> list[ModelInfo]:
        """Ask which models there are; the default one says so."""
        return await self._drive(self._planner.list_models(timeout_s))

    async def list_collections(self, *, timeout_s: float | None = None) -> list[CollectionInfo]:
        """Ask which collections there are."""
        return await self._drive(self._planner.list_collections(timeout_s))

    async def health(self, service: str = "", *, timeout_s: float | None = None) -> bool:
        """Ask whether a service serves, such as `horace.v1.Horace`; all where empty."""
        return await self._drive(self._planner.health(service, timeout_s))

    async def _drive(self, plan: Plan[Value]) -> Value:
        """Perform a plan to its end."""
        answer: object = None
        while True:
            try:
                step = plan.send(answer)
            except StopIteration as end:
                value: Value = end.value
                return value
            answer = await self._perform(step)

    async def _perform(self, step: Step) -> object:
        """Make a call, or wait."""
        if not isinstance(step, Call):
            await self._sleep(step.seconds)
            return None
        if self._closed:
            raise self._planner.closed()
        if asyncio.get_running_loop() is not self._loop:
            raise _wrong_loop("the event loop that it was made in", "another")
        try:
            return await self._methods[step.method](
                step.request, timeout=step.timeout_s, metadata=step.metadata
            )
        except (grpc.RpcError, asyncio.CancelledError) as error:
            return self._failure(error)

    def _failure(self, error: BaseException) -> Failure:
        """Read how a call ended; our caller's own cancellation goes on.

        Raises:
            UnavailableError: the client was closed meanwhile; gRPC cancels its calls then.
        """
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling()):
            raise error
        if self._closed:
            raise self._planner.closed() from None
        if not isinstance(error, grpc.RpcError):
            raise error
        return read_failure(error)


def _running_loop() -> asyncio.AbstractEventLoop:
    """Give the event loop that a channel made now would belong to.

    Raises:
        UsageError: there is none; gRPC would take one that need never run.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise _wrong_loop("a running event loop", "none") from None


def _wrong_loop(expected: str, found: str) -> UsageError:
    """Say where a client works."""
    mend = "make it inside the coroutine that uses it, one client for each loop"
    return UsageError("AsyncClient", expected=expected, found=found, mend=mend)
