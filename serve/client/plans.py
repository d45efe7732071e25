"""What a client does, without doing it: calls and pauses, in order, for a driver to perform.

A plan is a generator. It yields a `Call` or a `Pause`; the driver performs it and sends back
the reply, or a `Failure`. So the blocking and the asyncio client share all that they decide:
how requests are split, what is tried again, and what errors are called.

Rules:
    One deadline holds for a whole operation, with all its requests and retries.
    Parts of one result come from one encoder, or there is no result.
    What the server takes is asked once, and again when it refuses a request: it may have
    been started anew with less.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias, TypeVar, cast
from urllib.parse import unquote

import grpc
import numpy as np
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from models.image_source import ImageData
from models.wire import vectors_from_wire
from protos import horace_pb2 as pb
from serve.client.arguments import check_integer, check_text, check_timeout
from serve.client.connection import Metadata
from serve.client.items import EmbeddedItem, failed_items, items_of
from serve.client.requests import (
    EmbedOptions,
    Group,
    Images,
    Queries,
    RequestSize,
    SearchOptions,
    check_images,
    embed_request,
    group_images,
    split,
)
from serve.client.results import (
    CollectionInfo,
    EmbedResult,
    ItemStatus,
    ModelInfo,
    SearchResult,
    read_collection,
    read_hits,
    read_model,
    read_status,
    read_timings,
)
from serve.client.retry import RetryBudget, RetryPolicy
from serve.client.unreachable import REFUSED, handshake_mend, why
from serve.errors import (
    STOPPING,
    DeadlineError,
    PreconditionError,
    RequestError,
    ServeError,
    UnavailableError,
    from_status,
)

Value = TypeVar("Value")

TIMEOUT_S = 60.0
"""Of one operation, with all its requests and retries."""

UNSAID = RequestSize(images=1024, request_bytes=64 << 20)
"""What a server takes unless it is told otherwise; one without a model does not say it."""

ITER_BYTES = 8 << 20
"""From how many on a request of `embed_iter` takes no further image. Several are under way at once,
and a server has room for four of the largest (`--max-in-flight-mib`): of photos it would refuse the
others until no retry is left."""

TOO_LARGE = "message larger than max"
"""What gRPC itself says with RESOURCE_EXHAUSTED where no later attempt can do better."""

OF_A_MODEL = "model "
"""How a server begins what it says of a model that it cannot have computed now."""

TIME_IS_UP = "Deadline Exceeded"
"""What gRPC itself says with DEADLINE_EXCEEDED; by some servers it comes with `%20`."""

NO_REPLY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
"""What a call may end with that never came to a server."""


@dataclass(frozen=True, slots=True)
class Call:
    """Make this call and send back its reply, or a `Failure`."""

    method: str
    request: Message
    timeout_s: float
    metadata: Metadata = ()


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait this long and send back anything."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Failure:
    """How a call ended that has no reply.

    Attributes:
        code: the status.
        details: its message.
        retry_after_s: when the server wants to be called again, where it says so; negative
            where it does not want to be.
    """

    code: grpc.StatusCode
    details: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Deadline:
    """When an operation must have ended, and how long it had from its start."""

    at_s: float
    timeout_s: float


Step: TypeAlias = Call | Pause
Plan: TypeAlias = Generator[Step, object, Value]


class Planner:
    """Plans every operation of a client on one server."""

    def __init__(
        self,
        target: str,
        *,
        retry: RetryPolicy,
        clock: Callable[[], float],
        rng: random.Random,
        timeout_s: float = TIMEOUT_S,
        metadata: Metadata = (),
        by_tls: bool = False,
    ) -> None:
        """Plan for the server at `target`.

        Args:
            target: `host:port`, for messages.
            retry: when a call is tried again.
            clock: monotonic seconds.
            rng: what waits are drawn from.
            timeout_s: of every operation that is given none of its own.
            metadata: what goes with every call.
            by_tls: whether connections are secured, for messages.

        Raises:
            UsageError: the timeout is none.
        """
        self.target = target
        self._by_tls = by_tls
        self._has_replied = False
        self._metadata = metadata
        self._timeout_s = check_timeout(timeout_s)
        self._retry = retry
        self._budget = RetryBudget(retry, clock)
        self._clock = clock
        self._rng = rng
        self._sizes: dict[bool, RequestSize] = {}
        """By whether the length of vectors was asked, too."""

    def embed(
        self, images: Images, options: EmbedOptions, timeout_s: float | None
    ) -> Plan[EmbedResult]:
        """Embed one to many images, in as many requests as they need."""
        deadline = self._deadline(timeout_s)
        checked = check_images(images)
        return (yield from self._fit(partial(self._embed, checked, options, deadline), deadline))

    def _embed(
        self,
        images: Sequence[ImageData],
        options: EmbedOptions,
        deadline: Deadline,
        size: RequestSize,
    ) -> Plan[EmbedResult]:
        """Embed images in requests of at most `size`."""
        replies = []
        statuses: list[ItemStatus] = []
        for group in group_images(images, size):
            answer = yield from self._call(
                "Embed", embed_request(group, options), deadline, options.request_id
            )
            replies.append(reply := cast(pb.EmbedResponse, answer))
            statuses += read_statuses(reply.statuses, group)
        self._require_one_encoder([reply.fingerprint for reply in replies])
        return read_embedded(replies, statuses)

    def embed_group(
        self, group: Group, options: EmbedOptions, timeout_s: float | None
    ) -> Plan[list[EmbeddedItem]]:
        """Embed some images of an iterable, in one request; one that fails has items, too.

        In several where the server takes less than when they were put together.
        """
        deadline = self._deadline(timeout_s)
        try:
            plan = partial(self._embed_group, group, options, deadline)
            return (yield from self._fit(plan, deadline))
        except ServeError as error:
            return failed_items(group, error)

    def _embed_group(
        self, group: Group, options: EmbedOptions, deadline: Deadline, size: RequestSize
    ) -> Plan[list[EmbeddedItem]]:
        """Embed some images of an iterable in requests of at most `size`.

        Raises:
            RequestError: the server takes less, or not what is asked of every image.
        """
        items = []
        for part in split(group, size):
            request = embed_request(part, options)
            try:
                answer = yield from self._call("Embed", request, deadline, options.request_id)
            except RequestError:
                raise
            except ServeError as error:
                items += failed_items(part, error)
                continue
            reply = cast(pb.EmbedResponse, answer)
            items += items_of(part, read_embedded([reply], read_statuses(reply.statuses, part)))
        return items

    def search(
        self, queries: Queries, options: SearchOptions, timeout_s: float | None
    ) -> Plan[SearchResult]:
        """Search, in as many requests as the queries and their hits need."""
        deadline = self._deadline(timeout_s)
        plan = partial(self._search, queries, options, deadline)
        return (yield from self._fit(plan, deadline, with_dim=options.include_vectors))

    def _search(
        self, queries: Queries, options: SearchOptions, deadline: Deadline, size: RequestSize
    ) -> Plan[SearchResult]:
        """Search in requests of at most `size`."""
        replies = []
        statuses: list[ItemStatus] = []
        for request, group in queries.requests(size, options):
            answer = yield from self._call("Search", request, deadline, options.request_id)
            replies.append(reply := cast(pb.SearchResponse, answer))
            statuses += read_statuses([hits.status for hits in reply.results], group)
        self._require_one_encoder([reply.fingerprint for reply in replies])
        return SearchResult(
            hits=tuple(read_hits(hits) for reply in replies for hits in reply.results),
            statuses=tuple(statuses),
            collection=replies[0].collection,
            fingerprint=replies[0].fingerprint,
            timings=read_timings([reply.timings for reply in replies]),
            versions=tuple(dict.fromkeys(reply.version for reply in replies)),
        )

    def list_models(self, timeout_s: float | None) -> Plan[list[ModelInfo]]:
        """Ask which models there are."""
        return (yield from self._list_models(self._deadline(timeout_s)))

    def list_collections(self, timeout_s: float | None) -> Plan[list[CollectionInfo]]:
        """Ask which collections there are."""
        return (yield from self._list_collections(self._deadline(timeout_s)))

    def health(self, service: str, timeout_s: float | None) -> Plan[bool]:
        """Ask whether a service serves; all of them where the name is empty."""
        check_text("service", service)
        deadline = self._deadline(timeout_s)
        request = health_pb2.HealthCheckRequest(service=service)
        answer = yield from self._call("Check", request, deadline)
        reply = cast(health_pb2.HealthCheckResponse, answer)
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def request_size(self, images: int, timeout_s: float | None) -> Plan[RequestSize]:
        """Give the size of requests of an iterable: `images` at most, and what the server takes.

        Raises:
            UsageError: `images` is below 1.
        """
        most = check_integer("images_per_request", images, 1)
        size = yield from self._ask_size(self._deadline(timeout_s))
        return replace(size, images=min(most, size.images), full_bytes=ITER_BYTES)

    def _error(self, failure: Failure, what: str, timeout_s: float) -> ServeError:
        """Say in one line how a call ended."""
        match failure.code:
            case grpc.StatusCode.UNAVAILABLE if failure.details.startswith((STOPPING, OF_A_MODEL)):
                return UnavailableError(
                    f"server {self.target}", found=failure.details, mend="try again, or elsewhere"
                )
            case grpc.StatusCode.RESOURCE_EXHAUSTED if TOO_LARGE in failure.details:
                return RequestError(
                    f"{what} at {self.target}",
                    expected="a request that the server takes",
                    found=failure.details,
                    mend="split it, or call again if the server has changed",
                )
            case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.UNIMPLEMENTED:
                return UnavailableError(
                    f"server {self.target}",
                    expected="a Horace server that answers",
                    found=why(failure.details) or failure.code.name,
                    mend=self._handshake_mend(failure)
                    or "start it with `python -m serve`, or check host and port",
                )
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return self._late(what, timeout_s, failure.details)
        return from_status(failure.code, failure.details)

    def _handshake_mend(self, failure: Failure) -> str | None:
        """Say what may mend a handshake that failed; None where the failure is no such one."""
        return handshake_mend(failure.details, by_tls=self._by_tls, has_replied=self._has_replied)

    def closed(self) -> UnavailableError:
        """Say that the client is closed."""
        return UnavailableError(
            f"client of {self.target}",
            expected="an open one",
            found="one that was closed",
            mend="make another",
        )

    def _deadline(self, timeout_s: float | None) -> Deadline:
        """Start an operation's time; the client's own where it is given none."""
        limit_s = self._timeout_s if timeout_s is None else check_timeout(timeout_s)
        return Deadline(self._clock() + limit_s, limit_s)

    def _fit(
        self,
        plan: Callable[[RequestSize], Plan[Value]],
        deadline: Deadline,
        *,
        with_dim: bool = False,
    ) -> Plan[Value]:
        """Follow `plan` within what the server takes; once more if it takes less by now."""
        known = self._sizes.get(with_dim)
        size = known or (yield from self._ask_size(deadline, with_dim=with_dim))
        try:
            return (yield from plan(size))
        except RequestError:
            if known is None:
                raise
            if (size := (yield from self._ask_size(deadline, with_dim=with_dim))) == known:
                raise
        return (yield from plan(size))

    def _ask_size(self, deadline: Deadline, *, with_dim: bool = False) -> Plan[RequestSize]:
        """Ask for the largest request that the server takes; remember it if the server says it."""
        dim = 0
        if with_dim:  # a collection may have longer vectors than any model that is offered
            collections = yield from self._list_collections(deadline)
            dim = max((collection.dim for collection in collections), default=0)
        models = yield from self._list_models(deadline)
        if not models:
            return replace(UNSAID, dim=dim)
        self._sizes[with_dim] = size = RequestSize(
            images=min(model.max_images_per_request for model in models),
            request_bytes=min(model.max_request_bytes for model in models),
            dim=dim,
        )
        return size

    def _list_models(self, deadline: Deadline) -> Plan[list[ModelInfo]]:
        """Ask which models there are."""
        answer = yield from self._call("ListModels", pb.ListModelsRequest(), deadline)
        return [read_model(model) for model in cast(pb.ListModelsResponse, answer).models]

    def _list_collections(self, deadline: Deadline) -> Plan[list[CollectionInfo]]:
        """Ask which collections there are."""
        answer = yield from self._call("ListCollections", pb.ListCollectionsRequest(), deadline)
        reply = cast(pb.ListCollectionsResponse, answer)
        return [read_collection(collection) for collection in reply.collections]

    def _call(
        self, method: str, request: Message, deadline: Deadline, request_id: str | None = None
    ) -> Plan[object]:
        """Call until there is a reply, an error that will not pass, or no time left.

        Raises:
            ServeError: how the last attempt ended.
        """
        failures = 0
        handshake: Failure | None = None
        self._budget.earn()
        metadata = self._metadata
        if request_id:
            metadata = (*metadata, ("x-request-id", request_id))
        while (remaining_s := deadline.at_s - self._clock()) > 0:
            answer = yield Call(method, request, remaining_s, metadata)
            if not isinstance(answer, Failure):
                self._has_replied = True
                return answer
            self._has_replied |= answer.code not in NO_REPLY
            failures += 1
            wait_s = self._wait_s(answer, failures, deadline)
            if self._handshake_mend(answer):
                handshake = answer
            if wait_s is None:
                if handshake and REFUSED in answer.details:  # at another address of the name
                    answer = handshake
                error = self._error(answer, method, deadline.timeout_s)
                error.retry_after_s = answer.retry_after_s
                raise error
            yield Pause(wait_s)
        raise self._late(method, deadline.timeout_s)

    def _wait_s(self, failure: Failure, failures: int, deadline: Deadline) -> float | None:
        """Say how long to wait for the next attempt; None where there is none."""
        if TOO_LARGE in failure.details:
            return None
        wait_s = self._retry.wait_s(
            failure.code,
            failures=failures,
            has_replied=self._has_replied,
            remaining_s=deadline.at_s - self._clock(),
            rng=self._rng,
            retry_after_s=failure.retry_after_s,
        )
        return wait_s if wait_s is not None and self._budget.spend() else None

    def _late(self, what: str, timeout_s: float, details: str = "") -> DeadlineError:
        """Say that there was no reply in time; a server that gave up first may say why."""
        return DeadlineError(
            f"{what} at {self.target}",
            expected=f"a reply within {timeout_s:g} s",
            found="none" if not details or TIME_IS_UP in unquote(details) else details,
            mend="allow more with timeout_s",
        )

    def _require_one_encoder(self, fingerprints: Sequence[str]) -> None:
        """Refuse parts that cannot be compared with one another.

        Raises:
            PreconditionError: the server changed its model between two requests.
        """
        if len(set(fingerprints)) > 1:
            raise PreconditionError(
                f"server {self.target}",
                expected=f"one encoder for all parts, {fingerprints[0]}",
                found=f"another, {fingerprints[-1]}",
                mend="the server has changed its model: call again",
            )


def read_embedded(
    replies: Sequence[pb.EmbedResponse], statuses: Sequence[ItemStatus]
) -> EmbedResult:
    """Put the replies of one encoder together."""
    return EmbedResult(
        vectors=np.concatenate([vectors_from_wire(reply.vectors) for reply in replies]),
        statuses=tuple(statuses),
        fingerprint=replies[0].fingerprint,
        model=replies[0].model,
        timings=read_timings([reply.timings for reply in replies]),
        version=replies[0].version,
    )


def read_statuses(statuses: Sequence[pb.ItemStatus], group: Group) -> list[ItemStatus]:
    """Read the statuses of one request; what was not sent has the client's own."""
    return [group.refused.get(n) or read_status(status) for n, status in enumerate(statuses)]
