"""The RPCs of `horace.v1.Horace`, written once for every gRPC front end.

Rules:
    A call fails only for what concerns all of it; an image or a query that is wrong has its
    own status.
    Everything that can be refused is refused before anything is computed.
    A request of a stream that is refused is answered with `error` and the stream goes on.
    Where the queue is full a stream waits with one request read.

How calls are counted, observed and ended is `serve.answering`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from models.wire import dtype_from_wire, vectors_to_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc
from serve.answering import Answering, Context
from serve.catalog import Catalog, ServedCollection, ServedModel
from serve.combining import count_examples, read_combinations, search_combinations
from serve.embedding import finish, take_images
from serve.errors import RETRY_AFTER_S, QueueFullError, RequestError, retry_after_ms
from serve.job import Embedded
from serve.operation.observer import Call
from serve.pool import ThreadPool
from serve.screen import Work
from serve.searching import (
    Query,
    count_queries,
    read_query,
    read_query_vectors,
    search_ids,
    search_vectors,
    select,
)

if TYPE_CHECKING:
    from index.collection import Collection

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Horace"].full_name


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What one request may ask for.

    Attributes:
        max_images: images of Embed, queries of Search.
        max_message_bytes: of a request, and of a reply that grows with k.
        max_neighbours: the largest k.
        max_waiting_searches: searches that wait for a thread; of images also those that are
            embedded first, which have their place from then on.
        stream_requests: requests of one stream that are under way at once.
    """

    max_images: int = 1024
    max_message_bytes: int = 64 << 20
    max_neighbours: int = 1000
    max_waiting_searches: int = 256
    stream_requests: int = 8


class HoraceServicer(pb_grpc.HoraceServicer):
    """Answers for a catalogue of models and collections. Belongs to one event loop."""

    def __init__(
        self,
        catalog: Catalog,
        *,
        limits: RequestLimits,
        search_pool: ThreadPool,
        following_pool: ThreadPool,
        answering: Answering,
    ) -> None:
        """Serve `catalog`, which may grow; its engines, and the pools, have owners.

        Args:
            catalog: what is offered.
            limits: what one request may ask for.
            search_pool: threads for searches.
            following_pool: threads that read what was written to a collection.
            answering: how calls are answered, and whose clock is the engines'.
        """
        self._catalog = catalog
        self._limits = limits
        self._search_pool = search_pool
        self._embedding_searches = 0
        self._following_pool = following_pool
        self._clock = answering.clock
        self._answering = answering

    def __repr__(self) -> str:
        return f"<HoraceServicer {self._answering.calls!r} {self._catalog!r}>"

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        """Embed one to many images."""
        call = self._answering.new_call("Embed", request.request_id, context)
        work = self._embed(request, call, self._answering.deadline_s(context))
        return await self._answering.answer(call, work, context)

    async def Search(self, request: pb.SearchRequest, context: Context) -> pb.SearchResponse:
        """Find the neighbours of images, vectors or stored ids."""
        call = self._answering.new_call("Search", request.request_id, context)
        work = self._search(request, call, self._answering.deadline_s(context))
        return await self._answering.answer(call, work, context)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """Say which models there are and what they take."""
        call = self._answering.new_call("ListModels", "", context)
        return await self._answering.answer(call, self._list_models(), context)

    async def ListCollections(
        self, request: pb.ListCollectionsRequest, context: Context
    ) -> pb.ListCollectionsResponse:
        """Say which collections there are and which model may query them."""
        call = self._answering.new_call("ListCollections", "", context)
        return await self._answering.answer(call, self._list_collections(), context)

    async def EmbedStream(
        self, request_iterator: AsyncIterator[pb.EmbedRequest], context: Context
    ) -> None:
        """Embed requests as they come; see the module's rules."""
        deadline_s, late_s = self._answering.deadline_s(context), self._answering.late_s(context)

        async def answer(
            request: pb.EmbedRequest, on_admitted: Callable[[], None]
        ) -> pb.EmbedResponse:
            call = self._answering.new_call("EmbedStream", request.request_id, context)
            work = self._embed(request, call, deadline_s, on_admitted)
            return await self._answering.answer_in_stream(call, work, _refuse, late_s=late_s)

        window = self._limits.stream_requests
        await self._answering.stream(request_iterator, context, answer, window=window)

    # Lists.

    async def _list_models(self) -> pb.ListModelsResponse:
        """Describe every model by the version that is served by default."""
        models = [
            pb.Model(
                name=model.name,
                fingerprint=model.encoder.fingerprint,
                dim=model.encoder.dim,
                preprocessing_json=json.dumps(model.encoder.preprocessing.to_json()),
                is_default=model.name == self._catalog.default,
                max_images_per_request=self._limits.max_images,
                max_request_bytes=self._limits.max_message_bytes,
                version=model.version,
                versions=list(self._catalog.versions[model.name]),
            )
            for model in self._catalog.models.values()
        ]
        return pb.ListModelsResponse(models=models)

    async def _list_collections(self) -> pb.ListCollectionsResponse:
        """Describe every collection as a search would find it now."""
        names = list(self._catalog.collections)
        collections = [await self._describe_collection(name) for name in names]
        return pb.ListCollectionsResponse(collections=collections)

    async def _describe_collection(self, name: str) -> pb.Collection:
        """Describe one collection; any may be swapped while another is looked at."""
        with self._catalog.lease_collection(name) as served:
            collection = await served.following.snapshot(self._following_pool.run)
            return pb.Collection(
                name=served.name,
                fingerprint=collection.fingerprint,
                dim=collection.dim,
                count=collection.count,
                metric=collection.metric,
                index=collection.factory,
                model=served.model.name,
                version=version_of(collection),
            )

    # Embed.

    def foresee_embed(self, request: pb.EmbedRequest) -> Work:
        """Say what a request would have an engine do; see `serve.screen`.

        Raises:
            HoraceError: the request is wrong.
        """
        images = len(request.images)
        self._check_count("images", images)
        model = self._catalog.model(request.model, request.version)
        return Work(model=model, images=images, priority=request.priority)

    async def _embed(
        self,
        request: pb.EmbedRequest,
        call: Call,
        deadline_s: float,
        on_admitted: Callable[[], None] | None = None,
    ) -> pb.EmbedResponse:
        """Embed as a request asks; with `on_admitted` it waits for room, and says when."""
        with self._catalog.lease_model(request.model, request.version) as model:
            call.model, call.version = model.name, model.version
            call.images = len(request.images)
            dtype = dtype_from_wire(request.dtype)
            self._check_dims(request.dims, model)
            self._check_count("images", len(request.images))
            embedded = await self._compute(
                model,
                call,
                request.images,
                request.priority,
                deadline_s,
                on_admitted,
                is_unit=not (request.skip_normalize or request.dims),
            )
            call.embedded = embedded
        vectors_ND, statuses = finish(
            embedded,
            dims=request.dims or None,
            normalize=not request.skip_normalize,
            dtype=dtype,
        )
        return pb.EmbedResponse(
            vectors=vectors_to_wire(vectors_ND, dtype),
            statuses=statuses,
            model=model.name,
            version=model.version,
            fingerprint=model.encoder.fingerprint,
            timings=self._timings(call),
            request_id=request.request_id,
        )

    async def _compute(
        self,
        model: ServedModel,
        call: Call,
        images: Sequence[pb.Image],
        priority: int,
        deadline_s: float,
        on_admitted: Callable[[], None] | None = None,
        *,
        is_unit: bool = False,
    ) -> Embedded:
        """Run images through a model's engine."""
        taken, payload_bytes = take_images(images)
        return await model.engine.embed(
            taken,
            count=len(images),
            payload_bytes=payload_bytes,
            deadline_s=deadline_s,
            client=call.client,
            priority=priority,
            is_unit=is_unit,
            on_admitted=on_admitted,
        )

    def _check_dims(self, dims: int, model: ServedModel) -> None:
        """Refuse to keep more dimensions than there are."""
        if dims > model.encoder.dim:
            raise RequestError("dims", expected=f"1 to {model.encoder.dim}", found=str(dims))

    def _check_count(self, what: str, count: int) -> None:
        """Refuse a request for nothing, or for too much."""
        most = self._limits.max_images
        if not 1 <= count <= most:
            mend = "split the request" if count else None
            raise RequestError(what, expected=f"1 to {most} a request", found=f"{count}", mend=mend)

    def _timings(self, call: Call) -> pb.Timings:
        """Say where the time went, in milliseconds."""
        total_s = self._clock() - call.arrived_s
        timings = pb.Timings(search_ms=call.search_s * 1e3, total_ms=total_s * 1e3)
        if (embedded := call.embedded) is not None:
            timings.decode_ms = embedded.decode_s * 1e3
            timings.queue_ms = embedded.queue_s * 1e3
            timings.inference_ms = embedded.inference_s * 1e3
        return timings

    # Search.

    async def _search(
        self, request: pb.SearchRequest, call: Call, deadline_s: float
    ) -> pb.SearchResponse:
        """Search by whatever the request has for queries."""
        with self._catalog.lease_collection(request.collection) as served:
            return await self._search_in(served, request, call, deadline_s)

    async def _search_in(
        self, served: ServedCollection, request: pb.SearchRequest, call: Call, deadline_s: float
    ) -> pb.SearchResponse:
        """Search in a collection that is leased: in one snapshot of it."""
        collection = await served.following.snapshot(self._following_pool.run)
        count = count_queries(request)
        call.model, call.version = served.model.name, served.model.version
        call.images = count
        self._check_count("queries", count)
        query = read_query(
            request,
            collection.dim,
            count=count,
            max_neighbours=self._limits.max_neighbours,
            max_reply_bytes=self._limits.max_message_bytes,
        )
        if request.filter:
            self._check_search_room()
            selecting = partial(select, collection, request.filter)
            query = replace(query, selection=await self._search_pool.run(selecting))
        work = await self._prepare(served, collection, call, request, query, deadline_s)
        if call.embedded is None:
            self._check_search_room()
        started_s = self._clock()
        results = await self._search_pool.run_in_pieces(work)
        call.search_s = self._clock() - started_s
        return pb.SearchResponse(
            results=results,
            collection=served.name,
            fingerprint=collection.fingerprint,
            timings=self._timings(call),
            request_id=request.request_id,
            version=version_of(collection),
        )

    async def _prepare(
        self,
        served: ServedCollection,
        collection: Collection,
        call: Call,
        request: pb.SearchRequest,
        query: Query,
        deadline_s: float,
    ) -> Callable[[Callable[[], None]], list[pb.Hits]]:
        """Read the queries and embed their images; give the search that is left to do."""
        embed = partial(
            self._embed_queries, served, call, priority=request.priority, deadline_s=deadline_s
        )
        match request.WhichOneof("queries"):
            case "combined":
                self._check_count("examples", max(1, count_examples(request.combined)))
                combined, images = read_combinations(request.combined, served)
                vectors_ND = np.empty((0, collection.dim), np.float32)
                statuses: list[pb.ItemStatus] = []
                if images:
                    vectors_ND, statuses = await embed(images)
                return partial(
                    search_combinations, collection, combined, vectors_ND, statuses, query
                )
            case "images":
                vectors_QD, statuses = await embed(request.images.images)
            case "vectors":
                vectors_QD, statuses = read_query_vectors(request.vectors, served)
            case _:
                return partial(search_ids, collection, request.ids.ids, query)
        return partial(search_vectors, collection, vectors_QD, statuses, query)

    async def _embed_queries(
        self,
        served: ServedCollection,
        call: Call,
        images: Sequence[pb.Image],
        *,
        priority: int,
        deadline_s: float,
    ) -> tuple[NDArray[np.float32], list[pb.ItemStatus]]:
        """Embed what a search is for; it has its place among those that wait from now on."""
        self._check_search_room(self._embedding_searches)
        self._embedding_searches += 1
        try:
            call.embedded = await self._compute(served.model, call, images, priority, deadline_s)
        finally:
            self._embedding_searches -= 1
        return finish(call.embedded, normalize=False)

    def _check_search_room(self, to_come: int = 0) -> None:
        """Refuse a search where too many wait for a thread, those to come included."""
        most = self._limits.max_waiting_searches
        if self._search_pool.waiting + to_come >= most:
            raise QueueFullError(
                "searches",
                expected=f"fewer than {most} that wait",
                found=f"{most}",
                retry_after_s=self._search_pool.wait_s or RETRY_AFTER_S,
            )


def version_of(collection: Collection) -> str:
    """Write down which content of a collection a snapshot has: each write makes another."""
    from index.collection import version_text  # with faiss and pyarrow: there is a collection

    return version_text(collection.version)


def _refuse(call: Call, error: Exception) -> pb.EmbedResponse:
    """Say in a stream why a request failed."""
    refusal = pb.RequestError(
        code=call.code.value[0], message=call.message, retry_after_ms=retry_after_ms(error) or 0
    )
    return pb.EmbedResponse(error=refusal, request_id=call.request_id)
