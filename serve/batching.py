"""Decides which images run together, and when: policy alone.

The engine calls it under its own lock and does what it says. Nothing here holds a thread,
a lock or a clock; every method that needs the time is given it.

Rules:
    Images are counted, not requests. A request larger than a batch is split, and is
    complete when the last of its images is settled: computed, or failed to decode.
    An idle instance never waits while images do, unless a delay is asked for; that delay is
    anchored to the oldest waiting arrival. Batches grow only while every instance is busy.
    Images run in the order in which they became ready.
    What a request holds (images, bytes) is bounded and counted from its admission until it
    is over; one that does not fit is refused at once, or waits in line if it asks to. An
    empty batcher admits any request.
    The line is first come, first served: nobody is admitted past its head, however small.
    A request that is cancelled, or whose deadline has passed, is computed no further.

It does not know what an image is, how long one takes, or who is asking.

Source: the work-conserving loop of text-embeddings-inference and the delay of Triton's
dynamic batcher, which counts from the oldest request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic

from serve.errors import QueueFullError
from serve.tickets import Batch, BatcherStatistics, Decision, Part, TicketT


class Batcher(Generic[TicketT]):
    """The queue of one model. Not safe for threads: the engine holds a lock around it."""

    def __init__(
        self,
        *,
        max_batch_images: int,
        max_held_images: int,
        max_held_bytes: int,
        max_delay_s: float = 0.0,
        instances: int = 1,
    ) -> None:
        """Bound batches and what is held.

        Args:
            max_batch_images: the largest batch.
            max_held_images: images of all requests that are not over.
            max_held_bytes: bytes of all requests that are not over.
            max_delay_s: how long the oldest request may wait for a fuller batch while an
                instance is idle.
            instances: how many batches run at once.
        """
        assert max_batch_images > 0
        assert instances > 0
        self._max_batch_images = max_batch_images
        self._max_held_images = max_held_images
        self._max_held_bytes = max_held_bytes
        self._max_delay_s = max_delay_s
        self._instances = instances
        self._queue: OrderedDict[Part[TicketT], None] = OrderedDict()
        self._held: dict[TicketT, set[Part[TicketT]]] = {}  # with their waiting parts
        self._line: dict[TicketT, None] = {}  # those who wait for room, in order
        self._held_images = self._held_bytes = 0
        self._waiting_images = self._running_images = self._running_batches = 0
        self._admitted = self._refused = self._cancelled = self._expired = 0
        self._computed_images = self._computed_batches = 0

    def __repr__(self) -> str:
        return (
            f"<Batcher waiting={self._waiting_images} running={self._running_images} images "
            f"in {self._running_batches}/{self._instances} batches, "
            f"held={self._held_images}/{self._max_held_images} images, "
            f"{self._held_bytes}/{self._max_held_bytes} bytes>"
        )

    def admit(self, ticket: TicketT, *, line_up: bool = False) -> bool:
        """Take a request in; `ready` and `settle` account for each of its images later.

        Args:
            ticket: the request.
            line_up: where there is no room, wait in line for `admit_line`.

        Returns:
            Whether it is admitted now.

        Raises:
            QueueFullError: it does not fit beside what is held and who waits already, and
                `line_up` is false.
        """
        assert ticket.images > 0
        if not self._line and self._fits(ticket):
            self._hold(ticket)
            return True
        if line_up:
            self._line[ticket] = None
            return False
        self._refused += 1
        raise QueueFullError(
            "queue",
            expected=f"room for {ticket.images} images and {ticket.held_bytes} bytes",
            found=f"{self._held_images} of {self._max_held_images} images and "
            f"{self._held_bytes} of {self._max_held_bytes} bytes taken, "
            f"{len(self._line)} requests in line",
            mend="try again later, or elsewhere",
        )

    def admit_line(self) -> tuple[TicketT, ...]:
        """Admit those at the head of the line who fit now; ask after whatever may free room."""
        admitted: tuple[TicketT, ...] = ()
        while self._line and self._fits(head := next(iter(self._line))):
            del self._line[head]
            self._hold(head)
            admitted += (head,)
        return admitted

    def ready(self, ticket: TicketT, positions: Sequence[int], now_s: float) -> None:
        """Queue images of `ticket` that can be computed now."""
        ticket.preparing -= len(positions)
        assert ticket.preparing >= 0
        if ticket.gone:
            self._release_if_over(ticket)
            return
        part = Part(ticket, positions, now_s)
        self._held[ticket].add(part)
        self._queue[part] = None
        ticket.waiting += len(positions)
        self._waiting_images += len(positions)

    def settle(self, ticket: TicketT, images: int) -> bool:
        """Count images that failed before the queue; whether to answer the ticket now."""
        ticket.preparing -= images
        assert ticket.preparing >= 0
        return self._release_if_over(ticket) and not ticket.gone

    def cancel(self, ticket: TicketT, *, unprepared: bool = False) -> None:
        """Forget a ticket whose caller has gone; what runs of it runs on unseen.

        Args:
            ticket: the request.
            unprepared: whether its images will never come to `ready` or `settle`.
        """
        if ticket in self._line:
            self._cancelled += 1
            del self._line[ticket]
            ticket.gone = True
        if ticket not in self._held:
            return
        if unprepared:
            ticket.preparing = 0
        if ticket.gone:
            self._release_if_over(ticket)
        else:
            self._cancelled += 1
            self._drop(ticket)

    def decide(self, now_s: float) -> Decision[TicketT]:
        """Say what an idle instance should do now; a batch given counts as running.

        Every batch must come back through `finish`.
        """
        if self._running_batches >= self._instances:
            return Decision()
        expired = self._drop_expired_heads(now_s)
        if not self._queue:
            return Decision(expired=expired)
        if self._max_delay_s and self._waiting_images < self._max_batch_images:
            oldest_s = min(part.ticket.arrived_s for part in self._queue)
            if now_s < oldest_s + self._max_delay_s:
                return Decision(expired=expired, wake_at_s=oldest_s + self._max_delay_s)
        parts: list[Part[TicketT]] = []
        room = self._max_batch_images
        while room and self._queue:
            parts.append(part := self._take_head(room))
            room -= len(part.positions)
            expired += self._drop_expired_heads(now_s)
        batch = Batch(tuple(parts), self._max_batch_images - room)
        self._running_batches += 1
        self._running_images += batch.images
        return Decision(batch, expired)

    def finish(self, batch: Batch[TicketT], *, failed: bool = False) -> list[TicketT]:
        """Take a batch back, computed or failed.

        Returns:
            The tickets to answer now: those whose last images these were; after a failure
            every ticket of the batch, of which nothing more is computed.
        """
        self._running_batches -= 1
        self._running_images -= batch.images
        if not failed:
            self._computed_images += batch.images
            self._computed_batches += 1
        answered = []
        for part in batch.parts:
            ticket = part.ticket
            ticket.running -= len(part.positions)
            if ticket.gone:
                self._release_if_over(ticket)
            elif failed:
                answered.append(ticket)
                self._drop(ticket)
            elif self._release_if_over(ticket):
                answered.append(ticket)
        return answered

    @property
    def waiting_images(self) -> int:
        """Images that are ready and wait for an instance."""
        return self._waiting_images

    @property
    def tickets(self) -> tuple[TicketT, ...]:
        """Every ticket that is not over, those in line included."""
        return (*self._held, *self._line)

    def statistics(self) -> BatcherStatistics:
        """Give the present state and the counts so far."""
        return BatcherStatistics(
            lined_up_requests=len(self._line),
            held_requests=len(self._held),
            held_images=self._held_images,
            held_bytes=self._held_bytes,
            waiting_images=self._waiting_images,
            running_images=self._running_images,
            running_batches=self._running_batches,
            admitted_requests=self._admitted,
            refused_requests=self._refused,
            cancelled_requests=self._cancelled,
            expired_requests=self._expired,
            computed_images=self._computed_images,
            computed_batches=self._computed_batches,
        )

    def _fits(self, ticket: TicketT) -> bool:
        """Whether there is room for a ticket beside what is held."""
        images = self._held_images + ticket.images
        held_bytes = self._held_bytes + ticket.held_bytes
        fits = images <= self._max_held_images and held_bytes <= self._max_held_bytes
        return fits or not self._held

    def _hold(self, ticket: TicketT) -> None:
        """Count what a ticket holds, from now until it is over."""
        self._held[ticket] = set()
        self._held_images += ticket.images
        self._held_bytes += ticket.held_bytes
        self._admitted += 1
        ticket.preparing = ticket.images

    def _take_head(self, room: int) -> Part[TicketT]:
        """Take up to `room` images of the oldest part out of the queue."""
        head = taken = next(iter(self._queue))
        ticket = head.ticket
        if len(head.positions) > room:
            taken = Part(ticket, head.positions[:room], head.ready_s)
            head.positions = head.positions[room:]
        else:
            del self._queue[head]
            self._held[ticket].remove(head)
        images = len(taken.positions)
        self._waiting_images -= images
        ticket.waiting -= images
        ticket.running += images
        return taken

    def _drop_expired_heads(self, now_s: float) -> tuple[TicketT, ...]:
        """Drop tickets from the queue's front whose deadline has passed."""
        expired: tuple[TicketT, ...] = ()
        while self._queue and (ticket := next(iter(self._queue)).ticket).deadline_s <= now_s:
            self._expired += 1
            self._drop(ticket)
            expired += (ticket,)
        return expired

    def _drop(self, ticket: TicketT) -> None:
        """Take a ticket's waiting images out of the queue and compute no more of it."""
        ticket.gone = True
        for part in self._held[ticket]:
            del self._queue[part]
        self._held[ticket].clear()
        self._waiting_images -= ticket.waiting
        ticket.waiting = 0
        self._release_if_over(ticket)

    def _release_if_over(self, ticket: TicketT) -> bool:
        """Stop counting what a ticket held once it is over; whether it is."""
        if not ticket.over:
            return False
        del self._held[ticket]
        self._held_images -= ticket.images
        self._held_bytes -= ticket.held_bytes
        return True
