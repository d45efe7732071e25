"""What a client gets back: plain values, with nothing of the wire in them.

Shapes: N images or queries, D dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from models.preprocess import PreprocessSpec
from models.wire import vectors_from_wire
from protos import horace_pb2 as pb
from serve.errors import FailedItemsError


@dataclass(frozen=True, slots=True)
class ItemStatus:
    """What became of one image or one query.

    Attributes:
        code: `ok`, or the reason in a word or three, such as `corrupt` or `not_found`.
        message: the reason in a line; empty where ok.
    """

    code: str = "ok"
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether there is a result."""
        return self.code == "ok"


OK_STATUS = ItemStatus()


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Where the server spent its time, in milliseconds; sums where a call was split.

    Attributes:
        decode_ms: from arrival until the last image was decoded.
        queue_ms: the longest that an image waited for the encoder.
        inference_ms: the encoder's time for the batches that the images were in.
        search_ms: the collection's time.
        total_ms: from arrival to the reply.
    """

    decode_ms: float = 0.0
    queue_ms: float = 0.0
    inference_ms: float = 0.0
    search_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class EmbedResult:
    """The vectors of some images.

    Attributes:
        vectors: (N ok, D) float32, a row for each image whose status is ok, in order.
        statuses: one an image.
        fingerprint: of the encoder that made them; a search with them must send it.
        model: the name under which it was served.
        timings: where the time went.
        version: the version of the model.
    """

    vectors: NDArray[np.float32]
    statuses: tuple[ItemStatus, ...]
    fingerprint: str
    model: str
    timings: Timings
    version: str = ""

    def by_image(self) -> list[NDArray[np.float32] | None]:
        """Give one (D,) vector an image, None where it failed."""
        rows = iter(self.vectors)
        return [next(rows) if status.ok else None for status in self.statuses]

    def raise_for_status(self) -> EmbedResult:
        """Give the result back if every image has a vector.

        Raises:
            FailedItemsError: some have none; names how many, and the first.
        """
        raise_for_statuses("images", self.statuses)
        return self


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One neighbour.

    Attributes:
        id: the image's 63-bit id in the collection.
        score: cosine similarity, -1 to 1; of a Euclidean collection minus the squared distance.
        key: where the image stands in its source.
        label: its class; empty where none is known.
        source: the source's URI, less the directories that it lies in.
        vector: (D,) float32, where it was asked for.
        metadata: the collection's further columns, where asked for; times as ISO 8601 texts.
    """

    id: int
    score: float
    key: str
    label: str
    source: str
    vector: NDArray[np.float32] | None = None
    metadata: Mapping[str, object] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The neighbours of some queries.

    Attributes:
        hits: per query its neighbours, nearest first; empty where its status is not ok.
        statuses: one a query.
        collection: the name under which it was served.
        fingerprint: of the encoder that made its vectors.
        timings: where the time went.
        versions: of the collection's content: each write makes another. One, unless it was
            written between the requests of a call that had to be split.
    """

    hits: tuple[tuple[Hit, ...], ...]
    statuses: tuple[ItemStatus, ...]
    collection: str
    fingerprint: str
    timings: Timings
    versions: tuple[str, ...] = ()

    def raise_for_status(self) -> SearchResult:
        """Give the result back if every query was answered.

        Raises:
            FailedItemsError: some were not; names how many, and the first.
        """
        raise_for_statuses("queries", self.statuses)
        return self


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A served model.

    Attributes:
        name: what a call asks for.
        fingerprint: of its newest version; so are the next two.
        dim: length of a vector.
        preprocessing: what becomes of an image before it.
        is_default: whether it is meant where a call names none.
        max_images_per_request: what the server takes.
        max_request_bytes: what the server takes.
        version: the newest, which is meant where a call names none.
        versions: all that are served, newest first.
    """

    name: str
    fingerprint: str
    dim: int
    preprocessing: PreprocessSpec
    is_default: bool
    max_images_per_request: int
    max_request_bytes: int
    version: str = ""
    versions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CollectionInfo:
    """A served collection.

    `model` is the one whose images may query it, `version` that of its content, which is another
    one after each write.
    """

    name: str
    fingerprint: str
    dim: int
    count: int
    metric: str
    index: str
    model: str
    version: str = ""


def raise_for_statuses(what: str, statuses: Sequence[ItemStatus]) -> None:
    """Raise `FailedItemsError` unless every status is ok."""
    failed = [(n, status) for n, status in enumerate(statuses) if not status.ok]
    if failed:
        n, status = failed[0]
        raise FailedItemsError(
            f"{len(failed)} of {len(statuses)} {what}",
            expected="a result for each",
            found=f"{status.code} for number {n}: {status.message}",
        )


def read_status(message: pb.ItemStatus) -> ItemStatus:
    """Read one status; a code of a later version is given as its number."""
    if message.code == pb.OK:
        return OK_STATUS
    known = message.code in pb.ItemCode.values()
    code = pb.ItemCode.Name(message.code).lower() if known else f"code_{message.code}"
    return ItemStatus(code, message.message)


def read_timings(messages: Sequence[pb.Timings]) -> Timings:
    """Add up the timings of the requests of one call."""
    return Timings(
        decode_ms=sum(m.decode_ms for m in messages),
        queue_ms=sum(m.queue_ms for m in messages),
        inference_ms=sum(m.inference_ms for m in messages),
        search_ms=sum(m.search_ms for m in messages),
        total_ms=sum(m.total_ms for m in messages),
    )


def read_hits(message: pb.Hits) -> tuple[Hit, ...]:
    """Read the neighbours of one query."""
    vectors = list(vectors_from_wire(message.vectors)) if message.vectors.rows else []
    return tuple(
        Hit(
            id=hit.id,
            score=hit.score,
            key=hit.key,
            label=hit.label,
            source=hit.source,
            vector=vectors[n] if vectors else None,
            metadata=json.loads(hit.metadata) if hit.metadata else {},
        )
        for n, hit in enumerate(message.hits)
    )


def read_model(message: pb.Model) -> ModelInfo:
    """Read what the server says of a model."""
    return ModelInfo(
        name=message.name,
        fingerprint=message.fingerprint,
        dim=message.dim,
        preprocessing=PreprocessSpec.from_json(json.loads(message.preprocessing_json)),
        is_default=message.is_default,
        max_images_per_request=message.max_images_per_request,
        max_request_bytes=message.max_request_bytes,
        version=message.version,
        versions=tuple(message.versions),
    )


def read_collection(message: pb.Collection) -> CollectionInfo:
    """Read what the server says of a collection."""
    return CollectionInfo(
        name=message.name,
        fingerprint=message.fingerprint,
        dim=message.dim,
        count=message.count,
        metric=message.metric,
        index=message.index,
        model=message.model,
        version=message.version,
    )
