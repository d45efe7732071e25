"""Reads combined queries: several examples each, images, vectors and stored ids mixed.

Rules:
    An example that cannot be used gives its query a status that names it, such as
    `positive 2`; the other queries of the request are answered.
    Vectors of another encoder are refused with the whole request, as they are elsewhere.
    What can be refused without the encoder is refused before images are embedded, and an
    example of several vectors before they are read: it is counted as one.

How examples become one query is `index.combine`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from models.errors import UsageError
from protos import horace_pb2 as pb
from serve.searching import Query, id_status, lay_out, read_query_vectors

if TYPE_CHECKING:
    from index.collection import Collection
    from index.combine import Combination, Example
    from serve.catalog import ServedCollection

EmbeddedImage: TypeAlias = tuple[NDArray[np.float32] | None, pb.ItemStatus]
"""The (D,) vector of an image, or None and why there is none."""


@dataclass(frozen=True, kw_only=True)
class ReadExample:
    """One example, before images are embedded: one of three, or the status of none.

    Attributes:
        name: its side and number, such as `positive 2`.
        image: its place among the request's images.
        id: of a stored image.
        vector_D: (D,) float32.
        status: why it is none of them.
    """

    name: str
    image: int | None = None
    id: int | None = None
    vector_D: NDArray[np.float32] | None = None
    status: pb.ItemStatus | None = None


@dataclass(frozen=True, kw_only=True)
class ReadCombination:
    """One query, before images are embedded; a weight of None is the default's."""

    positives: Sequence[ReadExample]
    negatives: Sequence[ReadExample]
    negative_weight: float | None


def count_examples(combined: pb.Combined) -> int:
    """Count the examples of all queries."""
    return sum(len(query.positives) + len(query.negatives) for query in combined.queries)


def read_combinations(
    combined: pb.Combined, served: ServedCollection
) -> tuple[list[ReadCombination], list[pb.Image]]:
    """Read every query, and the images that are to be embedded for them.

    Raises:
        FingerprintMismatchError: another encoder made a vector.
        RequestError: a vector does not say who made it, or has another dimension.
    """
    images: list[pb.Image] = []

    def read(side: str, examples: Sequence[pb.Example]) -> list[ReadExample]:
        return [
            _read_example(f"{side} {n}", example, served, images)
            for n, example in enumerate(examples, start=1)
        ]

    queries = [
        ReadCombination(
            positives=read("positive", query.positives),
            negatives=read("negative", query.negatives),
            negative_weight=query.negative_weight if query.HasField("negative_weight") else None,
        )
        for query in combined.queries
    ]
    return queries, images


def search_combinations(
    collection: Collection,
    combinations: Sequence[ReadCombination],
    image_vectors_ND: NDArray[np.float32],
    image_statuses: Sequence[pb.ItemStatus],
    query: Query,
    on_piece: Callable[[], None],
) -> list[pb.Hits]:
    """Search by combined queries.

    Args:
        collection: where to search.
        combinations: the queries.
        image_vectors_ND: one row for each image whose status is OK.
        image_statuses: one for each image of `read_combinations`.
        query: how to search.
        on_piece: see `Query.search`.

    Returns:
        One entry a query: the hits, or the status alone where it is not OK.
    """
    from index.combine import pad_ids, query_vector  # faiss: only where there is a collection

    rows = iter(image_vectors_ND)
    images = [(next(rows) if s.code == pb.OK else None, s) for s in image_statuses]
    statuses: list[pb.ItemStatus] = []
    queries: list[NDArray[np.float32]] = []
    without: list[list[int]] = []
    for read in combinations:
        try:
            combination = _resolve(collection, read, images)
            queries.append(query_vector(collection, combination))
        except _BadExampleError as bad:
            statuses.append(bad.status)
        except UsageError as error:
            statuses.append(_wrong_query(str(error)))
        else:
            without.append(combination.ids)
            statuses.append(pb.ItemStatus())
    found = None
    if queries:
        found = query.search(collection, np.stack(queries), on_piece, pad_ids(without))
    return lay_out(collection, found, statuses, query)


def _read_example(
    name: str, example: pb.Example, served: ServedCollection, images: list[pb.Image]
) -> ReadExample:
    """Read one example; an image goes to `images`."""
    match example.WhichOneof("source"):
        case "image":
            images.append(example.image)
            return ReadExample(name=name, image=len(images) - 1)
        case "id":
            return ReadExample(name=name, id=example.id)
        case "vector":
            if (rows := example.vector.vectors.rows) != 1:
                found = f"expected one vector, found {rows}"
                return ReadExample(name=name, status=_wrong_query(found))
            vectors_ND, statuses = read_query_vectors(example.vector, served, needs_direction=True)
            if not len(vectors_ND):
                return ReadExample(name=name, status=statuses[0])
            return ReadExample(name=name, vector_D=vectors_ND[0])
    found = "expected an image, a vector or an id, found none"
    return ReadExample(name=name, status=_wrong_query(found))


def _resolve(
    collection: Collection, read: ReadCombination, images: Sequence[EmbeddedImage]
) -> Combination:
    """Put a query together.

    Raises:
        _BadExampleError: an example cannot be used.
        UsageError: the query cannot be meant.
    """
    from index.combine import NEGATIVE_WEIGHT, Combination

    weight = read.negative_weight
    return Combination(
        positives=[_example(collection, one, images) for one in read.positives],
        negatives=[_example(collection, one, images) for one in read.negatives],
        negative_weight=NEGATIVE_WEIGHT if weight is None else weight,
    )


def _example(collection: Collection, read: ReadExample, images: Sequence[EmbeddedImage]) -> Example:
    """Give the id or the vector of an example."""
    status = read.status
    if read.image is not None:
        vector_D, status = images[read.image]
        if vector_D is not None:
            return vector_D
    if read.id is not None:
        status = id_status(collection, read.id)
        if status.code == pb.OK:
            return read.id
    if read.vector_D is not None:
        return read.vector_D
    assert status is not None
    raise _BadExampleError(read.name, status)


class _BadExampleError(Exception):
    """Says which example is wrong, and how."""

    def __init__(self, name: str, status: pb.ItemStatus) -> None:
        super().__init__(name)
        self.status = pb.ItemStatus(code=status.code, message=f"{name}: {status.message}")


def _wrong_query(message: str) -> pb.ItemStatus:
    """Refuse one query."""
    return pb.ItemStatus(code=pb.WRONG_QUERY, message=message)
