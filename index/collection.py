"""A collection of images: vectors of one encoder, their ids and metadata, searchable.

Rules:
    Every query says which encoder made it; another encoder's is refused, whatever its
    dimension. Scores are best first: cosines, of unit vectors, or where the metric is Euclidean
    minus the squared distance, of vectors of any length.
    Ids are 63-bit hashes of the images' keys: they outlive a rebuild and fit an int64.
    An open collection never changes, whatever is written to its files; any number of threads
    may search it. `latest` gives what is there now, and shares what has not changed.
    Deleted images are nowhere: not found, not counted, not chosen by a filter.
    Files are held against the manifest's checksums before they are read.

It does not embed (`index.embed`), nor write (`index.build`, `index.storage.writer`).

Shapes: Q queries, N rows, D dimensions, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Self, cast

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from index.errors import CollectionError, UnknownIdError, unknown_id
from index.knn import MISSING, merge_neighbours
from index.milvus.connection import require_directory
from index.neighbours import Neighbours as Neighbours
from index.neighbours import check_fingerprint, check_queries, leave_out, no_neighbours
from index.selection import Selection
from index.storage.ids import as_ids
from index.storage.ids import id_of as id_of
from index.storage.publishing import count_sources
from index.storage.rows import Row as Row
from index.storage.rows import in_schema, read_rows, take_rows
from index.storage.segment import FLAT
from index.storage.snapshot import Snapshot
from index.storage.store import Store
from models.cpu import cpu_budget
from models.errors import UsageError


class Collection:
    """An open collection. Use `Collection.open`; close it, or use it as a context manager."""

    def __init__(self, store: Store, snapshot: Snapshot, *, threads: int) -> None:
        """Look at a snapshot of a store; use `open`."""
        self.path = store.path
        self.manifest = snapshot.manifest
        self._store = store
        self._kept: Snapshot | None = snapshot
        self._threads = threads
        self.version: Hashable = snapshot.version
        """Of what is there; another after every write."""
        self.count = snapshot.count
        """Images in the collection."""

    @classmethod
    def open(
        cls, path: str | Path, *, verify: bool = True, threads: int | None = None
    ) -> Collection:
        """Open the collection in a directory.

        Args:
            path: the directory that `index.build` wrote.
            verify: whether to hash every file that is read; sizes are always checked.
            threads: CPU threads of a search; the CPU budget where None.

        Raises:
            CollectionError: there is none, or a file is missing, damaged or foreign.
            UsageError: it is the address of a Milvus.
        """
        require_directory(path)
        store = Store(Path(path), verify=verify)
        return cls(store, store.snapshot, threads=threads or cpu_budget())

    def latest(self) -> Self:
        """Give the collection as it is now, by whatever process it was written.

        Returns:
            This one where nothing was written. Where the directory was replaced by another
            collection's, that one; its fingerprint may be another.

        Raises:
            CollectionError: it is closed, or a new file is missing, damaged or foreign.
        """
        kept, snapshot = self._snapshot, self._store.latest()
        if snapshot is kept:
            return self
        return type(self)(self._store, snapshot, threads=self._threads)

    def is_current(self) -> bool:
        """Tell whether `latest` would give this collection; no file is read for it."""
        return self._kept is not None and self._store.is_latest(self._kept)

    def __repr__(self) -> str:
        return (
            f"<Collection {self.name} {self.count} x {self.dim} {self.factory} "
            f"fingerprint={self.fingerprint[:12]}>"
        )

    def __enter__(self) -> Collection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of files and memory; searches that are under way end well."""
        self._kept = None

    @property
    def name(self) -> str:
        """A word for people."""
        return self.manifest.name

    @property
    def fingerprint(self) -> str:
        """The encoder that made every vector here."""
        return self.manifest.fingerprint

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.manifest.dim

    @property
    def metric(self) -> str:
        """How vectors are compared: `cosine` or `euclidean`."""
        return self.manifest.metric

    @property
    def encoder(self) -> str:
        """URI or path of the encoder when the collection was built."""
        return self.manifest.encoder

    @property
    def factory(self) -> str:
        """The FAISS factory string, or `Flat` where every search is exact."""
        factories = dict.fromkeys(segment.factory for segment in self.manifest.segments)
        return "+".join(factories) or FLAT

    @property
    def ids(self) -> NDArray[np.int64]:
        """(N,) int64: the id of every image, in the order in which they were written."""
        return self._snapshot.ids

    @property
    def schema(self) -> pa.Schema:
        """The columns of the metadata; see `index.storage.rows`."""
        return self._snapshot.schema

    @property
    def max_neighbours(self) -> None:
        """The most neighbours that a search gives: any number."""
        return None

    @property
    def deleted(self) -> dict[str, int]:
        """Rows that are deleted, or replaced, and still take space: by segment, "" the delta."""
        return {part.segment.entry.name: part.dead for part in self._snapshot.parts}

    @property
    def delta_count(self) -> int:
        """Images that are in no segment yet."""
        return sum(part.count for part in self._snapshot.parts if not part.segment.entry.name)

    @property
    def sources(self) -> dict[str, int]:
        """URI and number of images of each source."""
        return count_sources(self._snapshot.parts)

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
        filter: str | Selection | None = None,
        without_QW: NDArray[np.int64] | None = None,
    ) -> Neighbours:
        """Find the k nearest images of each query.

        Args:
            queries_QD: (Q, D) float32, of unit length where the metric is cosine.
            k: neighbours a query, at least 1; K is no larger than the collection.
            fingerprint: of the encoder that made the queries.
            exact: whether to search every vector instead of the index.
            parameters: of this call's search, by FAISS's names, such as `efSearch`; the
                manifest's where None.
            filter: which images may be found: a text of `index.filters`, or what `select` made
                of one; all where None.
            without_QW: (Q, W) ids that are no answers to their query; -1 stands for none.

        Raises:
            FingerprintMismatchError: another encoder made the queries.
            FilterError: the filter cannot be read.
            UsageError: k is below 1, the queries have another dimension or are not finite,
                `without_QW` is not of as many, or the index has no such parameter.
        """
        self.require(fingerprint)
        queries_QD, n_without = check_queries(queries_QD, k, self.dim, without_QW)
        snapshot = self._snapshot
        selection = self.select(filter) if isinstance(filter, str) else filter
        if selection is not None and not snapshot.made(selection):
            raise UsageError(
                "filter",
                expected=f"a selection of this state of collection {self.name}",
                found="another's",
                mend="select again, or search with the filter's text",
            )
        if not self.count:
            return no_neighbours(len(queries_QD))
        chosen = [None] * len(snapshot.parts) if selection is None else selection.chosen
        k_asked = min(k + n_without, self.count)
        own = snapshot.own_parameters(parameters or {})
        found = []
        for part, part_parameters, among in zip(snapshot.parts, own, chosen, strict=True):
            scores, rows = part.search(
                queries_QD, k_asked, exact=exact, parameters=part_parameters,
                threads=self._threads, among=among,
            )  # fmt: skip
            found.append((scores, part.segment.ids_or_missing[rows]))
        scores, ids = merge_neighbours(found, k_asked)
        neighbours = Neighbours(ids=ids, scores=scores)
        return neighbours if without_QW is None else leave_out(neighbours, without_QW, k)

    def select(self, filter: str, *, source_names: Callable[[str], str] | None = None) -> Selection:
        """Choose the images of which a filter is true, for one search or many.

        Args:
            filter: see `index.filters`; its columns are those of `table()`.
            source_names: gives the name by which the filter knows a source; its URI where None.

        Raises:
            FilterError: the filter cannot be read.
        """
        return self._snapshot.select(filter, source_names)

    def effort_parameters(self, candidates: int, k: int) -> dict[str, int]:
        """Give the parameters by which a search for k weighs so many candidates a query.

        Empty where every search is exact anyway; of segments that want different ones the most.
        """
        found: dict[str, int] = {}
        for part in self._snapshot.parts:
            index = part.segment.index
            if index is not None:
                own = index.effort_parameters(candidates, k, part.segment.entry.parameters)
                found |= {name: max(value, found.get(name, 0)) for name, value in own.items()}
        return found

    def search_ids(
        self,
        ids: ArrayLike,
        k: int,
        *,
        exact: bool = False,
        filter: str | Selection | None = None,
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
        """Give the stored vectors, (n, D) float32, of unit length where the metric is cosine.

        Raises:
            UnknownIdError: an id is not in the collection.
        """
        parts, rows = self._locate(ids)
        vectors_ND = np.empty((len(rows), self.dim), np.float32)
        for number, part in enumerate(self._snapshot.parts):
            here = parts == number
            vectors_ND[here] = part.segment.vectors_ND[rows[here]]
        return vectors_ND

    def rows(self, ids: ArrayLike) -> list[Row]:
        """Give the metadata of images, in the order asked for.

        Raises:
            UnknownIdError: an id is not in the collection.
        """
        snapshot = self._snapshot
        parts, part_rows = self._locate(ids)
        rows: list[Row | None] = [None] * len(part_rows)
        for number, part in enumerate(snapshot.parts):
            here = np.flatnonzero(parts == number)
            if here.size:
                taken = in_schema(take_rows(part.segment.rows, part_rows[here]), snapshot.schema)
                for place, row in zip(here.tolist(), read_rows(taken), strict=True):
                    rows[place] = row
        return cast(list[Row], rows)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Give the metadata of every image, in the order of `self.ids`.

        Args:
            columns: which; all that there are where None, see `index.storage.rows`.
        """
        snapshot = self._snapshot
        return snapshot.rows if columns is None else snapshot.columns(columns)

    def row_numbers(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Give the places of ids within `self.ids`.

        Raises:
            UnknownIdError: an id is not in the collection.
        """
        asked = as_ids(ids)
        places = self._snapshot.places(asked.reshape(-1))
        self._require_known(asked.reshape(-1), places)
        return places.reshape(asked.shape)

    def find_key(self, key: str) -> int:
        """Give the id of the image with this key.

        Raises:
            UnknownIdError: no image has it.
        """
        (id_,) = self.find_keys([key])
        return id_

    def find_keys(self, keys: Sequence[str]) -> list[int]:
        """Give the ids of images, in one look-up.

        Raises:
            UnknownIdError: no image has one of these keys; it is named.
        """
        ids = [id_of(key) for key in keys]
        held = self._snapshot.keys_of(np.array(ids, np.int64))
        for id_, key in zip(ids, keys, strict=True):
            if held.get(id_) == key:
                continue
            raise UnknownIdError(
                f"key {key!r}",
                expected=f"a key of the {self.count} in collection {self.name}",
                found="none such",
                mend=self._shown_key(),
            )
        return ids

    def labels(self) -> list[str | None]:
        """Give the label of every image, in the order of `self.ids`."""
        return cast(list[str | None], self.table(["label"])["label"].to_pylist())

    def keys(self) -> list[str]:
        """Give the key of every image, in the order of `self.ids`."""
        return cast(list[str], self.table(["key"])["key"].to_pylist())

    @property
    def _snapshot(self) -> Snapshot:
        """Give the snapshot, unless the collection was closed."""
        if self._kept is None:
            raise CollectionError(f"collection {self.name}", expected="an open one", found="closed")
        return self._kept

    def _locate(self, ids: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give the part and the row in it of each id."""
        asked = as_ids(ids).reshape(-1)
        parts, rows = self._snapshot.locate(asked)
        self._require_known(asked, parts)
        return parts, rows

    def _require_known(self, asked: NDArray[np.int64], found: NDArray[np.int64]) -> None:
        """Refuse ids that are not there."""
        unknown = asked[found == MISSING]
        if unknown.size:
            raise unknown_id(int(unknown[0]), count=self.count, name=self.name)

    def _shown_key(self) -> str:
        """Show what keys look like here."""
        snapshot = self._snapshot
        keys = snapshot.keys_of(snapshot.ids[:1]).values()
        return f"keys here look like {next(iter(keys))!r}" if keys else "it is empty"


def version_text(version: Hashable) -> str:
    """Write the version of a collection for people and for the wire, such as `3.17`."""
    return ".".join(map(str, version)) if isinstance(version, tuple) else str(version)
