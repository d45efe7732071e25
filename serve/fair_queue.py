"""In which order waiting images run: by priority, and fairly between clients. Policy alone.

Rules:
    Images of priority 1 run before those of 2, those before 3. No priority starves: for every
    15 images of higher priorities that are taken while it waits, one of it is. So a flood of
    priority 1 leaves each of the others about a sixteenth, and nothing depends on a clock.
    Within a priority clients take turns of `quantum_images` images, so that one who sends
    thousands does not keep waiting those who send one. A client alone needs no turns.
    Within a client and a priority images run in the order in which they became ready.
    A turn that a full batch cuts short goes on in the next batch.

A request may be cut anywhere, so a turn is never too short for what is at the head: of
deficit round robin only the rest of a turn is left to remember.

Source: Shreedhar and Varghese, "Efficient Fair Queueing using Deficit Round Robin", 1995.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic

from serve.tickets import LOWEST_PRIORITY, Part, TicketT

OVERTAKERS = 15
"""Images of higher priorities that may be taken before one that waits is taken, too."""


@dataclass(eq=False, slots=True)
class _Level(Generic[TicketT]):
    """What waits at one priority.

    Attributes:
        number: its place, 0 being the first.
        left: images left of the turn of the first client.
        clients: their parts; the order is that of their turns.
        images: how many wait.
        overtaken: by how many images, taken from higher levels while some waited here.
    """

    number: int
    left: int
    clients: OrderedDict[str, OrderedDict[Part[TicketT], None]] = field(default_factory=OrderedDict)
    images: int = 0
    overtaken: int = 0


class FairQueue(Generic[TicketT]):
    """The waiting images of one model."""

    def __init__(self, *, quantum_images: int) -> None:
        """Wait for images.

        Args:
            quantum_images: a client's turn while others wait.
        """
        assert quantum_images > 0
        self._quantum = quantum_images
        self._levels: list[_Level[TicketT]] = [
            _Level(number, quantum_images) for number in range(LOWEST_PRIORITY)
        ]
        self._chosen: _Level[TicketT] | None = None  # by `head`, until anything changes
        self.images = 0

    def __repr__(self) -> str:
        return f"<FairQueue {self.images_by_priority} images of {self.clients} clients>"

    @property
    def images_by_priority(self) -> tuple[int, ...]:
        """How many images wait, the first priority first."""
        return tuple(level.images for level in self._levels)

    @property
    def clients(self) -> int:
        """How many clients wait; one who waits at two priorities counts twice."""
        return sum(len(level.clients) for level in self._levels)

    def push(self, part: Part[TicketT]) -> None:
        """Put images behind those of their client and priority."""
        self._chosen = None
        level = self._levels[part.ticket.priority - 1]
        parts = level.clients.get(part.ticket.client)
        if parts is None:
            parts = level.clients[part.ticket.client] = OrderedDict()
        parts[part] = None
        images = len(part.positions)
        level.images += images
        self.images += images

    def head(self) -> Part[TicketT] | None:
        """Give the part whose turn it is; None where nothing waits."""
        if not self.images:
            return None
        level = self._chosen = self._next()
        return next(iter(next(iter(level.clients.values()))))

    def take(self, room: int) -> Part[TicketT]:
        """Take images of the head out, at most `room`; the rest of it stays the head."""
        level = self._chosen or self._next()
        self._chosen = None
        client, parts = next(iter(level.clients.items()))
        if len(level.clients) > 1 and room > level.left:
            room = level.left
        alone = level.images == self.images
        if not alone and level.overtaken >= OVERTAKERS:
            room = min(room, level.overtaken // OVERTAKERS)
        head = taken = next(iter(parts))
        images = len(head.positions)
        if images > room:
            images = room
            taken = Part(head.ticket, head.positions[:room], head.ready_s)
            head.positions = head.positions[room:]
        else:
            del parts[head]
        level.left -= images
        level.images -= images
        self.images -= images
        if not parts:
            self._forget(level, client)
        elif level.left <= 0:
            level.clients.move_to_end(client)
            level.left = self._quantum
        if not alone:
            self._count_overtaken(level, images)
        return taken

    def remove(self, part: Part[TicketT]) -> None:
        """Take a part out that nobody waits for."""
        self._chosen = None
        level, client = self._levels[part.ticket.priority - 1], part.ticket.client
        parts = level.clients[client]
        del parts[part]
        level.images -= len(part.positions)
        self.images -= len(part.positions)
        if not parts:
            self._forget(level, client)
        if not level.images:
            level.overtaken = 0

    def due_s(self, delay_s: float, takes_s: float) -> float:
        """Say until when all that waits may wait for company.

        Args:
            delay_s: how long a request may, from its arrival. One with a deadline waits for
                half of the time it has at most, since forecasts are none at first.
            takes_s: how long before its deadline a request must begin.
        """
        return min(
            min(
                ticket.arrived_s + min(delay_s, (ticket.deadline_s - ticket.arrived_s) / 2),
                ticket.deadline_s - takes_s,
            )
            for level in self._levels
            for parts in level.clients.values()
            for ticket in (part.ticket for part in parts)
        )

    def _next(self) -> _Level[TicketT]:
        """Say from which level to take."""
        first: _Level[TicketT] | None = None
        for level in self._levels:
            if not level.images:
                continue
            if level.images == self.images:
                return level
            if first is None:
                first = level
            elif level.overtaken >= OVERTAKERS:
                return level
        assert first is not None
        return first

    def _count_overtaken(self, level: _Level[TicketT], images: int) -> None:
        """Count images taken against the lower levels that wait, and off what this was owed."""
        level.overtaken = max(0, level.overtaken - OVERTAKERS * images) if level.images else 0
        for lower in self._levels[level.number + 1 :]:
            if lower.images:
                lower.overtaken += images

    def _forget(self, level: _Level[TicketT], client: str) -> None:
        """Drop a client of whom nothing waits; the turn passes on if it was its."""
        if next(iter(level.clients)) == client:
            level.left = self._quantum
        del level.clients[client]
