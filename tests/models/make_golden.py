"""Make the tiny images of `golden/`, whose right pixels are known beforehand.

Every good image shows one picture, `picture()`: four quadrants, 64 x 32 pixels when upright,
each colour filling whole 16 x 16 blocks, so that even JPEG and WebP keep it nearly exact.
What each file must become stands in `test_preprocess_golden.py` and is computed from the
colours, never by the code under test. PNG and the damaged files are written byte by byte
here, since Pillow writes neither interlaced PNG nor lies in a header.

Run from the root: `python tests/models/make_golden.py`.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

GOLDEN = Path(__file__).parent / "golden"

HEIGHT, WIDTH = 32, 64
COLOURS = ((200, 40, 40), (40, 160, 60), (50, 70, 190), (230, 220, 90))
"""Upper left, upper right, lower left, lower right; RGB."""

GREYS = (20, 90, 160, 240)
GREYS_16 = (0x1400, 0x5AFF, 0xA037, 0xF0F0)
"""Clipped to eight bits, as Pillow does, all would be white."""

ALPHA = (255, 128, 0, 64)

# How the upright picture is turned before it is stored with that Exif orientation.
STORED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p.swapaxes(0, 1)[::-1],
    7: lambda p: p.swapaxes(0, 1)[::-1, ::-1],
    8: lambda p: p.swapaxes(0, 1)[:, ::-1],
}


def quadrants(values: tuple[object, ...], dtype: str = "u1") -> np.ndarray:
    """Fill the four quadrants; (32, 64) or (32, 64, C)."""
    upper = np.repeat(np.array([values[:2]], dtype), HEIGHT // 2, axis=0)
    lower = np.repeat(np.array([values[2:]], dtype), HEIGHT // 2, axis=0)
    picture = np.repeat(np.concatenate([upper, lower]), WIDTH // 2, axis=1)
    return picture.astype(dtype)  # concatenate gives native byte order


def encode(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    """Encode with Pillow."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int, order: str = "<") -> bytes:
    """Write an Exif block that holds nothing but an orientation."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(f"{order}HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)
    return b"Exif\0\0" + mark + struct.pack(f"{order}I", 8) + entry


def chunk(name: bytes, body: bytes) -> bytes:
    """Write a PNG chunk."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    rows: bytes,
    *,
    depth: int,
    colour: int,
    interlaced: bool = False,
    before: bytes = b"",
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> bytes:
    """Write a PNG from its filtered rows; `before` are chunks ahead of the pixels."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced)
    body = chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + body + chunk(b"IEND", b"")


def png_rows(samples: np.ndarray) -> bytes:
    """Lay out rows of samples, each behind filter type 0."""
    return b"".join(b"\0" + np.ascontiguousarray(row).tobytes() for row in samples)


def adam7(pixels: np.ndarray) -> bytes:
    """Lay out the seven passes of an interlaced PNG (PNG specification, section 8.2)."""
    starts = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2))
    starts += ((0, 1, 2, 2), (1, 0, 2, 1))
    return b"".join(png_rows(pixels[y::dy, x::dx]) for y, x, dy, dx in starts)


def drop_segment(jpeg: bytes, marker: int) -> bytes:
    """Leave out the first segment of that marker."""
    at = jpeg.index(bytes((0xFF, marker)))
    length = int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return jpeg[:at] + jpeg[at + 2 + length :]


def inks(adobe: bool) -> np.ndarray:
    """Give the picture as CMYK without black; Adobe stores 255 for no ink."""
    rgb = quadrants(COLOURS)
    light = np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])
    return light if adobe else 255 - light


def jpegs() -> dict[str, bytes]:
    """Make the JPEGs."""
    rgb, grey = quadrants(COLOURS), quadrants(GREYS)
    good = {"quality": 95}
    # Pillow inverts CMYK when it writes and marks the file as Adobe's.
    files = {
        "baseline.jpg": encode(rgb, "JPEG", **good),
        "progressive.jpg": encode(rgb, "JPEG", progressive=True, **good),
        "grey.jpg": encode(grey, "JPEG", **good),
        "cmyk-adobe.jpg": _cmyk_jpeg(255 - inks(adobe=True)),
        "cmyk-plain.jpg": drop_segment(_cmyk_jpeg(255 - inks(adobe=False)), 0xEE),
        "ycck-adobe.jpg": simplejpeg.encode_jpeg(inks(adobe=True), 95, "CMYK", "444"),
    }
    for orientation, turn in STORED.items():
        options = {"exif": exif(orientation, "<" if orientation % 2 else ">"), **good}
        files[f"exif-{orientation}.jpg"] = encode(turn(rgb), "JPEG", **options)
    return files


def _cmyk_jpeg(ink: np.ndarray) -> bytes:
    """Encode (h, w, 4) inks as Pillow does."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(ink), mode="CMYK").save(file, "JPEG", quality=95)
    return file.getvalue()


def pngs() -> dict[str, bytes]:
    """Make the PNGs, without Pillow."""
    rgb, grey = quadrants(COLOURS), quadrants(GREYS)
    index = quadrants((0, 1, 2, 3))
    palette = chunk(b"PLTE", bytes(value for colour in COLOURS for value in colour))
    clear = chunk(b"tRNS", bytes(ALPHA))
    rgba = np.dstack([rgb, quadrants(ALPHA)])
    deep = quadrants(GREYS_16, ">u2")
    bits = np.packbits(quadrants((0, 1, 1, 0)), axis=1)
    nibbles = (index[:, ::2] << 4) | index[:, 1::2]
    turned = STORED[6](rgb)
    orientation = chunk(b"eXIf", exif(6).removeprefix(b"Exif\0\0"))
    key_colour = chunk(b"tRNS", struct.pack(">HHH", *COLOURS[2]))
    return {
        "rgb.png": png(png_rows(rgb), depth=8, colour=2),
        "grey.png": png(png_rows(grey), depth=8, colour=0),
        "rgba.png": png(png_rows(rgba), depth=8, colour=6),
        "grey-alpha.png": png(png_rows(np.dstack([grey, quadrants(ALPHA)])), depth=8, colour=4),
        "rgb-key.png": png(png_rows(rgb), depth=8, colour=2, before=key_colour),
        "palette.png": png(png_rows(index), depth=8, colour=3, before=palette),
        "palette-4bit.png": png(png_rows(nibbles), depth=4, colour=3, before=palette),
        "palette-alpha.png": png(png_rows(index), depth=8, colour=3, before=palette + clear),
        "grey-16bit.png": png(png_rows(deep), depth=16, colour=0),
        "rgb-16bit.png": png(png_rows(rgb.astype(">u2") * 257), depth=16, colour=2),
        "one-bit.png": png(png_rows(bits), depth=1, colour=0),
        "interlaced.png": png(adam7(rgb), depth=8, colour=2, interlaced=True),
        "exif-6.png": png(
            png_rows(turned), depth=8, colour=2, before=orientation, size=(HEIGHT, WIDTH)
        ),
    }


def others() -> dict[str, bytes]:
    """Make WebP, GIF, BMP and TIFF."""
    rgb, grey = quadrants(COLOURS), quadrants(GREYS)
    rgba = np.dstack([rgb, quadrants(ALPHA)])
    black = Image.new("RGB", (WIDTH, HEIGHT))
    pages = {"save_all": True, "append_images": [black]}
    turned = STORED[8](rgb)
    return {
        "lossy.webp": encode(rgb, "WEBP", quality=95),
        "lossless.webp": encode(rgb, "WEBP", lossless=True),
        "alpha.webp": encode(rgba, "WEBP", lossless=True, exact=True),
        "animated.webp": encode(rgb, "WEBP", lossless=True, **pages),
        "exif-8.webp": encode(turned, "WEBP", lossless=True, exif=exif(8)),
        "still.gif": encode(rgb, "GIF"),
        "animated.gif": encode(rgb, "GIF", duration=100, **pages),
        "rgb.bmp": encode(rgb, "BMP"),
        "grey.bmp": encode(grey, "BMP"),
        "rgb.tiff": encode(rgb, "TIFF"),
        "lzw.tiff": encode(rgb, "TIFF", compression="tiff_lzw"),
        "deflate.tiff": encode(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "grey-16bit.tiff": encode(quadrants(GREYS_16, "<u2"), "TIFF"),
        "grey-16bit-big-endian.tiff": _deep_tiff(quadrants(GREYS_16, ">u2")),
        "exif-8.tiff": encode(turned, "TIFF", tiffinfo={0x0112: 8}),
        "pages.tiff": encode(rgb, "TIFF", **pages),
    }


def _deep_tiff(pixels: np.ndarray, *, order: str = ">", bits: int = 16, black: int = 1) -> bytes:
    """Write an uncompressed grey TIFF (TIFF 6.0, section 3).

    Args:
        pixels: as they are stored, whole bytes.
        order: ">" for Motorola's, "<" for Intel's.
        bits: of a pixel.
        black: PhotometricInterpretation: 1 where 0 is black, 0 where it is white.
    """
    tags = ((256, WIDTH), (257, HEIGHT), (258, bits), (259, 1), (262, black), (273, 122))
    tags += ((277, 1), (278, HEIGHT), (279, pixels.nbytes))
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    magic = {">": b"MM\0*", "<": b"II*\0"}[order]
    head = magic + struct.pack(f"{order}IH", 8, len(tags)) + entries + bytes(4)
    assert len(head) == 122
    return head + pixels.tobytes()


def damaged(good: dict[str, bytes]) -> dict[str, bytes]:
    """Make files that must be refused, from good ones where there is one to damage."""
    whole = {"truncated.jpg": "baseline.jpg", "truncated-progressive.jpg": "progressive.jpg"}
    whole |= {"truncated.png": "rgba.png", "truncated.gif": "still.gif"}
    whole |= {"truncated.webp": "lossless.webp", "truncated.bmp": "rgb.bmp"}
    whole |= {"truncated.tiff": "lzw.tiff"}
    files = {name: good[of][: len(good[of]) * 2 // 3] for name, of in whole.items()}
    flipped = bytearray(good["rgb.png"])
    flipped[flipped.index(b"IDAT") + 8] ^= 1
    jpeg = good["grey.jpg"]
    frame = jpeg.index(b"\xff\xc0")
    size = struct.pack(">HH", 65000, 65000)
    row = np.zeros((1, 20_000 // 8), np.uint8)
    return files | {
        "flipped-bit.png": bytes(flipped),
        "bomb.png": png(png_rows(row), depth=1, colour=0, size=(20_000, 20_000)),
        "bomb.jpg": jpeg[: frame + 5] + size + jpeg[frame + 9 :],
        "bomb.gif": b"GIF89a" + b"\xff" * 4 + good["still.gif"][10:],
        "empty.jpg": b"",
        "text.jpg": b"This is no image, whatever its name says.\n",
        "drawing.svg": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>\n',
        "page.html": b"<!DOCTYPE html>\n<title>404 Not Found</title>\n",
        "photo.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(16),
        "float.tiff": encode(np.ones((HEIGHT, WIDTH), np.float32), "TIFF"),
        "grey-12bit.tiff": _deep_tiff(
            np.ones((HEIGHT, WIDTH * 3 // 2), np.uint8), order="<", bits=12
        ),
        "grey-16bit-white-is-zero.tiff": _deep_tiff(quadrants(GREYS_16, "<u2"), order="<", black=0),
        "grey-16bit-key.png": png(
            png_rows(quadrants(GREYS_16, ">u2")), depth=16, colour=0, before=chunk(b"tRNS", b"\0\0")
        ),
    }


def main() -> None:
    """Write every file."""
    GOLDEN.mkdir(exist_ok=True)
    good = jpegs() | pngs() | others()
    for name, data in (good | damaged(good)).items():
        (GOLDEN / name).write_bytes(data)


if __name__ == "__main__":
    main()
