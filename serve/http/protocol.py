"""How a connection of HTTP/1.1 is read: by uvicorn, and with bounded patience."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.http.tls import CALLER_STATE, describe_caller

HEAD_S = 20.0
"""How long the head of a request may take, from its first byte."""

ACCEPTS = 16
"""Connections that one turn of the event loop takes. asyncio tries as often as its backlog says
also where no descriptor is left, and tells of each: uvicorn's 2,048 took a third of the time."""


class PatientProtocol(H11Protocol):
    """uvicorn's reader of HTTP/1.1, with three things more.

    It tells the application who showed a certificate, and closes a connection that begins a
    request and does not come to the end of its head: the application, which has deadlines for
    all that follows, never hears of such a one. A connection above the limit is refused by
    itself: uvicorn would refuse the requests of all others, too, while it is open.
    """

    head_s = HEAD_S
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(
        self,
        transport: asyncio.Transport,  # type: ignore[override]  # uvicorn's own, too, narrows it
    ) -> None:
        """Note what the handshake found out; it is in the state of every request."""
        super().connection_made(transport)
        caller = describe_caller(transport.get_extra_info("ssl_object"))
        self.app_state = {**self.app_state, CALLER_STATE: caller}
        if self.limit_concurrency is not None:
            is_too_many = len(self.connections) > self.limit_concurrency
            self.limit_concurrency = 0 if is_too_many else None
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Read on; note whether a head has begun that is not complete."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._await_head()
        else:
            self._forget_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._forget_head()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        """Give the head of a request its time, once."""
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_s, self.transport.abort)

    def _forget_head(self) -> None:
        """Wait for a head no more."""
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
