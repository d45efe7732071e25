"""Who may come in: what requests hold is bounded, and no client takes it all. Policy alone.

Rules:
    Images and bytes of the requests that are not over are bounded. An empty room takes any
    request: what could never come in beside others comes in alone.
    A client that holds something may hold more only while an eighth as much stays free
    beside it: a single bulk client leaves a ninth of the room to others, two leave a
    seventeenth, and so on. A client that holds nothing is bound by the room alone, so
    nobody is shut out, however large its request.
    Who asks for it waits in line instead of being refused. A client's requests come in in
    their order; clients take turns. One that waits for room, not for its own share, is passed
    by nobody, however small.
    The line is bounded in bytes, too: what waits in it is in memory.

Source: Choudhury and Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet
Switches", 1998 (a queue may grow to a multiple, here 8, of what is free).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic

from serve.tickets import Holding, Ticket, TicketT

SHARE = 8
"""How many times of what stays free one client may hold."""


class Room(Generic[TicketT]):
    """What is held of one model, and who waits for room."""

    def __init__(self, *, max_images: int, max_bytes: int) -> None:
        """Hold nothing yet.

        Args:
            max_images: of the requests that are not over.
            max_bytes: of those, and once more of those in line.
        """
        self.max_images = max_images
        self.max_bytes = max_bytes
        self.requests = self.images = self.bytes = 0
        self.lined_up = self.lined_up_bytes = 0
        self._holdings: dict[str, Holding] = {}
        self._line: OrderedDict[str, OrderedDict[TicketT, None]] = OrderedDict()

    def __repr__(self) -> str:
        return (
            f"<Room {self.images}/{self.max_images} images, {self.bytes}/{self.max_bytes} bytes "
            f"of {len(self._holdings)} clients, {self.lined_up} in line>"
        )

    @property
    def clients(self) -> int:
        """How many clients hold something."""
        return len(self._holdings)

    @property
    def line(self) -> tuple[TicketT, ...]:
        """Those in line, by client."""
        return tuple(ticket for tickets in self._line.values() for ticket in tickets)

    def holding(self, client: str) -> Holding | None:
        """Give what a client holds; None where that is nothing."""
        return self._holdings.get(client)

    def admits(self, ticket: Ticket) -> bool:
        """Whether a newcomer may come in now."""
        if not self._line:
            return self._fits(ticket) and self._has_share(ticket)
        if ticket.client in self._line or not (self._fits(ticket) and self._has_share(ticket)):
            return False
        return not any(self._has_share(next(iter(others))) for others in self._line.values())

    def hold(self, ticket: TicketT) -> None:
        """Count what a request holds, from now until `release`."""
        self.requests += 1
        self.images += ticket.images
        self.bytes += ticket.held_bytes
        holding = self._holdings.get(ticket.client)
        if holding is None:
            holding = self._holdings[ticket.client] = Holding()
        ticket.holding = holding
        holding.requests += 1
        holding.images += ticket.images
        holding.bytes += ticket.held_bytes

    def release(self, ticket: TicketT) -> None:
        """Count it no more."""
        self.requests -= 1
        self.images -= ticket.images
        self.bytes -= ticket.held_bytes
        holding = ticket.holding
        assert holding is not None
        holding.requests -= 1
        holding.images -= ticket.images
        holding.bytes -= ticket.held_bytes
        if not holding.requests:
            del self._holdings[ticket.client]

    def line_up(self, ticket: TicketT) -> bool:
        """Let a request wait for `next_in_line`; whether the line has room for its bytes."""
        if self.lined_up and self.lined_up_bytes + ticket.held_bytes > self.max_bytes:
            return False
        self._line.setdefault(ticket.client, OrderedDict())[ticket] = None
        self.lined_up += 1
        self.lined_up_bytes += ticket.held_bytes
        return True

    def leave_line(self, ticket: TicketT) -> bool:
        """Take a request out of the line; whether it was in it."""
        tickets = self._line.get(ticket.client)
        if tickets is None or ticket not in tickets:
            return False
        del tickets[ticket]
        if not tickets:
            del self._line[ticket.client]
        self.lined_up -= 1
        self.lined_up_bytes -= ticket.held_bytes
        return True

    def next_in_line(self) -> TicketT | None:
        """Take out of the line whoever may come in now; its client has had its turn then."""
        for client, tickets in self._line.items():
            head = next(iter(tickets))
            if not self._has_share(head):
                continue
            if not self._fits(head):
                return None
            self.leave_line(head)
            if client in self._line:
                self._line.move_to_end(client)
            return head
        return None

    def lacking_images(self, ticket: Ticket) -> int:
        """Say how many images must be computed before a request fits, about."""
        images = self.images + ticket.images - self.max_images
        if self.images and (over := self.bytes + ticket.held_bytes - self.max_bytes) > 0:
            images = max(images, -(-over * self.images // max(1, self.bytes)))
        return max(1, min(images, self.images))

    def _fits(self, ticket: Ticket) -> bool:
        """Whether there is room beside what is held."""
        fits = (
            self.images + ticket.images <= self.max_images
            and self.bytes + ticket.held_bytes <= self.max_bytes
        )
        return fits or not self.requests

    def _has_share(self, ticket: Ticket) -> bool:
        """Whether enough stays free beside what its client would hold."""
        holding = self._holdings.get(ticket.client)
        if holding is None:
            return True
        free = self.max_images - self.images - ticket.images
        free_bytes = self.max_bytes - self.bytes - ticket.held_bytes
        return (
            free >= (holding.images + ticket.images) // SHARE
            and free_bytes >= (holding.bytes + ticket.held_bytes) // SHARE
        )
