"""What lies on the disk: versions, models of a repository, and what has changed of them.

Rules:
    A directory with a `bundle.json` is a bundle. One with numeric subdirectories (1, 2, ...)
    that are bundles is a model with versions. In a repository every subdirectory that is
    either is a model of that name.
    A signature is of every file's name, inode, size and time, so that a copy that is still
    under way looks different from the finished one; nothing is read.
    Names that begin with a dot are nobody's: what is written there is not finished.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from models.bundle import BUNDLE_FILE, split_precision
from models.errors import SourceError
from serve.lifecycle.options import NAME

Signature = tuple[tuple[str, int, int, int], ...]

MAX_DEPTH = 3
"""Directories below a bundle or a collection that count: neither has more."""


def sign(path: Path) -> Signature:
    """Say what lies in a directory, or that it is one file; empty where there is nothing."""
    return tuple(sorted(_walk(path, "", MAX_DEPTH)))


def find_versions(path: Path) -> dict[str, Path]:
    """List the versions of a model, oldest first; what has none is "", a bundle or not."""
    directory, _ = split_precision(path)
    found = [
        child
        for child in _children(directory)
        if _is_version(child.name) and (child / BUNDLE_FILE).is_file()
    ]
    if not found or (directory / BUNDLE_FILE).is_file():
        return {"": path}
    return {child.name: child for child in sorted(found, key=lambda child: int(child.name))}


def find_models(repository: Path) -> dict[str, Path]:
    """List the models of a repository by name.

    Raises:
        SourceError: there is no such directory.
    """
    if not repository.is_dir():
        raise SourceError(
            f"--repository {repository}", expected="a directory of models", found="none"
        )
    children = _children(repository)
    return {c.name: c for c in children if re.fullmatch(NAME, c.name) and _is_model(c)}


def _is_model(directory: Path) -> bool:
    """Whether it is a bundle or has versions."""
    return (directory / BUNDLE_FILE).is_file() or "" not in find_versions(directory)


def _is_version(name: str) -> bool:
    """Whether a name is a version's: a number as people write it, from 1."""
    return name.isascii() and name.isdigit() and not name.startswith("0")


def _children(directory: Path) -> list[Path]:
    """List the directories in a directory, by name."""
    try:
        with os.scandir(directory) as entries:
            names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    except OSError:
        return []
    return [directory / name for name in sorted(names)]


def _walk(path: Path, prefix: str, depth: int) -> Iterator[tuple[str, int, int, int]]:
    """Describe every file below a path; what goes meanwhile is passed over."""
    try:
        entries = list(os.scandir(path))
    except NotADirectoryError:
        entries = []
        status = path.stat()
        yield (prefix, status.st_ino, status.st_size, status.st_mtime_ns)
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        name = f"{prefix}/{entry.name}"
        try:
            if entry.is_dir():
                if depth:
                    yield from _walk(path / entry.name, name, depth - 1)
                continue
            status = entry.stat()
        except OSError:
            continue
        yield (name, status.st_ino, status.st_size, status.st_mtime_ns)
