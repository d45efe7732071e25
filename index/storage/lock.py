"""The lock of a collection's one writer: `.lock` in its directory, held by flock.

Rules:
    It ends with the process that holds it, however that ends.
    The file is no part of the collection's content: nothing is read from it but the number of
    the process, for the message.
    Who holds it holds that of the directory which stands at the path: one that was
    exchanged meanwhile is tried again.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from index.errors import CollectionError
from models.errors import reason_of
from models.files import open_regular

LOCK_FILE = ".lock"


class CollectionLockedError(CollectionError):
    """Another writer has the collection."""


@contextmanager
def writer_lock(directory: Path) -> Iterator[None]:
    """Keep other writers out of a collection's directory within this context.

    Raises:
        CollectionLockedError: there is one; names its process.
        CollectionError: the directory is missing, or cannot be written.
    """
    descriptor = take_lock(directory)
    try:
        yield
    finally:
        os.close(descriptor)


def take_lock(directory: Path) -> int:
    """Lock a directory and give the descriptor, whose closing unlocks it; see `writer_lock`."""
    file = directory / LOCK_FILE
    while True:
        try:
            descriptor = open_regular(file, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise CollectionError(
                str(directory),
                expected="a collection directory that can be written",
                found=f"{LOCK_FILE}: {reason_of(error)}",
            ) from error
        try:
            _lock(descriptor, directory)
            if _is_here(descriptor, file):
                with suppress(OSError):  # a full disk: the number is for a message alone
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a directory that was exchanged for another


def _lock(descriptor: int, directory: Path) -> None:
    """Take the lock, or say who has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        pid = os.pread(descriptor, 20, 0).decode("ascii", "replace")
        raise CollectionLockedError(
            str(directory),
            expected="no other writer",
            found=f"process {pid}" if pid.isdigit() else "one that has just begun",
            mend="wait until it is done, or end it; a collection has one writer at a time",
        ) from error


def _is_here(descriptor: int, file: Path) -> bool:
    """Tell whether the open file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except OSError:
        return False
