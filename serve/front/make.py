"""Chooses a front end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import grpc

from serve.front.base import Front, FrontKind
from serve.front.grpcio import GrpcioFront
from serve.front.limit import OnTurnedAway
from serve.front.native import NativeFront
from serve.port import is_loopback
from serve.screen import NO_SCREEN, Screens
from serve.valve import Refuses, never


def make_front(
    kind: FrontKind,
    *,
    max_message_bytes: int,
    max_calls: int,
    max_calls_a_connection: int = 1024,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    reuse_port: bool = False,
    tls: bool = False,
    host: str = "127.0.0.1",
    refuses: Refuses = never,
    screen: Screens = NO_SCREEN,
    on_turned_away: OnTurnedAway = lambda _: None,
) -> Front:
    """Make the front end that serves what is asked; it serves nothing yet.

    Args:
        kind: which; `auto` takes the native one where it serves what is asked: no TLS, and
            callers on this machine alone, since it reads any message before it refuses it.
        max_message_bytes: of a request.
        max_calls: calls and streams that are open at once, probes apart; one more is refused
            unread.
        max_calls_a_connection: the same of one connection; clients wait for their turn.
        interceptors: see every call first, in this order.
        reuse_port: whether other processes share the port.
        tls: whether it will listen with credentials.
        host: where it will listen.
        refuses: turns calls away unparsed, by the seconds that they have; the native front end
            asks it first of all, grpcio cannot.
        screen: ends calls before they are begun; the native front end asks it.
        on_turned_away: hears of every call that the front end itself refuses.
    """
    is_native = kind == "native" or (kind == "auto" and not tls and is_loopback(host))
    make = partial(NativeFront, refuses=refuses, screen=screen) if is_native else GrpcioFront
    return make(
        max_message_bytes=max_message_bytes,
        max_calls=max_calls,
        max_calls_a_connection=max_calls_a_connection,
        interceptors=interceptors,
        reuse_port=reuse_port,
        on_turned_away=on_turned_away,
    )
