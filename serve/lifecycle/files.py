"""What lies on the disk: versions, models of a repository, and what has changed of them.

Rules:
    A directory with a `bundle.json` is a bundle. One with numeric subdirectories (1, 2, ...)
    that are bundles is a model with versions. In a repository every subdirectory that is
    either is a model of that name.
    A signature is of every file's name, inode, size, time, mode and owners, so that a copy that
    is still under way looks different from the finished one, and so does what may be read at
    last; nothing is read.
    Names that begin with a dot are nobody's: what is written there is not finished.
    Gone is only what the system says is not there. What cannot be read is an error, or a
    mark in a signature: a want of descriptors must not look like an empty disk.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from models.bundle import BUNDLE_FILE, split_precision
from models.errors import SourceError, reason_of
from serve.lifecycle.options import NAME

Signature = tuple[tuple[str, tuple[int, ...]], ...]

ABSENT = (FileNotFoundError, NotADirectoryError)
"""What the system raises where nothing is."""

MAX_DEPTH = 3
"""Directories below a bundle or a collection that count: neither has more."""


def sign(path: Path) -> Signature:
    """Say what lies in a directory, or that it is one file; empty where there is nothing.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        return tuple(sorted(_walk(path, "", MAX_DEPTH)))
    except ABSENT:
        return ()
    except OSError as error:
        raise _unreadable(path, error) from error


def find_versions(path: Path) -> dict[str, Path]:
    """List the versions of a model, oldest first; what has none is "", a bundle or not.

    Raises:
        SourceError: a directory cannot be read.
    """
    directory, _ = split_precision(path)
    children = [child for child in _children(directory) if _is_version(child.name)]
    found = [child for child in children if _is_bundle(child)]
    if not found or _is_bundle(directory):
        return {"": path}
    return {child.name: child for child in sorted(found, key=lambda child: int(child.name))}


def find_signed_versions(path: str) -> tuple[dict[str, str], dict[str, Signature]]:
    """List the versions of a model, and what each that has a number looks like.

    Raises:
        SourceError: a directory cannot be read.
    """
    found = find_versions(Path(path))
    signatures = {version: sign(path) for version, path in found.items() if version}
    return {version: str(path) for version, path in found.items()}, signatures


def find_models(repository: Path) -> dict[str, Path]:
    """List the models of a repository by name.

    A directory that cannot be read is taken for one: its loading says what is wrong.

    Raises:
        SourceError: there is no such directory, or it cannot be read.
    """
    try:
        children = _list(repository)
    except OSError as error:
        raise SourceError(
            f"--repository {repository}",
            expected="a directory of models",
            found="none" if isinstance(error, ABSENT) else reason_of(error),
        ) from error
    return {c.name: c for c in children if re.fullmatch(NAME, c.name) and _is_model(c)}


def _is_model(directory: Path) -> bool:
    """Whether it is a bundle or has versions, or may be or have."""
    try:
        return _is_bundle(directory) or "" not in find_versions(directory)
    except SourceError:
        return True


def _is_bundle(directory: Path) -> bool:
    """Whether it has a `bundle.json`."""
    try:
        return stat.S_ISREG(os.stat(directory / BUNDLE_FILE).st_mode)
    except ABSENT:
        return False
    except OSError as error:
        raise _unreadable(directory, error) from error


def _is_version(name: str) -> bool:
    """Whether a name is a version's: a number as people write it, from 1."""
    return name.isascii() and name.isdigit() and not name.startswith("0")


def _children(directory: Path) -> list[Path]:
    """List the directories in a directory, by name; none where there is no directory."""
    try:
        return _list(directory)
    except ABSENT:
        return []
    except OSError as error:
        raise _unreadable(directory, error) from error


def _list(directory: Path) -> list[Path]:
    """List the directories in a directory, by name."""
    with os.scandir(directory) as entries:
        names = [e.name for e in entries if not e.name.startswith(".") and _is_directory(e)]
    return [directory / name for name in sorted(names)]


def _is_directory(entry: os.DirEntry[str]) -> bool:
    """Whether it is one; also where that cannot be found out, which its reader says."""
    try:
        return entry.is_dir()
    except OSError:
        return True


def _unreadable(path: Path, error: OSError) -> SourceError:
    """Say what the system says of a path."""
    return SourceError(str(path), expected="what can be read", found=reason_of(error))


def _walk(path: Path, prefix: str, depth: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Describe every file below a path.

    What goes meanwhile is passed over; what below it cannot be read is there all the same.
    """
    try:
        entries = list(os.scandir(path))
    except NotADirectoryError:
        entries = []
        yield (prefix, _describe(path.stat()))
    for entry in entries:
        if entry.name.startswith("."):
            continue
        name = f"{prefix}/{entry.name}"
        try:
            if entry.is_dir():
                if depth:
                    yield from _walk(path / entry.name, name, depth - 1)
                continue
            description = _describe(entry.stat())
        except ABSENT:
            continue
        except OSError:
            description = ()
        yield (name, description)


def _describe(status: os.stat_result) -> tuple[int, ...]:
    """Tell a file, and who may read it, from another; a link that is made to it changes nothing."""
    what = (status.st_ino, status.st_size, status.st_mtime_ns)
    return (*what, status.st_mode, status.st_uid, status.st_gid)
