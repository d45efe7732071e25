"""What a build would do, and how long it would take, before it does it.

Rules:
    Nothing is written, locked or made. Parts that are there are held against the source as the
    build would hold them, so that a source that has changed is told now.
    The time comes from embedding a sample of what is missing with the build's own workers: of
    one process, on the machine as it is now. The index is built after that; its time is not
    known here.
    Bytes are estimates: vectors to the byte, rows and index from above.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice

from index.ann.kinds import FLAT, parse_kind
from index.ann.memory import as_size, search_bytes
from index.ann.trials import Goal
from index.ann.tuning import plan as choose_kinds
from index.building.part_set import PartSet, RecordBatch
from index.building.pipeline import Crew, embed_batches
from models.command import counted, per_second
from models.encoder import Encoder

SAMPLE_ROUNDS = 4
"""Batches a worker in the sample, after the first."""

ENOUGH_S = 3.0
"""Where a worker's first batch takes so long, it is the sample."""

ROW_BYTES = 48
"""Of a row beside its vector and its key: id, digest and label."""


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """What a build would do.

    Attributes:
        source: URI of the images.
        images: records in the source; None where only reading all would tell.
        reused: of them in parts that an unfinished run has left.
        reused_parts: how many parts these are.
        encoder: its name.
        fingerprint: of the encoder.
        dim: length of a vector.
        index: FAISS factory string, or `Flat`; None where the number of images decides, or what
            each reaches.
        recall: that the index must reach, where it is chosen so.
        candidates: the kinds that would be tried then; none where their number is not known.
        collection_bytes: on the disk, for as many images as there are; None likewise.
        parts_bytes: on the disk beside it until the build is done; None likewise.
        sampled: images that were embedded to see how long it takes.
        images_per_s: how fast; None where nothing is missing.
        embed_s: seconds for embedding all that is missing; None where that is not known.
    """

    source: str
    images: int | None
    reused: int
    reused_parts: int
    encoder: str
    fingerprint: str
    dim: int
    index: str | None
    recall: float | None
    candidates: Sequence[str]
    collection_bytes: int | None
    parts_bytes: int | None
    sampled: int
    images_per_s: float | None
    embed_s: float | None

    def __str__(self) -> str:
        count = "images" if self.images is None else counted(self.images, "image")
        lines = [
            f"would build {count} of {self.source} with encoder {self.encoder} "
            f"{self.fingerprint[:12]} ({self.dim} dimensions), index "
            f"{self._index_text}",
            f"reuses {counted(self.reused, 'image')} in "
            f"{counted(self.reused_parts, 'finished part')}",
        ]
        if self.collection_bytes is not None and self.parts_bytes is not None:
            lines.append(
                f"about {as_size(self.collection_bytes)} on the disk, and "
                f"{as_size(self.parts_bytes)} of parts beside it until it is done"
            )
        if self.images_per_s is None:
            lines.append("nothing is left to embed")
        else:
            took = counted(self.sampled, "image")
            rate = f"{per_second(self.images_per_s)}, as {took} took"
            takes = "" if self.embed_s is None else f"embedding takes about {self.embed_s:.0f} s: "
            lines.append(f"{takes}{rate}; the index comes after that")
        return "\n".join(lines)

    @property
    def _index_text(self) -> str:
        """Say which index, or what decides."""
        if self.recall is None:
            return self.index or "by their number"
        among = f", of {' '.join(self.candidates)}" if self.candidates else ""
        return f"chosen by its recall, at least {self.recall}{among}"


def plan_build(
    parts: PartSet,
    batches: Iterator[RecordBatch],
    encoder: Encoder,
    *,
    crew: Crew,
    factory: str | None,
    goal: Goal | None = None,
) -> BuildPlan:
    """Look at what is there, and embed a sample of what is missing.

    Args:
        parts: what an unfinished run has left.
        batches: what it has not.
        encoder: what would embed them.
        crew: how many batches would be at work.
        factory: of the index; None where it is not known yet.
        goal: what the index must reach, where it is chosen so.

    Raises:
        HoraceError: as the build would.
    """
    first = next(batches, None)
    sampled, rate, key_bytes = 0, None, 0.0
    if first is not None:
        keys = [len(record.key.encode()) for record in first.records]
        key_bytes = sum(keys) / len(keys)
        sampled, rate = measure_rate(chain([first], batches), encoder, crew)
    key, images = parts.key, parts.key.source_count
    row_bytes = round(key.dim * 4 + ROW_BYTES + key_bytes)
    index_bytes = 0
    if factory not in (None, FLAT) and images is not None:
        index_bytes = search_bytes(parse_kind(factory, key.dim), images, key.dim)
    kinds = [] if goal is None or images is None else choose_kinds(images, key.dim, goal)
    missing = None if images is None else images - parts.n_records
    return BuildPlan(
        source=key.source,
        images=images,
        reused=parts.n_images,
        reused_parts=len(parts.finished),
        encoder=encoder.name,
        fingerprint=key.fingerprint,
        dim=key.dim,
        index=factory,
        recall=None if goal is None else goal.recall,
        candidates=[kind.factory for kind in kinds if kind.fits],
        collection_bytes=None if images is None else images * row_bytes + index_bytes,
        parts_bytes=None if images is None else images * row_bytes,
        sampled=sampled,
        images_per_s=rate,
        embed_s=None if rate is None or missing is None else missing / rate,
    )


def measure_rate(
    batches: Iterator[RecordBatch], encoder: Encoder, crew: Crew
) -> tuple[int, float | None]:
    """Embed some batches; give how many images that were, and images a second."""
    measured: tuple[int, float | None] = (0, None)
    for rounds in (1, SAMPLE_ROUNDS):  # in the first round the encoder finds its memory
        sample, start_s = islice(batches, rounds * crew.workers), time.monotonic()
        with closing(embed_batches(sample, encoder, crew=crew)) as made:
            n_images = sum(map(len, made))
        took_s = time.monotonic() - start_s
        if n_images >= measured[0]:  # the end of a small source tells less than its beginning
            measured = n_images, n_images / took_s
        if took_s > ENOUGH_S:
            break
    return measured
