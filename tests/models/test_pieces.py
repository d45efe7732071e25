"""A file of nothing but small pieces is refused before a decoder walks them in Python."""

from __future__ import annotations

import io
import os
import struct
import zlib
from typing import TypeAlias

import pytest
from PIL import Image

from models.decode import decode
from models.errors import ImageError, ImageFault
from models.jpeg import MAX_SCANS
from models.pieces import MAX_NUMBERS, MAX_PIECES, MAX_TEXTS

SHORT, LONG, RATIONAL = 3, 4, 5
EXIF, GPS, MAKER_NOTE = 0x8769, 0x8825, 0x927C

Entry: TypeAlias = tuple[int, int, int, int]
"""Tag, type, count and value."""


def saved(kind: str) -> bytes:
    """Encode a picture of one pixel."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, kind)
    return file.getvalue()


def png(chunk: tuple[bytes, bytes], n: int) -> bytes:
    """Put `n` chunks behind the header of a PNG."""
    name, body = chunk
    whole = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    data = saved("PNG")
    return data[:33] + whole * n + data[33:]


def gif(blocks: bytes) -> bytes:
    """Put blocks before the first picture of a GIF."""
    data = saved("GIF")
    at = 13 + 3 * (2 << (data[10] & 7))
    return data[:at] + blocks + data[at:]


def jpeg(segments: bytes) -> bytes:
    """Put segments behind the start of a JPEG."""
    data = saved("JPEG")
    return data[:2] + segments + data[2:]


def tiff(
    kind: int,
    numbers: bytes,
    *,
    in_exif: bool = False,
    order: str = "<",
    pointer: int = LONG,
    beside: tuple[Entry, ...] = (),
) -> bytes:
    """Write a grey TIFF of one pixel, with a tag of numbers in its directory or in Exif's.

    Args:
        kind: the type of the numbers.
        numbers: little- or big-endian, as `order` says.
        in_exif: where the tag is.
        order: "<" for Intel's, ">" for Motorola's.
        pointer: the type of what leads to Exif.
        beside: entries more.
    """
    places = ((256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1))
    entries: list[Entry] = [(tag, LONG, 1, value) for tag, value in (*places, (279, 1))]
    n = len(numbers) // (8 if kind == RATIONAL else 4)
    exif_bytes = len(directory([(0, 0, 0, 0)], order)) if in_exif else 0
    more: Entry = (MAKER_NOTE, kind, n, 16 + exif_bytes)
    inner = directory([more], order) if in_exif else b""
    entries += [(EXIF, pointer, 1, 16) if in_exif else more, *beside]
    magic = {"<": b"II*\0", ">": b"MM\0*"}[order]
    head = magic + struct.pack(f"{order}I", 16 + exif_bytes + len(numbers)) + bytes(8)
    return head + inner + numbers + directory(entries, order)


def directory(entries: list[Entry], order: str) -> bytes:
    """Write a directory of a TIFF (TIFF 6.0, section 2)."""
    packed = b"".join(
        struct.pack(f"{order}HHIHH", *entry, 0)
        if entry[1] == SHORT
        else struct.pack(f"{order}HHII", *entry)
        for entry in entries
    )
    return struct.pack(f"{order}H", len(entries)) + packed + bytes(4)


COMMENT, PADDING = b"\xff\xfe\0\2", b"\xff"
RATIONALS = struct.pack("<II", 1, 1) * (MAX_NUMBERS + 1)

TEXT = b"key\0\0" + zlib.compress(b"value")

TOO_MANY = {
    "PNG chunks": (lambda: png((b"prVt", b""), MAX_PIECES), "PNG image: expected at most 32768"),
    "PNG profiles": (
        lambda: png((b"iCCP", b"a\0\0" + zlib.compress(b"profile")), 2),
        "PNG image: expected at most 1 colour profile, found more",
    ),
    "PNG texts": (
        lambda: png((b"zTXt", TEXT), MAX_TEXTS + 1),
        "PNG image: expected at most 100 compressed texts, found more",
    ),
    "GIF comments": (lambda: gif(b"!\xfe" + b"\1a" * MAX_PIECES + b"\0"), "GIF image: expected at"),
    "GIF extensions": (lambda: gif(b"!\xff\1a\0" * MAX_PIECES), "blocks before its picture"),
    "GIF filling": (lambda: gif(b"\0" * MAX_PIECES), "blocks before its picture"),
    "JPEG segments": (lambda: jpeg(COMMENT * MAX_PIECES), "JPEG image: expected at most 32768"),
    "JPEG padding": (lambda: jpeg(PADDING * MAX_PIECES), "segments, found more"),
    "GIF second list": (
        lambda: gif(b"!\xf9\0," + b"a" * 44 + b"\1a" * MAX_PIECES + b"\0"),
        "blocks before its picture",
    ),
    "JPEG behind its scan": (
        lambda: (
            (data := saved("JPEG"))[:-2]
            + b"\xff\xfe\0\4\xff\xda" * (MAX_SCANS + 1)
            + COMMENT * MAX_PIECES
            + data[-2:]
        ),
        "segments, found more",
    ),
    "TIFF tag": (lambda: tiff(RATIONAL, RATIONALS), "TIFF image: expected at most 65536"),
    "TIFF Exif": (lambda: tiff(RATIONAL, RATIONALS, in_exif=True), "numbers in its tags"),
    "TIFF big-endian": (
        lambda: tiff(RATIONAL, RATIONALS, in_exif=True, order=">"),
        "numbers in its tags",
    ),
    "TIFF short pointer": (
        lambda: tiff(RATIONAL, RATIONALS, in_exif=True, order=">", pointer=SHORT),
        "numbers in its tags",
    ),
    "TIFF pointer to nowhere": (
        lambda: tiff(RATIONAL, RATIONALS, in_exif=True, beside=((GPS, LONG, 1, 0xFFFFFFF0),)),
        "numbers in its tags",
    ),
}


@pytest.mark.parametrize("name", TOO_MANY)
def test_a_file_of_too_many_pieces_is_refused(name: str) -> None:
    """Each would keep the interpreter to itself for seconds, and longer the longer it is."""
    make, text = TOO_MANY[name]
    with pytest.raises(ImageError) as caught:
        decode(make())
    assert caught.value.fault is ImageFault.CORRUPT
    assert text in str(caught.value)


def test_what_pictures_have_passes() -> None:
    """Many pieces, each of a kind that real files have, harm nothing."""
    for data in (
        png((b"tEXt", b"a\0b"), 1000),
        png((b"iCCP", b"a\0\0" + zlib.compress(os.urandom(1 << 19))), 1),
        gif(b"!\xfe" + b"\1a" * 1000 + b"\0"),
        jpeg(COMMENT * 1000),
        png((b"zTXt", TEXT), 100),
        tiff(LONG, bytes(4 * 40_000)),
        tiff(RATIONAL, RATIONALS[:800], in_exif=True, order=">"),
    ):
        assert decode(data).pixels.shape == (1, 1, 3)


def test_directories_that_lead_into_one_another_end() -> None:
    """A directory that names itself is walked once."""
    data = bytearray(tiff(RATIONAL, RATIONALS[:80], in_exif=True))
    data[18:30] = struct.pack("<HHII", EXIF, LONG, 1, 16)
    assert decode(bytes(data)).pixels.shape == (1, 1, 3)


def test_an_application_s_own_pillow_is_as_it_was() -> None:
    """What is passed over here is read where somebody wants it: the client imports this, too."""
    with Image.open(io.BytesIO(png((b"zTXt", TEXT), 1))) as image:
        assert image.text == {"key": "value"}  # type: ignore[attr-defined]  # of a PNG's
