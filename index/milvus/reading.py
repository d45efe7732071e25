"""What is asked of a collection in Milvus: to count, read, look up, and search.

Rules:
    Every answer has all that was written before the question, by anybody.
    What is large is read a page at a time; an exact search holds one page.
    Expressions are Milvus's own (`index.milvus.filters` writes them); "" chooses all.

Shapes: Q queries, N rows, D dimensions, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from index.knn import COSINE, MISSING, knn_search, merge_neighbours, padding
from index.milvus.connection import MilvusAddress, milvus_errors
from index.milvus.description import METRICS, VECTOR
from index.milvus.rows import to_vectors

if TYPE_CHECKING:
    from pymilvus import MilvusClient

PAGE_ROWS = 1000
"""Rows asked for at once, or queries asked: of 2,048 dimensions, eight megabytes."""

MAX_MESSAGE_BYTES = 16 << 20
"""Of vectors, or of neighbours, in one message: a quarter of what Milvus takes."""

NEIGHBOUR_BYTES = 32
"""Of a neighbour in an answer: its id, as key and as field, and its score."""


class MilvusReader:
    """Asks one collection. The client is the caller's to close.

    Every method raises a CollectionError where Milvus refuses, or does not answer.
    """

    def __init__(self, client: MilvusClient, address: MilvusAddress) -> None:
        """Ask the collection at an address through a client that is connected."""
        self._client = client
        self._address = address

    def count(self, expression: str = "") -> int:
        """Count rows."""
        with milvus_errors(str(self._address)):
            (one,) = self._client.query(
                self._address.name, filter=expression, output_fields=["count(*)"],
                consistency_level="Strong",
            )  # fmt: skip
        return cast(int, one["count(*)"])

    def scan(self, fields: Sequence[str], expression: str = "") -> Iterator[list[dict[str, Any]]]:
        """Read all rows, a page at a time."""
        with milvus_errors(str(self._address)):
            pages = self._client.query_iterator(
                self._address.name, batch_size=PAGE_ROWS, filter=expression,
                output_fields=list(fields), consistency_level="Strong",
            )  # fmt: skip
            try:
                while page := pages.next():
                    yield page
            finally:
                pages.close()

    def fetch(self, ids: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any]]:
        """Read those of the rows that are there, in no order."""
        found: list[dict[str, Any]] = []
        with milvus_errors(str(self._address)):
            for start in range(0, len(ids), PAGE_ROWS):
                found += self._client.query(
                    self._address.name, ids=list(ids[start : start + PAGE_ROWS]),
                    output_fields=["id", *fields], consistency_level="Strong",
                )  # fmt: skip
        return found

    def search_index(
        self,
        queries_QD: NDArray[np.float32],
        k: int,
        expression: str,
        *,
        metric: str,
        settings: Mapping[str, int],
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Have Milvus search: (Q, K) scores and ids, padded; equal scores by their ids.

        Args:
            queries_QD: (Q, D) float32.
            k: neighbours a query.
            expression: which rows may be found.
            metric: how vectors are compared, by our name.
            settings: search parameters, by Milvus's names.
        """
        query_bytes = max(4 * queries_QD.shape[1], NEIGHBOUR_BYTES * k)
        step = max(1, min(PAGE_ROWS, MAX_MESSAGE_BYTES // query_bytes))
        found: list[Any] = []
        with milvus_errors(str(self._address)):
            for start in range(0, len(queries_QD), step):
                found += self._client.search(
                    self._address.name, data=list(queries_QD[start : start + step]),
                    anns_field=VECTOR, limit=k,
                    filter=expression, output_fields=["id"], consistency_level="Strong",
                    search_params={"metric_type": METRICS[metric], "params": dict(settings)},
                )  # fmt: skip
        sign = 1 if metric == COSINE else -1
        scores_QK, ids_QK = padding(len(queries_QD), k)
        for ids_K, scores_K, hits in zip(ids_QK, scores_QK, found, strict=True):
            ids = np.array([hit["id"] for hit in hits], np.int64)
            scores = np.array([sign * hit["distance"] for hit in hits], np.float32)
            order = np.lexsort((ids, -scores))
            ids_K[: len(ids)], scores_K[: len(ids)] = ids[order], scores[order]
        return scores_QK, ids_QK

    def search_exactly(
        self,
        queries_QD: NDArray[np.float32],
        k: int,
        expression: str,
        *,
        metric: str,
        threads: int,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Read every vector and compare it here; the result is as `search_index` gives it."""
        best = padding(len(queries_QD), k)
        for page in self.scan(["id", VECTOR], expression):
            ids_N = np.array([one["id"] for one in page], np.int64)
            vectors_ND = to_vectors(page, queries_QD.shape[1])
            scores_QK, rows_QK = knn_search(
                queries_QD, vectors_ND, k, threads=threads, metric=metric
            )
            ids_QK = np.where(rows_QK < 0, MISSING, ids_N[rows_QK])
            best = merge_neighbours([best, (scores_QK, ids_QK)], k)
        return best
