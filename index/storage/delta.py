"""The delta: images that were written since the last segment, in memory, searched exactly.

Rules:
    A row never changes once it is there, and the arrays only grow: a snapshot is a view of the
    first n rows, and stays right whatever is written later.
    What says which rows are alive is copied before it is changed.
    Of the rows of one id only the last can be alive.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index.storage.manifest import SegmentEntry
from index.storage.rows import ROW_SCHEMA
from index.storage.segment import FLAT, Block, Segment

FIRST_CAPACITY = 256


class Delta:
    """Rows that are added and killed by one thread, and looked at by any number."""

    def __init__(self, dim: int, metric: str) -> None:
        """Begin without rows."""
        self._metric = metric
        self._vectors = np.empty((FIRST_CAPACITY, dim), np.float32)
        self._ids = np.empty(FIRST_CAPACITY, np.int64)
        self._alive = np.ones(FIRST_CAPACITY, np.bool_)
        self._chunks: list[pa.Table] = []
        self._row_of: dict[int, int] = {}
        self.n_rows = 0

    @property
    def n_alive(self) -> int:
        """Rows that are alive."""
        return len(self._row_of)

    def add(self, block: Block) -> None:
        """Append rows, whose ids must not be alive here."""
        start, end = self.n_rows, self.n_rows + len(block.rows)
        self._reserve(end)
        ids_N = block.rows["id"].to_numpy()
        self._vectors[start:end] = block.vectors_ND
        self._ids[start:end] = ids_N
        self._row_of.update(zip(ids_N.tolist(), range(start, end), strict=True))
        self._add_chunk(block.rows)
        self.n_rows = end

    def kill(self, ids: NDArray[np.int64]) -> int:
        """Declare rows dead; give how many were alive."""
        rows = [row for id_ in ids.tolist() if (row := self._row_of.pop(id_, None)) is not None]
        if rows:
            self._alive = self._alive.copy()
            self._alive[rows] = False
        return len(rows)

    def view(self) -> tuple[Segment, NDArray[np.bool_] | None]:
        """Give the rows as they are now, and which are alive; None where all are."""
        n = self.n_rows
        rows = pa.concat_tables(self._chunks, promote_options="default") if n else None
        segment = Segment(
            entry=SegmentEntry(name="", count=n, factory=FLAT),
            vectors_ND=self._vectors[:n],
            ids_N=self._ids[:n],
            rows=ROW_SCHEMA.empty_table() if rows is None else rows,
            index=None,
            metric=self._metric,
        )
        return segment, None if self.n_alive == n else self._alive[:n]

    def _reserve(self, n_rows: int) -> None:
        """Make room; views of the arrays that were keep those."""
        capacity = len(self._ids)
        if n_rows <= capacity:
            return
        capacity = max(n_rows, 2 * capacity)
        for name in ("_vectors", "_ids", "_alive"):
            old = getattr(self, name)
            new = np.empty((capacity, *old.shape[1:]), old.dtype)
            if name == "_alive":
                new[self.n_rows :] = True
            new[: self.n_rows] = old[: self.n_rows]
            setattr(self, name, new)

    def _add_chunk(self, rows: pa.Table) -> None:
        """Keep metadata in few chunks: two of a size become one, so that log n are left."""
        self._chunks.append(rows)
        while len(self._chunks) > 1 and len(self._chunks[-2]) <= 2 * len(self._chunks[-1]):
            last = [self._chunks.pop(-2), self._chunks.pop(-1)]
            self._chunks.append(pa.concat_tables(last, promote_options="default").combine_chunks())
