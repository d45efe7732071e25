"""What a sync writes: stored vectors under their keys of now, and what it embeds, as it comes.

Rules:
    What the collection would refuse is a reject, and the rest is written. Where no search could
    compare the vector the old row goes, too; where a row has too much text the old one stays,
    and where a file is being written.
    What is gone is dropped when everything else is written.

Shapes: N images of a write, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index.building.part_set import RecordBatch, reject_unsound
from index.building.pipeline import Crew, embed_batches
from index.building.sync_plan import TOO_LARGE, UNREADABLE, SyncPlan
from index.building.sync_rows import RowMaker
from index.collection import Collection
from index.embed import EmbeddedBatch, Reject
from index.knn import COSINE
from index.storage.rows import DIGEST, MAX_TEXT_BYTES, text_bytes
from index.storage.writer import CollectionWriter
from models.command import progress
from models.encoder import Encoder

WRITE_ROWS = 1024
"""Rows of one write: what a killed sync has to embed again, at most."""


@dataclass
class SyncWriting:
    """A plan that is carried out; what turns out otherwise is taken note of in it.

    Attributes:
        writer: of the collection.
        before: the collection that the plan was made for.
        plan: what is to be done.
        rows: makes the rows.
        is_settled: tells of a key whether nobody has written to its file of late.
        digests: of what was embedded, by key.
        embedded: images that went through the encoder.
    """

    writer: CollectionWriter
    before: Collection
    plan: SyncPlan
    rows: RowMaker
    is_settled: Callable[[str], bool]
    digests: dict[str, str] = field(default_factory=dict)
    embedded: int = 0

    def __post_init__(self) -> None:
        self._ids = self.before.ids
        self._kept: set[int] = set()
        """Rows that stay because those that were to follow them cannot be written."""

    def write_updated(self, rows: pa.Table, old_rows: Sequence[int]) -> None:
        """Write unchanged images whose label, metadata or source is another now."""
        self._write_stored(rows, old_rows, old_rows, is_updated=True)

    def write_reused(self) -> None:
        """Write the keys that take over a vector."""
        reuse = self.plan.reuse
        seen, old_rows = [one.seen for one in reuse], [one.metadata_row for one in reuse]
        rows = self.rows.make(
            old_rows,
            [one.key for one in seen],
            [one.label for one in seen],
            [one.digest for one in seen],
        )
        self._write_stored(rows, [one.vector_row for one in reuse], old_rows)

    def embed(self, batches: Iterator[RecordBatch], encoder: Encoder, crew: Crew) -> None:
        """Embed what no vector is known of, and write it as it comes."""
        is_unit, total = self.before.metric == COSINE, len(self.plan.embed)
        made = embed_batches(batches, encoder, crew=crew, normalize=is_unit)
        waiting: list[EmbeddedBatch] = []
        with closing(made):
            for batch in progress(made, what="embedding", total=total, size=len):
                waiting.append(batch)
                if sum(map(len, waiting)) >= WRITE_ROWS:
                    self._write_embedded(waiting)
                    waiting = []
        if waiting:
            self._write_embedded(waiting)

    def drop(self) -> None:
        """Delete the rows whose images are gone, or are none."""
        self._delete(self.plan.drop)

    def _delete(self, rows: Sequence[int]) -> None:
        """Delete rows, but those that are kept."""
        deleted = [row for row in rows if row not in self._kept]
        self.writer.delete(self._ids[np.array(deleted, np.int64)])

    def _write_stored(
        self,
        rows: pa.Table,
        vector_rows: Sequence[int],
        old_rows: Sequence[int | None],
        *,
        is_updated: bool = False,
    ) -> None:
        """Write rows with vectors that are stored under whatever key.

        A key whose image has moved goes with the write that moves it: what is embedded for it
        after a kill would else take that image's metadata.
        """
        vacated = {*self.plan.vacated}
        for start in range(0, len(rows), WRITE_ROWS):
            some = slice(start, start + WRITE_ROWS)
            self._write(
                rows.slice(start, WRITE_ROWS),
                self.before.vectors(self._ids[vector_rows[some]]),
                old_rows[some],
                is_updated=is_updated,
            )
            self._delete([row for row in old_rows[some] if row in vacated])

    def _write_embedded(self, batches: Sequence[EmbeddedBatch]) -> None:
        """Write what was embedded, and take note of what could not be."""
        keys = [key for batch in batches for key in batch.keys]
        labels = [label for batch in batches for label in batch.labels]
        digests = [digest for batch in batches for digest in batch.digests]
        for batch in batches:
            for reject in batch.rejects:
                is_final = self.is_settled(reject.key)
                self._reject(reject, self.plan.embed[reject.key], is_final=is_final)
        old_rows = [self.plan.embed[key] for key in keys]
        vectors_ND = np.concatenate([batch.vectors_ND for batch in batches])
        self._write(self.rows.make(old_rows, keys, labels, digests), vectors_ND, old_rows)
        self.embedded += len(keys)
        self.digests.update(zip(keys, digests, strict=True))

    def _write(
        self,
        rows: pa.Table,
        vectors_ND: NDArray[np.float32],
        old_rows: Sequence[int | None],
        *,
        is_updated: bool = False,
    ) -> None:
        """Hand rows to the writer, but those that it would refuse.

        Args:
            rows: of N images.
            vectors_ND: theirs.
            old_rows: those whose metadata they took.
            is_updated: whether nothing but metadata is another.
        """
        keys, digests = (cast(list[str], rows[name].to_pylist()) for name in ("key", DIGEST))
        refused = _reject_large(rows) | reject_unsound(
            keys, digests, vectors_ND, metric=self.before.metric
        )
        for n, reject in refused.items():
            self._reject(reject, old_rows[n], is_updated=is_updated)
        kept = [n for n in range(len(keys)) if n not in refused]
        written = rows.take(pa.array(kept, pa.int64()))
        self.writer.upsert(written, vectors_ND[kept], fingerprint=self.before.fingerprint)

    def _reject(
        self,
        reject: Reject,
        old_row: int | None,
        *,
        is_updated: bool = False,
        is_final: bool = True,
    ) -> None:
        """Take note of an image that cannot be written, and settle what becomes of its old row.

        Args:
            reject: why it cannot.
            old_row: whose metadata it was to have.
            is_updated: whether nothing but metadata is another.
            is_final: whether its file stays as it is, and is not being written.
        """
        plan = self.plan
        plan.rejects.append(reject)
        if reject.digest is not None:
            self.digests[reject.key] = reject.digest
        if is_updated:
            plan.updated -= 1
        elif old_row is None:
            plan.new -= 1
        elif self.rows.table["key"][old_row].as_py() == reject.key:
            plan.changed -= 1
        else:
            plan.moved -= 1
        key_row = old_row if is_updated else plan.replaced.get(reject.key)
        if reject.fault != TOO_LARGE:
            if key_row is not None:
                stays = reject.fault == UNREADABLE or not is_final
                (plan.retained if stays else plan.drop).append(key_row)
        elif old_row is not None:
            self._kept.add(old_row)


def _reject_large(rows: pa.Table) -> dict[int, Reject]:
    """Reject, by its place, every row that has more text than may come in."""
    bytes_N = text_bytes(rows)
    rejects = {}
    for n in np.flatnonzero(bytes_N > MAX_TEXT_BYTES).tolist():
        key, digest = (cast(str, rows[name][n].as_py()) for name in ("key", DIGEST))
        fact = f"expected at most {MAX_TEXT_BYTES} bytes of text in its row, found {bytes_N[n]}"
        rejects[n] = Reject(key=key, fault=TOO_LARGE, message=fact, digest=digest)
    return rejects
