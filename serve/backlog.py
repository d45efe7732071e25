"""How many images will run before those of a newcomer: policy alone.

Rules:
    What is admitted and in no batch yet counts, also while it is being decoded.
    The count follows `serve.fair_queue`: higher priorities run before; of its own priority the
    newcomer's own client's images do, and of every other client as many turns as its own
    takes, if that has so much; lower priorities run as much as they are owed.
    It costs the same however much waits.
"""

from __future__ import annotations

from serve.fair_queue import OVERTAKERS
from serve.tickets import LOWEST_PRIORITY, Holding, Ticket


class Backlog:
    """Images by priority, from their admission until their batch."""

    def __init__(self, *, quantum_images: int) -> None:
        """Count nothing yet.

        Args:
            quantum_images: a client's turn.
        """
        self._quantum = quantum_images
        self._by_level = [0] * LOWEST_PRIORITY
        self.images = 0

    def __repr__(self) -> str:
        return f"<Backlog {tuple(self._by_level)} images>"

    def add(self, ticket: Ticket, images: int) -> None:
        """Count images of a request that was admitted; less than none counts them off.

        They are counted off when they run, or never will.
        """
        holding, level = ticket.holding, ticket.priority - 1
        assert holding is not None
        holding.pending[level] += images
        self._by_level[level] += images
        self.images += images

    def ahead_of(self, ticket: Ticket, holding: Holding | None, *, clients: int) -> int:
        """Say how many images run before the last one of a newcomer does, at most.

        Args:
            ticket: the newcomer.
            holding: what its client holds already.
            clients: how many hold something.
        """
        level = ticket.priority - 1
        own, others = 0, clients
        if holding is not None:
            own, others = holding.pending[level], clients - 1
        turns = -(-(own + ticket.images) // self._quantum)
        ahead = own + min(self._by_level[level] - own, turns * self._quantum * others)
        ahead += sum(self._by_level[:level])
        if self.images == ahead:  # nothing waits below: most often
            return ahead
        owed = (ahead + ticket.images) // OVERTAKERS
        return ahead + sum(min(owed, images) for images in self._by_level[level + 1 :])
