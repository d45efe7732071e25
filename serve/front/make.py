"""Chooses a front end."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from serve.front.base import Front, FrontKind
from serve.front.grpcio import GrpcioFront


def make_front(
    kind: FrontKind,
    *,
    max_message_bytes: int,
    max_calls: int,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    reuse_port: bool = False,
    tls: bool = False,
) -> Front:
    """Make the front end that serves what is asked; it serves nothing yet.

    Args:
        kind: which; `auto` takes the native one where it serves what is asked.
        max_message_bytes: of a request.
        max_calls: calls and streams that are open at once; one more is refused unread.
        interceptors: see every call first, in this order.
        reuse_port: whether other processes share the port.
        tls: whether it will listen with credentials.
    """
    return GrpcioFront(
        max_message_bytes=max_message_bytes,
        max_calls=max_calls,
        interceptors=interceptors,
        reuse_port=reuse_port,
    )
