"""Asks interceptors for the handler of a call, as grpc.aio does, for a front end of our own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import grpc

from serve.front.registry import Handler

Ask: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"


def chain(
    interceptors: Sequence[grpc.aio.ServerInterceptor], handlers: Mapping[str, Handler]
) -> Ask | None:
    """Join interceptors to one function that gives a call's handler; None without any."""
    if not interceptors:
        return None

    async def find(details: grpc.HandlerCallDetails) -> Handler | None:
        return handlers.get(details.method)

    ask: Ask = find
    for interceptor in reversed(interceptors):
        ask = partial(interceptor.intercept_service, ask)
    return ask


class CallDetails(grpc.HandlerCallDetails):
    """What interceptors are told of a call."""

    def __init__(self, method: str, invocation_metadata: Any) -> None:
        self.method = method
        self.invocation_metadata = invocation_metadata
