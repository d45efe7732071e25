"""How many images a message asks for, of whichever service: what limits a second are about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serve.combining import count_examples
from serve.searching import count_queries


def count_images(request: Any) -> int:
    """Count the images, queries or examples of a message; 0 for one that is not about images.

    It believes what the message says: what asks for more than it may is refused later, and
    pays for having asked.
    """
    count = _COUNTS.get(request.DESCRIPTOR.full_name)
    return 0 if count is None else count(request)


def _count_search(request: Any) -> int:
    """Count the queries, or their examples where those are more."""
    return max(count_queries(request), count_examples(request.combined))


def _count_tensor(request: Any) -> int:
    """Count the rows of a KServe request's first input."""
    if not request.inputs or not request.inputs[0].shape:
        return 1
    return max(0, int(request.inputs[0].shape[0]))


_COUNTS: dict[str, Callable[[Any], int]] = {
    "horace.v1.EmbedRequest": lambda request: len(request.images),
    "horace.v1.SearchRequest": _count_search,
    "inference.ModelInferRequest": _count_tensor,
}
