r"""Images in a folder and its subfolders.

Rules:
    The key is the path below the root, with `/`; records come sorted by key.
    The label is the *first* folder below the root, however deep the image lies under it
    (`cats/2019/a/1.jpg` is a cat), as in torchvision's ImageFolder; an image in the root
    itself has none. A root above the classes (`data/train/cats`) is mended by naming the
    folder of the classes (`data/train`), which a rule of the last folder could not offer.
    Links are followed; one that leads back to a folder above itself is not.
    What cannot be looked into is listed as a folder that cannot be read, ending in `/`, so
    that nobody takes what was below it for gone: a folder, or a link that leads nowhere.
    A file that is gone is an image that cannot be read; a root that is gone, or is another
    folder than was opened, is storage that fails: see `models.image_source.away`.
    Names that start with a dot and suffixes that are no image's are counted, not listed.
    A name that is no UTF-8 keeps its bytes as `\xNN` in the key.

Source: torchvision.datasets.ImageFolder for the meaning of the folders.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

from models.errors import ImageError, ImageFault, SourceError, reason_of
from models.image_source import (
    IMAGE_SUFFIXES,
    ImageData,
    ImageRecord,
    away,
    read_image_file,
    storage_fault,
    unknown_key,
)

_ESCAPED_BYTE = re.compile(r"\\x([89a-f][0-9a-f])")

HIDDEN, NO_SUFFIX = "hidden", "without suffix"
"""What stands for a suffix where a name starts with a dot, and where it has none."""

MAX_SUFFIXES = 5
"""So many are named in a line."""


@dataclass(frozen=True)
class _Listing:
    """What one walk found.

    Attributes:
        keys: the images, sorted; an unreadable folder is listed too, ending in `/`.
        faults: why the folders among the keys cannot be read.
        ignored: how many files were passed over, by suffix.
        has_archives: whether tar files are among those.
    """

    keys: list[str]
    faults: dict[str, OSError]
    ignored: Counter[str]
    has_archives: bool


class FolderSource:
    """The images below a folder.

    Raises:
        SourceError: there is no such folder, or it is out of reach.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        try:
            self._was: os.stat_result | None = os.stat(self.root)
        except (FileNotFoundError, NotADirectoryError):
            self._was = None
        except OSError as error:  # such as of a share that is away
            raise _cannot_list(self.root, error) from error
        if self._was is None or not stat.S_ISDIR(self._was.st_mode):
            raise SourceError(
                f"image folder {root}",
                expected="a folder",
                found="nothing" if self._was is None else "a file",
                mend="check the path",
            )

    def __repr__(self) -> str:
        """Show the source as it is opened."""
        return f"FolderSource({self.uri!r})"

    @property
    def uri(self) -> str:
        """`folder:` and the absolute path."""
        return f"folder:{self.root}"

    @property
    def ignored_by_suffix(self) -> dict[str, int]:
        """How many files were passed over by the suffix of their names, the most frequent first.

        Suffixes are in lower case; `HIDDEN` and `NO_SUFFIX` stand for names that have none.

        Raises:
            SourceError: the folder cannot be listed, or holds no image.
        """
        return dict(_by_frequency(self._listing.ignored))

    def count(self) -> int:
        """Count the images; walks the folder on the first call.

        Raises:
            SourceError: the folder cannot be listed, or holds no image.
        """
        return len(self._listing.keys)

    def records(self, start: int = 0) -> Iterator[ImageRecord]:
        """Yield the images by key.

        Raises:
            SourceError: the folder cannot be listed, or holds no image.
        """
        for key in islice(self._listing.keys, start, None):
            label, _, rest = key.partition("/")
            read = partial(self._read, key)
            yield ImageRecord(key, label if rest else None, read, self._size_bytes(key))

    def load(self, key: str) -> ImageData:
        """Read the image of that key.

        Raises:
            ImageError: the key leads outside the folder or to nothing that can be read.
        """
        parts = key.split("/")
        if key.startswith("/") or ".." in parts or "\0" in key:
            raise unknown_key(key, self.uri)
        return self._read(key)

    @cached_property
    def _listing(self) -> _Listing:
        """Walk the folder once; this source does not see what is added later."""
        found = _walk(self.root)
        if not found.keys:
            raise SourceError(
                f"image folder {self.root}",
                expected=f"images ({' '.join(sorted(IMAGE_SUFFIXES))})",
                found=_of_others(found.ignored),
                mend=f"for shards use wds:{self.root}/*.tar"
                if found.has_archives
                else "check the path",
            )
        return found

    def would_list(self, path: Path) -> bool:
        """Say whether images that lie in `path` would be among these: inside, and not hidden."""
        for place, root in (
            (Path(os.path.abspath(path)), self.root),
            (path.resolve(), self.root.resolve()),
        ):
            if place.is_relative_to(root):
                return not any(part.startswith(".") for part in place.relative_to(root).parts)
        return False

    def file_of(self, key: str) -> Path:
        """Give the file of a key that `records` gave; it may be gone since."""
        return self._path(key)

    def _size_bytes(self, key: str) -> int | None:
        """Give the size of a file; None where it cannot be had."""
        try:
            return os.stat(self._path(key)).st_size
        except OSError:
            return None

    def _read(self, key: str) -> bytes:
        """Read the file of a key; where it cannot be had, see whether a folder is to blame."""
        try:
            return self._read_file(key)
        except ImageError as error:
            if error.__cause__ is None or storage_fault(error) is not None:
                raise
            if (folder := self._folder_away(key)) is None:
                raise
        cause = away(folder)
        raise ImageError(
            ImageFault.UNREADABLE, key, expected="a readable file", found=reason_of(cause)
        ) from cause

    def _read_file(self, key: str) -> bytes:
        """Read the file of a key."""
        if key.endswith("/"):
            raise ImageError(
                ImageFault.UNREADABLE,
                key,
                expected="a readable folder",
                found="one that cannot be listed",
                mend="check its permissions, and where it leads if it is a link",
            ) from self._listing.faults.get(key)
        return read_image_file(self._path(key), key)

    def _folder_away(self, key: str) -> Path | None:
        """Give the folder that is to blame for a file, the root or its own; None where it is not.

        The root must be the folder that was opened, and let files in it be had.
        """
        try:
            info = os.stat(os.path.join(self.root, "."))  # which takes the right to enter it
        except OSError:
            return self.root
        if self._was is None or not os.path.samestat(info, self._was):
            return self.root
        folder = self._path(key).parent
        return None if os.path.isdir(folder) else folder

    def _path(self, key: str) -> Path:
        """Give the file of a key, which may have had its bytes escaped."""
        path = self.root / key
        if _ESCAPED_BYTE.search(key) and not os.path.lexists(path):
            path = self.root / _unescape(key)
        return path


def _walk(root: Path) -> _Listing:
    """List every image below `root`.

    Raises:
        SourceError: `root` itself cannot be listed.
    """
    keys: list[str] = []
    faults: dict[str, OSError] = {}
    ignored: Counter[str] = Counter()
    has_archives = False
    folders: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [(str(root), "", ())]
    while folders:
        folder, prefix, above = folders.pop()
        try:
            info = os.stat(folder)
            entries = list(os.scandir(folder))
        except OSError as error:
            if not prefix:
                raise _cannot_list(root, error) from error
            faults[prefix] = error
            continue
        identity = (info.st_dev, info.st_ino)
        if identity in above:
            continue
        for entry in entries:
            if entry.name.startswith("."):
                ignored[HIDDEN] += 1
            elif _is_folder(entry):
                below = f"{prefix}{_escape(entry.name)}/"
                folders.append((entry.path, below, (*above, identity)))
            elif (suffix := os.path.splitext(entry.name)[1].lower()) in IMAGE_SUFFIXES:
                keys.append(prefix + _escape(entry.name))
            elif (fault := _fault_of(entry)) is not None:
                faults[f"{prefix}{_escape(entry.name)}/"] = fault
            else:
                ignored[_escape(suffix) or NO_SUFFIX] += 1
                has_archives |= ".tar" in entry.name or entry.name.endswith(".tgz")
    return _Listing(sorted([*keys, *faults]), faults, ignored, has_archives)


def passed_over(counts: Mapping[str, int]) -> str:
    """Say how many files are passed over, such as `12 files passed over: 9 .heic, 3 .avif`."""
    n_files = sum(counts.values())
    return f"{n_files} file{'s' if n_files > 1 else ''} passed over{_named(counts)}"


def _of_others(counts: Counter[str]) -> str:
    """Say how many files there are that are no images, and of which suffixes."""
    n_files = counts.total()
    return (
        f"{n_files} other file{'s' if n_files > 1 else ''}{_named(counts)}" if n_files else "none"
    )


def _named(counts: Mapping[str, int]) -> str:
    """Name the most frequent suffixes behind a colon; nothing where there is none."""
    named = [f"{n} {suffix}" for suffix, n in _by_frequency(counts)[:MAX_SUFFIXES]]
    if len(counts) > MAX_SUFFIXES:
        named.append("and others")
    return f": {', '.join(named)}" if named else ""


def _by_frequency(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Sort suffixes, the most frequent first, and equals by name, on every machine alike."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _cannot_list(root: Path, error: OSError) -> SourceError:
    """Say that the root itself is out of reach."""
    return SourceError(
        f"image folder {root}",
        expected="a folder that can be listed",
        found=reason_of(error),
        mend="check its permissions and whether its disk is there",
    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry is known to be a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _fault_of(entry: os.DirEntry[str]) -> OSError | None:
    """Say why nobody knows what an entry is, as of a link that leads nowhere; None of others."""
    try:
        entry.stat()
    except FileNotFoundError as error:  # a file that is no link was deleted just now
        return error if entry.is_symlink() else None
    except OSError as error:
        return error
    return None


def _escape(name: str) -> str:
    """Turn a file name into text that UTF-8 can carry."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _unescape(key: str) -> str:
    """Undo `_escape`."""
    return _ESCAPED_BYTE.sub(lambda byte: chr(0xDC00 + int(byte[1], 16)), key)
