"""Files that are whole or absent: written under a temporary name, synced, then renamed.

Rules:
    A reader never sees half a file or half a directory, whatever the moment of a SIGKILL.
    A temporary name starts with `.tmp-` and lies beside its target, on the same file system.
    A temporary directory is locked by who fills it. What a killed process left of one goes when
    a directory of the same name is written a day later.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"
CHUNK_BYTES = 1 << 20

LEFT_OVER_S = 86_400.0
"""Age of a temporary directory from which on it is one that was left; where locks are of one
machine alone, another may be filling a younger one."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Of renameat2(2): paths are the process's own; swap them."""


def sha256_file(path: Path) -> str:
    """Hash a file's content in bounded memory; lower-case hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: object) -> bytes:
    """Serialise to the one JSON text that equal values share (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; it becomes `path` when the block ends well.

    Missing parent directories are made. After an exception `path` is as it was. A link stays,
    and what it leads to is replaced.

    Raises:
        OSError: the file cannot be written; or something is there that is no regular file,
            such as a device, of which only the name would be replaced.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "something that is no regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{TEMPORARY_PREFIX}{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a temporary directory to fill; it becomes `path` when the block ends well.

    Args:
        path: the final name; its parents are made. A link stays, and what it leads to is written.
        replace: whether an existing `path` is exchanged with the new one, then deleted. A
            reader that has files of the old one open keeps them.

    Raises:
        FileExistsError: `path` exists and `replace` is false.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not replace:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{TEMPORARY_PREFIX}{path.name}."
    _remove_left_over(path.parent, prefix)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
    lock = os.open(temporary, os.O_RDONLY)
    try:
        with suppress(OSError):  # of a file system that has no locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
        temporary.chmod(0o755)
        for file in (temporary, *temporary.rglob("*")):
            sync(file)
        publish_directory(temporary, path, replace=replace)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # what failed, or what was replaced
        os.close(lock)


def _remove_left_over(folder: Path, prefix: str) -> None:
    """Delete temporary directories of a name that nobody holds, and that are old."""
    name = re.compile(rf"{re.escape(prefix)}[a-z0-9_]{{8}}")  # which mkdtemp gives
    with suppress(OSError):
        for left_over in [path for path in folder.iterdir() if name.fullmatch(path.name)]:
            if time.time() - left_over.stat().st_mtime >= LEFT_OVER_S:
                _remove_unless_held(left_over)


def _remove_unless_held(directory: Path) -> None:
    """Delete a temporary directory, unless another process is at work on it."""
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory)
    finally:
        os.close(lock)


def publish_directory(built: Path, path: Path, *, replace: bool) -> None:
    """Give a finished directory its name in one step, and put the new name on the disk.

    Args:
        built: the directory, on the file system of `path`.
        path: its name from now on.
        replace: whether `path` may exist. Where it does the two are exchanged, so that
            `path` is never absent, and `built` is the old one afterwards.

    Raises:
        OSError: the names cannot be changed; both are as they were.
    """
    if replace and path.exists():
        _exchange(built, path)
    else:
        built.rename(path)
    sync(path.parent)


def _exchange(one: Path, other: Path) -> None:
    """Swap two names in one step, or in three where the file system cannot."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux only
    if swap is not None:
        names = [os.fsencode(path.absolute()) for path in (one, other)]
        if swap(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS):  # what the file system cannot do
            raise OSError(number, os.strerror(number), str(one), None, str(other))
    aside = one.with_name(f"{one.name}.old")
    other.rename(aside)
    try:
        one.rename(other)
    except BaseException:
        aside.rename(other)
        raise
    aside.rename(one)


def open_regular(path: Path, flags: int) -> int:
    """Open a file and give its descriptor; a pipe, which would keep us waiting, is refused.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o644)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "no regular file", str(path))


def sync(path: Path) -> None:
    """Ask the kernel to put a file's content, or a directory's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
