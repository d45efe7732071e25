"""What every collection can do, whoever keeps its vectors, and how to open one by its address.

`index.collection` keeps them in a directory with FAISS, `index.milvus` in a Milvus. The tests in
`tests/index/test_conformance.py` say what both do alike.

Shapes: Q queries, N rows, D dimensions, K neighbours, W ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from index.storage.rows import Row

if TYPE_CHECKING:
    from index.neighbours import Neighbours


class AnySelection(Protocol):
    """What a filter leaves of a collection; only that collection can make use of it."""

    @property
    def filter(self) -> str:
        """Its text."""

    @property
    def count(self) -> int:
        """How many images it left."""


class AnyCollection(Protocol):
    """A collection that is open to be searched; `index.collection.Collection` says how."""

    @property
    def name(self) -> str:
        """A word for people."""

    @property
    def fingerprint(self) -> str:
        """The encoder that made every vector."""

    @property
    def dim(self) -> int:
        """Length of a vector."""

    @property
    def metric(self) -> str:
        """How vectors are compared: `cosine` or `euclidean`."""

    @property
    def factory(self) -> str:
        """The kind of index."""

    @property
    def encoder(self) -> str:
        """URI or path of the encoder when the collection was built."""

    @property
    def count(self) -> int:
        """Images in the collection."""

    @property
    def ids(self) -> NDArray[np.int64]:
        """(N,) int64: the id of every image."""

    @property
    def max_neighbours(self) -> int | None:
        """The most neighbours that a search of the index gives; None where it gives any number."""

    def latest(self) -> Self:
        """Give the collection as it is now."""

    def require(self, fingerprint: str) -> None:
        """Refuse another encoder's vectors."""

    def search(
        self,
        queries_QD: NDArray[np.float32],
        k: int,
        *,
        fingerprint: str,
        exact: bool = False,
        parameters: Mapping[str, int] | None = None,
        filter: Any = None,  # a text, or what this collection's own `select` gave
        without_QW: NDArray[np.int64] | None = None,
    ) -> Neighbours:
        """Find the k nearest images of each query."""

    def select(
        self, filter: str, *, source_names: Callable[[str], str] | None = None
    ) -> AnySelection:
        """Choose the images of which a filter is true."""

    def effort_parameters(self, candidates: int, k: int) -> dict[str, int]:
        """Give the parameters by which a search for k weighs so many candidates a query."""

    def search_ids(
        self,
        ids: ArrayLike,
        k: int,
        *,
        exact: bool = False,
        filter: Any = None,  # as in `search`
    ) -> Neighbours:
        """Find the k nearest images of stored ones."""

    def vectors(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Give stored vectors."""

    def rows(self, ids: ArrayLike) -> list[Row]:
        """Give the metadata of images."""

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Give the metadata of every image, in the order of `ids`."""

    def keys(self) -> list[str]:
        """Give the key of every image, in the order of `ids`."""

    def labels(self) -> list[str | None]:
        """Give the label of every image, in the order of `ids`."""

    def find_key(self, key: str) -> int:
        """Give the id of the image with this key."""

    def close(self) -> None:
        """Let go of files or connections."""


def open_collection(address: str, *, threads: int | None = None) -> AnyCollection:
    """Open a collection by its directory, or by `milvus:URI#NAME`.

    Raises:
        UsageError: the address is none.
        CollectionError: there is none, it is damaged, or it does not answer.
    """
    from index.milvus.connection import is_milvus

    if is_milvus(address):
        from index.milvus.collection import MilvusCollection

        return MilvusCollection.open(address, threads=threads)
    from index.collection import Collection

    return Collection.open(address, threads=threads)
