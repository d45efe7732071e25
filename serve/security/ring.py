"""API keys as the server knows them: names and hashes, never keys.

Rules:
    A key is 256 random bits, so one SHA-256 is what keeps it: there is nothing to guess that
    a slow hash would make dearer, and a slow one would be paid on every call.
    A key is looked for among all, each compared in constant time, whichever it is.
    A name may stand on several lines while its key is being changed: each of them holds.
    A file that is not right throughout is refused whole, by line and never with its content.
    A blank file does not say that nobody may get in: it is being written, or the disk is full.
    A comment line alone says it.

The file has one key a line, `NAME:SHA256-HEX` or `NAME:SHA256-HEX:LIMITS`, where limits are
`requests=N,images=N,calls=N` (the first two a second), in place of those for everyone. Empty
lines and lines that begin with `#` are passed over. `python -m serve.security.keys` writes it.

Source: docs/decisions/0010-security.md.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from serve.errors import StartError
from serve.security.buckets import Quota
from serve.security.files import read_file

PREFIX = "horace_"
"""How a key begins, so that scanners for leaked secrets can know one."""

MAX_FILE_BYTES = 1 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LIMITS = {"requests": "requests_per_s", "images": "images_per_s", "calls": "calls"}

EXPECTED_LINE = "NAME:SHA256-HEX or NAME:SHA256-HEX:requests=N,images=N,calls=N"


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """One key as the server knows it.

    Attributes:
        name: whose it is.
        digest: SHA-256 of the key.
        limits: what the line says of limits, by field of `Quota`.
        line: its number in the file, from 1; 0 for a key of no file.
    """

    name: str
    digest: bytes
    limits: tuple[tuple[str, float], ...] = ()
    line: int = 0

    @property
    def limits_text(self) -> str:
        """What the line says of limits, as it says it; empty where it says nothing."""
        by_field = dict(self.limits)
        given = {name: by_field[field] for name, field in _LIMITS.items() if field in by_field}
        return ",".join(f"{name}={limit:.15g}" for name, limit in given.items())

    def quota(self, everyone: Quota) -> Quota:
        """Give its limits; those for everyone where it has none of its own."""
        return replace(everyone, **dict(self.limits)) if self.limits else everyone


class KeyRing:
    """The keys that open this server."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self.keys = tuple(keys)

    def __repr__(self) -> str:
        return f"<KeyRing of {len(self.keys)}: {', '.join(self.names)}>"

    @property
    def names(self) -> list[str]:
        """Whose keys there are."""
        return sorted({key.name for key in self.keys})

    def find(self, token: str) -> ApiKey | None:
        """Find a key; it takes as long for every token of a length."""
        return self.find_digest(hash_token(token))

    def find_digest(self, digest: bytes) -> ApiKey | None:
        """Find a key by its hash; it takes as long for every hash."""
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def new_token() -> str:
    """Make a key of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_token(token: str) -> bytes:
    """Hash a key; whatever text it is."""
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()


def write_line(name: str, token: str, limits: str = "") -> str:
    """Write the line of a key, without a line's end.

    Raises:
        StartError: the name or the limits are none.
    """
    if not _NAME.fullmatch(name):
        expected = "a letter or digit, and up to 63 of those and of ._@-, in ASCII"
        raise StartError("NAME", expected=expected, found=f"{name[:80]!r}")
    line = f"{name}:{hash_token(token).hex()}" + (f":{limits}" if limits else "")
    _read_line(line, "the new key")
    return line


def read_ring(path: str | Path, *, may_be_blank: bool = True) -> KeyRing:
    """Read a key file.

    Raises:
        UnreadableError: it cannot be read; a pipe is not waited for.
        StartError: it is not right throughout, or it is blank and may not be.
    """
    data = read_file(
        f"key file {path}",
        path,
        max_bytes=MAX_FILE_BYTES,
        mend="make one with python -m serve.security.keys new NAME --file FILE",
    )
    if not (may_be_blank or data.strip()):
        raise StartError(
            f"key file {path}",
            expected="a key, or a comment line (#) where nobody is to get in",
            found="a blank file",
            mend=f"add a key with python -m serve.security.keys new NAME --file {path}",
        )
    return KeyRing(read_lines(data.decode(errors="replace"), f"key file {path}"))


def read_lines(text: str, where: str) -> list[ApiKey]:
    """Read every line of a key file; `where` names it.

    Raises:
        StartError: it is not right throughout.
    """
    keys = [
        replace(_read_line(line.strip(), f"{where}, line {n}"), line=n)
        for n, line in enumerate(text.split("\n"), 1)  # as `sed` counts, which deletes by number
        if line.strip() and not line.lstrip().startswith("#")
    ]
    firsts: dict[str, ApiKey] = {}
    for key in keys:
        first = firsts.setdefault(key.name, key)
        if first.limits != key.limits:
            found = (f"{one.limits_text or 'none'} on line {one.line}" for one in (first, key))
            raise StartError(
                where, expected=f"one set of limits for {key.name}", found=" and ".join(found)
            )
    return keys


def _read_line(line: str, where: str) -> ApiKey:
    """Read one line; what is wrong with it is said without its content."""
    name, _, rest = line.partition(":")
    digest, _, limits = rest.partition(":")
    if not (_NAME.fullmatch(name) and _DIGEST.fullmatch(digest)):
        raise StartError(where, expected=EXPECTED_LINE, found="another line")
    return ApiKey(name=name, digest=bytes.fromhex(digest), limits=_read_limits(limits, where))


def _read_limits(text: str, where: str) -> tuple[tuple[str, float], ...]:
    """Read `requests=N,images=N,calls=N`, any of them."""
    limits = {}
    for part in text.split(",") if text else ():
        name, _, number = part.strip().partition("=")
        if name not in _LIMITS or not re.fullmatch(r"\d{1,9}(\.\d{1,6})?", number):
            raise StartError(where, expected=EXPECTED_LINE, found="other limits")
        if float(number) <= 0:
            raise StartError(where, expected=f"{name} above 0", found=number)
        limits[_LIMITS[name]] = float(number)
    return tuple(sorted(limits.items()))
