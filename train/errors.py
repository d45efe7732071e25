"""The errors of training: each says what, what was expected, what was found, how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.errors import HoraceError, SourceError, reason_of

MOVED = "name the place where they are now as SOURCE"
"""What a run's images may need when it is resumed; see `or_else`."""


class TrainError(HoraceError):
    """Training that cannot start or go on; the base of every error of `train`."""


class RunError(TrainError):
    """A run directory that is missing, taken, damaged, or of another configuration."""


class ExportError(TrainError):
    """A graph that cannot be written or does not do what the trained network does."""


@contextmanager
def writing(path: Path, *, mend: str) -> Iterator[None]:
    """Turn a disk that is full or may not be written into one line about `path`.

    Raises:
        RunError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            str(path),
            expected="a directory that can be written, with room for what comes",
            found=reason_of(error),
            mend=mend,
        ) from error


@contextmanager
def or_else(mend: str) -> Iterator[None]:
    """Add to the error of a source that cannot be opened what else its reader can do.

    Raises:
        SourceError: the same, with one more way to mend it.
    """
    try:
        yield
    except SourceError as error:
        mends = [error.mend, mend] if error.mend else [mend]
        raise SourceError(
            error.what, expected=error.expected, found=error.found, mend="; or ".join(mends)
        ) from error


@contextmanager
def training_packages() -> Iterator[None]:
    """Say what to install where torch, or what else only training needs, is not there.

    Raises:
        TrainError: in place of a ModuleNotFoundError.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise TrainError(
            f"Python package {error.name}",
            expected="an installation for training",
            found="one for serving and search",
            mend="install it by `pip install '.[cpu,train]'`",
        ) from error
