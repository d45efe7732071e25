"""Count the pieces of an image file, before a decoder walks them one by one.

Chunks, segments, blocks and tags are read in Python, with the interpreter's lock held: a
file of 64 MiB that is nothing else keeps every thread waiting for a minute, and a TIFF of
rational numbers takes a gigabyte. No file that draws something has as many.

Rules:
    A walk takes as many steps at most, and stops where the pieces end or make no
    sense: the decoder will say what is damaged.
    A PNG has one colour profile (ISO/IEC 15948, 11.3.2.3), and a few compressed texts; each is
    inflated when it is met, and nobody reads it here.

Source: ISO/IEC 15948 (PNG), GIF89a, TIFF 6.0 section 2.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress

from models.errors import ImageError, ImageFault

MAX_PIECES = 1 << 15
"""Chunks, segments or blocks. A PNG of 64 MiB has 8,192 chunks of libpng's 8 KiB."""

MAX_TEXTS = 100
"""A PNG's texts that may be compressed: 1 MiB of each at most takes some 5 ms."""

MAX_NUMBERS = 1 << 16
"""Two for each strip of a TIFF: 40,000 for 20,000 rows in strips of one."""

_FREE_TYPES = frozenset({1, 2, 7})
"""Types of TIFF tags that stay bytes: BYTE, ASCII, UNDEFINED."""

_SHORT = 3
_DIRECTORY_TAGS = frozenset({0x8769, 0x8825, 0xA005})
"""Tags that lead to a directory more: Exif, GPS, interoperability."""


def check_pieces(kind: str, data: bytes) -> None:
    """Refuse a PNG, GIF or TIFF of too many pieces; other formats pass.

    Raises:
        ImageError: CORRUPT.
    """
    if kind == "PNG":
        _check_png(data)
    elif kind == "GIF":
        _check_gif(data)
    elif kind == "TIFF":
        _check_tiff(data)


def too_many(kind: str, pieces: str, most: int = MAX_PIECES) -> ImageError:
    """Make the error for a file of too many pieces."""
    return ImageError(
        ImageFault.CORRUPT, f"{kind} image", expected=f"at most {most} {pieces}", found="more"
    )


def _check_png(data: bytes) -> None:
    at, profiles, texts = 8, 0, 0
    for _ in range(MAX_PIECES):
        if at + 8 > len(data):
            return
        name = data[at + 4 : at + 8]
        profiles += name == b"iCCP"
        texts += name in (b"zTXt", b"iTXt")
        if profiles > 1:
            raise too_many("PNG", "colour profile", 1)
        if texts > MAX_TEXTS:
            raise too_many("PNG", "compressed texts", MAX_TEXTS)
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    raise too_many("PNG", "chunks")


def _check_gif(data: bytes) -> None:
    """Walk to the first picture; the decoder looks no further in Python."""
    if len(data) < 13:
        return
    at = 13 + (3 * (2 << (data[10] & 7)) if data[10] & 0x80 else 0)
    lists = 0  # of an extension's blocks, that are still to come
    for _ in range(MAX_PIECES):
        if at >= len(data):
            return
        byte = data[at]
        if lists:  # a block of that many bytes; the empty one ends the list
            lists -= byte == 0
            at += 1 + byte
        elif byte in b",;":
            return
        elif byte == 0x21 and at + 2 < len(data):
            # Where the first block is empty, the decoder reads on, but for a comment.
            is_comment, is_empty = data[at + 1] == 0xFE, data[at + 2] == 0
            lists = 2 if is_empty and not is_comment else 1
            at += 2
        else:
            at += 1
    raise too_many("GIF", "blocks before its picture")


def _check_tiff(data: bytes) -> None:
    """Add up the numbers in the directories of the first picture, and the entries."""
    order = "<" if data.startswith(b"II") else ">"
    pieces, seen = 0, set()
    pending = [int.from_bytes(data[4:8], "little" if order == "<" else "big")]
    while pending:
        at = pending.pop()
        if at in seen:
            continue
        seen.add(at)
        for tag, kind, count, value in _entries(data, at, order):
            if tag in _DIRECTORY_TAGS:
                pending.append(value >> 16 if (kind, order) == (_SHORT, ">") else value)
            # What claims to be longer than the file is passed over.
            pieces += 1 if kind in _FREE_TYPES or count > len(data) else 1 + count
            if pieces > MAX_NUMBERS:
                raise too_many("TIFF", "numbers in its tags", MAX_NUMBERS)


def _entries(data: bytes, at: int, order: str) -> Iterator[tuple[int, int, int, int]]:
    """Read tag, type, count and value of a directory's entries, as many as there are."""
    with suppress(struct.error):  # an offset that leads outside
        (n_entries,) = struct.unpack_from(f"{order}H", data, at)
        for entry in range(at + 2, at + 2 + 12 * n_entries, 12):
            yield struct.unpack_from(f"{order}HHII", data, entry)
