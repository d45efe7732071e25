"""What a client sends: images and queries, checked and cut into requests a server takes.

Rules:
    A request never exceeds what the server advertises; an image that alone does is not sent
    and gets its own status.
    A query vector goes with the fingerprint of the encoder that made it, or not at all.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from models.errors import UsageError
from models.image_source import ImageData
from models.wire import DTYPES, check_image, image_to_wire, mend_image, vectors_to_wire
from protos import horace_pb2 as pb
from serve.client.arguments import (
    MAX_UINT64,
    ONE_IMAGE,
    check_integer,
    check_number,
    check_request_id,
    check_text,
    describe,
)
from serve.client.combining import Combination, check_combined, group_combinations
from serve.client.results import EmbedResult, ItemStatus
from serve.reply_size import bytes_of_hit

Images: TypeAlias = Sequence[ImageData] | NDArray[np.uint8]
"""Several images, or one array of them: (N, H, W) or (N, H, W, C)."""

Vectors: TypeAlias = EmbedResult | NDArray[np.float32]
"""(N, D) float32, or the result that holds them and their fingerprint."""

IMAGE_OVERHEAD_BYTES = 64
"""Of one image in a request: tags, lengths and shape."""

LOWEST_PRIORITY = 3

NOT_AN_IMAGE = "not_an_image"
"""The status of what is neither bytes nor pixels."""

REQUEST_OVERHEAD_BYTES = 4096
"""Of one request: names, fingerprint and options."""


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """What is asked of every vector; `dtype` is how they cross the wire."""

    model: str | None = None
    version: str | None = None
    dims: int | None = None
    normalize: bool = True
    dtype: str = "fp32"
    request_id: str | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        """Refuse what no server can mean.

        Raises:
            UsageError: a value makes no sense.
        """
        check_text("model", self.model)
        check_text("version", self.version)
        check_request_id(self.request_id)
        check_integer("priority", self.priority, 0, LOWEST_PRIORITY)
        if self.dims is not None:
            check_integer("dims", self.dims, 1)
        if self.dtype not in [*DTYPES]:  # as a list, which cannot be looked up in a dict
            raise UsageError("dtype", expected=" or ".join(DTYPES), found=repr(self.dtype))


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How to search."""

    collection: str | None = None
    k: int = 10
    exact: bool = False
    include_vectors: bool = False
    include_metadata: bool = False
    filter: str | None = None
    effort: int | None = None
    min_score: float | None = None
    diversity: float = 0.0
    request_id: str | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        """Refuse what no server can mean.

        Raises:
            UsageError: a value makes no sense.
        """
        check_text("collection", self.collection)
        check_request_id(self.request_id)
        check_integer("priority", self.priority, 0, LOWEST_PRIORITY)
        check_integer("k", self.k, 1)
        check_text("filter", self.filter)
        if self.effort is not None:
            check_integer("effort", self.effort, 1)
        if self.min_score is not None:
            check_number("min_score", self.min_score, -1, 1)
        check_number("diversity", self.diversity, 0, 1)


@dataclass(frozen=True, kw_only=True)
class RequestSize:
    """The largest request that a server takes.

    Attributes:
        images: images of Embed, queries of Search.
        request_bytes: of a request, and of the hits of a reply.
        full_bytes: from how many on a request takes no further image; `request_bytes` where None.
        dim: of the longest vector that it may send; asked for where vectors are to be sent.
    """

    images: int
    request_bytes: int
    full_bytes: int | None = None
    dim: int = 0


@dataclass(kw_only=True)
class Group:
    """Images that go into one request.

    Attributes:
        first: the place of its first image among all of them, from 0.
        images: as they cross the wire.
        refused: the status of those that are too large, or no images, by position; an empty
            image goes in their place.
        size_bytes: of the request, about.
    """

    first: int = 0
    images: list[pb.Image] = field(default_factory=list)
    refused: dict[int, ItemStatus] = field(default_factory=dict)
    size_bytes: int = REQUEST_OVERHEAD_BYTES


@dataclass(frozen=True, kw_only=True)
class Queries:
    """What to search by; exactly one of the four is set."""

    images: Sequence[ImageData] | None = None
    vectors_ND: NDArray[np.float32] | None = None
    ids: Sequence[int] | None = None
    combinations: Sequence[pb.Combination] | None = None
    fingerprint: str = ""

    def requests(
        self, size: RequestSize, options: SearchOptions
    ) -> Iterator[tuple[pb.SearchRequest, Group]]:
        """Cut the queries into requests whose replies may be sent; with their images' group."""
        reply_bytes = options.k * bytes_of_hit(
            size.dim, with_vector=options.include_vectors, with_metadata=options.include_metadata
        )
        most = max(1, min(size.images, size.request_bytes // reply_bytes))
        # One that takes more than half of a request is longer than any filter may be.
        filter_bytes = min(len((options.filter or "").encode()), size.request_bytes // 2)
        left_bytes = size.request_bytes - filter_bytes
        for request, group in self._parts(replace(size, images=most, request_bytes=left_bytes)):
            request.collection = options.collection or ""
            request.k, request.exact = options.k, options.exact
            request.include_vectors = options.include_vectors
            request.include_metadata = options.include_metadata
            request.filter, request.effort = options.filter or "", options.effort or 0
            request.diversity = options.diversity
            if options.min_score is not None:
                request.min_score = options.min_score
            request.request_id = options.request_id or ""
            request.priority = options.priority
            yield request, group

    def _parts(self, size: RequestSize) -> Iterator[tuple[pb.SearchRequest, Group]]:
        """Cut the queries into requests that hold nothing else."""
        if self.images is not None:
            for group in group_images(self.images, size):
                yield pb.SearchRequest(images=pb.ImageQueries(images=group.images)), group
        elif self.vectors_ND is not None:
            rows = max(1, (size.request_bytes - REQUEST_OVERHEAD_BYTES) // self._row_bytes())
            step = min(size.images, rows)
            for start in range(0, len(self.vectors_ND), step):
                vectors = vectors_to_wire(self.vectors_ND[start : start + step])
                queries = pb.VectorQueries(vectors=vectors, fingerprint=self.fingerprint)
                yield pb.SearchRequest(vectors=queries), Group()
        elif self.ids is not None:
            for start in range(0, len(self.ids), size.images):
                part = self.ids[start : start + size.images]
                yield pb.SearchRequest(ids=pb.IdQueries(ids=part)), Group()
        elif self.combinations is not None:
            max_bytes = size.request_bytes - REQUEST_OVERHEAD_BYTES
            for combined in group_combinations(
                self.combinations, max_examples=size.images, max_bytes=max_bytes
            ):
                yield pb.SearchRequest(combined=pb.Combined(queries=combined)), Group()

    def _row_bytes(self) -> int:
        """Give the size of one query vector."""
        assert self.vectors_ND is not None
        return 4 * int(self.vectors_ND.shape[1])


def make_queries(
    images: Images | None,
    vectors: Vectors | None,
    ids: Sequence[int] | NDArray[np.int64] | None,
    fingerprint: str | None,
    combined: Sequence[Combination] | None = None,
) -> Queries:
    """Check that there is one kind of query, and that it can be meant.

    Raises:
        UsageError: there is none, or several; or vectors come without a fingerprint.
    """
    check_text("fingerprint", fingerprint)
    kinds = {"images": images, "vectors": vectors, "ids": ids, "combined": combined}
    given = [name for name, value in kinds.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise UsageError("search", expected="one of images, vectors, ids and combined", found=found)
    if images is not None:
        return Queries(images=check_images(images))
    if ids is not None:
        return Queries(ids=_check_ids(ids))
    if combined is not None:
        return Queries(combinations=check_combined(combined, fingerprint or ""))
    assert vectors is not None
    if isinstance(vectors, EmbedResult):
        fingerprint, vectors = vectors.fingerprint, vectors.vectors
    if not fingerprint:
        raise UsageError(
            "query vectors",
            expected="an EmbedResult, or an array with fingerprint=",
            found="an array alone",
            mend="pass the result of embed(), or fingerprint=result.fingerprint",
        )
    try:
        vectors_ND = np.asarray(vectors, dtype=np.float32)
    except (TypeError, ValueError):
        vectors_ND = np.empty(0, np.float32)
    if vectors_ND.ndim != 2 or not vectors_ND.size:
        found = f"{type(vectors).__name__} of shape {np.shape(vectors_ND)}"
        raise UsageError("query vectors", expected="shape (N, D), N at least 1", found=found)
    return Queries(vectors_ND=vectors_ND, fingerprint=fingerprint)


def check_images(images: Images) -> Sequence[ImageData]:
    """Refuse one image in the place of several: it would be read as its bytes or rows.

    Raises:
        UsageError: it is not a sequence of images, or an empty one, or one of it is no image.
    """
    several = isinstance(images, Sequence) and not isinstance(images, ONE_IMAGE)
    if isinstance(images, np.ndarray):
        several = images.ndim == 4 or (images.ndim == 3 and images.shape[2] not in (1, 3, 4))
    if not several:
        raise UsageError(
            "images",
            expected="a sequence of images",
            found=_describe(images),
            mend=_mend(images),
        )
    if not len(images):
        raise UsageError("images", expected="at least one", found="none")
    checked = list(images)
    for image in checked:
        check_image(image)
    return checked


def check_iterable(images: object) -> None:
    """Refuse one image in the place of many.

    Raises:
        UsageError: it cannot be iterated over, or not as images.
    """
    several = isinstance(images, Iterable | AsyncIterable) and not isinstance(images, ONE_IMAGE)
    if not several:
        raise UsageError(
            "images",
            expected="an iterable of images",
            found=_describe(images),
            mend=_mend(images),
        )


def group_images(
    images: Iterable[ImageData], size: RequestSize, *, keep_going: bool = False
) -> Iterator[Group]:
    """Cut images into requests, as large as `size` allows, as they come.

    Raises:
        UsageError: something is no image, unless `keep_going` gives it a status of its own.
        Exception: what `images` raises; with `keep_going` after a request of what came before.
    """
    grouper = Grouper(size)
    add = grouper.add_any if keep_going else grouper.add
    try:
        for image in images:
            yield from add(image)
    except Exception:
        if keep_going:
            yield from grouper.end()
        raise
    yield from grouper.end()


class Grouper:
    """Fills requests with images, one after the other."""

    def __init__(self, size: RequestSize, *, first: int = 0) -> None:
        """Start with an empty group, whose first image has this place."""
        self._size = size
        self._full_bytes = min(size.request_bytes, size.full_bytes or size.request_bytes)
        self._group = Group(first=first)

    def add(self, image: ImageData) -> Iterator[Group]:
        """Take an image in; give the groups that are full now.

        Raises:
            UsageError: it is no image.
        """
        yield from self.add_wire(image_to_wire(image), _size_of(image))

    def add_wire(self, wire: pb.Image, image_bytes: int) -> Iterator[Group]:
        """Take in an image as it is sent; give the groups that are full now."""
        if REQUEST_OVERHEAD_BYTES + image_bytes > self._size.request_bytes:
            yield from self.refuse(_too_large(image_bytes, self._size))
        else:
            yield from self._add(wire, image_bytes)

    def add_any(self, image: ImageData) -> Iterator[Group]:
        """Take in what may be no image: it has its own status then."""
        try:
            yield from self.add(image)
        except UsageError as error:
            yield from self.refuse(ItemStatus(NOT_AN_IMAGE, str(error)))

    def refuse(self, status: ItemStatus) -> Iterator[Group]:
        """Count an image that is not sent; give the groups that are full now."""
        yield from self._add(pb.Image(), IMAGE_OVERHEAD_BYTES, status)

    def _add(
        self, wire: pb.Image, image_bytes: int, refused: ItemStatus | None = None
    ) -> Iterator[Group]:
        """Put an image into the present group, or into the next where it does not fit."""
        if self._group.size_bytes + image_bytes > self._full_bytes:
            yield from self.end()
        if refused is not None:
            self._group.refused[len(self._group.images)] = refused
        self._group.images.append(wire)
        self._group.size_bytes += image_bytes
        if len(self._group.images) >= self._size.images:
            yield from self.end()

    def end(self) -> Iterator[Group]:
        """Give the group that is not full, unless it is empty."""
        if (group := self._group).images:
            self._group = Group(first=group.first + len(group.images))
            yield group


def split(group: Group, size: RequestSize) -> Iterator[Group]:
    """Cut a group anew, for a server that takes less than when it was made; else it stays."""
    if len(group.images) <= size.images and group.size_bytes <= size.request_bytes:
        yield group
        return
    grouper = Grouper(size, first=group.first)
    for n, wire in enumerate(group.images):
        if refused := group.refused.get(n):
            yield from grouper.refuse(refused)
        else:
            payload = len(wire.encoded) + len(wire.raw.pixels)  # one of them is empty
            yield from grouper.add_wire(wire, payload + IMAGE_OVERHEAD_BYTES)
    yield from grouper.end()


def embed_request(group: Group, options: EmbedOptions) -> pb.EmbedRequest:
    """Write the request for a group."""
    return pb.EmbedRequest(
        model=options.model or "",
        version=options.version or "",
        images=group.images,
        dims=options.dims or 0,
        skip_normalize=not options.normalize,
        dtype=DTYPES[options.dtype],
        request_id=options.request_id or "",
        priority=options.priority,
    )


def _check_ids(ids: Sequence[int] | NDArray[np.int64]) -> list[int]:
    """Give ids as Python's integers.

    Raises:
        UsageError: there are none, or one is none of 64 bits.
    """
    if not isinstance(ids, Iterable) or isinstance(ids, str | bytes):
        raise UsageError("ids", expected="a sequence of integers", found=describe(ids))
    checked = [check_integer("ids", id_, 0, MAX_UINT64) for id_ in ids]
    if not checked:
        raise UsageError("ids", expected="at least one", found="none")
    return checked


def _size_of(image: ImageData) -> int:
    """Give what an image takes in a request, in bytes."""
    payload = len(image) if isinstance(image, bytes | bytearray) else image.nbytes
    return payload + IMAGE_OVERHEAD_BYTES


def _too_large(image_bytes: int, size: RequestSize) -> ItemStatus:
    """Refuse an image that no request can hold."""
    message = (
        f"image: expected at most {size.request_bytes} bytes a request, found {image_bytes}; "
        "send a smaller file"
    )
    return ItemStatus("too_many_bytes", message)


def _mend(images: object) -> str | None:
    """Say how what was given becomes several images; None where nobody can."""
    into_list = "put a single image into a list"
    if isinstance(images, bytes | bytearray | memoryview):
        return into_list
    if getattr(images, "dtype", None) == np.dtype(object):  # of files, in an array or a column
        return "make a list of them, or call embed_iter"
    if isinstance(images, np.ndarray):
        if images.dtype == np.uint8 and images.ndim in (2, 3):
            return into_list
        return "make it uint8, (N, H, W) or (N, H, W, C), or a list of files' bytes"
    if mend := mend_image(images):
        return f"{mend}, and {into_list}"
    if isinstance(images, Iterable | AsyncIterable):
        return "make a list of them, or call embed_iter"
    return None


def _describe(images: object) -> str:
    """Name what was given instead of several images."""
    if isinstance(images, np.ndarray):
        return f"an array of shape {images.shape}"
    return type(images).__name__
