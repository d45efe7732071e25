"""The one who writes a collection in Milvus, behind the interface of `CollectionWriter`.

Rules:
    A row is written with its vector, whole or not at all; a call of many rows is cut into
    messages, and one that fails midway leaves those before it: the same `upsert` mends it.
    Milvus keeps what it acknowledged, and has no lock: of two writers the later one wins.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from index.milvus.collection import MilvusCollection
from index.milvus.connection import connect, milvus_errors, read_address
from index.milvus.description import Description, make_index, make_schema, to_properties
from index.milvus.reading import MAX_MESSAGE_BYTES, PAGE_ROWS
from index.milvus.rows import to_entities
from index.storage.ids import as_ids
from index.storage.incoming import check_keys, check_table, check_vectors, prepare_rows
from models.errors import UsageError


class MilvusWriter:
    """Writes to a collection. Close it, or use it as a context manager."""

    def __init__(self, collection: MilvusCollection) -> None:
        """Write to an open collection, which is closed with this."""
        self.collection = collection
        self._client = collection._client

    @classmethod
    def create(cls, address: str, description: Description) -> MilvusWriter:
        """Make an empty collection.

        Raises:
            UsageError: the address is none, or its name is taken.
            CollectionError: Milvus does not answer, or refuses.
        """
        read = read_address(address)
        client = connect(read.uri)
        with milvus_errors(str(read)):
            if client.has_collection(read.name):
                raise UsageError(
                    str(read), expected="a new name", found="a collection",
                    mend="choose another name, or replace it with --replace",
                )  # fmt: skip
            client.create_collection(
                read.name,
                schema=make_schema(client, description.dim),
                index_params=make_index(client, description),
                properties=to_properties(description),
                consistency_level="Strong",
            )
        return cls(MilvusCollection(client, read, description, own_name=read.name))

    @classmethod
    def open(cls, address: str) -> MilvusWriter:
        """Open a collection to write to it.

        Raises:
            UsageError: the address is none.
            CollectionError: nothing answers, or there is no such collection of Horace's.
        """
        return cls(MilvusCollection.open(address))

    def __enter__(self) -> MilvusWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self.collection.close()

    def add(self, rows: pa.Table, vectors_ND: ArrayLike, *, fingerprint: str) -> None:
        """Add images that are not there yet.

        Args:
            rows: at least key, label and source of each.
            vectors_ND: (N, D) float32, unit length.
            fingerprint: of the encoder that made the vectors.

        Raises:
            FingerprintMismatchError: another encoder made them.
            UsageError: rows or vectors are not of this shape, a key comes twice or is there
                already; none was added.
            CollectionError: another key has the id of one, or Milvus refuses.
        """
        self._put(rows, vectors_ND, fingerprint, replace=False)

    def upsert(self, rows: pa.Table, vectors_ND: ArrayLike, *, fingerprint: str) -> None:
        """Add images, in the place of those that have their keys; see `add`."""
        self._put(rows, vectors_ND, fingerprint, replace=True)

    def delete(self, ids: ArrayLike) -> int:
        """Delete images; give how many were there.

        Raises:
            UsageError: what is given is no whole numbers.
            CollectionError: Milvus refuses.
        """
        asked: list[int] = np.unique(as_ids(ids)).tolist()
        there = list(self.collection.keys_of(asked))
        address = self.collection.own_address
        with milvus_errors(str(address)):
            for start in range(0, len(there), PAGE_ROWS):
                self._client.delete(address.name, ids=there[start : start + PAGE_ROWS])
        return len(there)

    def seal(self) -> None:
        """Have Milvus make segments, with an index, of what was written."""
        address = self.collection.own_address
        with milvus_errors(str(address)):
            self._client.flush(address.name)

    def describe(self, description: Description) -> None:
        """Change what the collection says of itself."""
        address = self.collection.own_address
        with milvus_errors(str(address)):
            self._client.alter_collection_properties(
                address.name, properties=to_properties(description)
            )
        self.collection.description = description

    def _put(
        self, rows: pa.Table, vectors_ND: ArrayLike, fingerprint: str, *, replace: bool
    ) -> None:
        """Hold rows and vectors against the collection, and write them."""
        collection = self.collection
        collection.require(fingerprint)
        check_table(rows)
        vectors = check_vectors(vectors_ND, len(rows), dim=collection.dim, metric=collection.metric)
        table = prepare_rows(rows, collection.description.columns)
        there = collection.keys_of(cast(list[int], table["id"].to_pylist()))
        check_keys(table, there, replace=replace)
        description = collection.description.with_columns(table.schema)
        if description.columns != collection.description.columns:
            self.describe(description)
        step = max(1, min(PAGE_ROWS, MAX_MESSAGE_BYTES // (4 * collection.dim)))
        for start in range(0, len(table), step):
            entities = to_entities(
                table.slice(start, step), vectors[start : start + step], description.columns.names
            )
            with milvus_errors(str(collection.own_address)):
                self._client.upsert(collection.own_address.name, data=entities)
