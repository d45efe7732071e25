"""The routes: what is answered where, and how every request is answered.

Rules:
    Every refusal is JSON, also of what Starlette refuses itself; but for what uvicorn does not
    pass on: a head that is no HTTP, and a connection too many.
    A request is under way from its head on: a drain waits for its body, and answers it.
    A deadline holds for the whole of a request, its body included.
    While a request is computed its connection is watched: a caller that hangs up cancels it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Collection, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message import Message
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from protos import horace_pb2 as pb
from serve.errors import DeadlineError, RequestError, UnauthenticatedError
from serve.http.body import Body, BodyMemory, read_body
from serve.http.context import HttpContext
from serve.http.doorman import Doorman
from serve.http.faults import code_of, refuse, refuse_with
from serve.http.fields import EMBED_FIELDS, SEARCH_FIELDS, Asked, read_embed, read_search
from serve.http.linger import Linger
from serve.http.openapi import describe
from serve.http.replies import (
    Json,
    collections_reply,
    embed_reply,
    json_response,
    models_reply,
    search_reply,
)
from serve.http.tls import CALLER_STATE
from serve.security.caller import CURRENT
from serve.security.costs import count_images
from serve.security.guard import Pass

Reply = TypeVar("Reply")
Question = TypeVar("Question", pb.EmbedRequest, pb.SearchRequest)
Handler = Callable[[Request], Coroutine[Any, Any, Response]]

SERVICE = "/horace.v1.Horace/"
"""What gRPC calls the methods that stand behind the routes."""

PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)

_TIMEOUT_MS = re.compile(r"[0-9]{1,9}")


def make_app(doorman: Doorman) -> Starlette:
    """Make the application; it owns nothing that has to be closed."""
    routes = _Routes(doorman)
    return Starlette(
        routes=[
            Route("/", routes.page),
            Route("/healthz", routes.healthz),
            Route("/readyz", routes.readyz),
            Route("/openapi.json", routes.openapi),
            Route("/v1/models", routes.models),
            Route("/v1/collections", routes.collections),
            Route("/v1/embed", routes.embed, methods=["POST"]),
            Route("/v1/search", routes.search, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _refuse_route},
        middleware=[Middleware(Linger)],
    )


class _Routes:
    """The handlers of the routes."""

    def __init__(self, doorman: Doorman) -> None:
        self._doorman = doorman
        self._memory = BodyMemory(doorman.max_held_bytes)
        self._openapi = json_response(describe(doorman.limits))
        page = Path(__file__).with_name("page.html").read_text()
        self._page = HTMLResponse(page, headers={"content-security-policy": PAGE_POLICY})

    # What says something of the server itself; no key is asked for.

    async def page(self, request: Request) -> Response:
        """Show the interface to people."""
        return self._page

    async def openapi(self, request: Request) -> Response:
        """Describe the interface to programs."""
        return self._openapi

    async def healthz(self, request: Request) -> Response:
        """Say that the event loop turns."""
        return json_response({"status": "alive"})

    async def readyz(self, request: Request) -> Response:
        """Say whether the server serves, as its gRPC health does."""
        if self._doorman.is_serving():
            return json_response({"status": "ready"})
        return json_response({"status": "not ready"}, 503, {"retry-after": "1"})

    # What is answered by the services.

    async def models(self, request: Request) -> Response:
        """Say which models there are."""
        message = pb.ListModelsRequest()
        return await self._list(request, "ListModels", message, models_reply)

    async def collections(self, request: Request) -> Response:
        """Say which collections there are."""
        message = pb.ListCollectionsRequest()
        return await self._list(request, "ListCollections", message, collections_reply)

    async def embed(self, request: Request) -> Response:
        """Embed images."""

        async def write(reply: pb.EmbedResponse, asked: Asked) -> Json:
            return embed_reply(reply, asked.refused, as_base64=asked.as_base64)

        return await self._ask(request, "Embed", EMBED_FIELDS, read_embed, write)

    async def search(self, request: Request) -> Response:
        """Find neighbours."""

        async def write(reply: pb.SearchResponse, asked: Asked) -> Json:
            return await search_reply(reply, asked.refused)

        return await self._ask(request, "Search", SEARCH_FIELDS, read_search, write)

    async def _list(
        self, request: Request, method: str, message: Message, write: Callable[[Any], Json]
    ) -> Response:
        """Answer with what a method of the services gives that needs no body."""

        async def work(context: HttpContext, entered: Pass) -> Response:
            return json_response(write(await self._call(method, message, context, entered)))

        return await self._answer(request, method, work)

    async def _ask(
        self,
        request: Request,
        method: str,
        known: Collection[str],
        read: Callable[[Body, str], tuple[Question, Asked]],
        write: Callable[[Any, Asked], Awaitable[Json]],
    ) -> Response:
        """Answer with what a method of the services makes of the body."""

        async def work(context: HttpContext, entered: Pass) -> Response:
            _refuse_query(request)
            with self._memory.holding(entered.client) as held:
                body = await self._read(request, held, known)
                message, asked = read(body, context.request_id)
                context.take_name(message.request_id)
                del body  # its images are in the message now
                call = self._call(method, message, context, entered)
                reply = await _unless_gone(request, call)
            return json_response(await write(reply, asked))

        return await self._answer(request, method, work)

    def _call(
        self, method: str, message: Message, context: HttpContext, entered: Pass
    ) -> Coroutine[Any, Any, Any]:
        """Charge for a request, and hand it to the services."""
        self._charge(entered, message)
        context.is_with_service = True
        call: Coroutine[Any, Any, Any] = getattr(self._doorman.services, method)(message, context)
        return call

    # How every one of them is answered.

    async def _answer(
        self,
        request: Request,
        method: str,
        work: Callable[[HttpContext, Pass], Awaitable[Response]],
    ) -> Response:
        """Answer with what `work` gives; an error becomes a status."""
        context = self._context(request)
        try:
            response = await self._let_in(method, request, context, work)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            if not context.is_with_service:  # which would have counted it
                self._doorman.on_turned_away(code_of(error))
            response = refuse(error)
            error.with_traceback(None)  # whose frames hold the images, and the task that holds this
        response.headers["x-request-id"] = context.request_id
        if not self._doorman.is_serving():
            response.headers["connection"] = "close"  # the next request goes where it is served
        return response

    async def _let_in(
        self,
        method: str,
        request: Request,
        context: HttpContext,
        work: Callable[[HttpContext, Pass], Awaitable[Response]],
    ) -> Response:
        """Let the call in, and await `work` within the deadline.

        Raises:
            ServeError: it is not let in, or too late; or what `work` raises.
        """
        entered = self._enter(method, context)
        timeout_s = self._timeout_s(request)
        context.deadline_s = self._doorman.clock() + timeout_s
        try:
            with self._doorman.calls.accepted_early(), self._doorman.guard.under_way(entered):
                async with asyncio.timeout(timeout_s):
                    return await work(context, entered)
        except TimeoutError as error:
            expected = f"a body and a reply within {timeout_s:g} s"
            raise DeadlineError(method, expected=expected, found="none") from error

    def _enter(self, method: str, context: HttpContext) -> Pass:
        """Let a call in, and say who makes it, here and to whoever answers it.

        Raises:
            UnauthenticatedError: it has no key, or another.
        """
        guard = self._doorman.guard
        try:
            key = guard.authorise(SERVICE + method, context.invocation_metadata())
        except UnauthenticatedError:
            guard.count_stranger(SERVICE + method, peer=context.peer())
            raise
        entered = guard.name(key, peer=context.peer(), auth_context=context.auth_context())
        CURRENT.set(entered.client)  # this task answers nothing else
        return entered

    def _charge(self, entered: Pass, message: Message) -> None:
        """Charge for a request that has been read.

        Raises:
            QueueFullError: its caller asks for more a second than it may.
        """
        images = min(count_images(message), self._doorman.limits.max_images)
        self._doorman.guard.charge(entered, images=images)

    async def _read(self, request: Request, held: Any, known: Collection[str]) -> Body:
        """Read the body within the limits of a request."""
        limits = self._doorman.limits
        return await read_body(
            request, held, known, max_bytes=limits.max_message_bytes, max_images=limits.max_images
        )

    def _context(self, request: Request) -> HttpContext:
        """Describe the call as gRPC would."""
        client = request.client
        return HttpContext(
            headers=request.headers.items(),
            peer=None if client is None else (client.host, client.port),
            clock=self._doorman.clock,
            auth_context=request.scope.get("state", {}).get(CALLER_STATE),
        )

    def _timeout_s(self, request: Request) -> float:
        """Give the time that a request has: what it asks for, within what it may.

        Raises:
            RequestError: it asks for something that is no time.
        """
        asked = request.headers.get("x-timeout-ms")
        if asked is None:
            return self._doorman.timeout_s
        if not _TIMEOUT_MS.fullmatch(asked) or not int(asked):
            raise RequestError(
                "x-timeout-ms", expected="milliseconds, 1 or more", found=f"{asked[:40]!r}"
            )
        return min(int(asked) / 1e3, self._doorman.timeout_s)


def _refuse_query(request: Request) -> None:
    """Refuse what is asked in the address: nobody reads it there.

    Raises:
        RequestError: something is.
    """
    if query := request.url.query:
        raise RequestError(
            "query", expected="none: fields are in the body", found=f"{query[:40]!r}"
        )


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Reply]) -> Reply:
    """Await `work` unless its caller hangs up; then cancel it.

    Raises:
        ClientDisconnect: the caller has gone.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return await working
        raise ClientDisconnect
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.wait([working, watching])
        if not working.cancelled():
            working.exception()  # seen: nobody is left to be told


async def _until_gone(request: Request) -> None:
    """Wait until the caller hangs up; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refuse_route(request: Request, error: Exception) -> Response:
    """Answer what no route takes."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
    return refuse_with(error.status_code, code, error.detail, error.headers or {})
