"""The files of a command: images, in folders with all that lies below them, and what it writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.errors import HoraceError, ImageError, UsageError
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


def require_parent(option: str, path: Path) -> None:
    """Refuse to write into a directory that is not there: a slip in a path shall make none.

    Raises:
        HoraceError: it is not there.
    """
    if not path.parent.is_dir():
        raise HoraceError(
            f"{option} {path}",
            expected="a file that can be written",
            found=f"no directory {path.parent}",
            mend="make it or choose another",
        )
