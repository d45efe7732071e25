"""Images that are one array, and the IDX files that hold such arrays.

An IDX file is a magic number (two zero bytes, the element type, the number of dimensions),
one big-endian 32-bit size a dimension, and the elements in row-major order; often gzipped.
The header is checked against what follows it before anything that size is allocated.

Source: the description at the end of Yann LeCun's MNIST page.
"""

from __future__ import annotations

import errno
import gzip
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from models.errors import SourceError
from models.files import open_regular
from models.image_source import ImageData, ImageRecord, unknown_key

_UINT8 = 0x08
_KEY_DIGITS = 5
_CHUNK_BYTES = 1 << 20
_GET_AGAIN = "get the file again"
_MNIST_NAME = re.compile(r"^(?P<split>.+)-images-idx3-ubyte(?P<gz>\.gz)?$")


class ArraySource:
    """Images held in memory as one uint8 array.

    Args:
        uri: what opens the same images again.
        name: first part of every key; the second is the position, zero-padded.
        images: (N, H, W) or (N, H, W, C) uint8.
        labels: N texts, or None.

    Raises:
        SourceError: the shapes do not agree.
    """

    def __init__(
        self,
        uri: str,
        name: str,
        images: NDArray[np.uint8],
        labels: Sequence[str] | None = None,
    ) -> None:
        if labels is not None and len(labels) != len(images):
            raise SourceError(
                f"labels of {uri}",
                expected=f"{len(images)}, one an image",
                found=str(len(labels)),
                mend="name the label file that belongs to these images",
            )
        self.uri = uri
        self.name = name
        self.images = images
        self.labels = None if labels is None else list(labels)
        self._digits = max(_KEY_DIGITS, len(str(len(images) - 1)))

    def __repr__(self) -> str:
        """Show the source as it is opened, and the shape of its images."""
        return f"ArraySource({self.uri!r}, images={self.images.shape})"

    def count(self) -> int:
        """Count the images."""
        return len(self.images)

    def records(self, start: int = 0) -> Iterator[ImageRecord]:
        """Yield the images in their order; their arrays are read-only views."""
        for i in range(start, len(self.images)):
            label = None if self.labels is None else self.labels[i]
            key = f"{self.name}/{i:0{self._digits}d}"
            read = partial(self.images.__getitem__, i)
            yield ImageRecord(key, label, read, self.images[i].nbytes)

    def load(self, key: str) -> ImageData:
        """Give the image of that key as (H, W) or (H, W, C) uint8.

        Raises:
            ImageError: there is no such image.
        """
        name, _, digits = key.rpartition("/")
        if name == self.name and re.fullmatch(rf"[0-9]{{{self._digits}}}", digits):
            i = int(digits)
            if i < len(self.images):
                image: NDArray[np.uint8] = self.images[i]
                return image
        raise unknown_key(key, self.uri)


def open_idx(images: Path, labels: Path | None = None) -> ArraySource:
    """Read IDX images, and their labels where there are any.

    Args:
        images: a file of three or four dimensions, gzipped or not.
        labels: a file of one dimension; where None and the images are called
            `NAME-images-idx3-ubyte[.gz]`, the labels are looked for beside them.

    Raises:
        SourceError: a file is missing or damaged, or the two do not belong together.
    """
    named = _MNIST_NAME.match(images.name)
    if labels is None and named:
        beside = images.with_name(f"{named['split']}-labels-idx1-ubyte{named['gz'] or ''}")
        labels = beside if beside.exists() else None
    pixels = read_idx(images, dimensions=(3, 4))
    texts = None if labels is None else [str(n) for n in read_idx(labels, dimensions=(1,))]
    files = [str(path.absolute()) for path in (images, labels) if path is not None]
    name = named["split"] if named else images.name.split(".")[0]
    return ArraySource(f"idx:{','.join(files)}", name, pixels, texts)


def read_idx(path: Path, *, dimensions: Sequence[int]) -> NDArray[np.uint8]:
    """Read an IDX file of bytes, gzipped or not.

    Args:
        path: the file.
        dimensions: how many dimensions are right.

    Returns:
        A read-only uint8 array of the shape in the header.

    Raises:
        SourceError: the file is missing, of another kind, truncated or too long.
    """
    try:
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream = gzip.GzipFile(fileobj=file) if gzipped else file
            shape = _read_shape(cast(BinaryIO, stream), path, dimensions)
            size = math.prod(shape)
            data = _read_at_most(cast(BinaryIO, stream), size + 1)  # one more shows a surplus
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(
            f"IDX file {path}",
            expected="a readable file",
            found=getattr(error, "strerror", None) or str(error),
            mend="check the path"
            if getattr(error, "errno", None) in (errno.ENOENT, errno.EINVAL)
            else _GET_AGAIN,
        ) from error
    if len(data) != size:
        raise SourceError(
            f"IDX file {path}",
            expected=f"{size} bytes of elements, as its shape {shape} says",
            found=str(len(data)) if len(data) < size else "more",
            mend=_GET_AGAIN,
        )
    try:
        return np.frombuffer(data, dtype=np.uint8).reshape(shape)
    except ValueError as error:  # of no elements, as one size is 0
        raise SourceError(
            f"IDX file {path}",
            expected="sizes that an array can have",
            found=str(shape),
            mend=_GET_AGAIN,
        ) from error


def _read_at_most(stream: BinaryIO, size: int) -> bytes:
    """Read `size` bytes or to the end; a size that is a lie costs only what is there."""
    chunks = []
    while size > 0 and (chunk := stream.read(min(size, _CHUNK_BYTES))):
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def _read_shape(stream: BinaryIO, path: Path, dimensions: Sequence[int]) -> tuple[int, ...]:
    """Read the header and give the sizes of the dimensions.

    Raises:
        SourceError: this is no IDX file of bytes with that many dimensions.
    """
    magic = stream.read(4)
    if len(magic) == 4 and magic[:3] == bytes((0, 0, _UINT8)) and magic[3] in dimensions:
        sizes = stream.read(4 * magic[3])
        if len(sizes) == 4 * magic[3]:
            return struct.unpack(f">{magic[3]}I", sizes)
    wanted = " or ".join(bytes((0, 0, _UINT8, n)).hex() for n in dimensions)
    raise SourceError(
        f"IDX file {path}",
        expected=f"magic number {wanted} (bytes, {' or '.join(map(str, dimensions))} dimensions)",
        found=magic.hex() or "an empty file",
        mend="name images first, then labels: idx:IMAGES,LABELS",
    )
