"""One unary call on the native front end, with the face of grpc.aio's context."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import grpc

Pairs: TypeAlias = Sequence[tuple[str, str | bytes]]
Metadata: TypeAlias = grpc.aio.Metadata | Pairs

_INSECURE: Mapping[str, list[bytes]] = {
    "transport_security_type": [b"insecure"],
    "security_level": [b"TSI_SECURITY_NONE"],
}
"""What grpcio says of a connection without TLS."""


class NativeCall(grpc.aio.ServicerContext[Any, Any]):
    """A call from its arrival until it is answered.

    Attributes:
        call_id: what the native server calls it.
        task: answers it.
        status: the code and the message to end with, once a handler has set or aborted.
        initial: metadata to send before the reply.
        trailing: metadata to send after it.
        is_gone: whether its caller hung up or its deadline has passed.
    """

    __slots__ = (
        "_callbacks", "_deadline_s", "_is_done", "_metadata", "_peer",
        "call_id", "initial", "is_gone", "status", "task", "trailing",
    )  # fmt: skip

    def __init__(self, call_id: int, metadata: Pairs, peer: str, remaining_s: float | None):
        self.call_id = call_id
        self._metadata = metadata
        self._peer = peer
        self._deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
        self.task: asyncio.Task[None] | None = None
        self.status: tuple[grpc.StatusCode, str] | None = None
        self.initial: Pairs | None = None
        self.trailing: Pairs = ()
        self.is_gone = False
        self._is_done = False
        self._callbacks: list[Callable[[Any], None]] = []

    def leave(self) -> None:
        """Stop the work for a caller that does not wait any longer."""
        self.is_gone = True
        if self.task is not None:
            self.task.cancel()

    def finish(self) -> None:
        """Tell those who asked to hear of it that the call is over."""
        self._is_done = True
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)

    # What handlers ask.

    def peer(self) -> str:
        """Give the caller's address as gRPC writes it."""
        return self._peer

    def peer_identities(self) -> None:
        """Nobody is identified without TLS."""
        return None

    def peer_identity_key(self) -> None:
        """Nobody is identified without TLS."""
        return None

    def auth_context(self) -> Mapping[str, list[bytes]]:
        """Say that there is no TLS."""
        return _INSECURE

    def invocation_metadata(self) -> Any:  # pairs, as in grpcio, whose stubs say otherwise
        """Give the call's metadata as pairs."""
        return self._metadata

    def time_remaining(self) -> Any:  # None, as in grpcio, whose stubs know only float
        """Give the seconds until the caller's deadline; None where it has none."""
        if self._deadline_s is None:
            return None
        return max(0.0, self._deadline_s - time.monotonic())

    def cancelled(self) -> bool:
        """Whether nobody waits for the reply."""
        return self.is_gone

    def done(self) -> bool:
        """Whether the call is over."""
        return self._is_done

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Have `callback` called with this once the call is over."""
        if self._is_done:
            callback(self)
        else:
            self._callbacks.append(callback)

    # What handlers say.

    async def send_initial_metadata(self, initial_metadata: Metadata) -> None:
        """Send metadata before the reply, with it."""
        self.initial = list(initial_metadata)

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        """Send metadata after the reply."""
        self.trailing = list(trailing_metadata)

    def trailing_metadata(self) -> Any:  # as above
        """Give what was set."""
        return self.trailing

    def set_code(self, code: grpc.StatusCode) -> None:
        """End with a code where the handler returns."""
        self.status = code, self.details()

    def code(self) -> grpc.StatusCode:
        """Give the code that was set."""
        return self.status[0] if self.status else grpc.StatusCode.OK

    def set_details(self, details: str) -> None:
        """End with a message where the handler returns with a code."""
        self.status = self.code(), details

    def details(self) -> str:
        """Give the message that was set."""
        return self.status[1] if self.status else ""

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()
    ) -> NoReturn:
        """End the call with an error."""
        assert code is not grpc.StatusCode.OK
        self.status = code, details
        if trailing_metadata:
            self.trailing = list(trailing_metadata)
        raise grpc.aio.AbortError("the call was ended by its handler")

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """End the call with an error."""
        await self.abort(status.code, status.details, status.trailing_metadata or ())

    def set_compression(self, compression: grpc.Compression) -> None:
        """Replies are vectors, which do not compress; ignored."""

    def disable_next_message_compression(self) -> None:
        """Nothing is compressed."""

    async def read(self) -> NoReturn:
        """Streams do not come here."""
        raise AssertionError("a unary call has one request")

    async def write(self, message: object) -> NoReturn:
        """Streams do not come here."""
        raise AssertionError("a unary call has one reply")
