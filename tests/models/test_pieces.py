"""A file of nothing but small pieces is refused before a decoder walks them in Python."""

from __future__ import annotations

import io
import os
import struct
import zlib

import pytest
from PIL import Image

from models.decode import decode
from models.errors import ImageError, ImageFault
from models.pieces import MAX_NUMBERS, MAX_PIECES

LONG, RATIONAL = 4, 5
EXIF, SOFTWARE_LIST = 0x8769, 0xC000


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


def tiff(tag: int, kind: int, numbers: bytes, *, in_exif: bool = False) -> bytes:
    """Write a grey TIFF of one pixel, with a tag more in its directory or in Exif's."""
    n = len(numbers) // (8 if kind == RATIONAL else 4)
    more = (tag, kind, n, 16)
    entries = [(256, LONG, 1, 1), (257, LONG, 1, 1), (258, LONG, 1, 8), (259, LONG, 1, 1)]
    entries += [(262, LONG, 1, 1), (273, LONG, 1, 8), (277, LONG, 1, 1), (278, LONG, 1, 1)]
    entries += [(279, LONG, 1, 1)]
    end = 16 + len(numbers)
    inner = directory([more]) if in_exif else b""
    entries += [(EXIF, LONG, 1, end)] if in_exif else [more]
    head = b"II*\0" + struct.pack("<I", end + len(inner))
    return head + bytes(8) + numbers + inner + directory(entries)


def directory(entries: list[tuple[int, int, int, int]]) -> bytes:
    """Write a directory of a TIFF (TIFF 6.0, section 2)."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<H", len(entries)) + packed + bytes(4)


COMMENT, PADDING = b"\xff\xfe\0\2", b"\xff"
RATIONALS = struct.pack("<II", 1, 1) * (MAX_NUMBERS + 1)

TOO_MANY = {
    "PNG chunks": (lambda: png((b"prVt", b""), MAX_PIECES), "PNG image: expected at most 32768"),
    "PNG profiles": (
        lambda: png((b"iCCP", b"a\0\0" + zlib.compress(b"profile")), 2),
        "PNG image: expected at most 1 colour profile, found more",
    ),
    "GIF comments": (lambda: gif(b"!\xfe" + b"\1a" * MAX_PIECES + b"\0"), "GIF image: expected at"),
    "GIF extensions": (lambda: gif(b"!\xff\1a\0" * MAX_PIECES), "blocks before its picture"),
    "GIF filling": (lambda: gif(b"\0" * MAX_PIECES), "blocks before its picture"),
    "JPEG segments": (lambda: jpeg(COMMENT * MAX_PIECES), "JPEG image: expected at most 32768"),
    "JPEG padding": (lambda: jpeg(PADDING * MAX_PIECES), "segments, found more"),
    "TIFF tag": (lambda: tiff(SOFTWARE_LIST, RATIONAL, RATIONALS), "TIFF image: expected at most"),
    "TIFF Exif": (lambda: tiff(37386, RATIONAL, RATIONALS, in_exif=True), "numbers in its tags"),
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
        png((b"iCCP", b"a\0\0" + zlib.compress(os.urandom(2 << 20))), 1),
        gif(b"!\xfe" + b"\1a" * 1000 + b"\0"),
        jpeg(COMMENT * 1000),
        tiff(SOFTWARE_LIST, LONG, bytes(4 * 40_000)),
        tiff(37386, RATIONAL, RATIONALS[:800], in_exif=True),
    ):
        assert decode(data).pixels.shape == (1, 1, 3)


def test_directories_that_lead_into_one_another_end() -> None:
    """A directory that names itself is walked once."""
    data = bytearray(tiff(37386, RATIONAL, RATIONALS[:80], in_exif=True))
    inner = 16 + 80
    data[inner + 2 : inner + 14] = struct.pack("<HHII", EXIF, LONG, 1, inner)
    assert decode(bytes(data)).pixels.shape == (1, 1, 3)
