"""From records to finished parts: decoding, encoding and writing at the same time.

Rules:
    A worker takes a batch through reading, decoding and encoding on one thread; there are as
    many workers as CPUs, so that all of them are busy whatever the two cost, and no stage
    waits for another. More workers wait for a remote encoder, so that its wire is never idle.
    A local encoder computes on the worker's thread alone (`ENCODE_THREADS`), in slices of
    `SLICE_BYTES`: a vector depends on neither the number of CPUs nor of processes, and a worker
    on a large network holds the layers of a few images.
    Parts are written, and synced, by a thread of their own while the next is embedded.
    Batches come out in the source's order. Memory holds the pixels of a batch a worker, the
    records of `WINDOW` batches a worker, and the vectors of two parts and of that window.
    An error ends the stream once what came before it is in parts that are whole; what has
    begun is waited for, the rest is dropped.

It chooses neither records nor names: see `index.building.part_set`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from index.building.part_set import PartSet, RecordBatch
from index.embed import EmbeddedBatch, embed_records
from models.encoder import Encoder
from models.errors import SourceError
from models.providers import GPU_BATCHES, ON_CPU, split_placement

ENCODE_THREADS = 1
"""Of the encoder that `make_parts` is given: open it with `open_encoder(..., threads=1)`."""

SLICE_BYTES = 16 * 224 * 224 * 3
"""Of pixels that a local encoder is given at once: sixteen images of 224. A build with ResNet-50 on
two CPUs then peaks at .9 GiB, where batches of 64 took 1.4 (`benchmarks.build_throughput`)."""

WINDOW = 2
"""Batches a worker that are begun or done before the oldest is: one that takes longer than its
neighbours holds nobody up."""

REMOTE_REQUESTS = 4
"""Batches on their way to a remote encoder: one is computed, one waits there, two travel."""


@dataclass(frozen=True, kw_only=True)
class Crew:
    """How many batches are at work.

    Attributes:
        workers: threads that each take a batch from its records to its vectors.
        encoding: how many of them may be with the encoder at once.
        slice_bytes: of pixels that the encoder is given at once; whole batches where None.
    """

    workers: int
    encoding: int
    slice_bytes: int | None = SLICE_BYTES


def choose_crew(cpus: int, encoder: str, *, requests: int = REMOTE_REQUESTS) -> Crew:
    """Share CPUs among workers; those who wait for a server or for a GPU need none.

    Args:
        cpus: that this process may use.
        encoder: as `open_encoder` takes it.
        requests: batches on their way to a remote encoder at once.
    """
    where, placement = split_placement(encoder)
    if "://" not in where and (placement or ON_CPU).provider == "cpu":
        return Crew(workers=cpus, encoding=cpus)
    encoding = requests if "://" in where else GPU_BATCHES
    return Crew(workers=cpus + encoding, encoding=encoding, slice_bytes=None)


def make_parts(
    batches: Iterator[RecordBatch], encoder: Encoder, parts: PartSet, *, crew: Crew
) -> Generator[int, None, None]:
    """Embed batches and write them as parts; yield the number of records of each batch.

    Args:
        batches: what `PartSet.missing` gives: in order, none across two parts.
        encoder: opened with `ENCODE_THREADS`.
        parts: where the parts go.
        crew: how many batches are at work.

    Raises:
        SourceError: the source is damaged or was replaced, or its storage fails; what came
            before it and fills a part is kept.
        EncoderError: the runtime failed; likewise.
        OSError: a part cannot be written.
    """
    with (
        closing(embed_batches(batches, encoder, crew=crew)) as embedded,
        ThreadPoolExecutor(1, thread_name_prefix="write") as writer,
    ):
        writing: Future[None] | None = None
        waiting: list[EmbeddedBatch] = []
        for batch in embedded:
            waiting.append(batch)
            yield len(batch)
            if (batch.start + len(batch)) % parts.key.part_size == 0:
                if writing is not None:
                    writing.result()
                writing, waiting = writer.submit(parts.add, waiting), []
        if writing is not None:
            writing.result()
        if waiting:
            parts.add(waiting)


def embed_batches(
    batches: Iterable[RecordBatch], encoder: Encoder, *, crew: Crew, normalize: bool = True
) -> Generator[EmbeddedBatch, None, None]:
    """Embed batches with several workers; give them in order.

    Closing the iterator, or an error, waits for what has begun and drops the rest.

    Raises:
        SourceError: the source is damaged or was replaced, or its storage fails; all batches
            before were given.
        EncoderError: the runtime failed.
    """
    gated = GatedEncoder(encoder, crew)
    pool = ThreadPoolExecutor(crew.workers, thread_name_prefix="embed")
    begun: deque[Future[EmbeddedBatch]] = deque()
    try:
        damage: list[SourceError] = []
        for batch in _until_damaged(batches, damage):
            task = pool.submit(
                embed_records, batch.records, gated, start=batch.start, normalize=normalize
            )
            begun.append(task)
            if len(begun) >= WINDOW * crew.workers:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
        if damage:
            raise damage[0]
    finally:
        pool.shutdown(cancel_futures=True)


def _until_damaged(
    batches: Iterable[RecordBatch], damage: list[SourceError]
) -> Iterator[RecordBatch]:
    """Give what comes before a fault of the source, and note the fault."""
    try:
        yield from batches
    except SourceError as error:
        damage.append(error)


class GatedEncoder:
    """An encoder as a crew uses it: some batches at once, each in slices.

    Attributes:
        preprocessing: the encoder's, as all the rest.
    """

    def __init__(self, encoder: Encoder, crew: Crew) -> None:
        """Stand before an encoder, whose owner closes it."""
        self._encoder = encoder
        self._gate = threading.BoundedSemaphore(crew.encoding)
        self.name, self.fingerprint, self.dim = encoder.name, encoder.fingerprint, encoder.dim
        self.preprocessing, self.preprocess = encoder.preprocessing, encoder.preprocess
        spec = encoder.preprocessing
        image_bytes = spec.height * spec.width * spec.channels
        self._step = None if crew.slice_bytes is None else max(1, crew.slice_bytes // image_bytes)

    def encode(self, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed, when there is room."""
        step = self._step or max(1, len(images_NHWC))
        with self._gate:
            if len(images_NHWC) <= step:
                return self._encoder.encode(images_NHWC)
            starts = range(0, len(images_NHWC), step)
            return np.concatenate([self._encoder.encode(images_NHWC[n : n + step]) for n in starts])

    def close(self) -> None:
        """Do nothing: the encoder is its owner's."""
