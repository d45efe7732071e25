"""Which rows of a collection a filter leaves, and how to search among those alone.

Rules:
    A filter is worked out once: the rows never change, so that what it chose is kept for the
    next search, within bounds.
    What is found is among what was chosen, and k are found where so many were chosen.
    The index is never changed, and searched as it always is: more of its candidates are
    looked at than are wanted, and those that were not chosen are dropped. A query with too
    few left, as where the filter and the neighbourhood exclude one another, is searched
    again among all that was chosen, exactly.
    Where few rows were chosen, to compare every one of them costs less than the index does, and
    so it does where the index was seldom of use to the queries before.

Source of the limits: docs/decisions/0014-filtered-search.md, measured by benchmarks.filters.

Shapes: N rows, Q queries, K neighbours.
"""

from __future__ import annotations

import math
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from index.filters import parse_filter
from index.knn import COPY_MIN_QUERIES, padding

MAX_KEPT_BYTES = 64 << 20
"""Of the selections of one collection that are kept; and as much of those of its segments."""

KEPT_SELECTION_BYTES = 1 << 10
"""What a selection weighs beside its mask and its filter's text, about."""

CHANCE = 1.5
"""Deviations of the number of chosen ones among the candidates that are allowed for. With
fewer, more queries are searched twice; with more, all of them look at more candidates."""

ROWS_A_CANDIDATE = 30
"""Rows that are compared, a query at a time, in about the time that the index takes a candidate:
15 to 60, by the kind of the index and how busy the memory is."""

MAX_BATCH_GAIN = 256
"""Rows more than that, at most: about one for each query of a batch, whose rows are copied
once and multiplied by BLAS."""

DOUBT = 4
"""Queries that are taken to have found enough in the index, beside those that were searched for."""

MAX_SHORT_SHARE = 0.8
"""What is believed of a filter's queries at most: rows are compared where that costs no more than
five times what the index does, and else it is asked again."""

SourceNames = Callable[[str], str]


class Chosen:
    """The rows of one segment that may be found, and what searches among them have shown.

    Any number of threads may use it: a lost count of `note` costs time, and no neighbour.

    Attributes:
        mask_N: (N,) bool, whether each row may be found; nobody may write to it.
        count: how many may.
    """

    def __init__(self, mask_N: NDArray[np.bool_]) -> None:
        """Begin without a search."""
        self.mask_N = mask_N
        self.count = int(np.count_nonzero(mask_N))
        self._asked = self._short = 0

    def rows(self) -> NDArray[np.int64]:
        """Give the numbers of the chosen rows, (M,) int64, ascending."""
        return self._few if 8 * self.count <= len(self.mask_N) else np.flatnonzero(self.mask_N)

    @cached_property
    def _few(self) -> NDArray[np.int64]:
        """The numbers, where they weigh no more than the mask."""
        return np.flatnonzero(self.mask_N)

    @property
    def short_share(self) -> float:
        """The share of queries that find fewer among the index's candidates than they want."""
        return min(MAX_SHORT_SHARE, self._short / (self._asked + DOUBT))

    def note(self, *, asked: int, short: int) -> None:
        """Count queries that the index was asked, and those that found too few."""
        self._asked += asked
        self._short += short


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """What a filter leaves of a collection.

    Attributes:
        filter: its text.
        mask_N: (N,) bool, whether each row was chosen; nobody may write to it.
        count: how many were.
        chosen: the same for the rows of each part of a collection, dead ones among them, none of
            which was chosen; empty for the rows of one part.
        parts: the parts of the snapshot that it was made of, and holds for.
    """

    filter: str
    mask_N: NDArray[np.bool_]
    count: int
    chosen: tuple[Chosen, ...] = ()
    parts: object = None


class KeptSelections:
    """Selections that were worked out before, within bounds. Any number of threads may use it."""

    def __init__(self, n_rows: int, *, max_kept_bytes: int = MAX_KEPT_BYTES) -> None:
        """Begin without one.

        Args:
            n_rows: of what is chosen from.
            max_kept_bytes: of their masks and filters; one is always kept.
        """
        self._n_rows = n_rows
        self._max_bytes = max_kept_bytes
        self._bytes = 0
        self._kept: OrderedDict[tuple[str, SourceNames | None], Selection] = OrderedDict()
        self._lock = threading.Lock()

    def get(
        self, key: tuple[str, SourceNames | None], work_out: Callable[[], Selection]
    ) -> Selection:
        """Give a selection by filter and names of sources; the longest unused go."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        selection = work_out()
        with self._lock:
            if key not in self._kept:  # another thread may have been quicker
                self._bytes += self._weigh(key)
            self._kept[key] = selection
            while self._bytes > self._max_bytes and len(self._kept) > 1:
                unused, _ = self._kept.popitem(last=False)
                self._bytes -= self._weigh(unused)
        return selection

    def _weigh(self, key: tuple[str, SourceNames | None]) -> int:
        """Say how many bytes a selection takes; callers choose filters, and how long they are."""
        return self._n_rows + sys.getsizeof(key[0]) + KEPT_SELECTION_BYTES


class Selector:
    """Works out filters over the metadata of some rows. Any number of threads may use it."""

    def __init__(self, rows: pa.Table, *, max_kept_bytes: int = MAX_KEPT_BYTES) -> None:
        """Choose from `rows`.

        Args:
            rows: the metadata, whose columns filters may name.
            max_kept_bytes: of the selections that are kept for later.
        """
        self._rows = rows
        self._kept = KeptSelections(len(rows), max_kept_bytes=max_kept_bytes)

    def select(self, filter: str, *, source_names: SourceNames | None = None) -> Selection:
        """Choose the rows of which a filter is true.

        Args:
            filter: see `index.filters`.
            source_names: gives the name by which the filter knows a source; its URI where None.

        Raises:
            FilterError: the filter cannot be read.
        """
        return self._kept.get((filter, source_names), lambda: self._work_out(filter, source_names))

    def _work_out(self, filter: str, source_names: SourceNames | None) -> Selection:
        """Try every row; `Table.filter` would copy all metadata of those that are chosen."""
        # Brings pandas where that is installed, which is not small.
        from pyarrow.acero import Declaration, ProjectNodeOptions, TableSourceNodeOptions

        condition = parse_filter(filter, self._rows.schema)
        rows = self._rows if source_names is None else _rename_sources(self._rows, source_names)
        source = Declaration("table_source", TableSourceNodeOptions(rows))
        project = Declaration("project", ProjectNodeOptions([condition], ["chosen"]))
        mask_N = Declaration.from_sequence([source, project]).to_table()["chosen"].to_numpy()
        mask_N.flags.writeable = False
        return Selection(filter=filter, mask_N=mask_N, count=int(np.count_nonzero(mask_N)))


def _rename_sources(rows: pa.Table, source_names: SourceNames) -> pa.Table:
    """Give the sources other names; there are few of them, whatever the number of rows."""
    sources = rows["source"].combine_chunks().dictionary_encode()
    uris = cast(list[str], sources.dictionary.to_pylist())
    names = pa.array([source_names(uri) for uri in uris], pa.string())
    column = pc.take(names, sources.indices)
    return rows.set_column(rows.column_names.index("source"), "source", column)


def count_candidates(k: int, *, chosen: int, count: int, ef_search: int) -> int:
    """Say how many candidates of an index have k chosen ones among them, as a rule.

    Where the filter has nothing to do with the query, of c candidates c * chosen / count were
    chosen, give or take the root of that. A quarter of `ef_search` on top makes up for what
    the index misses among the last of its candidates.
    """
    wanted = (k + CHANCE * math.sqrt(k)) * count / max(1, chosen)
    return min(count, max(ef_search, math.ceil(wanted) + ef_search // 4))


def is_exact_cheaper(
    *, chosen: int, candidates: int, queries: int, short_share: float = 0.0
) -> bool:
    """Say whether to compare every chosen row costs less than so many candidates do.

    Where the index finds too few, its candidates are paid for, and then every row.
    """
    rows = ROWS_A_CANDIDATE
    if queries >= COPY_MIN_QUERIES:
        rows += min(queries, MAX_BATCH_GAIN)
    return chosen * (1 - short_share) <= rows * candidates


def keep_chosen(
    scores_QC: NDArray[np.float32],
    rows_QC: NDArray[np.int64],
    mask_N: NDArray[np.bool_],
    k: int,
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Drop candidates that were not chosen, and those beyond k.

    Returns:
        (Q, k) scores and rows, padded, and the queries that have fewer than k.
    """
    is_kept_QC = (rows_QC >= 0) & mask_N[rows_QC]
    if is_kept_QC[:, :k].all() and is_kept_QC.shape[1] >= k:  # as where few rows are dead
        return scores_QC[:, :k], rows_QC[:, :k], np.empty(0, np.int64)
    counts_Q = is_kept_QC.sum(axis=1)
    queries, columns = np.nonzero(is_kept_QC)
    places = np.arange(len(queries)) - np.repeat(np.cumsum(counts_Q) - counts_Q, counts_Q)
    first = places < k
    queries, columns, places = queries[first], columns[first], places[first]
    scores_QK, rows_QK = padding(len(rows_QC), k)
    scores_QK[queries, places] = scores_QC[queries, columns]
    rows_QK[queries, places] = rows_QC[queries, columns]
    return scores_QK, rows_QK, np.flatnonzero(counts_Q < k)
