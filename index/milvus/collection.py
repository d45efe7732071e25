"""A collection in Milvus, behind the interface of one on disk (`index.collection`).

Rules:
    Ids, keys, fingerprints, filters and scores are those of a collection on disk: the same
    tests hold for both.
    It is no snapshot: every call sees what was written before it, by anybody. Columns are
    those of the time when it was opened.
    An exact search reads every vector over the wire, whatever the index.

Shapes: Q queries, N rows, D dimensions, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from index.errors import UnknownIdError
from index.filters import parse_filter_as
from index.knn import MISSING, knn_search, merge_neighbours, pad_neighbours
from index.milvus.connection import MilvusAddress, connect, milvus_errors, read_address
from index.milvus.description import METRICS, VECTOR, Description, read_description
from index.milvus.filters import MilvusDialect
from index.milvus.rows import to_table, to_vectors
from index.neighbours import (
    Neighbours,
    check_queries,
    check_without,
    leave_out,
    no_neighbours,
)
from index.storage.ids import id_of
from index.storage.rows import Row, read_rows
from models.cpu import cpu_budget
from models.errors import FingerprintMismatchError, UsageError

if TYPE_CHECKING:
    from pymilvus import MilvusClient

MAX_NEIGHBOURS = 16_384
"""The most that Milvus gives for a query."""

EF_SEARCH = 64
PAGE_ROWS = 1000
"""Rows asked for at once: of 2,048 dimensions, eight megabytes."""

_PARAMETERS = {"hnsw": {"efSearch": "ef"}, "flat": {}}
"""Search parameters by their names on disk, and by Milvus's."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MilvusSelection:
    """What a filter leaves.

    Attributes:
        filter: its text.
        expression: the same for Milvus.
        count: how many rows it chose when it was made.
    """

    filter: str
    expression: str
    count: int


class MilvusCollection:
    """An open collection. Close it, or use it as a context manager."""

    def __init__(
        self,
        client: MilvusClient,
        address: MilvusAddress,
        description: Description,
        *,
        threads: int | None = None,
    ) -> None:
        """Take over a client that is connected."""
        self.address = address
        self.description = description
        self._client = client
        self._threads = threads or cpu_budget()

    @classmethod
    def open(cls, address: str, *, threads: int | None = None) -> MilvusCollection:
        """Open the collection at an address: see `index.milvus.connection`.

        Raises:
            UsageError: the address is none.
            CollectionError: nothing answers, or there is no such collection of Horace's.
        """
        read = read_address(address)
        client = connect(read.uri)
        with milvus_errors(str(read), mend="make it with `python -m index.build --store`"):
            described = client.describe_collection(read.name)
            client.load_collection(read.name)
        return cls(client, read, read_description(read, described), threads=threads)

    def __repr__(self) -> str:
        return f"<MilvusCollection {self.address} fingerprint={self.fingerprint[:12]}>"

    def __enter__(self) -> MilvusCollection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    @property
    def name(self) -> str:
        """A word for people."""
        return self.description.name

    @property
    def fingerprint(self) -> str:
        """The encoder that made every vector here."""
        return self.description.fingerprint

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.description.dim

    @property
    def metric(self) -> str:
        """How vectors are compared."""
        return self.description.metric

    @property
    def encoder(self) -> str:
        """URI or path of the encoder when the collection was built."""
        return self.description.encoder

    @property
    def factory(self) -> str:
        """The kind of index: as on disk, `HNSW32` or `Flat`."""
        return {"hnsw": "HNSW32", "flat": "Flat"}[self.description.index]

    @property
    def count(self) -> int:
        """Images in the collection, now."""
        return self._count("")

    @property
    def ids(self) -> NDArray[np.int64]:
        """(N,) int64: every id, rising."""
        pages = [[one["id"] for one in page] for page in self._scan(["id"])]
        return np.sort(np.array([id_ for page in pages for id_ in page], np.int64))

    @property
    def version(self) -> tuple[int, int]:
        """Nothing that would change: a collection in Milvus is no snapshot."""
        return (0, 0)

    def latest(self) -> MilvusCollection:
        """Give the collection with the columns that it has now."""
        with milvus_errors(str(self.address)):
            described = self._client.describe_collection(self.address.name)
        description = read_description(self.address, described)
        return MilvusCollection(self._client, self.address, description, threads=self._threads)

    def require(self, fingerprint: str) -> None:
        """Refuse another encoder's vectors.

        Raises:
            FingerprintMismatchError: `fingerprint` is not the collection's; names both.
        """
        if fingerprint != self.fingerprint:
            raise FingerprintMismatchError(
                f"collection {self.name}",
                expected=self.fingerprint,
                found=fingerprint,
                mend="query it with the encoder that built it, or build it again with this one",
            )

    def search(
        self,
        queries_QD: NDArray[np.float32],
        k: int,
        *,
        fingerprint: str,
        exact: bool = False,
        parameters: Mapping[str, int] | None = None,
        filter: str | MilvusSelection | None = None,
        without_QW: NDArray[np.int64] | None = None,
    ) -> Neighbours:
        """Find the k nearest images of each query: see `Collection.search`.

        Raises:
            FingerprintMismatchError: another encoder made the queries.
            FilterError: the filter cannot be read.
            UsageError: as of a collection on disk; and k is over 16,384.
            CollectionError: Milvus does not answer.
        """
        self.require(fingerprint)
        queries_QD = check_queries(queries_QD, k, self.dim)
        n_without = 0 if without_QW is None else check_without(without_QW, len(queries_QD))
        count = self.count
        k_asked = min(k + n_without, count)
        settings = self._settings(parameters or {}, k_asked)
        selection = self.select(filter) if isinstance(filter, str) else filter
        expression = "" if selection is None else selection.expression
        if not count or not len(queries_QD):
            return no_neighbours(len(queries_QD), min(k, count))
        if exact:
            scores, ids = self._search_exactly(queries_QD, k_asked, expression)
        else:
            scores, ids = self._search_index(queries_QD, k_asked, expression, settings)
        found = Neighbours(ids=ids, scores=scores)
        return found if without_QW is None else leave_out(found, without_QW, k)

    def select(
        self, filter: str, *, source_names: Callable[[str], str] | None = None
    ) -> MilvusSelection:
        """Choose the images of which a filter is true, for one search or many.

        Args:
            filter: see `index.filters`.
            source_names: gives the name by which the filter knows a source; its URI where None.

        Raises:
            FilterError: the filter cannot be read.
        """
        uris = self.description.sources
        names = None if source_names is None else {uri: source_names(uri) for uri in uris}
        expression = parse_filter_as(MilvusDialect(names), filter, self.description.columns)
        return MilvusSelection(filter=filter, expression=expression, count=self._count(expression))

    def effort_parameters(self, candidates: int) -> dict[str, int]:
        """Give the parameters by which the index weighs so many candidates for a query."""
        return {name: candidates for name in _PARAMETERS[self.description.index]}

    def search_ids(
        self,
        ids: ArrayLike,
        k: int,
        *,
        exact: bool = False,
        parameters: Mapping[str, int] | None = None,
        filter: str | MilvusSelection | None = None,
    ) -> Neighbours:
        """Find the k nearest images of stored ones, each left out of its own neighbours.

        Raises:
            UnknownIdError: an id is not in the collection.
            FilterError: the filter cannot be read.
            UsageError: k is below 1.
        """
        ids_Q = np.asarray(ids, dtype=np.int64)
        return self.search(
            self.vectors(ids_Q), k, fingerprint=self.fingerprint, exact=exact,
            parameters=parameters, filter=filter, without_QW=ids_Q[:, None],
        )  # fmt: skip

    def vectors(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Give the stored vectors, (n, D) float32.

        Raises:
            UnknownIdError: an id is not in the collection.
        """
        return to_vectors(self._look_up(ids, [VECTOR]), self.dim)

    def rows(self, ids: ArrayLike) -> list[Row]:
        """Give the metadata of images, in the order asked for.

        Raises:
            UnknownIdError: an id is not in the collection.
        """
        columns = self.description.columns
        return read_rows(to_table(self._look_up(ids, columns.names), columns))

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Give the metadata of every row, in the order of `ids`.

        Args:
            columns: which; all that there are where None.
        """
        schema = self.description.columns
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns])
        entities = [one for page in self._scan(["id", *schema.names]) for one in page]
        entities.sort(key=lambda one: cast(int, one["id"]))
        return to_table(entities, schema)

    def labels(self) -> list[str | None]:
        """Give the label of every row, in the order of `ids`."""
        return cast(list[str | None], self.table(["label"])["label"].to_pylist())

    def keys(self) -> list[str]:
        """Give the key of every row, in the order of `ids`."""
        return cast(list[str], self.table(["key"])["key"].to_pylist())

    def find_key(self, key: str) -> int:
        """Give the id of the image with this key.

        Raises:
            UnknownIdError: no image has it.
        """
        id_ = id_of(key)
        found = self._fetch([id_], ["key"])
        if not found or found[0]["key"] != key:
            raise UnknownIdError(
                f"key {key!r}",
                expected=f"a key of the {self.count} in collection {self.name}",
                found="none such",
            )
        return id_

    def keys_of(self, ids: Sequence[int]) -> dict[int, str]:
        """Give the keys of those ids that are there."""
        return {one["id"]: one["key"] for one in self._fetch(ids, ["key"])}

    def _settings(self, parameters: Mapping[str, int], k: int) -> dict[str, int]:
        """Check the parameters of a search, and give them Milvus's names.

        Raises:
            UsageError: the index has no such parameter, or k is more than Milvus gives.
        """
        if k > MAX_NEIGHBOURS:
            raise UsageError("k", expected=f"at most {MAX_NEIGHBOURS} from Milvus", found=str(k))
        known: Mapping[str, str] = _PARAMETERS[self.description.index]
        for name, value in parameters.items():
            if name not in known or value < 1:
                raise UsageError(
                    f"search parameter {name}",
                    expected=f"{' or '.join(known)} of at least 1"
                    if known
                    else f"none for {self.factory}",
                    found=str(value),
                )
        effort = max(parameters.get("efSearch", EF_SEARCH), k)
        return {name: effort for name in known.values()}

    def _search_index(
        self,
        queries_QD: NDArray[np.float32],
        k: int,
        expression: str,
        settings: Mapping[str, int],
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Ask Milvus; equal scores in the order of their ids."""
        with milvus_errors(str(self.address)):
            found = self._client.search(
                self.address.name, data=list(queries_QD), anns_field=VECTOR, limit=k,
                filter=expression, output_fields=["id"], consistency_level="Strong",
                search_params={"metric_type": METRICS[self.metric], "params": dict(settings)},
            )  # fmt: skip
        sign = 1 if self.metric == "cosine" else -1
        ids_QK = np.full((len(queries_QD), k), MISSING, np.int64)
        scores_QK = np.full((len(queries_QD), k), -np.inf, np.float32)
        for ids_K, scores_K, hits in zip(ids_QK, scores_QK, found, strict=True):
            ids = np.array([hit["id"] for hit in hits], np.int64)
            scores = np.array([sign * hit["distance"] for hit in hits], np.float32)
            order = np.lexsort((ids, -scores))
            ids_K[: len(ids)], scores_K[: len(ids)] = ids[order], scores[order]
        return scores_QK, ids_QK

    def _search_exactly(
        self, queries_QD: NDArray[np.float32], k: int, expression: str
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Compare every vector, a page at a time."""
        best = pad_neighbours(
            np.empty((len(queries_QD), 0), np.float32), np.empty((len(queries_QD), 0), np.int64), k
        )
        for page in self._scan(["id", VECTOR], expression):
            ids_N = np.array([one["id"] for one in page], np.int64)
            scores_QK, rows_QK = knn_search(
                queries_QD, to_vectors(page, self.dim), k, threads=self._threads, metric=self.metric
            )
            ids_QK = np.where(rows_QK < 0, MISSING, ids_N[rows_QK])
            best = merge_neighbours([best, (scores_QK, ids_QK)], k)
        return best

    def _count(self, expression: str) -> int:
        """Count rows."""
        with milvus_errors(str(self.address)):
            (one,) = self._client.query(
                self.address.name, filter=expression, output_fields=["count(*)"],
                consistency_level="Strong",
            )  # fmt: skip
        return cast(int, one["count(*)"])

    def _scan(self, fields: Sequence[str], expression: str = "") -> Iterator[list[dict[str, Any]]]:
        """Read all rows, a page at a time."""
        with milvus_errors(str(self.address)):
            pages = self._client.query_iterator(
                self.address.name, batch_size=PAGE_ROWS, filter=expression,
                output_fields=list(fields), consistency_level="Strong",
            )  # fmt: skip
            try:
                while page := pages.next():
                    yield page
            finally:
                pages.close()

    def _look_up(self, ids: ArrayLike, fields: Sequence[str]) -> list[dict[str, Any]]:
        """Read the rows of ids, in their order.

        Raises:
            UnknownIdError: one is not there.
        """
        asked: list[int] = np.asarray(ids, np.int64).tolist()
        found = {one["id"]: one for one in self._fetch(asked, fields)}
        for id_ in asked:
            if id_ not in found:
                raise UnknownIdError(
                    f"id {id_}",
                    expected=f"an id of the {self.count} in collection {self.name}",
                    found="none such",
                    mend="take ids from a search of this collection",
                )
        return [found[id_] for id_ in asked]

    def _fetch(self, ids: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any]]:
        """Read those of the rows that are there, in no order."""
        found: list[dict[str, Any]] = []
        with milvus_errors(str(self.address)):
            for start in range(0, len(ids), PAGE_ROWS):
                found += self._client.query(
                    self.address.name, ids=list(ids[start : start + PAGE_ROWS]),
                    output_fields=["id", *fields], consistency_level="Strong",
                )  # fmt: skip
        return found
