"""Finds neighbours for one Search request, and lays them out as a reply.

Rules:
    A filter sees what its caller sees: sources by their public names, never a path.
    A query that cannot be meant, or an id that is not there, is a status of its own; the
    other queries of the request are answered.
    Stored metadata and vectors are read once a request, for all hits together.
    Many queries are searched in pieces: the watchdog sees each, and a search that nobody waits
    for any more ends with one. What is found is what one call finds.
    Everything here blocks: the services run it on a thread of its own.

Shapes: Q queries, K neighbours, D dimensions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from index.errors import UnknownIdError
from models.errors import FingerprintMismatchError
from models.vectors import finish_vectors
from models.wire import vectors_from_wire, vectors_to_wire
from protos import horace_pb2 as pb
from serve.errors import RequestError
from serve.reply_size import bytes_of_hit

if TYPE_CHECKING:
    from index.collection import Collection, Neighbours, Row
    from index.ranking import Ranking
    from index.selection import Selection
    from serve.catalog import ServedCollection

DEFAULT_NEIGHBOURS = 10

MAX_EFFORT = 10_000
"""A search that needs more is cheaper as an exact one."""

MAX_DIVERSE_NEIGHBOURS = 100
"""Each is compared with five times as many candidates: .03 s for 100 of 512 dimensions."""

LEAST_QUERIES = 20
"""Of a piece: below, FAISS compares exactly without BLAS, which rounds otherwise."""

PIECE_PRODUCTS = 1 << 36
"""Numbers that a piece multiplies, about, where `LEAST_QUERIES` do not multiply more: it is to end
long before the watchdog takes its thread for stuck."""

FINGERPRINT = re.compile("[0-9a-f]{64}")

MAX_ID = (1 << 63) - 1
"""Ids are 63-bit hashes; a larger one is nobody's."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """How to search.

    Attributes:
        k: neighbours a query.
        exact: whether every vector is compared, instead of asking the index.
        include_vectors: whether the hits' stored vectors are sent, too.
        ranking: how hits are chosen among the nearest.
        max_metadata_bytes: what the hits' metadata may take, which is sent, too, where above 0.
        effort: candidates that the index weighs for a query; 0 for as many as it is set to.
        selection: which images may be hits; all where None.
    """

    k: int
    exact: bool
    include_vectors: bool
    ranking: Ranking
    max_metadata_bytes: int = 0
    effort: int = 0
    selection: Selection | None = None

    def search(
        self,
        collection: Collection,
        queries_QD: NDArray[np.float32],
        on_piece: Callable[[], None],
        without_QW: NDArray[np.int64] | None = None,
    ) -> Neighbours:
        """Search by unit vectors of the collection's own encoder; see `Collection.search`.

        Args:
            collection: where to search.
            queries_QD: (Q, D) float32, at least one.
            on_piece: called after each piece of the work; what it raises ends the search.
            without_QW: see there.
        """
        from index.neighbours import Neighbours

        k = self.ranking.pool(self.k)
        parameters = collection.effort_parameters(self.effort, k) if self.effort else None

        def search(piece: slice) -> Neighbours:
            return collection.search(
                queries_QD[piece],
                k,
                fingerprint=collection.fingerprint,
                exact=self.exact,
                parameters=parameters,
                filter=self.selection,
                without_QW=None if without_QW is None else without_QW[piece],
            )

        def rank(piece: slice) -> Neighbours:
            near = Neighbours(ids=found.ids[piece], scores=found.scores[piece])
            return self.ranking.rank(collection, near, self.k)

        count = len(queries_QD)
        found = _in_pieces(search, count, self._piece(collection, k), on_piece)
        least = LEAST_QUERIES if self.ranking.diversity else count
        return _in_pieces(rank, count, least, on_piece)

    def _piece(self, collection: Collection, k: int) -> int:
        """Say how many queries a piece has at least.

        From `MAX_BATCH_GAIN` on a filter chooses the same way to search as for more; what it leaves
        may be compared whole, and so are rows that no index has yet.
        """
        from index.ann.kinds import FLAT
        from index.selection import MAX_BATCH_GAIN, ROWS_A_CANDIDATE

        rows = collection.count if self.selection is None else self.selection.count
        if not self.exact and self.selection is None:
            segments = collection.manifest.segments
            indexed = sum(one.count for one in segments if one.factory != FLAT)
            weighed = (ROWS_A_CANDIDATE + MAX_BATCH_GAIN) * max(self.effort, k)
            rows += min(0, weighed - indexed)
        fitting = PIECE_PRODUCTS // max(1, rows * collection.dim)
        return max(LEAST_QUERIES, min(MAX_BATCH_GAIN, fitting))


def _in_pieces(
    find: Callable[[slice], Neighbours], count: int, least: int, on_piece: Callable[[], None]
) -> Neighbours:
    """Find the neighbours of `count` queries, of at least `least` at a time, and put them together.

    Some pieces may be narrower: `leave_out` gives as many columns as any of its queries needs.
    """
    from index.knn import pad_neighbours
    from index.neighbours import Neighbours

    n_pieces = max(1, count // least)
    parts = []
    for start, end in pairwise(n * count // n_pieces for n in range(n_pieces + 1)):
        parts.append(find(slice(start, end)))
        on_piece()
    if n_pieces == 1:
        return parts[0]
    width = max(part.ids.shape[1] for part in parts)
    padded = [pad_neighbours(part.scores, part.ids, width) for part in parts]
    scores, ids = map(np.concatenate, zip(*padded, strict=True))
    return Neighbours(ids=ids, scores=scores)


def count_queries(request: pb.SearchRequest) -> int:
    """Count the queries of a request, of whatever kind.

    Raises:
        RequestError: it has none of any kind.
    """
    match request.WhichOneof("queries"):
        case "images":
            return len(request.images.images)
        case "vectors":
            return request.vectors.vectors.rows
        case "ids":
            return len(request.ids.ids)
        case "combined":
            return len(request.combined.queries)
    raise RequestError("queries", expected="images, vectors, ids or combined", found="none")


def read_query(
    request: pb.SearchRequest, dim: int, *, count: int, max_neighbours: int, max_reply_bytes: int
) -> Query:
    """Check how much is asked for.

    Args:
        request: says how to search.
        dim: of the collection.
        count: how many queries there are.
        max_neighbours: the largest k.
        max_reply_bytes: what the hits may take on the wire, about.

    Raises:
        RequestError: it is too much.
        UsageError: a score or a diversity is out of bounds.
    """
    from index.ranking import Ranking  # faiss: only where there is a collection

    k = request.k or DEFAULT_NEIGHBOURS
    if k > max_neighbours:
        raise RequestError("k", expected=f"1 to {max_neighbours}", found=f"{k}")
    if request.diversity and k > MAX_DIVERSE_NEIGHBOURS:
        expected = f"1 to {MAX_DIVERSE_NEIGHBOURS} with diversity"
        raise RequestError("k", expected=expected, found=f"{k}")
    if request.effort > MAX_EFFORT:
        raise RequestError("effort", expected=f"0 to {MAX_EFFORT}", found=f"{request.effort}")
    with_vector, with_metadata = request.include_vectors, request.include_metadata
    bare_bytes = bytes_of_hit(dim, with_vector=with_vector)
    hit_bytes = bytes_of_hit(dim, with_vector=with_vector, with_metadata=with_metadata)
    if count * k * hit_bytes > max_reply_bytes:
        raise RequestError(
            "reply",
            expected=f"at most {max_reply_bytes} bytes",
            found=f"{count} queries with {k} hits of some {hit_bytes} bytes",
            mend="ask for fewer hits, or split the request",
        )
    min_score = request.min_score if request.HasField("min_score") else None
    return Query(
        k=k,
        exact=request.exact,
        include_vectors=request.include_vectors,
        ranking=Ranking(min_score=min_score, diversity=request.diversity),
        max_metadata_bytes=max_reply_bytes - count * k * bare_bytes if with_metadata else 0,
        effort=request.effort,
    )


def select(collection: Collection, filter: str) -> Selection:
    """Work out a filter over what callers see of the collection.

    Raises:
        FilterError: it cannot be read.
    """
    return collection.select(filter, source_names=public_source)


def read_query_vectors(
    queries: pb.VectorQueries, served: ServedCollection, *, needs_direction: bool | None = None
) -> tuple[NDArray[np.float32], list[pb.ItemStatus]]:
    """Read query vectors; those that cannot be searched by get a status instead.

    Args:
        queries: which say whose vectors they are.
        served: the collection to search.
        needs_direction: whether one of zeros is refused; where its metric is cosine if None.

    Raises:
        FingerprintMismatchError: another encoder made them.
        RequestError: they do not say which encoder made them, or have another dimension.
        UsageError: they contradict themselves.
    """
    fingerprint = served.collection.fingerprint
    if not FINGERPRINT.fullmatch(queries.fingerprint):
        raise RequestError(
            "query vectors",
            expected="the fingerprint of the encoder that made them, 64 hex digits",
            found=f"{queries.fingerprint[:80]!r}" if queries.fingerprint else "none",
            mend="send the fingerprint that came with them",
        )
    if queries.fingerprint != fingerprint:
        raise FingerprintMismatchError(
            f"query vectors for collection {served.name!r}",
            expected=fingerprint,
            found=queries.fingerprint,
            mend=f"embed the queries with model {served.model.name!r}",
        )
    if queries.vectors.dim != served.collection.dim:
        raise RequestError(
            "query vectors",
            expected=f"{served.collection.dim} dimensions, as the collection has",
            found=f"{queries.vectors.dim}",
            mend="embed without dims",
        )
    vectors_QD = vectors_from_wire(queries.vectors)
    if needs_direction is None:
        needs_direction = served.collection.metric == "cosine"
    statuses = vector_statuses(vectors_QD, needs_direction=needs_direction)
    return vectors_QD[[status.code == pb.OK for status in statuses]], statuses


def search_vectors(
    collection: Collection,
    vectors_QD: NDArray[np.float32],
    statuses: Sequence[pb.ItemStatus],
    query: Query,
    on_piece: Callable[[], None],
) -> list[pb.Hits]:
    """Search by vectors of the collection's own encoder.

    Args:
        collection: where to search.
        vectors_QD: one row for each status that is OK; for cosines of any length but zero.
        statuses: one a query.
        query: how to search.
        on_piece: see `Query.search`.

    Returns:
        One entry a status: the hits, or the status alone where it is not OK.
    """
    found = None
    if len(vectors_QD):
        is_cosine = collection.metric == "cosine"  # else lengths count, as they are stored
        queries_QD = finish_vectors(vectors_QD, normalize=is_cosine)
        found = query.search(collection, queries_QD, on_piece)
    return lay_out(collection, found, statuses, query)


def search_ids(
    collection: Collection, ids: Sequence[int], query: Query, on_piece: Callable[[], None]
) -> list[pb.Hits]:
    """Search by stored images, each left out of its own neighbours; an entry an id."""
    statuses = [id_status(collection, id_) for id_ in ids]
    known = [id_ for id_, status in zip(ids, statuses, strict=True) if status.code == pb.OK]
    found = None
    if known:
        without_QW = np.array(known, np.int64)[:, None]
        found = query.search(collection, collection.vectors(known), on_piece, without_QW)
    return lay_out(collection, found, statuses, query)


def vector_statuses(
    vectors_QD: NDArray[np.float32], *, needs_direction: bool
) -> list[pb.ItemStatus]:
    """Say of each query vector whether it can be searched by."""
    norms = np.linalg.norm(vectors_QD.astype(np.float64), axis=1)
    return [_norm_status(norm, needs_direction=needs_direction) for norm in norms.tolist()]


def _norm_status(norm: float, *, needs_direction: bool) -> pb.ItemStatus:
    """Refuse a vector that is not finite, or has no direction where one is needed."""
    if math.isfinite(norm) and (norm or not needs_direction):
        return pb.ItemStatus()
    found = "only zeros" if norm == 0 else "values that are not finite"
    wanted = "finite values, not all zero" if needs_direction else "finite values"
    message = f"query vector: expected {wanted}, found {found}"
    return pb.ItemStatus(code=pb.WRONG_QUERY, message=message)


def id_status(collection: Collection, id_: int) -> pb.ItemStatus:
    """Say whether the collection has an id."""
    try:
        if id_ <= MAX_ID:
            collection.row_numbers([id_])
            return pb.ItemStatus()
    except UnknownIdError:
        pass
    message = f"id: expected one of the {collection.count} of this collection, found {id_}"
    return pb.ItemStatus(code=pb.NOT_FOUND, message=message)


def lay_out(
    collection: Collection,
    found: Neighbours | None,
    statuses: Sequence[pb.ItemStatus],
    query: Query,
) -> list[pb.Hits]:
    """Write one message a query, with the metadata of its hits.

    Args:
        collection: where was searched.
        found: a row for each status that is OK; None where none is.
        statuses: one a query.
        query: how was searched.

    Raises:
        RequestError: the metadata is more than a reply takes.
    """
    if found is None:
        return [pb.Hits(status=status) for status in statuses]
    ids_QK = found.ids
    unique = np.unique(ids_QK[ids_QK >= 0])
    rows = {row.id: row for row in collection.rows(unique)} if unique.size else {}
    vectors_ND = collection.vectors(unique) if query.include_vectors else None
    texts = _metadata_texts(ids_QK, rows, query.max_metadata_bytes)
    neighbours = zip(ids_QK, found.scores, strict=True)
    results = []
    for status in statuses:
        hits = pb.Hits(status=status)
        if status.code == pb.OK:
            ids_K, scores_K = next(neighbours)
            is_hit = ids_K >= 0
            ids_K, scores_K = ids_K[is_hit], scores_K[is_hit]
            pairs = zip(ids_K.tolist(), scores_K.tolist(), strict=True)
            hits.hits.extend(_hit(rows[id_], score, texts.get(id_, "")) for id_, score in pairs)
            if vectors_ND is not None:
                own_ND = vectors_ND[np.searchsorted(unique, ids_K)]
                hits.vectors.CopyFrom(vectors_to_wire(own_ND))
        results.append(hits)
    return results


def _metadata_texts(
    ids_QK: NDArray[np.int64], rows: Mapping[int, Row], max_bytes: int
) -> dict[int, str]:
    """Write the metadata of hits as JSON, where it was asked for and there is any.

    Raises:
        RequestError: it is more than `max_bytes` for all hits together.
    """
    if not max_bytes:
        return {}
    texts = {
        id_: json.dumps(row.to_json()["metadata"], ensure_ascii=False)
        for id_, row in rows.items()
        if row.metadata
    }
    sizes = {id_: len(text.encode()) for id_, text in texts.items()}
    n_bytes = sum(sizes.get(id_, 0) for id_ in ids_QK.ravel().tolist())
    if n_bytes > max_bytes:
        raise RequestError(
            "reply",
            expected=f"at most {max_bytes} bytes of metadata",
            found=f"{n_bytes}",
            mend="ask for fewer hits, or without metadata",
        )
    return texts


def _hit(row: Row, score: float, metadata: str) -> pb.Hit:
    """Write one hit."""
    return pb.Hit(
        id=row.id,
        score=score,
        key=row.key,
        label=row.label or "",
        source=public_source(row.source),
        metadata=metadata,
    )


def public_source(uri: str) -> str:
    """Name a source to callers without saying where it lies on this machine.

    `folder:/data/photos` becomes `folder:photos`; a source without a path stays as it is.
    """
    kind, separator, paths = uri.partition(":")
    if "/" not in paths:
        return uri
    return f"{kind}{separator}{','.join(Path(path).name for path in paths.split(','))}"
