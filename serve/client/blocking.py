"""The blocking client; `serve.client` gives it out, and says what both clients do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from types import TracebackType
from typing import TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

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
from serve.client.items import EmbeddedItem
from serve.client.plans import TIMEOUT_S, Call, Failure, Plan, Step
from serve.client.requests import (
    EmbedOptions,
    Group,
    Images,
    SearchOptions,
    Vectors,
    check_iterable,
    group_images,
    make_queries,
)
from serve.client.results import CollectionInfo, EmbedResult, ModelInfo, SearchResult
from serve.client.retry import RetryPolicy
from serve.client.window import Stop, run_window

Value = TypeVar("Value")


class Client:
    """A blocking client. Safe to use from several threads; close it, or use `with`.

    What every method raises: `UsageError` for arguments that cannot be meant, and a
    `ServeError` for a call that failed: `UnavailableError`, `DeadlineError`,
    `QueueFullError`, `UnknownNameError`, `RequestError`, `PreconditionError`,
    `InternalError`.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: ClientTls | None = None,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        retry: RetryPolicy | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Talk to the server at `host:port`; nothing is sent before the first call.

        Args:
            target: `host:port`; where the host has several addresses, such as the pods of a
                headless Service, calls take turns among them.
            tls: how the connection is secured; in the clear where None.
            api_key: sent with every call, where the server asks for one.
            timeout_s: of every operation that is given none of its own.
            retry: when a call is tried again.
            sleep: waits between attempts.

        Raises:
            UsageError: an argument cannot be meant, or a certificate cannot be read.
        """
        self._sleep = sleep
        self._closed = False
        connection = Connection(target=target, tls=tls, api_key=api_key)
        self._planner = make_planner(connection, retry, timeout_s)
        self._channel = connection.open_channel()
        self._methods = methods_of(self._channel)

    def __repr__(self) -> str:
        return f"<Client {self._planner.target}>"

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way end, with `UnavailableError`."""
        self._closed = True
        self._channel.close()

    def embed(
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
        """Embed one to many images.

        Args:
            images: encoded files or uint8 pixels, (H, W) or (H, W, C) each.
            model: a served model; the server's default where None.
            version: one of its versions; the newest where None.
            dims: keep the first `dims` dimensions, before the vectors are normalised.
            normalize: whether vectors have unit length.
            dtype: how vectors cross the wire: `fp32`, `fp16` or `int8`.
            request_id: names this call in the server's log and traces.
            priority: 1 is served before 2 and 3; 0 is the default, 2.
            timeout_s: for all of it.
        """
        options = EmbedOptions(
            model=model,
            version=version,
            dims=dims,
            normalize=normalize,
            dtype=dtype,
            request_id=request_id,
            priority=priority,
        )
        return self._drive(self._planner.embed(images, options, timeout_s))

    def search(
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
        """Find the nearest neighbours of images, vectors, stored ids or combinations of them.

        Args:
            images: encoded files or uint8 pixels; the server embeds them.
            vectors: the result of `embed`, or (N, D) float32 with `fingerprint`.
            ids: of stored images; each is left out of its own neighbours.
            combined: queries of several examples each; one of these four is given.
            fingerprint: of the encoder that made an array of vectors, or those in `combined`.
            collection: a served collection; the server's only one where None.
            k: neighbours a query.
            filter: which images may be hits, such as `label in ('Coat', 'Shirt')`; the
                language is that of `index.filters`.
            exact: whether every vector is compared, instead of asking the index.
            effort: candidates that the index weighs for a query, more for a better recall; as
                many as the collection is set to where None.
            min_score: the least cosine of a hit, -1 to 1; there may be fewer than k then.
            diversity: 0 for the nearest, up to 1 for what is also unlike one another; above 0,
                k is at most 100, and scores do not fall from hit to hit.
            include_vectors: whether the hits' stored vectors are sent, too.
            include_metadata: whether what the collection knows of them besides is sent, too.
            request_id: see `embed`.
            priority: see `embed`.
            timeout_s: for all of it.
        """
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
        return self._drive(self._planner.search(queries, options, timeout_s))

    def embed_iter(
        self,
        images: Iterable[ImageData],
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
    ) -> Iterator[EmbeddedItem]:
        """Embed an iterable of any length, image by image, with several requests under way.

        A bad image, or a request that failed after all its retries, is an item with another
        status than ok; the rest goes on. The iterable is read lazily, on the caller's thread,
        and an error of its own is raised after the items of what it gave before. An image's item
        is given only when the next request's images have been read, unless `in_flight` are under
        way. Closing the iterator cancels what is under way.

        Args:
            images: encoded files or uint8 pixels.
            ordered: whether items come in the order of the images, or as they are complete.
            in_flight: requests under way at once.
            images_per_request: images of one request, which waits for them; 1 for a live source,
                such as a queue, and 1 in flight, if items are wanted before the next image.
            model: see `embed`; so are the rest.
            version: see `embed`.
            dims: see `embed`.
            normalize: see `embed`.
            dtype: see `embed`.
            request_id: see `embed`; that of every request.
            priority: see `embed`.
            timeout_s: for each request, with its retries; and for the question before them, what
                the server takes.
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

        def work(group: Group, stop: Stop) -> list[EmbeddedItem]:
            return self._drive(self._planner.embed_group(group, options, limit_s), stop)

        def items() -> Iterator[EmbeddedItem]:
            size = self._drive(self._planner.request_size(images_per_request, limit_s))
            groups = group_images(images, size, keep_going=True)
            results = run_window(groups, work, in_flight=in_flight, ordered=ordered)
            with closing(results):
                for result in results:
                    yield from result

        return items()

    def list_models(self, *, timeout_s: float | None = None) -> list[ModelInfo]:
        """Ask which models there are; the default one says so."""
        return self._drive(self._planner.list_models(timeout_s))

    def list_collections(self, *, timeout_s: float | None = None) -> list[CollectionInfo]:
        """Ask which collections there are."""
        return self._drive(self._planner.list_collections(timeout_s))

    def health(self, service: str = "", *, timeout_s: float | None = None) -> bool:
        """Ask whether a service serves, such as `horace.v1.Horace`; all where empty."""
        return self._drive(self._planner.health(service, timeout_s))

    def _drive(self, plan: Plan[Value], stop: Stop | None = None) -> Value:
        """Perform a plan to its end, or until it is stopped."""
        answer: object = None
        while True:
            try:
                step = plan.send(answer)
            except StopIteration as end:
                value: Value = end.value
                return value
            answer = self._perform(step, stop)

    def _perform(self, step: Step, stop: Stop | None) -> object:
        """Make a call, or wait."""
        if not isinstance(step, Call):
            (self._sleep if stop is None else stop.pause)(step.seconds)
            return None
        if self._closed:
            raise self._planner.closed()
        method = self._methods[step.method]
        arguments = {"timeout": step.timeout_s, "metadata": step.metadata}
        try:
            if stop is None:
                return method(step.request, **arguments)
            return stop.call(lambda: method.future(step.request, **arguments))
        except (grpc.RpcError, ValueError) as error:  # the latter on a closed channel
            return self._failure(error)

    def _failure(self, error: Exception) -> Failure:
        """Read how a call ended.

        Raises:
            UnavailableError: the client was closed meanwhile.
        """
        if self._closed:
            raise self._planner.closed() from None
        if not isinstance(error, grpc.RpcError):
            raise error
        return read_failure(error)
