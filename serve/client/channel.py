"""What the blocking and the asyncio client share on the wire: options, methods, failures."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from protos import horace_pb2_grpc as pb_grpc
from serve.client.plans import Failure, Planner
from serve.client.retry import RetryPolicy

STREAM_IMAGES = 32
"""Images a request of a stream."""

STREAM_IN_FLIGHT = 4
"""Requests of a stream that wait for their replies."""

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),  # the server bounds its replies
    ("grpc.max_send_message_length", -1),  # and says what it takes
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.enable_retries", 0),  # `RetryPolicy` decides
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


def make_planner(
    target: str,
    retry: RetryPolicy | None,
    clock: Callable[[], float],
    rng: random.Random | None,
    timeout_s: float,
) -> Planner:
    """Plan for one client."""
    return Planner(
        target,
        retry=retry or RetryPolicy(),
        clock=clock,
        rng=rng or random.Random(),
        timeout_s=timeout_s,
    )


def methods_of(channel: Any) -> dict[str, Callable[..., Any]]:  # either kind of channel
    """Give the calls that plans name."""
    horace = pb_grpc.HoraceStub(channel)
    health: Any = health_pb2_grpc.HealthStub(channel)  # its stubs name no methods
    return {
        "Embed": horace.Embed,
        "EmbedStream": horace.EmbedStream,
        "Search": horace.Search,
        "ListModels": horace.ListModels,
        "ListCollections": horace.ListCollections,
        "Check": health.Check,
    }


def read_failure(error: grpc.RpcError) -> Failure:
    """Read how a call ended; both kinds of channel raise errors that can be asked."""
    if isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return Failure(error.code(), error.details() or "")
    return Failure(grpc.StatusCode.UNKNOWN, str(error))
