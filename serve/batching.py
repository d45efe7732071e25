"""Decides which images run together, and when: policy alone.

The engine calls it under its own lock and does what it says. Nothing here holds a thread,
a lock or a clock; every method that needs the time is given it.

Rules:
    Images are counted, not requests. A request larger than a batch is split, and is
    complete when the last of its images is settled: computed, or failed to decode.
    An idle instance never waits while images do, unless a delay is asked for; that delay is
    anchored to the oldest waiting arrival, and misses nobody's deadline. Batches grow only while
    every instance is busy.
    Where an encoder has lanes, how many images go together is decided by `serve.lanes`, and they
    may wait for what runs, but for nothing that is overdue: `serve.running_batches`.
    Images run by priority, clients of one priority in turns, and each client's in the order
    in which they became ready: `serve.fair_queue`.
    What a request holds (images, bytes) is bounded and counted from its admission until it
    is over; one that does not fit is refused at once and told when to come back, or waits in
    line if it asks to: `serve.room`.
    A request that cannot be done by its deadline, going by how long batches take of late
    (`serve.running_batches`) and what runs before it (`serve.backlog`), is refused when it
    comes, and dropped from the queue where that shows later: nothing is computed for it.
    A request that is cancelled, or whose deadline has passed, is computed no further.

It does not know what an image is, or who is asking.

Source: the work-conserving loop of text-embeddings-inference, the delay of Triton's dynamic
batcher, which counts from the oldest request, and BentoML's forecast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Generic

from serve.backlog import Backlog
from serve.errors import DeadlineError, QueueFullError
from serve.fair_queue import FairQueue
from serve.forecast import Forecast
from serve.lanes import Share
from serve.room import Room
from serve.running_batches import RunningBatches
from serve.tickets import Batch, BatcherStatistics, Decision, Part, Ticket, TicketT

TURN_IMAGES = 8
"""A client's turn: few enough that single requests of others wait a quarter of a batch at
most, enough that a large request is not cut into crumbs."""


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
        has_lanes: bool = False,
    ) -> None:
        """Bound batches and what is held.

        Args:
            max_batch_images: the largest batch.
            max_held_images: images of all requests that are not over.
            max_held_bytes: bytes of all requests that are not over.
            max_delay_s: how long the oldest request may wait for a fuller batch while an
                instance is idle.
            instances: how many batches run at once.
            has_lanes: whether each instance is a lane of the encoder.
        """
        assert max_batch_images > 0
        assert instances > 0
        self._max_batch_images = max_batch_images
        self._max_delay_s = max_delay_s
        turn = min(TURN_IMAGES, max_batch_images)
        self._queue: FairQueue[TicketT] = FairQueue(quantum_images=turn)
        self._backlog = Backlog(quantum_images=turn)
        self._room: Room[TicketT] = Room(max_images=max_held_images, max_bytes=max_held_bytes)
        self._held: dict[TicketT, set[Part[TicketT]]] = {}  # with their waiting parts
        self._running: RunningBatches[TicketT] = RunningBatches(
            max_batch_images=max_batch_images, instances=instances, has_lanes=has_lanes
        )
        self._admitted = self._refused = self._cancelled = 0
        self._unmeetable = self._expired = 0
        self._computed_images = self._computed_batches = self._abandoned_images = 0

    def __repr__(self) -> str:
        waiting = "+".join(map(str, self._queue.images_by_priority))
        room = self._room
        return (
            f"<Batcher waiting={waiting} of {self._queue.clients} clients, "
            f"running={self._running.images} images "
            f"in {len(self._running)}/{self._running.instances} batches, "
            f"held={room.images}/{room.max_images} images, "
            f"{room.bytes}/{room.max_bytes} bytes, {room.lined_up} in line>"
        )

    def admit(self, ticket: TicketT, *, line_up: bool = False) -> bool:
        """Take a request in; `ready` and `settle` account for each of its images later.

        Args:
            ticket: the request, which has just arrived.
            line_up: where there is no room, wait in line for `admit_line`.

        Returns:
            Whether it is admitted now.

        Raises:
            QueueFullError: it does not fit beside what is held and who waits already, and
                `line_up` is false; or the line is full, too.
            DeadlineError: it cannot be done by its deadline.
        """
        assert ticket.images > 0
        if not line_up:
            self.check(ticket)
        elif not self._room.admits(ticket):
            if self._room.line_up(ticket):
                return False
            raise self._full(ticket)
        self._hold(ticket)
        return True

    def check(self, ticket: Ticket, *, before: int = 0) -> Forecast | None:
        """Refuse a newcomer that would not come in now; it is counted then, and held never.

        Args:
            ticket: the request.
            before: images of the same client and priority that are about to come in.

        Returns:
            How long it will take; None where that is nowhere near what it has.

        Raises:
            QueueFullError: it does not fit beside what is held and who waits already.
            DeadlineError: it cannot be done by its deadline.
        """
        has_end = ticket.deadline_s < math.inf
        forecast = self._foresee(ticket, before) if has_end else None
        if not self._room.admits(ticket):
            raise self._full(ticket)
        return forecast

    def count_unmeetable(self) -> None:
        """Count a newcomer that was refused by what `check` has said of its like."""
        self._unmeetable += 1

    def admit_line(self) -> tuple[TicketT, ...]:
        """Admit those in line who may come in now; ask after whatever may free room."""
        admitted: tuple[TicketT, ...] = ()
        while (ticket := self._room.next_in_line()) is not None:
            self._hold(ticket)
            admitted += (ticket,)
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
        self._queue.push(part)
        ticket.waiting += len(positions)

    def settle(self, ticket: TicketT, images: int) -> bool:
        """Count images that failed before the queue; whether to answer the ticket now."""
        ticket.preparing -= images
        assert ticket.preparing >= 0
        if not ticket.gone:
            self._backlog.add(ticket, -images)
        return self._release_if_over(ticket) and not ticket.gone

    def expire(self, ticket: TicketT) -> None:
        """Drop a ticket whose deadline has passed in line, or as it came in from there."""
        if self._room.leave_line(ticket):
            self._expired += 1
        elif ticket in self._held and not ticket.gone:
            self._expire(ticket)

    def cancel(self, ticket: TicketT, *, unprepared: bool = False) -> None:
        """Forget a ticket whose caller has gone; what runs of it runs on unseen.

        Args:
            ticket: the request.
            unprepared: whether its images will never come to `ready` or `settle`.
        """
        if self._room.leave_line(ticket):
            self._cancelled += 1
        if ticket not in self._held:
            return
        if not ticket.gone:
            self._cancelled += 1
            self._drop(ticket)
        if unprepared:
            ticket.preparing = 0
            self._release_if_over(ticket)

    def decide(self, now_s: float) -> Decision[TicketT]:
        """Say what an idle instance should do now; a batch given counts as running.

        Every batch must come back through `finish`.
        """
        if len(self._running) >= self._running.instances:
            return Decision()
        expired = self._drop_passed_heads(now_s)
        if not (head := self._queue.head()):
            return Decision(expired=expired)
        if (share := self._running.next_share(self._queue.images, now_s)) is None:
            wake_at_s = min(self._running.overdue_s, head.ticket.deadline_s)
            return Decision(expired=expired, wake_at_s=wake_at_s)
        safe_s = now_s + self._running.longest_s(0, now_s)
        expired += self._drop_late_heads(now_s, share, share.images, safe_s)
        if not self._queue.images:
            return Decision(expired=expired)
        if self._max_delay_s and self._queue.images < self._max_batch_images:
            due_s = self._queue.due_s(self._max_delay_s, safe_s - now_s)
            if now_s < due_s:
                return Decision(expired=expired, wake_at_s=due_s)
        parts: list[Part[TicketT]] = []
        room = share.images
        while room and self._queue.images:
            parts.append(part := self._take_head(room))
            room -= len(part.positions)
            if room:
                expired += self._drop_late_heads(now_s, share, room, safe_s)
        batch = Batch(tuple(parts), share.images - room, now_s, share.on_one_thread)
        self._running.begin(batch)
        return Decision(batch, expired)

    def finish(self, batch: Batch[TicketT], now_s: float, *, failed: bool = False) -> list[TicketT]:
        """Take a batch back, computed or failed.

        Returns:
            The tickets to answer now: those whose last images these were; after a failure
            every ticket of the batch, of which nothing more is computed.
        """
        self._running.end(batch, now_s, failed=failed)
        if not failed:
            self._computed_images += batch.images
            self._computed_batches += 1
        answered = []
        for part in batch.parts:
            ticket = part.ticket
            ticket.running -= len(part.positions)
            if ticket.gone or ticket.deadline_s <= now_s:
                self._abandoned_images += len(part.positions)
            if ticket.gone:
                self._release_if_over(ticket)
            elif failed:
                answered.append(ticket)
                self._drop(ticket)
            elif self._release_if_over(ticket):
                answered.append(ticket)
        return answered

    def note_reply(self, seconds: float) -> None:
        """Learn how long a reply takes from its batch to its caller's event loop."""
        self._running.reply.observe(seconds)

    @property
    def waiting_images(self) -> int:
        """Images that are ready and wait for an instance."""
        return self._queue.images

    @property
    def tickets(self) -> tuple[TicketT, ...]:
        """Every ticket that is not over, those in line included."""
        return (*self._held, *self._room.line)

    def statistics(self) -> BatcherStatistics:
        """Give the present state and the counts so far."""
        return BatcherStatistics(
            lined_up_requests=self._room.lined_up,
            lined_up_bytes=self._room.lined_up_bytes,
            held_requests=len(self._held),
            held_images=self._room.images,
            held_bytes=self._room.bytes,
            clients=self._room.clients,
            waiting_images=self._queue.images,
            waiting_by_priority=self._queue.images_by_priority,
            running_images=self._running.images,
            running_batches=len(self._running),
            admitted_requests=self._admitted,
            refused_requests=self._refused,
            unmeetable_requests=self._unmeetable,
            cancelled_requests=self._cancelled,
            expired_requests=self._expired,
            computed_images=self._computed_images,
            computed_batches=self._computed_batches,
            abandoned_images=self._abandoned_images,
            latency=self._running.latency.statistics(),
        )

    def _foresee(self, ticket: Ticket, before: int) -> Forecast | None:
        """Refuse a newcomer that cannot be done by its deadline; see `check`.

        Raises:
            DeadlineError: so it is.
        """
        now_s, running = ticket.arrived_s, self._running
        left_s = ticket.deadline_s - now_s
        waiting = self._backlog.images + before + ticket.images
        if left_s > running.longest_s(waiting, now_s) and left_s > 0:
            return None
        ahead = before + self._backlog.ahead_of(
            ticket, self._room.holding(ticket.client), clients=self._room.clients
        )
        pace = running.pace(now_s, on_all=running.takes_all(waiting, now_s))
        around_s = running.until_idle_s(waiting, now_s) + running.reply.seconds
        ready = self._queue.images + before + ticket.images
        forecast = Forecast(pace, ahead + ticket.images, ready, around_s)
        takes_s = forecast.takes_s()
        if left_s > takes_s:
            return forecast
        self._unmeetable += 1
        if left_s <= 0:
            raise DeadlineError("the deadline passed before the request was read")
        error = DeadlineError(
            "deadline",
            expected=f"{takes_s * 1e3:.0f} ms from now, for {ticket.images} images "
            f"with {ahead} before them",
            found=f"{left_s * 1e3:.0f} ms",
            mend="allow more time, send less at once, or try elsewhere",
        )
        error.forecast = forecast
        raise error

    def _full(self, ticket: Ticket) -> QueueFullError:
        """Count a newcomer for which there is no room; say what is lacking, and until when."""
        self._refused += 1
        room, running, now_s = self._room, self._running, ticket.arrived_s
        lacking = room.lacking_images(ticket)
        takes_s = running.pace(now_s, on_all=running.takes_all(lacking, now_s)).seconds(lacking)
        return QueueFullError(
            "queue",
            expected=f"room for {ticket.images} images and {ticket.held_bytes} bytes",
            found=f"{room.images} of {room.max_images} images and "
            f"{room.bytes} of {room.max_bytes} bytes taken, "
            f"{room.lined_up} requests in line",
            mend="try again later, or elsewhere",
            retry_after_s=takes_s or None,
        )

    def _hold(self, ticket: TicketT) -> None:
        """Count what a ticket holds, from now until it is over."""
        if self._held:
            self._running.note_company(ticket.arrived_s)
        self._held[ticket] = set()
        self._room.hold(ticket)
        self._backlog.add(ticket, ticket.images)
        self._admitted += 1
        ticket.preparing = ticket.images

    def _take_head(self, room: int) -> Part[TicketT]:
        """Take up to `room` images of the part whose turn it is out of the queue."""
        taken = self._queue.take(room)
        ticket = taken.ticket
        images = len(taken.positions)
        self._held[ticket].discard(taken)
        self._backlog.add(ticket, -images)
        ticket.waiting -= images
        ticket.running += images
        return taken

    def _drop_passed_heads(self, now_s: float) -> tuple[TicketT, ...]:
        """Drop tickets from the front of the queue that are late whatever runs next."""
        expired: tuple[TicketT, ...] = ()
        while (head := self._queue.head()) is not None and head.ticket.deadline_s <= now_s:
            expired += (self._expire(head.ticket),)
        return expired

    def _drop_late_heads(
        self, now_s: float, share: Share, room: int, safe_s: float
    ) -> tuple[TicketT, ...]:
        """Drop tickets from the front of the queue that would be late in a batch of this kind.

        The batch is taken for as full as it can get: each that is dropped makes it shorter.
        A deadline after `safe_s` is met by whatever fits into one batch.
        """
        expired: tuple[TicketT, ...] = ()
        while (head := self._queue.head()) is not None:
            ticket = head.ticket
            deadline_s = ticket.deadline_s
            if deadline_s > safe_s and (
                deadline_s == math.inf or ticket.waiting + ticket.preparing <= share.images
            ):
                break
            if deadline_s > now_s and deadline_s > self._ends_s(ticket, now_s, share, room):
                break
            expired += (self._expire(ticket),)
        return expired

    def _expire(self, ticket: TicketT) -> TicketT:
        """Drop a ticket that would be late, and count it."""
        self._expired += 1
        self._drop(ticket)
        return ticket

    def _ends_s(self, ticket: TicketT, now_s: float, share: Share, room: int) -> float:
        """Say when a ticket would be answered whose images go into the next batch."""
        batch = min(share.images, share.images - room + self._queue.images)
        images = max(batch, ticket.waiting + ticket.preparing)
        running = self._running
        if images <= share.images:
            takes_s = running.predict_s(images, now_s, on_one_thread=share.on_one_thread)
        else:
            on_all = not share.on_one_thread and running.takes_all(images, now_s)
            takes_s = running.pace(now_s, on_all=on_all).seconds(images)
        return now_s + takes_s + running.reply.seconds if takes_s else now_s

    def _drop(self, ticket: TicketT) -> None:
        """Take a ticket's waiting images out of the queue and compute no more of it."""
        ticket.gone = True
        for part in self._held[ticket]:
            self._queue.remove(part)
        self._held[ticket].clear()
        if ticket.preparing or ticket.waiting:
            self._backlog.add(ticket, -ticket.preparing - ticket.waiting)
        ticket.waiting = 0
        self._release_if_over(ticket)

    def _release_if_over(self, ticket: TicketT) -> bool:
        """Stop counting what a ticket held once it is over; whether it is."""
        if not ticket.over or ticket not in self._held:
            return False
        del self._held[ticket]
        self._room.release(ticket)
        return True
