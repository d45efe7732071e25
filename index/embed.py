"""Images to vectors: one batch, or a stream that decodes ahead of its reader.

Rules:
    Batches are consecutive records, in the source's order, whatever the number of threads;
    an image that cannot be used leaves a gap and a `Reject`, never an error. One that the
    storage keeps back may be good another time: that is an error, and no `Reject`.
    `decode_batches` has at most `BATCHES_AHEAD` batches read and decoded before they are
    asked for.
    A vector is `finish_vectors(encoder.encode(batch))`, the same as the server gives.

It writes nothing: `index.building` does, whose pipeline keeps several batches at work.

Shapes: N images of a batch, H, W, C of the encoder's input, D dimensions.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from models.cpu import cpu_budget, share_cpus
from models.encoder import Encoder, open_encoder
from models.errors import BundleError, FingerprintMismatchError, ImageError, SourceError
from models.image_source import ImageRecord, digest_of, storage_fault
from models.vectors import finish_vectors

if TYPE_CHECKING:
    from index.interface import AnyCollection

BATCHES_AHEAD = 2
"""While one batch is encoded, one more is ready and one is in the making."""

CHUNK = 16
"""Images a task of the decoding pool: a task costs some 30 us, a 28 x 28 image 10 us."""

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Reject:
    """An image that could not be used.

    Attributes:
        key: its key in the source.
        fault: the value of an `ImageFault`, or one of `index.building`'s own.
        message: what was expected, what was found; without the key, which stands beside it.
        digest: of what was read, see `models.image_source`; None where nothing could be.
    """

    key: str
    fault: str
    message: str
    digest: str | None = None

    @classmethod
    def of(cls, key: str, error: ImageError, digest: str | None = None) -> Reject:
        """Say why an image could not be used; some errors name its key, others what it is."""
        message = str(error).removeprefix(f"{key}: ")
        return cls(key=key, fault=error.fault.value, message=message, digest=digest)


def rejects_text(rejects: Iterable[Reject]) -> str:
    """Lay rejects out as JSON, one a line."""
    return "".join(json.dumps(asdict(reject)) + "\n" for reject in rejects)


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Consecutive records of a source, decoded.

    Attributes:
        keys: of the N images that could be used.
        labels: of the same.
        digests: of what was read for them.
        images_NHWC: the encoder's input, uint8.
        rejects: the others. `len(batch)` counts both.
    """

    keys: list[str]
    labels: list[str | None]
    digests: list[str]
    images_NHWC: NDArray[np.uint8]
    rejects: list[Reject]

    def __len__(self) -> int:
        return len(self.keys) + len(self.rejects)


@dataclass(frozen=True, kw_only=True)
class EmbeddedBatch:
    """Consecutive records of a source, embedded.

    Attributes:
        start: number of the first of them in the source.
        keys: of the N images that could be used.
        labels: of the same.
        digests: of what was read for them.
        vectors_ND: of the same, float32; unit length, where that was asked for, unless the encoder
            failed in silence.
        rejects: the others. `len(batch)` counts both.
    """

    start: int
    keys: list[str]
    labels: list[str | None]
    digests: list[str]
    vectors_ND: NDArray[np.float32]
    rejects: list[Reject]

    def __len__(self) -> int:
        return len(self.keys) + len(self.rejects)


def open_collection_encoder(collection: AnyCollection, encoder: str | None) -> Encoder:
    """Open the named encoder, or the one that built the collection; it must be the same.

    Raises:
        BundleError: the recorded encoder is no longer where it was.
        FingerprintMismatchError: it is another encoder; names both.
    """
    uri = encoder or collection.encoder
    if encoder is None and "://" not in uri and not os.path.exists(uri):
        raise BundleError(
            f"encoder of collection {collection.name}",
            expected=f"the bundle at {uri}, where it was when the collection was built",
            found="nothing",
            mend="say where it is now with --encoder",
        )
    opened = open_encoder(uri)
    if opened.fingerprint != collection.fingerprint:
        opened.close()
        raise FingerprintMismatchError(
            f"collection {collection.name}",
            expected=f"{collection.fingerprint} ({collection.encoder})",
            found=f"{opened.fingerprint} ({uri})",
            mend="query it with the encoder that built it, or build it again with this one",
        )
    return opened


def decode_batches(
    records: Iterable[ImageRecord],
    encoder: Encoder,
    *,
    batch_size: int,
    threads: int | None = None,
) -> Generator[ImageBatch, None, None]:
    """Read and preprocess records in a pool of threads, ahead of the caller.

    Closing the iterator, or an error, waits for what has begun and drops the rest.

    Args:
        records: in the order of the batches.
        encoder: whose preprocessing is applied.
        batch_size: records a batch; the last may have fewer.
        threads: of the pool; the decoding share of the CPU budget where None.

    Raises:
        SourceError: the source is damaged or was replaced, or its storage fails; the batches
            before are good.
    """
    pool = ThreadPoolExecutor(
        threads or share_cpus(cpu_budget()).decode_threads, thread_name_prefix="decode"
    )
    waiting: deque[list[Future[list[_Outcome]]]] = deque()
    try:
        for batch in split(records, batch_size):
            tasks = [pool.submit(_decode, chunk, encoder) for chunk in split(batch, CHUNK)]
            waiting.append(tasks)
            if len(waiting) > BATCHES_AHEAD:
                yield _gather(_results(waiting.popleft()), encoder)
        while waiting:
            yield _gather(_results(waiting.popleft()), encoder)
    finally:
        pool.shutdown(cancel_futures=True)


def embed_records(
    records: Sequence[ImageRecord], encoder: Encoder, *, start: int = 0, normalize: bool = True
) -> EmbeddedBatch:
    """Read, decode and encode one batch, on the calling thread.

    Args:
        records: of the batch.
        encoder: what embeds them.
        start: number of the first of them in the source.
        normalize: whether vectors are scaled to unit length.

    Raises:
        SourceError: the source was replaced, or its storage fails.
        EncoderError: the runtime failed.
    """
    batch = _gather(_decode(records, encoder), encoder)
    return EmbeddedBatch(
        start=start,
        keys=batch.keys,
        labels=batch.labels,
        digests=batch.digests,
        vectors_ND=embed(encoder, batch.images_NHWC, normalize=normalize),
        rejects=batch.rejects,
    )


def embed(
    encoder: Encoder, images_NHWC: NDArray[np.uint8], *, normalize: bool = True
) -> NDArray[np.float32]:
    """Encode preprocessed images to (N, D) float32, of unit length where it normalises.

    Raises:
        EncoderError: the runtime failed.
    """
    return finish_vectors(encoder.encode(images_NHWC), normalize=normalize)


def split(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Cut into lists of `size`; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


@dataclass(frozen=True)
class _Outcome:
    """What became of one record: pixels, or the error; and what was read."""

    record: ImageRecord
    result: NDArray[np.uint8] | ImageError
    digest: str | None


def _decode(records: Sequence[ImageRecord], encoder: Encoder) -> list[_Outcome]:
    """Read and preprocess a chunk; runs in the pool."""
    outcomes = []
    for record in records:
        digest = None
        try:
            data = record.read()
            digest = digest_of(data)
            outcomes.append(_Outcome(record, encoder.preprocess(data), digest))
        except ImageError as error:
            if storage_fault(error) is not None:
                raise _storage_failed(record, error) from error
            outcomes.append(_Outcome(record, error, digest))
    return outcomes


def _storage_failed(record: ImageRecord, error: ImageError) -> SourceError:
    """Make the error for an image that its storage keeps back."""
    return SourceError(
        f"reading {record.key}",
        expected="storage that works",
        found=error.found,
        mend="see to it and run the same command again; if this file alone is lost, put an empty "
        "one in its place, which is passed over",
    )


def _results(tasks: Iterable[Future[list[_Outcome]]]) -> Iterator[_Outcome]:
    """Wait for the chunks of a batch, in order."""
    for task in tasks:
        yield from task.result()


def _gather(outcomes: Iterable[_Outcome], encoder: Encoder) -> ImageBatch:
    """Put the images of a batch together, and the rejects."""
    keys, labels, digests, images, rejects = [], [], [], [], []
    for outcome in outcomes:
        record, result, digest = outcome.record, outcome.result, outcome.digest
        if isinstance(result, ImageError):
            rejects.append(Reject.of(record.key, result, digest))
        else:
            assert digest is not None
            keys.append(record.key)
            labels.append(record.label)
            digests.append(digest)
            images.append(result)
    spec = encoder.preprocessing
    empty = np.empty((0, spec.height, spec.width, spec.channels), np.uint8)
    images_NHWC = np.stack(images) if images else empty
    return ImageBatch(
        keys=keys, labels=labels, digests=digests, images_NHWC=images_NHWC, rejects=rejects
    )
