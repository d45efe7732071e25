"""A collection of images: unit vectors of one encoder, their ids and metadata, searchable.

Rules:
    Every query says which encoder made it; another encoder's is refused, whatever its
    dimension. Scores are cosines, best first.
    Ids are 63-bit hashes of the images' keys: they outlive a rebuild and fit an int64.
    An open collection never changes; any number of threads may search it.
    Files are held against the manifest's checksums before they are read.

It does not embed (`index.embed`), nor write (`index.build`).

Shapes: Q queries, N rows, D dimensions, K neighbours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from index.errors import CollectionError, UnknownIdError
from index.knn import MISSING, merge_neighbours
from index.selection import Selection, Selector
from index.storage.manifest import METRIC, Manifest, read_manifest
from index.storage.rows import Row as Row
from index.storage.rows import read_rows
from index.storage.segment import Segment, open_segment
from models.cpu import cpu_budget
from models.errors import FingerprintMismatchError, UsageError


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """What a search found, best first.

    Attributes:
        ids: (Q, K) int64; -1 where fewer than K were found.
        scores: (Q, K) float32 cosines; -inf where fewer than K were found.
    """

    ids: NDArray[np.int64]
    scores: NDArray[np.float32]


def id_of(key: str) -> int:
    """Give the id of an image: the first 63 bits of the BLAKE2b hash of its key."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Collection:
    """An open collection. Use `Collection.open`; close it, or use it as a context manager."""

    def __init__(
        self, path: Path, manifest: Manifest, segments: Sequence[Segment], *, threads: int
    ) -> None:
        """Take over opened segments, in the manifest's order."""
        self.path = path
        self.manifest = manifest
        self._segments: tuple[Segment, ...] | None = tuple(segments)
        self._starts = np.cumsum([0, *(segment.entry.count for segment in segments)])
        self._threads = threads
        # One more than there are rows, so that row -1 has the id -1.
        self._ids = np.concatenate([*(segment.ids_N for segment in segments), [MISSING]])
        self._by_id = np.argsort(self._ids[:-1], kind="stable")
        self._rows = pa.concat_tables(
            [segment.rows for segment in segments], promote_options="default"
        )
        self._selector = Selector(self._rows)

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
        """
        path = Path(path)
        manifest = read_manifest(path)
        segments = [open_segment(path, manifest, s, verify=verify) for s in manifest.segments]
        return cls(path, manifest, segments, threads=threads or cpu_budget())

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
        self._segments = None

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
        """How vectors are compared: `cosine`."""
        return METRIC

    @property
    def factory(self) -> str:
        """The FAISS factory string, or `Flat` where every search is exact."""
        return "+".join(dict.fromkeys(segment.factory for segment in self.manifest.segments))

    @property
    def count(self) -> int:
        """Images in the collection."""
        return self.manifest.count

    @property
    def ids(self) -> NDArray[np.int64]:
        """(N,) int64: the id of every row, in the order of the sources."""
        return self._ids[:-1]

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
        filter: str | Selection | None = None,
        without_QW: NDArray[np.int64] | None = None,
    ) -> Neighbours:
        """Find the k nearest images of each query.

        Args:
            queries_QD: (Q, D) float32, unit length.
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
            UsageError: k is below 1, the queries have another dimension or are not finite, or
                the index has no such parameter.
        """
        self.require(fingerprint)
        if queries_QD.ndim != 2 or queries_QD.shape[1] != self.dim:
            raise UsageError("queries", expected=f"(Q, {self.dim})", found=str(queries_QD.shape))
        if k < 1:
            raise UsageError("k", expected="at least 1", found=str(k))
        queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
        wrong = np.flatnonzero(~np.isfinite(queries_QD).all(axis=1))
        if wrong.size:
            raise UsageError(
                f"query {wrong[0]}", expected="finite numbers", found="NaN or infinity"
            )
        selection = self.select(filter) if isinstance(filter, str) else filter
        if selection is not None and len(selection.mask_N) != self.count:
            raise UsageError(
                "filter", expected=f"a selection of collection {self.name}", found="another's"
            )
        n_without = 0 if without_QW is None else without_QW.shape[1]
        k_asked = min(k + n_without, self.count)
        parts = []
        for start, segment in zip(self._starts[:-1], self._open_segments(), strict=True):
            own = slice(start, start + segment.entry.count)
            mask_N = None if selection is None else selection.mask_N[own]
            scores, rows = segment.search(
                queries_QD, k_asked, exact=exact, parameters=parameters or {},
                threads=self._threads, mask_N=mask_N,
            )  # fmt: skip
            parts.append((scores, np.where(rows < 0, MISSING, rows + start)))
        scores, rows = merge_neighbours(parts, k_asked)
        found = Neighbours(ids=self._ids[rows], scores=scores)
        return found if without_QW is None else _leave_out(found, without_QW, k)

    def select(self, filter: str, *, source_names: Callable[[str], str] | None = None) -> Selection:
        """Choose the images of which a filter is true, for one search or many.

        Args:
            filter: see `index.filters`; its columns are those of `table()`.
            source_names: gives the name by which the filter knows a source; its URI where None.

        Raises:
            FilterError: the filter cannot be read.
        """
        return self._selector.select(filter, source_names=source_names)

    def effort_parameters(self, candidates: int) -> dict[str, int]:
        """Give the parameters by which the index weighs so many candidates for a query.

        None where every search is exact anyway.
        """
        segments = self._open_segments()
        found: dict[str, int] = {}
        for segment in segments:
            if segment.index is None:
                return {}
            found |= segment.index.effort_parameters(candidates, segment.entry.parameters)
        return found

    def search_ids(
        self,
        ids: ArrayLike,
        k: int,
        *,
        exact: bool = False,
        parameters: Mapping[str, int] | None = None,
        filter: str | Selection | None = None,
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
        """Give the stored vectors, (n, D) float32 of unit length.

        Raises:
            UnknownIdError: an id is not in the collection.
        """
        rows = self.row_numbers(ids)
        vectors_ND = np.empty((len(rows), self.dim), np.float32)
        for start, segment in zip(self._starts[:-1], self._open_segments(), strict=True):
            here = (rows >= start) & (rows < start + segment.entry.count)
            vectors_ND[here] = segment.vectors_ND[rows[here] - start]
        return vectors_ND

    def rows(self, ids: ArrayLike) -> list[Row]:
        """Give the metadata of images, in the order asked for.

        Raises:
            UnknownIdError: an id is not in the collection.
        """
        return read_rows(self._rows.take(self.row_numbers(ids)))

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Give the metadata of every row, in the order of `self.ids`.

        Args:
            columns: which; all that there are where None, see `index.storage.rows`.
        """
        return self._rows if columns is None else self._rows.select(list(columns))

    def row_numbers(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Give the places of ids within `self.ids`.

        Raises:
            UnknownIdError: an id is not in the collection.
        """
        asked = np.asarray(ids, dtype=np.int64)
        ranks = np.searchsorted(self.ids, asked, sorter=self._by_id)
        places = np.append(self._by_id, MISSING)[ranks]
        unknown = asked[(places == MISSING) | (self._ids[places] != asked)]
        if unknown.size:
            raise UnknownIdError(
                f"id {unknown[0]}",
                expected=f"an id of the {self.count} in collection {self.name}",
                found="none such",
                mend="take ids from a search of this collection",
            )
        return places

    def find_key(self, key: str) -> int:
        """Give the id of the image with this key.

        Raises:
            UnknownIdError: no image has it.
        """
        id_ = id_of(key)
        try:
            row = self.rows([id_])[0]
        except UnknownIdError:
            row = None
        if row is None or row.key != key:
            raise UnknownIdError(
                f"key {key!r}",
                expected=f"a key of the {self.count} in collection {self.name}",
                found="none such",
                mend=f"keys here look like {self._rows['key'][0].as_py()!r}",
            )
        return id_

    def labels(self) -> list[str | None]:
        """Give the label of every row, in the order of `self.ids`."""
        return cast(list[str | None], self._rows["label"].to_pylist())

    def keys(self) -> list[str]:
        """Give the key of every row, in the order of `self.ids`."""
        return cast(list[str], self._rows["key"].to_pylist())

    def _open_segments(self) -> tuple[Segment, ...]:
        """Give the segments, unless they were closed."""
        if self._segments is None:
            raise CollectionError(f"collection {self.name}", expected="an open one", found="closed")
        return self._segments


def _leave_out(found: Neighbours, without_QW: NDArray[np.int64], k: int) -> Neighbours:
    """Drop from each query's neighbours those that are no answers to it, and those beyond k."""
    n_fewest = int((without_QW >= 0).sum(axis=1).min(initial=without_QW.shape[1]))
    width = max(0, min(k, found.ids.shape[1] - n_fewest))
    is_out_QC = (found.ids[:, :, None] == without_QW[:, None, :]).any(axis=2)
    order_QK = np.argsort(is_out_QC, axis=1, kind="stable")[:, :width]
    is_out_QK = np.take_along_axis(is_out_QC, order_QK, 1)
    ids_QK = np.take_along_axis(found.ids, order_QK, 1)
    scores_QK = np.take_along_axis(found.scores, order_QK, 1)
    return Neighbours(
        ids=np.where(is_out_QK, MISSING, ids_QK),
        scores=np.where(is_out_QK, -np.inf, scores_QK).astype(np.float32),
    )
