"""A collection in Milvus, behind the interface of one on disk (`index.collection`).

Rules:
    Ids, keys, fingerprints, filters and scores are those of a collection on disk: the same
    tests hold for both.
    It is no snapshot: every call sees what was written before it, by anybody. Columns are
    those of the time when it was opened. Where another build has taken the name meanwhile there
    is nothing more to see, but through `latest`: its encoder may be another.
    An exact search reads every vector over the wire, whatever the index.

Shapes: Q queries, N rows, D dimensions, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from index.ann.ann_index import GRAPH_SLACK
from index.ann.kinds import EF_SEARCH, NEIGHBOURS
from index.errors import CollectionError, UnknownIdError, unknown_id
from index.filters import parse_filter_as
from index.milvus.connection import (
    MilvusAddress,
    connect,
    is_file,
    milvus_errors,
    read_address,
)
from index.milvus.description import VECTOR, Description, read_description
from index.milvus.filters import MilvusDialect
from index.milvus.reading import MilvusReader
from index.milvus.rows import to_table, to_vectors
from index.neighbours import (
    Neighbours,
    check_fingerprint,
    check_queries,
    leave_out,
    no_neighbours,
)
from index.storage.ids import as_ids, id_of
from index.storage.rows import Row, read_rows
from index.storage.segment import check_parameters
from models.cpu import cpu_budget
from models.errors import UsageError

if TYPE_CHECKING:
    from pymilvus import MilvusClient

MAX_NEIGHBOURS = 16_384
"""The most that Milvus gives for a query."""

FEW = 1_000
"""Images that a filter leaves, at most, that are read and compared here: an index would look for
them among all others, and seldom find them."""

MAX_EFFORT = 32_768
"""The most candidates of its graph that it weighs for one."""

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
        own_name: str,
        threads: int | None = None,
    ) -> None:
        """Take over a client that is connected.

        Args:
            client: closed with this.
            address: by which it was opened.
            description: what it holds.
            own_name: of the collection, for which the address may be an alias.
            threads: CPU threads of an exact search; the CPU budget where None.
        """
        self.address = address
        self.description = description
        self.own_address = MilvusAddress(uri=address.uri, name=own_name)
        """Of the collection itself, whatever becomes of its alias."""
        self._client = client
        self._threads = threads or cpu_budget()
        self._reader = MilvusReader(client, self.own_address)

    @classmethod
    def open(cls, address: str, *, threads: int | None = None) -> MilvusCollection:
        """Open the collection at an address: see `index.milvus.connection`.

        Raises:
            UsageError: the address is none.
            CollectionError: nothing answers, or there is no such collection of Horace's.
        """
        read = read_address(address)
        if is_file(read.uri) and not Path(read.uri).exists():  # it would be made
            raise CollectionError(
                str(read), expected="a file of Milvus Lite", found="none", mend="check the path"
            )
        client = connect(read.uri)
        with milvus_errors(str(read), mend="make it with `python -m index.build --store`"):
            described = client.describe_collection(read.name)
            client.load_collection(read.name)
        description = read_description(read, described)
        own_name = described["collection_name"]
        return cls(client, read, description, own_name=own_name, threads=threads)

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
        return self._reader.count()

    @property
    def ids(self) -> NDArray[np.int64]:
        """(N,) int64: every id, rising."""
        pages = [[one["id"] for one in page] for page in self._reader.scan(["id"])]
        return np.sort(np.array([id_ for page in pages for id_ in page], np.int64))

    @property
    def version(self) -> tuple[int, int]:
        """Nothing that would change: a collection in Milvus is no snapshot."""
        return (0, 0)

    @property
    def max_neighbours(self) -> int:
        """The most neighbours that Milvus gives for a query; an exact search gives any number."""
        return MAX_NEIGHBOURS

    def latest(self) -> MilvusCollection:
        """Give the collection with the columns that it has now."""
        with milvus_errors(str(self.address)):
            described = self._client.describe_collection(self.address.name)
        description = read_description(self.address, described)
        return MilvusCollection(
            self._client, self.address, description, own_name=described["collection_name"],
            threads=self._threads,
        )  # fmt: skip

    def require(self, fingerprint: str) -> None:
        """Refuse another encoder's vectors.

        Raises:
            FingerprintMismatchError: `fingerprint` is not the collection's; names both.
        """
        check_fingerprint(self.name, expected=self.fingerprint, found=fingerprint)

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
            UsageError: as of a collection on disk; and k is over 16,384, ids left out among
                them, and the search is not exact.
            CollectionError: Milvus does not answer.
        """
        self.require(fingerprint)
        queries_QD, n_without = check_queries(queries_QD, k, self.dim, without_QW)
        count = self.count
        k_asked = min(k + n_without, count)
        settings = self._settings(parameters or {}, k_asked)
        if k_asked > self.max_neighbours and not exact:
            raise UsageError(
                "k",
                expected=f"at most {self.max_neighbours} from Milvus",
                found=str(k_asked),
                mend="ask for fewer, or search exactly",
            )
        selection = self.select(filter) if isinstance(filter, str) else filter
        expression = "" if selection is None else selection.expression
        if not count or not len(queries_QD):
            return no_neighbours(len(queries_QD), min(k, count))
        search_exactly = partial(
            self._reader.search_exactly, k=k_asked, expression=expression, metric=self.metric,
            threads=self._threads,
        )  # fmt: skip
        if exact or (selection is not None and selection.count <= FEW):
            scores, ids = search_exactly(queries_QD)
        else:
            scores, ids = self._reader.search_index(
                queries_QD, k_asked, expression, metric=self.metric, settings=settings
            )
            if selection is not None:  # whose images may lie where the index does not get to
                is_short = (ids >= 0).sum(axis=1) < min(k_asked, selection.count)
                if is_short.any():
                    scores[is_short], ids[is_short] = search_exactly(queries_QD[is_short])
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
        count = self._reader.count(expression)
        return MilvusSelection(filter=filter, expression=expression, count=count)

    def effort_parameters(self, candidates: int, k: int) -> dict[str, int]:
        """Give the parameters by which a search for k weighs so many candidates a query."""
        return {name: candidates for name in _PARAMETERS[self.description.index]}

    def search_ids(
        self,
        ids: ArrayLike,
        k: int,
        *,
        exact: bool = False,
        filter: str | MilvusSelection | None = None,
    ) -> Neighbours:
        """Find the k nearest images of stored ones, each left out of its own neighbours.

        Raises:
            UnknownIdError: an id is not in the collection.
            FilterError: the filter cannot be read.
            UsageError: k is below 1.
        """
        ids_Q = as_ids(ids).reshape(-1)
        return self.search(
            self.vectors(ids_Q), k, fingerprint=self.fingerprint, exact=exact, filter=filter,
            without_QW=ids_Q[:, None],
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
        entities = [one for page in self._reader.scan(["id", *schema.names]) for one in page]
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
        found = self._reader.fetch([id_], ["key"])
        if not found or found[0]["key"] != key:
            raise UnknownIdError(
                f"key {key!r}",
                expected=f"a key of the {self.count} in collection {self.name}",
                found="none such",
            )
        return id_

    def keys_of(self, ids: Sequence[int]) -> dict[int, str]:
        """Give the keys of those ids that are there."""
        return {one["id"]: one["key"] for one in self._reader.fetch(ids, ["key"])}

    def _settings(self, parameters: Mapping[str, int], k: int) -> dict[str, int]:
        """Check the parameters of a search, and give them Milvus's names.

        Where none is given it is as on disk, see `AnnIndex.scale`: for `MAX_NEIGHBOURS` 32,768, as
        much as any Milvus takes (milvus#3738).

        Raises:
            UsageError: the index has no such parameter.
        """
        known: Mapping[str, str] = _PARAMETERS[self.description.index]
        check_parameters(parameters, known, self.factory)
        least = max(EF_SEARCH, GRAPH_SLACK * k if k > NEIGHBOURS else k)
        effort = min(max(parameters.get("efSearch", least), k), MAX_EFFORT)
        return {name: effort for name in known.values()}

    def _look_up(self, ids: ArrayLike, fields: Sequence[str]) -> list[dict[str, Any]]:
        """Read the rows of ids, in their order.

        Raises:
            UnknownIdError: one is not there.
        """
        asked: list[int] = as_ids(ids).reshape(-1).tolist()
        found = {one["id"]: one for one in self._reader.fetch(asked, fields)}
        for id_ in asked:
            if id_ not in found:
                raise unknown_id(id_, count=self.count, name=self.name)
        return [found[id_] for id_ in asked]
