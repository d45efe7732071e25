"""A segment: vectors that never change, their ids and metadata, and the index over them.

Files, under `segments/NAME/` of a collection:
    vectors.npy   (N, D) float32, of unit length where the metric is cosine;
                  memory-mapped, never overwritten.
    ids.npy       (N,) int64, row by row those of vectors.npy.
    rows.parquet  id, key, label (may be null), source, and further columns
                  (`index.storage.rows`); the same rows in the same order.
    index.faiss   the FAISS index, only where the factory is not `Flat`: Flat searches
                  vectors.npy itself. A graph's nodes are rows of vectors.npy, and what was
                  stored in codes is ranked again by them, so that nothing is stored twice.

Rules:
    A file is no larger in memory than it may be, whatever its header says, and one of another
    type, size or content is refused.
    Parameters of a search belong to the call; the shared index is never changed.
    The same rows give the same index, by however many threads it is built: `index.ann.making`.
"""

from __future__ import annotations

import tokenize
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index.ann.ann_index import AnnIndex
from index.ann.kinds import EF_SEARCH as EF_SEARCH
from index.ann.kinds import FLAT as FLAT
from index.ann.kinds import HNSW as HNSW
from index.ann.kinds import NEIGHBOURS, parameter_names
from index.ann.making import build_index, write_index
from index.ann.opening import open_index
from index.errors import CollectionError, first_line, refuse_to_blame
from index.knn import COSINE, MISSING, knn_search, pad_neighbours
from index.selection import Chosen, Selector, count_candidates, is_exact_cheaper
from index.storage.ids import Places
from index.storage.manifest import Manifest, SegmentEntry, check_file
from index.storage.rows import ROW_SCHEMA as ROW_SCHEMA
from index.storage.rows import in_schema, is_row_schema
from index.storage.rows_file import read_table
from models.errors import UsageError

SEGMENTS = "segments"

_BAD_ARRAY = (
    ValueError, EOFError, OverflowError, MemoryError, SyntaxError, RecursionError, TypeError,
    tokenize.TokenError,
)  # fmt: skip
"""What NumPy raises for a header that is none: it is read as a Python literal."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Consecutive rows on their way into a segment.

    Attributes:
        rows: a table of the segment's schema, n rows.
        vectors_ND: (n, D) float32, of unit length where the metric is cosine.
    """

    rows: pa.Table
    vectors_ND: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """An open segment; any number of threads may search it.

    Attributes:
        entry: what the manifest says of it.
        vectors_ND: (N, D) float32, a read-only memory map.
        ids_N: (N,) int64.
        rows: a table of `ROW_SCHEMA` and further columns.
        index: the index over them; None where the factory is `Flat`.
        metric: `cosine` or `euclidean`.
    """

    entry: SegmentEntry
    vectors_ND: NDArray[np.float32]
    ids_N: NDArray[np.int64]
    rows: pa.Table
    index: AnnIndex | None
    metric: str = COSINE

    def renewed(self, entry: SegmentEntry) -> Segment:
        """Give the same rows as a later manifest has them, such as with more of them dead.

        What was worked out of the rows stays: of millions to sort the ids takes seconds.
        """
        other = replace(self, entry=entry)
        kept = ("_places", "_selector", "ids_or_missing")
        vars(other).update({name: vars(self)[name] for name in kept if name in vars(self)})
        return other

    @cached_property
    def _places(self) -> Places:
        """The rows of ids."""
        return Places(self.ids_N)

    def find(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the row of each id, the last where an id is there again, -1 where none is."""
        return self._places.of(ids)

    @cached_property
    def parameter_names(self) -> tuple[str, ...]:
        """The search parameters that its index has."""
        return tuple(parameter_names(self.entry.factory))

    def selector(self, schema: pa.Schema, max_kept_bytes: int) -> Selector:
        """Give what works out filters over the rows, dead ones too.

        Args:
            schema: the columns that filters may name; those that the rows lack are null.
            max_kept_bytes: of the selections that are kept, where it is the first with this schema.
        """
        known, selector = self._selector[-1]
        if selector is None or not known.equals(schema):
            selector = Selector(in_schema(self.rows, schema), max_kept_bytes=max_kept_bytes)
            self._selector[:] = [(schema, selector)]
        return selector

    @cached_property
    def _selector(self) -> list[tuple[pa.Schema, Selector | None]]:
        """The last selector and its schema."""
        return [(self.rows.schema, None)]

    @cached_property
    def _parameters(self) -> Mapping[str, int]:
        """Its own search parameters, those that the manifest names."""
        check_parameters(self.entry.parameters, self.parameter_names, self.entry.factory)
        return self.entry.parameters

    @cached_property
    def ids_or_missing(self) -> NDArray[np.int64]:
        """(N + 1,) int64: the id of each row, and of row -1, which is none."""
        return np.append(self.ids_N, MISSING)

    def search(
        self,
        queries_QD: NDArray[np.float32],
        k: int,
        *,
        exact: bool,
        parameters: Mapping[str, int],
        threads: int,
        among: Chosen | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Find the k nearest rows: (Q, k) scores and row numbers, padded with -inf and -1.

        A query that has fewer than k where there are as many is searched again, exactly.

        Args:
            queries_QD: (Q, D) float32.
            k: how many.
            exact: whether to compare every row instead of asking the index.
            parameters: of the index, for this call, taken as they are; where there are none, its
                own, scaled to k.
            threads: CPU threads.
            among: the rows that may be found; all where None.

        Raises:
            UsageError: a parameter that the index does not have.
        """
        if parameters:
            check_parameters(parameters, self.parameter_names, self.entry.factory)
            parameters = {**self._parameters, **parameters}
        if among is not None:
            return self._search_chosen(
                queries_QD, k, among, exact=exact, parameters=parameters, threads=threads
            )
        if exact or self.index is None:
            return self._compare(queries_QD, k, threads=threads)
        settings = parameters or self._parameters
        if k != NEIGHBOURS and not parameters:
            settings = self.index.scale(settings, NEIGHBOURS, k)
        scores, rows = self.index.search(queries_QD, k, parameters=settings, threads=threads)
        last_Q = rows[:, min(k, self.entry.count) - 1]
        if (last_Q < 0).any():  # fewer than k, as where few short lists are looked into
            short = np.flatnonzero(last_Q < 0)
            scores[short], rows[short] = self._compare(queries_QD[short], k, threads=threads)
        return scores, rows

    def _search_chosen(
        self,
        queries_QD: NDArray[np.float32],
        k: int,
        among: Chosen,
        *,
        exact: bool,
        parameters: Mapping[str, int],
        threads: int,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Search among some rows, in the cheaper of two ways: see `index.selection`."""
        if exact or self.index is None:
            return self._compare(queries_QD, k, rows_M=among.rows(), threads=threads)
        n_found = min(k, among.count)
        candidates = count_candidates(
            n_found,
            chosen=among.count,
            count=self.entry.count,
            ef_search=self.index.candidates(n_found, parameters or self._parameters),
        )
        if is_exact_cheaper(
            chosen=among.count,
            candidates=candidates,
            queries=len(queries_QD),
            short_share=among.short_share,
        ):
            return self._compare(queries_QD, k, rows_M=among.rows(), threads=threads)
        own, k_of_own = (parameters, n_found) if parameters else (self._parameters, NEIGHBOURS)
        nearest = n_found * self.entry.count // among.count
        wider = self.index.scale_among(own, k_of_own, candidates=candidates, nearest=nearest)
        scores, rows, short = self.index.search_among(
            queries_QD, n_found, among, candidates=candidates, parameters=wider, threads=threads
        )
        among.note(asked=len(queries_QD), short=len(short))
        if short.size:
            scores[short], rows[short] = self._compare(
                queries_QD[short], n_found, rows_M=among.rows(), threads=threads
            )
        return pad_neighbours(scores, rows, k)

    def _compare(
        self,
        queries_QD: NDArray[np.float32],
        k: int,
        *,
        rows_M: NDArray[np.int64] | None = None,
        threads: int,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Compare every row, or those of some numbers."""
        return knn_search(
            queries_QD, self.vectors_ND, k, rows_M=rows_M, metric=self.metric, threads=threads
        )


def check_parameters(parameters: Mapping[str, int], known: Collection[str], factory: str) -> None:
    """Refuse a search parameter that an index of this kind does not have, or below 1.

    Raises:
        UsageError: there is one; says which there are.
    """
    for name, value in parameters.items():
        if name not in known or value < 1:
            raise UsageError(
                f"search parameter {name}",
                expected=f"{' or '.join(known)} of at least 1" if known else f"none for {factory}",
                found=str(value),
            )


def segment_files(entry: SegmentEntry) -> list[str]:
    """Name the files of a segment as the manifest does."""
    names = ["vectors.npy", "ids.npy", "rows.parquet"]
    if entry.factory != FLAT:
        names.append("index.faiss")
    return [f"{SEGMENTS}/{entry.name}/{name}" for name in names]


def write_segment(
    directory: Path,
    entry: SegmentEntry,
    blocks: Iterable[Block],
    dim: int,
    *,
    schema: pa.Schema = ROW_SCHEMA,
    metric: str = COSINE,
) -> list[str]:
    """Write a segment's files below the collection `directory`; memory holds one block.

    Args:
        directory: of the collection.
        entry: name, number of rows and index of the segment.
        blocks: the rows, `entry.count` of them in all.
        dim: length of a vector.
        schema: of the rows of every block; see `index.storage.rows`.
        metric: `cosine` or `euclidean`.

    Returns:
        The names of the files, as for the manifest.

    Raises:
        UsageError: the index is of no known kind, or does not fit the vectors.
    """
    folder = directory / SEGMENTS / entry.name
    folder.mkdir(parents=True, exist_ok=True)
    ids_N = _write_rows_and_vectors(folder, entry.count, blocks, dim, schema)
    np.save(folder / "ids.npy", ids_N)
    if entry.factory != FLAT:
        vectors_ND = np.load(folder / "vectors.npy", mmap_mode="r")
        index = build_index(vectors_ND, entry.factory, metric=metric)
        write_index(index, folder / "index.faiss", entry.factory)
    return segment_files(entry)


def open_segment(
    directory: Path, manifest: Manifest, entry: SegmentEntry, *, verify: bool
) -> Segment:
    """Open a segment of the collection in `directory`.

    Raises:
        CollectionError: a file is missing, damaged, or not what the manifest describes.
    """
    files = [
        check_file(directory, name, manifest.files.get(name), verify=verify)
        for name in segment_files(entry)
    ]
    vectors_ND = open_array(files[0], np.float32, (entry.count, manifest.dim), mapped=True)
    ids_N = open_array(files[1], np.int64, (entry.count,), mapped=False)
    return Segment(
        entry=entry,
        vectors_ND=vectors_ND,
        ids_N=ids_N,
        rows=_open_rows(files[2], ids_N),
        index=None
        if entry.factory == FLAT
        else open_index(
            files[3],
            factory=entry.factory,
            count=entry.count,
            dim=manifest.dim,
            metric=manifest.metric,
            vectors_ND=vectors_ND,
        ),
        metric=manifest.metric,
    )


def _write_rows_and_vectors(
    folder: Path, count: int, blocks: Iterable[Block], dim: int, schema: pa.Schema
) -> NDArray[np.int64]:
    """Stream blocks to vectors.npy and rows.parquet; give the ids."""
    ids: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    # Plain writes, not a memory map: on a full disk a map kills the process.
    with (
        (folder / "vectors.npy").open("wb") as file,
        pq.ParquetWriter(folder / "rows.parquet", schema, compression="zstd") as rows,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, dim)}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block.vectors_ND, "<f4").data)
            rows.write_table(block.rows)
            ids.append(block.rows["id"].to_numpy())
    ids_N = np.concatenate(ids)
    assert len(ids_N) == count, f"{len(ids_N)} rows came for a segment of {count}"
    return ids_N


def open_array(
    file: Path, dtype: type[np.generic], shape: tuple[int, ...], *, mapped: bool
) -> np.ndarray:
    """Open a .npy file that must have this dtype and shape; nothing is unpickled.

    It is mapped first, which fits it against its header: what is copied is no larger than
    was expected.
    """
    try:
        array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
        found = f"{array.dtype} {array.shape}"
        sound = array.dtype == dtype and array.shape == shape and array.flags.c_contiguous
        if sound and not mapped:
            array = np.array(array)
    except (*_BAD_ARRAY, OSError) as error:
        refuse_to_blame(file, error)
        found, sound = f"no such array ({first_line(error)})", False
    if not sound:
        raise CollectionError(
            str(file),
            expected=f"{np.dtype(dtype)} {shape}",
            found=found,
            mend="the file is not this collection's: copy or build the collection again",
        )
    return array


def _open_rows(file: Path, ids_N: NDArray[np.int64]) -> pa.Table:
    """Read the metadata, which must have the vectors' ids in the vectors' order."""
    try:
        rows = read_table(file, len(ids_N))
        found = f"{len(rows)} rows of {', '.join(rows.column_names)} that do not match"
        sound = is_row_schema(rows.schema) and np.array_equal(rows["id"].to_numpy(), ids_N)
    except (pa.ArrowException, OSError, MemoryError, ValueError) as error:
        refuse_to_blame(file, error)
        found, sound = f"no such table ({first_line(error)})", False
    if not sound:
        raise CollectionError(
            str(file),
            expected=f"the {len(ids_N)} rows of ids.npy, in its order",
            found=found,
            mend="the file is not this collection's: copy or build the collection again",
        )
    return rows
