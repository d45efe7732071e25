"""Hostile images: seeds of every format, mutated as an attacker or a bad disk would, and bombs.

Rules:
    Everything follows from one seed: the n-th input of a run is the same on every machine.
    Mutations know the formats as little as need be: bits, bytes, cuts, splices, lengths at any
    place. Two know more: checksums of PNG are made right again, so that its decoder looks
    further, and sizes are changed where each format keeps them.
    A bomb is small on the wire; what it asks for lies in its header.

The seeds are those of `tests/data/make_hostile.py`. It sends nothing; see `serve_hostile`.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SEEDS = Path(__file__).parents[1] / "tests" / "data" / "hostile"

EXTREMES = (0, 1, 2, 3, 7, 8, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF)
EXTREMES_32 = (*EXTREMES, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)

BOMB_SHARE = 0.02
"""Of all inputs. A bomb that is let in costs what a large picture does."""


@dataclass(frozen=True)
class Hostile:
    """One hostile image.

    Attributes:
        kind: what was done to it, for the tally.
        data: its bytes.
    """

    kind: str
    data: bytes


class HostileImages:
    """An endless row of hostile images, the same for the same seed."""

    def __init__(self, seed: int, folder: Path = SEEDS) -> None:
        """Read the seeds.

        Args:
            seed: of every choice.
            folder: sound images.
        """
        self._rng = random.Random(seed)
        self.seeds = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        assert self.seeds, f"no seeds in {folder}"
        self._files = tuple(self.seeds.values())

    def next(self) -> Hostile:
        """Make one more."""
        rng = self._rng
        if rng.random() < BOMB_SHARE:
            name, make = rng.choice(BOMBS)
            return Hostile(f"bomb {name}", make(rng))
        data = rng.choice(self._files)
        kinds = []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            name, mutate = rng.choice(MUTATIONS)
            data = mutate(rng, data, self._files)
            kinds.append(name)
        if data.startswith(PNG) and rng.random() < 0.7:
            data = with_right_checksums(data)
        return Hostile(kinds[0] if len(kinds) == 1 else "several", data)


Mutate = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


def flip_bits(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """Flip a few bits."""
    spoilt = bytearray(data)
    for _unused in range(rng.choice((1, 1, 2, 8, 32))):
        if spoilt:
            spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


def set_bytes(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """Fill a run of bytes with zeros, ones or noise."""
    if not data:
        return data
    at = rng.randrange(len(data))
    length = min(rng.choice((1, 2, 4, 16, 64)), len(data) - at)
    fill = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return data[:at] + fill + data[at + length :]


def cut(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """Cut the end off, anywhere."""
    return data[: rng.randrange(len(data) + 1)]


def drop(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """Leave out a piece."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.randrange(1, 65) :]


def repeat(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """Say a piece again, sometimes many times."""
    at = rng.randrange(len(data) + 1)
    piece = data[at : at + rng.randrange(1, 65)]
    return data[:at] + piece * rng.choice((2, 3, 50)) + data[at:]


def insert(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """Put noise in."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randrange(1, 33)) + data[at:]


def splice(rng: random.Random, data: bytes, files: Sequence[bytes]) -> bytes:
    """Go on as another file from somewhere on."""
    other = rng.choice(files)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]


def wear(rng: random.Random, data: bytes, files: Sequence[bytes]) -> bytes:
    """Begin as another format does."""
    length = rng.choice((4, 8, 12, 16, 32))
    return rng.choice(files)[:length] + data[length:]


def set_length(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """Write an extreme number somewhere, as a length, a count or an offset."""
    width = rng.choice((2, 4))
    if len(data) < width:
        return data
    at = rng.randrange(len(data) - width + 1)
    order = rng.choice(("little", "big"))
    old = int.from_bytes(data[at : at + width], "little" if order == "little" else "big")
    near = old + rng.choice((-1, 1, 256, -256))
    values = (*(EXTREMES if width == 2 else EXTREMES_32), near, len(data), len(data) - at)
    value = rng.choice(values) % (1 << 8 * width)
    number = value.to_bytes(width, "little" if order == "little" else "big")
    return data[:at] + number + data[at + width :]


def set_size(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """Say another width or height where the format keeps them."""
    places = size_places(data)
    if not places:
        return data
    at, layout = rng.choice(places)
    values = EXTREMES_32 if struct.calcsize(layout) == 4 else EXTREMES
    value = rng.choice((*values, 47, 49, 2048, 5000)) % (1 << 8 * struct.calcsize(layout))
    spoilt = bytearray(data)
    struct.pack_into(layout, spoilt, at, value)
    return bytes(spoilt)


def size_places(data: bytes) -> list[tuple[int, str]]:
    """Say where a file keeps width and height, and how they are written."""
    if data.startswith(PNG) and len(data) >= 24:
        return [(16, ">I"), (20, ">I")]
    if data[:3] == b"GIF" and len(data) >= 10:
        return [(6, "<H"), (8, "<H")]
    if data[:2] == b"BM" and len(data) >= 26:
        return [(18, "<I"), (22, "<I")]
    if data[:4] == b"RIFF" and len(data) >= 30:
        return [(26, "<H"), (28, "<H"), (24, "<H")]
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        at = data.find(marker)
        if data[:2] == b"\xff\xd8" and 0 < at <= len(data) - 9:
            return [(at + 5, ">H"), (at + 7, ">H")]
    return _tiff_places(data)


def _tiff_places(data: bytes) -> list[tuple[int, str]]:
    """Say where a TIFF keeps width, height, and the sizes of its strips and tiles."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None or len(data) < 10:
        return []
    (at,) = struct.unpack_from(f"{order}I", data, 4)
    if at + 2 > len(data):
        return []
    (entries,) = struct.unpack_from(f"{order}H", data, at)
    places = []
    for entry in range(at + 2, min(at + 2 + 12 * entries, len(data) - 12), 12):
        tag, kind = struct.unpack_from(f"{order}HH", data, entry)
        if tag in (256, 257, 258, 277, 278, 279, 322, 323):
            places.append((entry + 8, f"{order}H" if kind == 3 else f"{order}I"))
            places.append((entry + 4, f"{order}I"))
    return places


MUTATIONS: tuple[tuple[str, Mutate], ...] = (
    ("bits", flip_bits),
    ("bits", flip_bits),
    ("bytes", set_bytes),
    ("cut", cut),
    ("drop", drop),
    ("repeat", repeat),
    ("insert", insert),
    ("splice", splice),
    ("wear", wear),
    ("length", set_length),
    ("length", set_length),
    ("size", set_size),
    ("size", set_size),
)

PNG = b"\x89PNG\r\n\x1a\n"


def with_right_checksums(data: bytes) -> bytes:
    """Make the checksum of every whole PNG chunk right."""
    out, at = bytearray(data), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        struct.pack_into(">I", out, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(out)


def _chunk(name: bytes, body: bytes) -> bytes:
    """Write a chunk of PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_bomb(rng: random.Random) -> bytes:
    """Write a PNG of grey lines; some sizes are above any limit, some just let in."""
    side = rng.choice((3000, 9000, 20_000, 60_000, 0x7FFFFFFF))
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min(side, 3000) * (min(side, 3000) // 8 + 1)), 9)
    return PNG + _chunk(b"IHDR", header) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def text_bomb(_: random.Random) -> bytes:
    """Write a PNG whose comment unfolds to 50 MB."""
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    text = b"Comment\0\0" + zlib.compress(bytes(50 << 20), 9)
    rows = zlib.compress(bytes(8 * 9))
    chunks = _chunk(b"IHDR", header) + _chunk(b"zTXt", text) + _chunk(b"IDAT", rows)
    return PNG + chunks + _chunk(b"IEND", b"")


def colour_bomb(_: random.Random) -> bytes:
    """Write a PNG whose colour profile unfolds to 50 MB."""
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    profile = b"icc\0\0" + zlib.compress(bytes(50 << 20), 9)
    rows = zlib.compress(bytes(8 * 9))
    chunks = _chunk(b"IHDR", header) + _chunk(b"iCCP", profile) + _chunk(b"IDAT", rows)
    return PNG + chunks + _chunk(b"IEND", b"")


def crumbs(rng: random.Random) -> bytes:
    """Write a file of a million bytes or so that is nothing but tiny pieces."""
    tags = [(256, 4, 1, 1), (257, 4, 1, 1), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8)]
    tags += [(278, 4, 1, 1), (279, 4, 1, 1), (282, 5, 130_000, 200)]  # rational numbers
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    directory = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
    rows = _chunk(b"IDAT", zlib.compress(bytes(8 * 9))) + _chunk(b"IEND", b"")
    profile = _chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(1 << 20), 9))
    gif, jpeg = (SEEDS / "still.gif").read_bytes(), (SEEDS / "progressive.jpg").read_bytes()
    blocks_at = 13 + 3 * (2 << (gif[10] & 7))
    return rng.choice(
        (
            PNG + header + _chunk(b"prVt", b"") * 80_000 + rows,
            PNG + header + profile * 900 + rows,
            gif[:blocks_at] + b"!\xfe" + b"\1a" * 500_000 + b"\0" + gif[blocks_at:],
            jpeg[:2] + b"\xff\xfe\0\2" * 250_000 + jpeg[2:],
            directory.ljust(200, b"\0") + b"\1\0\0\0" * 260_000,
        )
    )


def gif_bomb(rng: random.Random) -> bytes:
    """Write a GIF of a large screen, or of a small one with a large frame."""
    screen, frame = rng.choice(((65535, 65535), (65535, 16), (16, 65535), (4000, 4000)))
    head = b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0x80, 0, 0) + bytes(6)
    image = b"," + struct.pack("<HHHHB", 0, 0, frame, frame, 0)
    return head + image + b"\x02\x02\x4c\x01\x00;"


def jpeg_bomb(rng: random.Random) -> bytes:
    """Write a JPEG that says that it is large, or one of very many scans."""
    data = (SEEDS / "progressive.jpg").read_bytes()
    at = data.find(b"\xff\xc2")
    if rng.random() < 0.5:
        side = rng.choice((65500, 20_000, 3000))
        return data[: at + 5] + struct.pack(">HH", side, side) + data[at + 9 :]
    scan = data.find(b"\xff\xda")
    return data[:scan] + data[scan:-2] * rng.choice((10, 200, 2000)) + data[-2:]


def bmp_bomb(rng: random.Random) -> bytes:
    """Write a BMP header of a large picture, with or without run lengths."""
    side, coded = rng.choice((3000, 30_000, 0x7FFFFFFF)), rng.randrange(3)
    info = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, coded, 0, 0, 0, 256, 0)
    return struct.pack("<2sIHHI", b"BM", 2000, 0, 0, 1078) + info + bytes(1024) + b"\xff\x00" * 500


def tiff_bomb(rng: random.Random) -> bytes:
    """Write a TIFF of a large picture, strip, tile, or number of channels."""
    size, tile, channels = rng.choice(
        ((100_000, 16, 1), (16, 60_000, 1), (2000, 2000, 65535), (16, 16, 60_000), (5000, 5000, 1))
    )
    tags = [
        (256, 4, size), (257, 4, size), (258, 3, 8), (259, 3, rng.choice((1, 5, 8, 7, 32773, 4))),
        (262, 3, 1), (277, 3, channels), (322, 4, tile), (323, 4, tile), (324, 4, 400),
        (325, 4, 64),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    return head.ljust(400, b"\0") + rng.randbytes(64)


def webp_bomb(rng: random.Random) -> bytes:
    """Write a WebP that says that it is large."""
    data = bytearray((SEEDS / rng.choice(("lossy.webp", "alpha.webp"))).read_bytes())
    if data[12:16] == b"VP8X":
        data[24:30] = rng.choice((b"\xff\xff\xff" * 2, b"\xff\x3f\x00" * 2))
    else:
        struct.pack_into("<HH", data, 26, 16383, 16383)
    return bytes(data)


def noise_bomb(rng: random.Random) -> bytes:
    """Write a magic number and a megabyte of noise."""
    magic = rng.choice((b"\xff\xd8\xff\xe0", PNG, b"GIF89a", b"BM", b"II*\0", b"RIFFxxxxWEBPVP8 "))
    return magic + rng.randbytes(1 << 20)


BOMBS: tuple[tuple[str, Callable[[random.Random], bytes]], ...] = (
    ("png", png_bomb),
    ("png text", text_bomb),
    ("png colours", colour_bomb),
    ("crumbs", crumbs),
    ("gif", gif_bomb),
    ("jpeg", jpeg_bomb),
    ("bmp", bmp_bomb),
    ("tiff", tiff_bomb),
    ("webp", webp_bomb),
    ("noise", noise_bomb),
)
