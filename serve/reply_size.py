"""What a hit takes in a reply: client and server reckon alike, and split or refuse by it."""

from __future__ import annotations

HIT_BYTES = 256
"""About what a hit takes on the wire, key and source included."""


METADATA_BYTES = 256
"""About what the metadata of a hit takes; what it takes indeed is counted by the server."""


def bytes_of_hit(dim: int, *, with_vector: bool, with_metadata: bool = False) -> int:
    """Say about what one hit takes in a reply."""
    vector_bytes = 4 * dim if with_vector else 0
    return HIT_BYTES + vector_bytes + (METADATA_BYTES if with_metadata else 0)
