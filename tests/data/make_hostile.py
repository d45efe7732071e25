"""Make the seeds of `hostile/`: sound images of every format and of odd modes, to be mutated.

Unlike the golden files of `tests/models`, these have detail everywhere, so that a change of
any byte means something to a decoder. The picture is drawn, with a seed; the bytes depend on
the version of Pillow, so the files are committed. What Pillow does not write (run-length coded
BMP, tiled TIFF, interlaced PNG) is written by hand here.

Run from the root: `python -m tests.data.make_hostile`.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

HOSTILE = Path(__file__).parent / "hostile"

WIDTH, HEIGHT = 48, 40
SEED = 20250101


def picture() -> Image.Image:
    """Draw the picture: a gradient, shapes and noise."""
    rng = np.random.default_rng(SEED)
    x, y = np.meshgrid(np.linspace(0, 255, WIDTH), np.linspace(0, 255, HEIGHT))
    pixels = np.stack([x, y, 255 - (x + y) / 2], axis=2) + rng.normal(0, 12, (HEIGHT, WIDTH, 3))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((6, 6, 26, 30), fill=(220, 60, 40), outline=(0, 0, 0))
    draw.polygon([(20, 36), (44, 30), (34, 8)], fill=(30, 120, 210))
    draw.line((0, 39, 47, 0), fill=(250, 240, 120), width=2)
    return image


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """Encode with Pillow."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_alpha(image: Image.Image) -> Image.Image:
    """Let the picture fade to the right."""
    faded = image.convert("RGBA")
    faded.putalpha(Image.linear_gradient("L").rotate(90).resize(image.size))
    return faded


def jpegs(image: Image.Image) -> Iterator[tuple[str, bytes]]:
    """JPEG: sequential, progressive, optimised, grey, inks, with Exif and with restarts."""
    exif = Image.Exif()
    exif[0x0112] = 6
    yield "baseline.jpg", encode(image, "JPEG", quality=80)
    yield "progressive.jpg", encode(image, "JPEG", quality=85, progressive=True, optimize=True)
    yield "full-colour.jpg", encode(image, "JPEG", quality=90, subsampling=0)
    yield "grey.jpg", encode(image.convert("L"), "JPEG", quality=75)
    yield "inks.jpg", encode(image.convert("CMYK"), "JPEG", quality=70)
    yield "exif.jpg", encode(image, "JPEG", quality=60, exif=exif)
    yield "restarts.jpg", encode(image, "JPEG", quality=70, restart_marker_blocks=1)


def pngs(image: Image.Image) -> Iterator[tuple[str, bytes]]:
    """PNG: every kind of colour and depth, chunks beside, and interlaced."""
    palette = image.quantize(24)
    grey = image.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    note = PngImagePlugin.PngInfo()
    note.add_text("Comment", "a picture " * 40, zip=True)
    yield "rgb.png", encode(image, "PNG")
    yield "alpha.png", encode(with_alpha(image), "PNG")
    yield "grey.png", encode(grey, "PNG")
    yield "grey-alpha.png", encode(with_alpha(image).convert("LA"), "PNG")
    yield "grey-16bit.png", encode(deep, "PNG")
    yield "one-bit.png", encode(image.convert("1"), "PNG")
    yield "palette.png", encode(palette, "PNG")
    yield "palette-key.png", encode(palette, "PNG", transparency=3)
    yield "text.png", encode(image, "PNG", pnginfo=note)
    yield "interlaced.png", interlaced_png(grey)


def interlaced_png(grey: Image.Image) -> bytes:
    """Write a grey PNG in Adam7's seven passes."""
    pixels = np.asarray(grey)
    starts = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2)]
    rows = b""
    for top, left, down, right in [*starts, (1, 0, 2, 1)]:
        for row in pixels[top::down, left::right]:
            rows += b"\0" + row.tobytes()
    header = struct.pack(">IIBBBBB", grey.width, grey.height, 8, 0, 0, 0, 1)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def webps(image: Image.Image) -> Iterator[tuple[str, bytes]]:
    """WebP: lossy, lossless, with alpha, moving."""
    turned = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    yield "lossy.webp", encode(image, "WebP", quality=70)
    yield "lossless.webp", encode(image, "WebP", lossless=True)
    yield "alpha.webp", encode(with_alpha(image), "WebP", quality=60)
    yield "moving.webp", encode(image, "WebP", save_all=True, append_images=[turned], quality=40)


def gifs(image: Image.Image) -> Iterator[tuple[str, bytes]]:
    """GIF: still, interlaced, with a transparent colour, moving."""
    palette = image.quantize(32)
    turned = palette.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    yield "still.gif", encode(palette, "GIF", interlace=0)
    yield "interlaced.gif", encode(palette, "GIF", interlace=1)
    yield "key.gif", encode(palette, "GIF", transparency=5)
    yield "moving.gif", encode(palette, "GIF", save_all=True, append_images=[turned], loop=0)


def bmps(image: Image.Image) -> Iterator[tuple[str, bytes]]:
    """BMP: plain, grey, with a palette, one bit, with alpha, run-length coded."""
    yield "rgb.bmp", encode(image, "BMP")
    yield "grey.bmp", encode(image.convert("L"), "BMP")
    yield "palette.bmp", encode(image.quantize(16), "BMP")
    yield "one-bit.bmp", encode(image.convert("1"), "BMP")
    yield "alpha.bmp", encode(with_alpha(image), "BMP")
    yield "run-length.bmp", run_length_bmp(image.convert("L"))


def run_length_bmp(grey: Image.Image) -> bytes:
    """Write a BMP of 8 bits in Microsoft's run-length code, bottom row first."""
    body = b""
    for row in np.asarray(grey)[::-1] // 16 * 16:
        at = 0
        while at < len(row):
            run = at
            while run < len(row) and row[run] == row[at] and run - at < 255:
                run += 1
            body += bytes((run - at, row[at]))
            at = run
        body += b"\0\0"
    body += b"\0\1"
    colours = b"".join(bytes((n, n, n, 0)) for n in range(256))
    start = 14 + 40 + len(colours)
    info = struct.pack(
        "<IiiHHIIiiII", 40, grey.width, grey.height, 1, 8, 1, len(body), 0, 0, 256, 0
    )
    return struct.pack("<2sIHHI", b"BM", start + len(body), 0, 0, start) + info + colours + body


def tiffs(image: Image.Image) -> Iterator[tuple[str, bytes]]:
    """TIFF: every compression, odd modes, several pages, tiles, the other byte order."""
    grey = image.convert("L")
    small = grey.resize((24, 20))
    deep = Image.fromarray(np.asarray(small).astype(np.uint16) * 257)
    floats = Image.fromarray(np.asarray(small).astype(np.float32) / 255)
    for name in ("lzw", "adobe_deflate", "packbits", "jpeg"):
        yield f"{name.replace('_', '-')}.tiff", encode(image, "TIFF", compression=f"tiff_{name}")
    yield "fax.tiff", encode(image.convert("1"), "TIFF", compression="group4")
    yield "fax3.tiff", encode(image.convert("1"), "TIFF", compression="group3")
    yield "plain.tiff", encode(small, "TIFF")
    yield "palette.tiff", encode(small.convert("RGB").quantize(16), "TIFF")
    yield "inks.tiff", encode(image.convert("CMYK"), "TIFF", compression="tiff_lzw")
    yield "alpha.tiff", encode(with_alpha(image), "TIFF", compression="tiff_adobe_deflate")
    yield "grey-16bit.tiff", encode(deep, "TIFF")
    yield "float.tiff", encode(floats, "TIFF")
    yield (
        "lab.tiff",
        encode(Image.fromarray(np.asarray(image.resize((24, 20))), mode="LAB"), "TIFF"),
    )
    yield "pages.tiff", encode(small, "TIFF", save_all=True, append_images=[small, small])
    yield "tiles.tiff", tiled_tiff(grey.crop((0, 0, 32, 32)))


def tiled_tiff(grey: Image.Image) -> bytes:
    """Write a big-endian TIFF of 16 x 16 tiles."""
    pixels = np.asarray(grey)
    tiles = [pixels[y : y + 16, x : x + 16].tobytes() for y in (0, 16) for x in (0, 16)]
    tags = [
        (256, 3, [grey.width]), (257, 3, [grey.height]), (258, 3, [8]), (259, 3, [1]),
        (262, 3, [1]), (277, 3, [1]), (322, 3, [16]), (323, 3, [16]),
        (324, 4, []), (325, 4, [len(tile) for tile in tiles]),
    ]  # fmt: skip
    start = 8 + 2 + 12 * len(tags) + 4
    offsets, counts = start, start + 4 * len(tiles)
    data = counts + 4 * len(tiles)
    entries = b""
    for tag, kind, values in tags:
        if tag == 324:
            entries += struct.pack(">HHII", tag, kind, len(tiles), offsets)
        elif len(values) > 1:
            entries += struct.pack(">HHII", tag, kind, len(values), counts)
        else:
            entries += struct.pack(">HHIHH", tag, kind, 1, values[0], 0)
    lengths = [len(tile) for tile in tiles]
    places = [data + sum(lengths[:n]) for n in range(len(tiles))]
    head = struct.pack(">2sHI", b"MM", 42, 8) + struct.pack(">H", len(tags)) + entries + bytes(4)
    return head + struct.pack(f">{2 * len(tiles)}I", *places, *lengths) + b"".join(tiles)


def main() -> None:
    """Write the seeds."""
    HOSTILE.mkdir(exist_ok=True)
    image = picture()
    for make in (jpegs, pngs, webps, gifs, bmps, tiffs):
        for name, data in make(image):
            (HOSTILE / name).write_bytes(data)


if __name__ == "__main__":
    main()
