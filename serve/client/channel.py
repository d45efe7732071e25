"""What the blocking and the asyncio client share on the wire: methods and failures."""

from __future__ import annotations

import contextlib
import random
import time
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from protos import horace_pb2_grpc as pb_grpc
from serve.client.connection import Connection
from serve.client.plans import Failure, Planner
from serve.client.retry import RetryPolicy
from serve.errors import RETRY_KEYS

ITER_IMAGES = 32
"""Images of a request of `embed_iter`."""

ITER_IN_FLIGHT = 8
"""Requests of `embed_iter` that are under way at once."""


def make_planner(
    connection: Connection,
    retry: RetryPolicy | None,
    timeout_s: float,
) -> Planner:
    """Plan for one client."""
    return Planner(
        connection.target,
        retry=retry or RetryPolicy(),
        clock=time.monotonic,
        rng=random.Random(),
        timeout_s=timeout_s,
        metadata=connection.metadata,
        by_tls=connection.tls is not None,
    )


def methods_of(channel: Any) -> dict[str, Any]:  # either kind of channel, and of calls
    """Give the calls that plans name."""
    horace = pb_grpc.HoraceStub(channel)
    health: Any = health_pb2_grpc.HealthStub(channel)  # its stubs name no methods
    return {
        "Embed": horace.Embed,
        "Search": horace.Search,
        "ListModels": horace.ListModels,
        "ListCollections": horace.ListCollections,
        "Check": health.Check,
    }


def read_failure(error: grpc.RpcError) -> Failure:
    """Read how a call ended; both kinds of channel raise errors that can be asked."""
    if isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        metadata = error.trailing_metadata() or ()
        return Failure(error.code(), error.details() or "", read_push_back(metadata))
    return Failure(grpc.StatusCode.UNKNOWN, str(error))


def read_push_back(metadata: Any) -> float | None:  # gRPC's two kinds, of pairs either
    """Read after how many seconds the server wants to be called again; negative: never."""
    for key, value in metadata:
        if key in RETRY_KEYS:
            with contextlib.suppress(ValueError):
                return float(value) / 1e3
    return None
