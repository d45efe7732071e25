"""How the one message of a call is read on grpcio: to its end, whatever becomes of the caller.

Of a message whose call is over before grpcio 1.85 has handed it on, it never frees what it
allocated (grpc/grpc#43360). So it is read as a stream of one message, which is the same on the
wire, beside the task that is ended.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeAlias

import grpc

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

GONE_S = 0.1
"""How long to wait for word that a caller has gone whose call ended without a message: grpcio may
say the one before the other, and what it cannot send any more it never frees either."""


async def read_message(context: Context) -> Any:
    """Read the message of a call; one that comes without any is told so, and ended."""
    reading = asyncio.ensure_future(context.read())
    reading.add_done_callback(_hear)
    message = await asyncio.shield(reading)
    if message is grpc.aio.EOF:
        await asyncio.sleep(GONE_S)
        await context.abort(grpc.StatusCode.INTERNAL, "expected a message, found none")
    return message


def _hear(reading: asyncio.Future[Any]) -> None:
    """Ask how a read ended, that asyncio does not complain where nobody else does."""
    if not reading.cancelled():
        reading.exception()
