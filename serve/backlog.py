"""How many images will run before those of a newcomer: policy alone.

Rules:
    What is admitted and in no batch yet counts, also while it is being decoded.
    The count follows `serve.fair_queue`: higher priorities run before; of its own priority the
    newcomer's own client's images do, and of every other client as many turns as its own
    takes; lower priorities run as much as they are owed.
    It costs the same however much waits.
"""

from __future__ import annotations

from serve.fair_queue import OVERTAKERS
from serve.tickets import LOWEST_PRIORITY, Ticket


class Backlog:
    """Images by priority and client, from their admission until their batch."""

    def __init__(self, *, quantum_images: int) -> None:
        """Count nothing yet.

        Args:
            quantum_images: a client's turn.
        """
        self._quantum = quantum_images
        self._images = [0] * LOWEST_PRIORITY
        self._clients: list[dict[str, int]] = [{} for _ in range(LOWEST_PRIORITY)]

    def __repr__(self) -> str:
        return f"<Backlog {tuple(self._images)} images>"

    def add(self, ticket: Ticket, images: int) -> None:
        """Count images of a request that was admitted."""
        level = ticket.priority - 1
        clients = self._clients[level]
        self._images[level] += images
        clients[ticket.client] = clients.get(ticket.client, 0) + images

    def remove(self, ticket: Ticket, images: int) -> None:
        """Count images off that run now, or never will."""
        level = ticket.priority - 1
        clients = self._clients[level]
        self._images[level] -= images
        left = clients[ticket.client] - images
        if left:
            clients[ticket.client] = left
        else:
            del clients[ticket.client]

    def ahead_of(self, ticket: Ticket) -> int:
        """Say how many images run before the last one of a newcomer does."""
        level = ticket.priority - 1
        clients = self._clients[level]
        own = clients.get(ticket.client, 0)
        turns = -(-(own + ticket.images) // self._quantum)
        others = len(clients) - (1 if own else 0)
        ahead = own + min(self._images[level] - own, turns * self._quantum * others)
        ahead += sum(self._images[:level])
        owed = (ahead + ticket.images) // OVERTAKERS
        return ahead + sum(min(owed, images) for images in self._images[level + 1 :])
