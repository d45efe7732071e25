"""What `serve.batching` deals in: requests, their images that wait or run, and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from serve.errors import RequestError
from serve.latency import LatencyStatistics

DEFAULT_PRIORITY = 2
LOWEST_PRIORITY = 3


def read_priority(priority: int) -> int:
    """Read a request's priority: 1 before 2 before 3, and 0 for the default, as in Triton.

    Raises:
        RequestError: there is no such priority.
    """
    if not 0 <= priority <= LOWEST_PRIORITY:
        raise RequestError(
            "priority", expected=f"0 to {LOWEST_PRIORITY}, 1 being the first", found=str(priority)
        )
    return priority or DEFAULT_PRIORITY


@dataclass(eq=False, slots=True)
class Holding:
    """What one client holds of a model, all of its requests together.

    Attributes:
        requests: those that are admitted and not over.
        images: their images.
        bytes: their bytes.
        pending: of the images those in no batch yet, the first priority first.
    """

    requests: int = 0
    images: int = 0
    bytes: int = 0
    pending: list[int] = field(default_factory=lambda: [0] * LOWEST_PRIORITY)


@dataclass(eq=False, kw_only=True)
class Ticket:
    """One request in the batcher, from its admission until it is over.

    Attributes:
        images: how many images it has.
        held_bytes: memory that it keeps, in bytes: its payload and what that decodes to.
        arrived_s: when it came.
        deadline_s: from when on nobody waits for it.
        client: whose it is, for fairness between clients; no secret.
        priority: 1 (first) to `LOWEST_PRIORITY`.
        preparing: images neither ready nor settled yet.
        waiting: images that are ready and in no batch yet.
        running: images in batches that run.
        gone: whether its caller has gone, so that nothing more of it is computed.
        holding: its client's, from its admission on.
    """

    images: int
    held_bytes: int = 0
    arrived_s: float = 0.0
    deadline_s: float = math.inf
    client: str = ""
    priority: int = DEFAULT_PRIORITY
    preparing: int = field(init=False, default=0)
    waiting: int = field(init=False, default=0)
    running: int = field(init=False, default=0)
    gone: bool = field(init=False, default=False)
    holding: Holding | None = field(init=False, default=None, repr=False)

    @property
    def over(self) -> bool:
        """Whether nothing of it is being prepared, waits or runs."""
        return not (self.preparing or self.waiting or self.running)


TicketT = TypeVar("TicketT", bound=Ticket)


@dataclass(eq=False, slots=True)
class Part(Generic[TicketT]):
    """Images of one ticket that wait or run together.

    Attributes:
        ticket: whose images these are.
        positions: their places in the request.
        ready_s: when they became ready.
    """

    ticket: TicketT
    positions: Sequence[int]
    ready_s: float


@dataclass(frozen=True, eq=False, slots=True)
class Batch(Generic[TicketT]):
    """Images to run together, in this order.

    Attributes:
        parts: whose they are.
        images: how many.
        started_s: when an instance was given them.
        on_one_thread: whether the instance's own thread computes them alone.
    """

    parts: tuple[Part[TicketT], ...]
    images: int
    started_s: float
    on_one_thread: bool = False


@dataclass(frozen=True, slots=True)
class Decision(Generic[TicketT]):
    """What to do now.

    Attributes:
        batch: run this on the instance that asked; None where there is nothing to run.
        expired: tell these callers that they would be, or are, too late; they are dropped
            already.
        wake_at_s: ask again at this time, unless something becomes ready before; None
            where only a new event can change the answer.
    """

    batch: Batch[TicketT] | None = None
    expired: tuple[TicketT, ...] = ()
    wake_at_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class BatcherStatistics:
    """The batcher at one moment, and what it has done since it was made.

    Attributes:
        lined_up_requests: requests that wait to be admitted.
        lined_up_bytes: their bytes.
        held_requests: requests admitted and not over.
        held_images: their images.
        held_bytes: their bytes.
        clients: those whose requests they are.
        waiting_images: images that are ready and wait for an instance.
        waiting_by_priority: the same, the first priority first.
        running_images: images in batches that run.
        running_batches: busy instances.
        admitted_requests: all that were ever admitted.
        refused_requests: those for which there was no room.
        unmeetable_requests: those refused because their deadline could not be met.
        cancelled_requests: those whose callers went before the reply.
        expired_requests: those dropped while they waited, because their deadline had passed or
            could not be met any more.
        computed_images: images in batches that have finished.
        computed_batches: batches that have finished.
        abandoned_images: images whose caller went, or whose deadline passed, while they ran.
        latency: how long batches take; of an encoder with lanes those on one thread.
    """

    lined_up_requests: int
    lined_up_bytes: int
    held_requests: int
    held_images: int
    held_bytes: int
    clients: int
    waiting_images: int
    waiting_by_priority: tuple[int, ...]
    running_images: int
    running_batches: int
    admitted_requests: int
    refused_requests: int
    unmeetable_requests: int
    cancelled_requests: int
    expired_requests: int
    computed_images: int
    computed_batches: int
    abandoned_images: int
    latency: LatencyStatistics
