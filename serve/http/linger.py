"""Reads on for a moment where a request is refused before its body has come.

A server that answers and closes while its caller still sends makes the kernel answer what
comes with a reset, and the reset takes the reply with it: the caller sees a broken connection
instead of its 401. So a little of such a body is read and thrown away before the reply.

Rules:
    It is bounded in bytes and in time: a body that does not end is not waited for.
    A caller that waits for leave to send its body (`expect: 100-continue`) is told at once.

Source: nginx's `lingering_close`; RFC 9112, section 9.6.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LINGER_BYTES = 1 << 20
LINGER_S = 1.0


class Linger:
    """Wraps an application."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap `app`."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer by the application, whose replies wait for what is left of the body."""
        is_read = scope["type"] != "http" or any(name == b"expect" for name, _ in scope["headers"])

        async def receive_and_note() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = not message.get("more_body")  # nor has the word of a hang-up
            return message

        async def discard() -> None:
            left_bytes = LINGER_BYTES
            while not is_read and left_bytes > 0:
                left_bytes -= len((await receive_and_note()).get("body", b""))

        async def send_after_the_body(message: Message) -> None:
            if not is_read and message["type"] == "http.response.start":
                with suppress(TimeoutError):
                    async with asyncio.timeout(LINGER_S):
                        await discard()
            await send(message)

        await self._app(scope, receive_and_note, send_after_the_body)
