"""Between the messages of Embed and the engine: images in, vectors and statuses out.

Rules:
    What is wrong with one image, or with its vector, is a status of its own.
    No reply that says OK carries a value that is not a finite number.

Source: IEEE 754 binary16, whose largest finite value is 65504.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from models.errors import ImageError
from models.image_source import ImageData
from models.vectors import finish_vectors
from models.wire import image_error_to_wire, image_from_wire
from protos import horace_pb2 as pb
from serve.job import Embedded

OK_STATUS = pb.ItemStatus()

SMALL_BYTES = 1 << 16
"""Of an image that is read before there is room for it."""

MAX_FP16 = float(np.finfo(np.float16).max)

NOT_FINITE = pb.ItemStatus(
    code=pb.NOT_FINITE,
    message="vector: expected finite numbers, found others; the encoder fails on this image",
)
OUT_OF_RANGE = pb.ItemStatus(
    code=pb.OUT_OF_RANGE,
    message=f"vector: expected values of at most {MAX_FP16:g}, which fp16 holds, found larger "
    "ones; ask for fp32, or for normalised vectors",
)


def take_images(images: Sequence[pb.Image]) -> tuple[Iterable[ImageData | ImageError], int]:
    """Give what reads images, once there is room for them, and the bytes that they take.

    Of most requests that is one small image, which is read here: to count it takes as long.
    """
    if len(images) == 1:
        (data,) = only = tuple(read_images(images))
        if not isinstance(data, ImageError):
            size = len(data) if isinstance(data, bytes) else data.nbytes
            return only if size <= SMALL_BYTES else read_images(images), 2 * size
    return read_images(images), count_payload(images)


def count_payload(images: Sequence[pb.Image]) -> int:
    """Count the bytes that images take in the engine: in the message, and read out of it.

    Every access copies one image, and lets go of it; `ByteSize` would serialise them all.
    """
    return 2 * sum(len(image.encoded) or len(image.raw.pixels) for image in images)


def read_images(images: Sequence[pb.Image]) -> Iterator[ImageData | ImageError]:
    """Read images; what is wrong with one goes on in its place."""
    for image in images:
        try:
            yield image_from_wire(image)
        except ImageError as error:
            yield error


def finish(
    embedded: Embedded, *, dims: int | None = None, normalize: bool = True, dtype: str = "fp32"
) -> tuple[NDArray[np.float32], list[pb.ItemStatus]]:
    """Cut and normalise vectors; those that cannot be sent as `dtype` get a status instead.

    Vectors that have unit norm already are to be sent as they are.

    Returns:
        (N ok, dims) float32, and one status an image.
    """
    assert not embedded.is_unit or (normalize and dims is None)
    rows = embedded.vectors_ND
    statuses = [OK_STATUS if e is None else image_error_to_wire(e) for e in embedded.errors]
    if not embedded.all_finite:
        rows = _keep(rows, np.isfinite(rows), statuses, NOT_FINITE)
    if dims is not None or (normalize and not embedded.is_unit):
        rows = finish_vectors(rows, dims=dims, normalize=normalize)
    if dtype == "fp16":
        rows = _keep(rows, np.abs(rows) <= MAX_FP16, statuses, OUT_OF_RANGE)
    return rows, statuses


def _keep(
    rows: NDArray[np.float32],
    good_ND: NDArray[np.bool_],
    statuses: list[pb.ItemStatus],
    fault: pb.ItemStatus,
) -> NDArray[np.float32]:
    """Keep the rows that are good throughout; the statuses of the others become `fault`."""
    if good_ND.all():
        return rows
    good = np.all(good_ND, axis=1)
    positions = [n for n, status in enumerate(statuses) if status.code == pb.OK]
    for row in np.flatnonzero(~good):
        statuses[positions[row]] = fault
    return rows[good]
