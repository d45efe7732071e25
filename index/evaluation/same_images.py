"""Which images are the same: by their content as sources hold it, or by their vectors.

Rules:
    Content is compared before decoding, by a hash: one that was encoded again is another. What
    the build took is used where it is there; else the sources are read again, on request.
    Vectors are the same up to the rounding of float32; pictures that the encoder cannot tell
    apart look like one image.

Shapes: Q queries, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from index.errors import EvaluationError
from index.interface import AnyCollection
from index.knn import COSINE, EUCLIDEAN
from index.storage.rows import DIGEST
from models.command import counted, progress
from models.errors import ImageError, SourceError
from models.image_source import digest_of
from models.images import ImageSource, open_source

SAME_VECTOR = {COSINE: 1e-6, EUCLIDEAN: 1e-10}
"""Scores this close to the best there is, relative to the query's squared length, are those of one
image: float32 rounds a product by some 1e-7 of that, a number of a vector by as much of itself."""


def is_same_vector(
    queries_QD: NDArray[np.float32], scores_Q: NDArray[np.float32], metric: str
) -> NDArray[np.bool_]:
    """Tell of each query's best score whether it is that of its own vector."""
    size_Q: NDArray[np.float64] = np.square(queries_QD, dtype=np.float64).sum(axis=1)
    best_Q = size_Q if metric == COSINE else np.zeros_like(size_Q)
    return scores_Q >= best_Q - SAME_VECTOR[metric] * size_Q


def same_vector_line(n: int, n_queries: int) -> str:
    """Say how many queries look as if they were in the collection."""
    share = f"({n / n_queries:.2%})"
    found = counted(n, f"query {share} has", plural=f"queries {share} have")
    return f"{found} a neighbour of the same vector"


def same_content_line(n: int, n_queries: int) -> str:
    """Say how many queries are in the collection."""
    share = f"({n / n_queries:.2%})"
    found = counted(n, f"query {share} is", plural=f"queries {share} are")
    return f"{found} in the collection byte for byte"


def sources_of(collection: AnyCollection) -> list[ImageSource]:
    """Open every source that an image of the collection came from, in their order.

    Raises:
        SourceError: one cannot be opened.
    """
    uris = pc.unique(collection.table(["source"])["source"])
    return [open_source(uri) for uri in cast(list[str], uris.to_pylist())]


def digest_by_key(sources: Sequence[ImageSource], *, what: str) -> dict[str, str]:
    """Hash every image that can be read; of a key that is there twice the first.

    Args:
        sources: in order.
        what: a word or two for the progress line.
    """
    digests: dict[str, str] = {}
    counts = [source.count() for source in sources]
    total = None if None in counts else sum(count or 0 for count in counts)
    records = (record for source in sources for record in source.records())
    for record in progress(records, what=what, total=total):
        if record.key not in digests:
            try:
                digests[record.key] = digest_of(record.read())
            except ImageError:
                continue  # it is in no collection either
    return digests


def describe_missing(keys: Sequence[str]) -> str:
    """Say of one key or more that there is no image of them."""
    others = f", and {len(keys) - 1} more missing" if len(keys) > 1 else ""
    return f"no image {keys[0]!r}{others}"


def stored_digests(collection: AnyCollection) -> list[str] | None:
    """Give the hash of every image as it was when it was embedded, in the order of the ids.

    None where the hash of some image was not taken.
    """
    table = collection.table()
    if DIGEST not in table.column_names or table[DIGEST].null_count:
        return None
    return cast(list[str], table[DIGEST].to_pylist())


def collection_digests(collection: AnyCollection, *, may_read: bool) -> list[str] | None:
    """Hash the content of a collection's images, in the order of the ids.

    Args:
        collection: whose images are hashed.
        may_read: whether to read them from where they came from, if their hashes are not stored.

    Returns:
        None where they are not, and nothing may be read.

    Raises:
        EvaluationError: a source is gone, or no longer has one of the images.
    """
    stored = stored_digests(collection)
    if stored is not None or not may_read:
        return stored
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
            found=describe_missing(missing),
            mend=mend,
        )
    return [digests[key] for key in keys]
