"""What a hit takes in a reply: client and server reckon alike, and split or refuse by it."""

from __future__ import annotations

HIT_BYTES = 256
"""About what a hit takes on the wire, key and source included."""


def bytes_of_hit(dim: int, *, with_vector: bool) -> int:
    """Say about what one hit takes in a reply."""
    return HIT_BYTES + (4 * dim if with_vector else 0)
