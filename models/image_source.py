"""What a source of images is: records with a stable key, a label or none, and a way to read.

Rules:
    `records()` comes in one order, the same on every call and every machine, so that
    `start=n` resumes exactly where n records were done.
    Nothing is read before `ImageRecord.read` is called, from whichever thread; what cannot
    be had raises `ImageError` there, so that every reader reports and skips in one place.
    Whether the file is to blame for that or its storage, `storage_fault` tells.
    A source that cannot be opened, that is itself damaged, or that is another now, raises
    `SourceError`.

Nothing here decodes: see `models.preprocess`.
"""

from __future__ import annotations

import errno
import hashlib
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from models.errors import ImageError, ImageFault, reason_of
from models.picture import DEFAULT_LIMITS

ImageData: TypeAlias = bytes | NDArray[np.uint8]
"""An encoded file, or uint8 pixels of shape (H, W) or (H, W, C)."""

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"}
)
"""Lower-case file name endings of the formats that `models.preprocess` decodes."""

OF_THE_FILE = frozenset(
    {
        errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR,
        errno.ENAMETOOLONG, errno.ELOOP,
    }
)  # fmt: skip
"""What the system says of a file whose storage works."""

MAX_READ_BYTES = DEFAULT_LIMITS.max_image_bytes
"""A larger file would be refused after it was read; it is refused before it takes memory."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of a source.

    Attributes:
        key: stable name within the source, with `/` between its parts.
        label: the class as text, or None.
        read: gives the encoded bytes or the uint8 pixels; raises `ImageError`, whose cause is
            the OSError where the system gave one, and `SourceError` where the source was
            replaced since it was listed.
            Safe to call from any thread, and after the iterator has moved on.
        size_bytes: of what `read` gives, where it is known before.
    """

    key: str
    label: str | None
    read: Callable[[], ImageData]
    size_bytes: int | None = None


class ImageSource(Protocol):
    """A data set of images."""

    @property
    def uri(self) -> str:
        """What `open_source` takes to open the same source again, from any directory."""
        ...

    def count(self) -> int | None:
        """Count the records; None where only reading everything would tell."""
        ...

    def records(self, start: int = 0) -> Iterator[ImageRecord]:
        """Yield the records in order, without the first `start`, which are not read.

        Raises:
            SourceError: the source is missing or damaged; what came before stays good.
        """
        ...

    def load(self, key: str) -> ImageData:
        """Read the one image of that key.

        Raises:
            ImageError: the key is not in the source, or its image cannot be read.
            SourceError: what holds the image is damaged, or was replaced meanwhile.
        """
        ...


def digest_of(data: ImageData) -> str:
    """Hash what a record reads: the first 128 bits of its SHA-256, in hexadecimal.

    Of encoded files it is the hash of the bytes, of pixels that of their shape and values.
    Processors have instructions for SHA-256; Python's BLAKE2b has none and takes four times as
    long here (`python -m benchmarks.sync`).
    """
    digest = hashlib.sha256()
    if isinstance(data, np.ndarray):
        digest.update(f"{data.dtype.str} {data.shape} ".encode())
        data = np.ascontiguousarray(data).tobytes()
    digest.update(data)
    return digest.hexdigest()[:32]


def read_image_file(path: Path, name: str) -> bytes:
    """Read a whole image file; `name` is what errors call it.

    Raises:
        ImageError: UNREADABLE, EMPTY or TOO_MANY_BYTES.
    """
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # a named pipe would block for ever
            raise ImageError(
                ImageFault.UNREADABLE,
                name,
                expected="a regular file",
                found="a directory" if stat.S_ISDIR(info.st_mode) else "something else",
            )
        DEFAULT_LIMITS.check_bytes(info.st_size, name)
        return path.read_bytes()
    except OSError as error:
        raise ImageError(
            ImageFault.UNREADABLE,
            name,
            expected="a readable file",
            found=reason_of(error),
            mend="check the path and its permissions",
        ) from error


def storage_fault(error: ImageError) -> int | None:
    """Give the number of the storage's error; None where the file itself is to blame."""
    cause = error.__cause__
    number = cause.errno if isinstance(cause, OSError) else None
    return None if number in OF_THE_FILE else number


def away(holder: Path) -> OSError:
    """Make the system's error for what held images and is out of reach: a `storage_fault`.

    A file that was deleted is to blame itself; of a folder or a shard that is away, as where a
    share is no longer mounted, no image is.
    """
    return OSError(errno.ESTALE, f"{holder} is out of reach, or another of its name is there")


def unknown_key(key: str, uri: str) -> ImageError:
    """Make the error for a key that a source does not hold."""
    return ImageError(
        ImageFault.UNREADABLE, f"image {key!r}", expected=f"a key of {uri}", found="no such image"
    )
