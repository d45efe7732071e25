"""A snapshot: what a collection held at one moment. It never changes, and parts are shared.

A part is a segment, or the rows that the delta had then, and which of them are alive.

Rules:
    Dead rows are never given out: neither found, nor chosen by a filter, nor counted.
    k living rows are found where so many are alive: a few more than k are asked for, and a
    query that has too few left of those is searched again among living rows alone.
    Places, as in `ids` and in the mask of a selection, count living rows only.

Shapes: N rows, Q queries, K neighbours, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index.filters import parse_filter
from index.knn import MISSING, pad_neighbours
from index.selection import (
    CHANCE,
    MAX_KEPT_BYTES,
    Chosen,
    KeptSelections,
    Selection,
    SourceNames,
    keep_chosen,
)
from index.storage.manifest import Manifest
from index.storage.rows import ROW_SCHEMA, in_schema, take_rows, unify
from index.storage.segment import FLAT, Segment, check_parameters

SPARE = 4
"""Dead rows that a search allows for beyond what chance puts among the nearest: of an image that
was replaced the old vector lies near the new one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Rows of a collection; any number of threads may use it.

    Attributes:
        segment: the rows, dead ones too.
        alive_N: (N,) bool, which are alive; None where all are. Nobody may write to it.
        count: how many are alive.
    """

    segment: Segment
    alive_N: NDArray[np.bool_] | None
    count: int

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
        """Find the k nearest living rows; see `Segment.search`.

        Args:
            queries_QD: see there; so are the next four.
            k: see there.
            exact: see there.
            parameters: see there.
            threads: see there.
            among: the rows that may be found, no dead one among them.
        """
        if among is not None or self.alive_N is None:
            return self.segment.search(
                queries_QD, k, exact=exact, parameters=parameters, threads=threads, among=among
            )
        search = partial(self.segment.search, exact=exact, parameters=parameters, threads=threads)
        n_rows = len(self.alive_N)
        if 2 * self.count < n_rows:
            return search(queries_QD, k, among=self._living)
        wanted = min(k, self.count)
        asked = wanted + spare_rows(wanted, dead=n_rows - self.count, count=n_rows)
        found = search(queries_QD, asked)
        scores_QK, rows_QK, short = keep_chosen(*found, self.alive_N, wanted)
        if short.size:
            scores_QK[short], rows_QK[short] = search(queries_QD[short], wanted, among=self._living)
        return pad_neighbours(scores_QK, rows_QK, k)

    @cached_property
    def _living(self) -> Chosen:
        """The living rows, where there are dead ones."""
        assert self.alive_N is not None
        return Chosen(self.alive_N)

    def find(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the living row of each id, -1 where there is none."""
        rows_N = self.segment.find(ids)
        if self.alive_N is None:
            return rows_N
        return np.where(self.alive_N[rows_N], rows_N, MISSING)

    @property
    def dead(self) -> int:
        """Rows that are not alive."""
        return len(self.segment.ids_N) - self.count

    @property
    def ids_N(self) -> NDArray[np.int64]:
        """The ids of living rows."""
        ids_N = self.segment.ids_N
        return ids_N if self.alive_N is None else ids_N[self.alive_N]

    def rows(self, schema: pa.Schema) -> pa.Table:
        """Give the metadata of living rows, with the columns of a schema."""
        rows = in_schema(self.segment.rows, schema)
        return rows if self.alive_N is None else rows.filter(pa.array(self.alive_N))

    @cached_property
    def ranks_N(self) -> NDArray[np.int64]:
        """Of every living row, how many living ones come before it."""
        if self.alive_N is None:
            return np.arange(len(self.segment.ids_N))
        return np.cumsum(self.alive_N, dtype=np.int64) - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """What a collection held at one moment.

    Attributes:
        manifest: that of its generation.
        version: grows with every write.
        parts: in the order of their rows.
    """

    manifest: Manifest
    version: tuple[int, int]
    parts: Sequence[Part]

    @cached_property
    def count(self) -> int:
        """Living rows."""
        return sum(part.count for part in self.parts)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The place of each part's first living row, and the number of all at the end."""
        return np.cumsum([0, *(part.count for part in self.parts)])

    @cached_property
    def parameter_names(self) -> tuple[str, ...]:
        """The search parameters that any part's index has."""
        names = (name for part in self.parts for name in part.segment.parameter_names)
        return tuple(dict.fromkeys(names))

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of the metadata: those of every part."""
        schemas = [ROW_SCHEMA, *(part.segment.rows.schema for part in self.parts)]
        return unify(schemas)

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """(N,) int64: the id of every living row."""
        return np.concatenate([np.empty(0, np.int64), *(part.ids_N for part in self.parts)])

    @cached_property
    def rows(self) -> pa.Table:
        """The metadata of every living row."""
        return self.columns(self.schema.names)

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Give some columns of every living row; of the others nothing is copied."""
        schema = pa.schema([self.schema.field(name) for name in names])
        tables = [part.rows(schema) for part in self.parts]
        return pa.concat_tables([schema.empty_table(), *tables])

    def own_parameters(self, parameters: Mapping[str, int]) -> list[dict[str, int]]:
        """Give each part those search parameters that its index has.

        Raises:
            UsageError: no part has one of them, or it is below 1.
        """
        if not parameters:
            return [{}] * len(self.parts)
        check_parameters(parameters, self.parameter_names, FLAT)
        return [
            {name: value for name, value in parameters.items() if name in names}
            for names in (part.segment.parameter_names for part in self.parts)
        ]

    def locate(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give the part and the row in it of each id; -1 and -1 where there is none."""
        parts, rows = np.full(len(ids), MISSING), np.full(len(ids), MISSING)
        for number, part in enumerate(self.parts):
            found = part.find(ids)
            is_here = found != MISSING
            parts[is_here], rows[is_here] = number, found[is_here]
        return parts, rows

    def keys_of(self, ids: NDArray[np.int64]) -> dict[int, str]:
        """Give the keys of those ids that are there."""
        parts, rows = self.locate(ids)
        keys: dict[int, str] = {}
        for number, part in enumerate(self.parts):
            here = np.flatnonzero(parts == number)
            found = take_rows(part.segment.rows.select(["key"]), rows[here])["key"].to_pylist()
            keys |= zip(ids[here].tolist(), cast(list[str], found), strict=True)
        return keys

    def places(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the place of each id among living rows; -1 where there is none."""
        parts, rows = self.locate(ids)
        places = np.full(len(ids), MISSING)
        for number, part in enumerate(self.parts):
            here = parts == number
            places[here] = self.starts[number] + part.ranks_N[rows[here]]
        return places

    def select(self, filter: str, source_names: SourceNames | None) -> Selection:
        """Choose the living rows of which a filter is true; see `Selector.select`.

        What it chose in a part is kept with the part, for later snapshots, too.
        """
        return self._kept.get((filter, source_names), lambda: self._work_out(filter, source_names))

    @cached_property
    def _kept(self) -> KeptSelections:
        """The selections that were worked out before."""
        # A mask of the living, the numbers of few rows, and where some are dead masks of all rows.
        masks = (
            len(part.segment.ids_N) * (1 if part.alive_N is None else 2) for part in self.parts
        )
        return KeptSelections(self.count + sum(masks))

    def _work_out(self, filter: str, source_names: SourceNames | None) -> Selection:
        """Choose in every part."""
        parse_filter(filter, self.schema)  # said even where there is no part
        masks = []
        n_rows = sum(len(part.segment.ids_N) for part in self.parts)
        for part in self.parts:
            own_bytes = MAX_KEPT_BYTES * len(part.segment.ids_N) // n_rows
            selector = part.segment.selector(self.schema, own_bytes)
            mask_N = selector.select(filter, source_names=source_names).mask_N
            masks.append(mask_N if part.alive_N is None else mask_N & part.alive_N)
        return join_masks(filter, masks, self.parts)

    def made(self, selection: Selection) -> bool:
        """Tell whether a selection was made of these rows."""
        return selection.parts is self.parts


def join_masks(filter: str, masks: Sequence[NDArray[np.bool_]], parts: Sequence[Part]) -> Selection:
    """Make one selection of what was chosen in each part."""
    living = [
        mask_N if part.alive_N is None else mask_N[part.alive_N]
        for mask_N, part in zip(masks, parts, strict=True)
    ]
    mask_N = living[0] if len(living) == 1 else np.concatenate([np.empty(0, np.bool_), *living])
    mask_N.flags.writeable = False
    return Selection(
        filter=filter,
        mask_N=mask_N,
        count=int(np.count_nonzero(mask_N)),
        chosen=tuple(map(Chosen, masks)),
        parts=parts,
    )


def spare_rows(k: int, *, dead: int, count: int) -> int:
    """Say how many rows to ask for beyond k, that k living ones are among them as a rule."""
    expected = k * dead / count
    return min(dead, SPARE + math.ceil(expected + CHANCE * math.sqrt(expected)))
