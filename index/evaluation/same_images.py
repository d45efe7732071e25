"""Which images are the same: by their content as sources hold it, or by their vectors.

Rules:
    Content is compared before decoding, by a hash: one that was encoded again is another.
    Vectors are the same up to the rounding of float32; pictures that the encoder cannot tell
    apart look like one image.

Shapes: Q queries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from index.collection import Collection
from index.errors import EvaluationError
from models.command import progress
from models.errors import ImageError, SourceError
from models.images import ImageData, ImageSource, open_source

SAME_VECTOR = 1e-6
"""Cosines this close to 1, or squared distances to 0, are those of one image: float32 rounds
unit vectors by some 1e-7."""


def content_digest(data: ImageData) -> bytes:
    """Hash an image's content: encoded bytes, or pixels with their shape."""
    shape = b"" if isinstance(data, bytes) else repr(data.shape).encode()
    content = data if isinstance(data, bytes) else data.tobytes()
    return hashlib.blake2b(content, digest_size=16, key=shape).digest()


def is_same_vector(scores_Q: NDArray[np.float32], metric: str) -> NDArray[np.bool_]:
    """Tell of each query's best score whether it is that of its own vector."""
    best = 1.0 if metric == "cosine" else 0.0
    return scores_Q >= best - SAME_VECTOR


def sources_of(collection: Collection) -> list[ImageSource]:
    """Open every source that an image of the collection came from, in their order.

    Raises:
        SourceError: one cannot be opened.
    """
    return [open_source(uri) for uri in collection.sources]


def digest_by_key(sources: Sequence[ImageSource], *, what: str) -> dict[str, bytes]:
    """Hash every image that can be read; of a key that is there twice the first.

    Args:
        sources: in order.
        what: a word or two for the progress line.
    """
    digests: dict[str, bytes] = {}
    counts = [source.count() for source in sources]
    total = None if None in counts else sum(count or 0 for count in counts)
    records = (record for source in sources for record in source.records())
    for record in progress(records, what=what, total=total):
        if record.key not in digests:
            try:
                digests[record.key] = content_digest(record.read())
            except ImageError:
                continue  # it is in no collection either
    return digests


def collection_digests(collection: Collection) -> dict[str, bytes]:
    """Hash the content of a collection's images, by key, from where they came from.

    Raises:
        EvaluationError: a source is gone, or no longer has one of the images.
    """
    mend = "put them back, or leave --contents out"
    try:
        digests = digest_by_key(sources_of(collection), what=f"contents of {collection.name}")
    except SourceError as error:
        raise EvaluationError(
            f"sources of collection {collection.name}",
            expected="the images that were indexed, whose contents are compared",
            found=f"{error.found} for {error.what}",
            mend=mend,
        ) from error
    keys = collection.keys()
    missing = [key for key in keys if key not in digests]
    if missing:
        raise EvaluationError(
            f"sources of collection {collection.name}",
            expected=f"the {collection.count} images that were indexed",
            found=f"none of the key {missing[0]!r}, and {len(missing) - 1} more missing",
            mend=mend,
        )
    return digests
