"""The errors of collections: what they keep, and what they refuse."""

from __future__ import annotations

import errno
from pathlib import Path

from models.errors import HoraceError, reason_of

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class IndexingError(HoraceError):
    """Base of the errors of `index`."""


class CollectionError(IndexingError):
    """A collection that is missing, damaged, of another schema, or not to be written."""


class SourceChangedError(CollectionError):
    """A source that lists other images than when an unfinished build read it."""


class UnknownIdError(IndexingError):
    """An id or a key that a collection does not hold."""


class QueryError(IndexingError):
    """Queries that cannot be used, beside others that can."""


class EvaluationError(IndexingError):
    """An evaluation that cannot be made of this collection and these images."""


def unknown_id(id_: int, *, count: int, name: str) -> UnknownIdError:
    """Make the error for an id that is none of a collection's."""
    return UnknownIdError(
        f"id {id_}",
        expected=f"an id of the {count} in collection {name}",
        found="none such",
        mend="take ids from a search of this collection",
    )


def refuse_to_blame(file: Path, error: Exception) -> None:
    """Say what the system said where it lacks memory, descriptors or rights.

    Args:
        file: what could not be opened or read.
        error: why, of whatever reads it.

    Raises:
        CollectionError: it is the system; else the file may be to blame.
    """
    if isinstance(error, OSError):
        is_system = error.errno not in (None, errno.ENOENT, errno.EISDIR, errno.ENOTDIR)
    else:  # Python's parser says so of a header that is none
        is_system = isinstance(error, MemoryError) and "Parser" not in str(error)
    if is_system:
        reason = reason_of(error) if isinstance(error, OSError) else first_line(error)
        raise CollectionError(
            str(file),
            expected="a file that the system opens",
            found=reason,
            mend="mend that and open the collection again: the file may be sound",
        ) from error


def mend_of(error: OSError) -> str:
    """Say what would help against what a disk refuses."""
    return "make room" if error.errno in _NO_ROOM else "mend that"


def first_line(error: Exception) -> str:
    """Give what an error says, on one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def unwritable(what: str, expected: str, error: OSError) -> CollectionError:
    """Make the error for what a disk does not take, with what would help against that."""
    return CollectionError(
        what,
        expected=expected,
        found=reason_of(error),
        mend=f"{mend_of(error)}, or choose another place",
    )
