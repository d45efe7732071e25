"""The rows that a sync writes: stored metadata under a key, label and digest of now.

Rules:
    Metadata stays with its image; a table that is given again has the last word.
    Rows of which nothing is another are not written. A date that may not come in any more, as
    older collections have, is null once its row is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from index.building.metadata import Column, Metadata
from index.building.sync_plan import Seen
from index.storage.rows import DIGEST, held_or_null, take_rows


@dataclass(frozen=True, kw_only=True)
class RowMaker:
    """Makes rows of one source.

    Attributes:
        table: the metadata of the collection when the sync began, with digests.
        uri: of the source.
        is_folder: whether a key tells the label, as in a folder.
        metadata: a table to join; what is stored stays where None.
    """

    table: pa.Table
    uri: str
    is_folder: bool
    metadata: Metadata | None

    def make(
        self,
        old_rows: Sequence[int | None],
        keys: Sequence[str],
        labels: Sequence[str | None],
        digests: Sequence[str | None],
    ) -> pa.Table:
        """Make rows for the writer: the metadata of stored ones, where there are, as it is now."""
        is_old_N = np.array([row is not None for row in old_rows], np.bool_)
        stored = take_rows(self.table, np.array([row for row in old_rows if row is not None], int))
        table = stored.take(pa.array(np.cumsum(is_old_N) - 1, pa.int64(), mask=~is_old_N))
        if self.metadata is None or not self.metadata.gives_labels:
            before = zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True)
            labels = [
                label if row is None else self._label(label, *cast(tuple[str, str | None], was))
                for row, label, was in zip(old_rows, labels, before, strict=True)
            ]
        columns = {"key": keys, "label": labels, "source": [self.uri] * len(keys), DIGEST: digests}
        for name, values in columns.items():
            place = table.column_names.index(name)
            table = table.set_column(place, name, pa.array(values, pa.string()))
        table = held_or_null(table.drop_columns(["id"]))
        return table if self.metadata is None else self.metadata.join(table)

    def find_updated(self, seen: Sequence[Seen], rows: Sequence[int]) -> tuple[pa.Table, list[int]]:
        """Give those of unchanged images that are to be written, and their places.

        Args:
            seen: the images now.
            rows: their places in the collection.
        """
        new = self.make(
            rows,
            [one.key for one in seen],
            [one.label for one in seen],
            [one.digest for one in seen],
        )
        old = held_or_null(self.table.take(pa.array(rows, pa.int64())))
        is_other_N = np.zeros(len(rows), np.bool_)
        for name in new.column_names:
            is_other_N |= _differs(new[name], old[name] if name in old.column_names else None)
        return new.filter(pa.array(is_other_N)), [
            rows[n] for n in np.flatnonzero(is_other_N).tolist()
        ]

    def _label(self, label: str | None, old_key: str, old_label: str | None) -> str | None:
        """Give the label of an image that is stored; one that was given by hand stays.

        In a folder the key tells the label: where a stored one is another, it came from a table
        of metadata, and a sync without that table must not undo it. Elsewhere nothing tells where
        a stored one came from: the source has the last word, unless it gives none.
        """
        if not self.is_folder:
            return old_label if label is None else label
        folder, slash, _ = old_key.partition("/")
        return label if old_label == (folder if slash else None) else old_label


def with_digest(table: pa.Table) -> pa.Table:
    """Give a table that may lack digests a column of nulls."""
    if DIGEST in table.column_names:
        return table
    return table.append_column(DIGEST, pa.nulls(len(table), pa.string()))


def _differs(new: Column, old: Column | None) -> NDArray[np.bool_]:
    """Tell of every row whether two columns differ; a missing one is null."""
    is_new_null = np.asarray(new.is_null(), np.bool_)
    if old is None:
        return ~is_new_null
    is_old_null = np.asarray(old.is_null(), np.bool_)
    equal = cast(Column, pc.equal(new, old))
    is_equal = np.asarray(pc.fill_null(equal, pa.scalar(False)), np.bool_)
    return np.where(is_new_null, ~is_old_null, ~is_equal)
