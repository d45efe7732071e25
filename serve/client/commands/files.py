"""The files of a command: images, in folders with all that lies below them, and what it writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from models.errors import HoraceError, ImageError, ImageFault, SourceError
from models.image_folder import FolderSource
from models.image_source import ImageData, read_image_file


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    r"""One image of the command line.

    Attributes:
        name: its path; bytes of it that are no UTF-8 stand as `\xNN`.
        data: its content; None where it cannot be read.
        error: why.
    """

    name: str
    data: ImageData | None = None
    error: ImageError | None = None

    @property
    def reason(self) -> str:
        """Why it cannot be read, without its name, which stands beside it; empty where it can."""
        if self.error is None:
            return ""
        names_it = self.name.endswith(self.error.what)  # of a folder's it is the end of its path
        return str(self.error).removeprefix(f"{self.error.what}: " if names_it else "")


def read_files(paths: Sequence[Path]) -> Iterator[ImageFile]:
    """Read files, and folders in the order of their keys, one image at a time.

    A file that cannot be read has an error in its place, and so has a folder without images.
    """
    for path in paths:
        name = os.fsencode(path).decode("utf-8", "backslashreplace")
        if not os.path.isdir(path):
            yield _read(partial(read_image_file, path, name), name)
            continue
        try:
            for record in FolderSource(path).records():
                yield _read(record.read, str(Path(name) / record.key))
        except SourceError as error:
            yield ImageFile(name=name, error=_unreadable(error, name))


def _read(read: Callable[[], ImageData], name: str) -> ImageFile:
    """Read one file."""
    try:
        return ImageFile(name=name, data=read())
    except ImageError as error:
        return ImageFile(name=name, error=error)


def _unreadable(error: SourceError, name: str) -> ImageError:
    """Say of one argument what is wrong with the folder that it names."""
    return ImageError(
        ImageFault.UNREADABLE,
        name,
        expected=error.expected,
        found=error.found,
        mend="check the path and its permissions",  # shards, which it may name, are not read here
    )


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
