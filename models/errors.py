"""The errors a person meets: one line of what, expected, found and how to mend it.

Rules:
    Every error that is not a bug of ours derives from `HoraceError`.
    Nothing here knows of gRPC or of a command line; `serve.errors` maps kinds to
    status codes and `models.command` maps them to exit statuses.
    A message never carries image bytes or secrets.
"""

from __future__ import annotations

import enum


class HoraceError(Exception):
    """Something that its reader can mend.

    Args:
        what: the thing that is wrong, named so that it can be found (a path, an option).
        expected: what would have been right.
        found: what was there instead.
        mend: what to do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        expected: str | None = None,
        found: str | None = None,
        mend: str | None = None,
    ) -> None:
        self.what, self.expected, self.found, self.mend = what, expected, found, mend
        facts = []
        if expected is not None:
            facts.append(f"expected {expected}")
        if found is not None:
            facts.append(f"found {found}")
        line = what if not facts else f"{what}: {', '.join(facts)}"
        super().__init__(line if mend is None else f"{line}; {mend}")


class UsageError(HoraceError):
    """A command, option or argument that cannot be meant."""


class SourceError(HoraceError):
    """A source of images that cannot be opened or read."""


class BundleError(HoraceError):
    """A bundle that is missing, damaged, or of another schema."""


class EncoderError(HoraceError):
    """An encoder that cannot be opened or run, or that was given wrong input."""


class EncoderUnavailableError(EncoderError):
    """An encoder whose servers do not answer now; another time they may."""


class FingerprintMismatchError(HoraceError):
    """Vectors of one encoder offered where those of another are kept."""

    def __init__(self, what: str, *, expected: str, found: str, mend: str) -> None:
        super().__init__(what, expected=f"encoder {expected}", found=f"encoder {found}", mend=mend)


class ImageFault(enum.Enum):
    """Why one image could not be used; the name is its code's on the wire, the value is in logs."""

    EMPTY = "empty"
    UNREADABLE = "unreadable"
    TOO_MANY_BYTES = "too_many_bytes"
    TOO_MANY_PIXELS = "too_many_pixels"
    UNSUPPORTED_FORMAT = "unsupported_format"
    CORRUPT = "corrupt"
    WRONG_SHAPE = "wrong_shape"


class ImageError(HoraceError):
    """One image that cannot be used; its batchmates are not concerned."""

    def __init__(
        self,
        fault: ImageFault,
        what: str,
        *,
        expected: str | None = None,
        found: str | None = None,
        mend: str | None = None,
    ) -> None:
        super().__init__(what, expected=expected, found=found, mend=mend)
        self.fault = fault


def reason_of(error: OSError) -> str:
    """Say what the system says, without the path."""
    return error.strerror or str(error) or type(error).__name__
