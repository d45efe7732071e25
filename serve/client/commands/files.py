"""The images that a command is given: files, and folders with all that lies below them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.errors import ImageError, UsageError
from models.image_folder import FolderSource
from models.image_source import ImageData, read_image_file


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """One image of the command line.

    Attributes:
        name: its path.
        data: its content; None where it cannot be read.
        error: why.
    """

    name: str
    data: ImageData | None = None
    error: ImageError | None = None


def read_files(paths: Sequence[Path]) -> Iterator[ImageFile]:
    """Read files, and folders in the order of their keys, one image at a time.

    Raises:
        UsageError: there is nothing at a path, which is seen before anything is read.
    """
    for path in paths:
        if not path.exists():
            raise UsageError(str(path), expected="an image file or a folder", found="nothing")
    return _read_files(paths)


def _read_files(paths: Sequence[Path]) -> Iterator[ImageFile]:
    """See `read_files`."""
    for path in paths:
        if not path.is_dir():
            yield _read(path, str(path))
            continue
        for record in FolderSource(path).records():
            name = str(path / record.key)
            try:
                yield ImageFile(name=name, data=record.read())
            except ImageError as error:
                yield ImageFile(name=name, error=error)


def _read(path: Path, name: str) -> ImageFile:
    """Read one file."""
    try:
        return ImageFile(name=name, data=read_image_file(path, name))
    except ImageError as error:
        return ImageFile(name=name, error=error)
