"""What the engine and the services tell of their work, and to whom: to nobody by default.

Rules:
    One call a request from the services, one a request and one a batch from the engine; each
    takes what is at hand, and whoever listens pays for the rest.
    An observer returns at once and never raises: it is called on the event loop and on the
    inference threads, by several of them at a time.
    A model's observer is asked for once a model and version, so that no name is looked up on
    the way of a request.

It knows nothing of Prometheus or OpenTelemetry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import grpc

if TYPE_CHECKING:
    from serve.job import Embedded


def no_metadata() -> Iterable[tuple[str, str | bytes]]:
    """Give the metadata of a call that came with none."""
    return ()


@dataclass(eq=False, slots=True, kw_only=True)
class Call:
    """One request on its way through a service, which fills this in as it learns more.

    Attributes:
        method: which of the service's methods, such as `Embed`; one of a fixed few.
        arrived_s: when it came, in monotonic seconds.
        metadata: gives what came with it, names in lower case; asked only where that matters.
        request_id: the caller's own name for it, where the message has one.
        client: who calls: the name of its key, the subject of its certificate, or its address.
        model: the model that it uses, as served; empty until that is known.
        version: of that model.
        images: images or queries that it asks for.
        embedded: what became of its images, where it had some.
        search_s: the collection's time.
        code: how it ended; CANCELLED until that is known.
        message: why, where it failed.
    """

    method: str
    arrived_s: float
    metadata: Callable[[], Iterable[tuple[str, str | bytes]] | None] = no_metadata
    request_id: str = ""
    client: str = ""
    model: str = ""
    version: str = ""
    images: int = 0
    embedded: Embedded | None = None
    search_s: float = 0.0
    code: grpc.StatusCode = grpc.StatusCode.CANCELLED
    message: str = ""


class ModelObserver(Protocol):
    """Hears of the work of one version of one model."""

    def answered(self, embedded: Embedded, total_s: float) -> None:
        """Hear that a request got its vectors, `total_s` after it came to the engine."""

    def failed(self, error: BaseException, images: int, total_s: float) -> None:
        """Hear that a request got none: refused, late, cancelled, or the encoder failed."""

    def computed(self, images: int, inference_s: float, *, failed: bool = False) -> None:
        """Hear that a batch has left the encoder, with vectors or without."""


class Observer(Protocol):
    """Hears of calls."""

    def answered(self, call: Call, total_s: float) -> None:
        """Hear that a call is over, `total_s` after it came."""

    def turned_away(self, code: grpc.StatusCode) -> None:
        """Hear that a call was refused before a service saw it: no key, above its rate."""


class Nobody:
    """Hears nothing; a base for who hears some things only."""

    def answered(self, *_: Any) -> None:
        """Ignore it."""

    def failed(self, *_: object) -> None:
        """Ignore it."""

    def computed(self, *_: object, failed: bool = False) -> None:
        """Ignore it."""

    def turned_away(self, *_: Any) -> None:
        """Ignore it."""


class Observers:
    """Passes on what it hears to several."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        """Pass on to these, in this order."""
        self._observers = tuple(observers)

    def __repr__(self) -> str:
        return f"<Observers {list(self._observers)}>"

    def answered(self, call: Call, total_s: float) -> None:
        """Pass on a call."""
        for observer in self._observers:
            observer.answered(call, total_s)

    def turned_away(self, code: grpc.StatusCode) -> None:
        """Pass on a call that no service saw."""
        for observer in self._observers:
            observer.turned_away(code)


_NOBODY = Nobody()
NO_OBSERVER: Observer = _NOBODY
NO_MODEL_OBSERVER: ModelObserver = _NOBODY
