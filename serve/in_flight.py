"""The bytes of all requests that are under way: bounded, whatever they ask for.

Rules:
    A call's message counts from the moment it has come until the call is over, whether it is
    embedded, searched with, or refused later. One that does not fit is refused before it is
    parsed; where nothing is under way any message fits.
    A message of a stream counts while it waits for its caller's turn. After that it waits in a
    line that is bounded in bytes (`serve.room`). A stream that waits for its next message keeps
    none.

What gRPC itself has received of messages that are not complete is not seen here; it is at most
the largest message for each call that may be open.
"""

from __future__ import annotations

from types import TracebackType

from serve.errors import RETRY_AFTER_S, QueueFullError


class InFlight:
    """Counts bytes. Belongs to one event loop."""

    def __init__(self, *, max_bytes: int) -> None:
        """Count nothing yet."""
        self.max_bytes = max_bytes
        self.bytes = 0
        self.calls = 0

    def __repr__(self) -> str:
        return f"<InFlight {self.bytes}/{self.max_bytes} bytes of {self.calls} calls>"

    def hold(self, message: object) -> Held:
        """Count a message within a context; what is not bytes counts as none.

        Raises:
            QueueFullError: there is no room for it.
        """
        size = len(message) if isinstance(message, bytes) else 0
        if size and self.bytes and self.bytes + size > self.max_bytes:
            raise QueueFullError(
                "requests under way",
                expected=f"at most {self.max_bytes} bytes",
                found=f"{self.bytes} bytes, and this one with {size}",
                mend="try again later, or elsewhere",
                retry_after_s=RETRY_AFTER_S,
            )
        return Held(self, size)


class Held:
    """What one call counts for."""

    __slots__ = ("_in_flight", "_size")

    def __init__(self, in_flight: InFlight, size: int) -> None:
        self._in_flight = in_flight
        self._size = size

    def __enter__(self) -> None:
        """Count it."""
        self._in_flight.bytes += self._size
        self._in_flight.calls += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Count it no more."""
        self._in_flight.bytes -= self._size
        self._in_flight.calls -= 1
