"""What the HTTP application has to know of the server that it belongs to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from serve.calls import Calls
from serve.security.guard import Guard
from serve.services import HoraceServicer, RequestLimits


@dataclass(frozen=True, kw_only=True)
class Doorman:
    """What the routes need to know of the server that they belong to.

    Attributes:
        services: answers every request.
        limits: what one request may ask for.
        calls: the server's account of calls under way.
        is_serving: whether the server says that it serves.
        guard: lets calls in, by the names that gRPC has for them.
        timeout_s: the longest that a request may take.
        max_held_bytes: of bodies that are in memory at once.
        clock: monotonic seconds, that of the services.
        on_turned_away: hears with which code a request ended that no service saw.
    """

    services: HoraceServicer
    limits: RequestLimits
    calls: Calls
    is_serving: Callable[[], bool]
    guard: Guard
    timeout_s: float = 60.0
    max_held_bytes: int = 1 << 29
    clock: Callable[[], float] = time.monotonic
    on_turned_away: Callable[[grpc.StatusCode], None] = lambda _: None
