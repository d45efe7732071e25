"""Decode one encoded image, from anyone, to upright 8-bit pixels.

Rules:
    Bytes are counted before the format is looked at, and pixels before any is decoded.
    The format is told by its first bytes, and only its own decoder ever sees the data.
    An image is whole or refused: no half-grey pictures, no clipped 16-bit ones.
    Whatever a decoder raises on hostile bytes becomes `ImageError`; nothing is printed,
    logged or warned. Every function may run in many threads; the decoders let go of the GIL.
    Transparent pixels show white: what people draw without a background, they draw for
    a page. Animations and documents give their first picture.

JPEG is decoded by `models.jpeg`, all else here by Pillow. No colour management: ICC
profiles are passed over.

Shapes: h, w decoded height and width.
"""

from __future__ import annotations

import ctypes
import io
import logging
import warnings
from pathlib import Path

import numpy as np
import PIL
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from models.errors import ImageError, ImageFault
from models.jpeg import ChooseDivisor, decode_jpeg, reduction
from models.picture import (
    DEFAULT_LIMITS,
    ORIENTATION_TAG,
    ImageLimits,
    Picture,
    exif_orientation,
    turn_upright,
)
from models.pieces import check_pieces


def _silence_decoders() -> None:
    """Stop Pillow and its libtiff from talking: what they would say, `ImageError` says.

    For the whole process, since nothing here can be set for one thread. Where libtiff is
    not the one in Pillow's wheel, it keeps its voice.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    for library in Path(PIL.__file__).parent.with_name("pillow.libs").glob("libtiff*"):
        ctypes.CDLL(str(library)).TIFFSetErrorHandler(None)


_silence_decoders()

_PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}

_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
)

MAX_RLE_BYTES = 1 << 20
"""Some .2 s of Python, in which other threads wait."""

TILE_WIDTH_TAG, TILE_LENGTH_TAG = 322, 323

_STRAIGHT_MODES = frozenset({"1", "L", "P", "RGB", "RGBA", "RGBX", "LA", "PA", "CMYK", "YCbCr"})
_DEEP_GREY_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})


def decode(
    data: bytes,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    grey: bool = False,
    shorter_side: int | None = None,
    choose_divisor: ChooseDivisor | None = None,
) -> Picture:
    """Decode a JPEG, PNG, WebP, GIF, BMP or TIFF.

    Args:
        data: the encoded image.
        limits: what it may cost.
        grey: whether to give BT.601 luma.
        shorter_side: the size in pixels that the shorter side will be resized to. Where the
            format can, fewer pixels are decoded, see `models.jpeg`.
        choose_divisor: says how many fewer, in place of `shorter_side`; asked only of a
            format that can.

    Returns:
        (h, w) pixels if `grey`, else (h, w, 3); upright, and opaque.

    Raises:
        ImageError: why the image cannot be used.
    """
    limits.check_bytes(len(data))
    kind = sniff(data)
    try:
        check_pieces(kind, data)
        if kind == "JPEG":
            choose = choose_divisor or (lambda *sides: reduction(min(sides), shorter_side))
            return decode_jpeg(data, limits, grey=grey, choose_divisor=choose)
        return _decode_with_pillow(kind, data, limits, grey)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # a GIF frame larger than its canvas
        raise ImageError(
            ImageFault.TOO_MANY_PIXELS,
            f"{kind} image",
            expected=f"at most {limits.max_pixels} pixels",
            found="more",
        ) from error
    except Exception as error:  # decoders raise whatever hostile bytes lead them to
        raise _corrupt(kind, error) from error


def sniff(data: bytes) -> str:
    """Name the format that the first bytes announce.

    Raises:
        ImageError: UNSUPPORTED_FORMAT.
    """
    for magic, kind in _MAGIC:
        if data.startswith(magic):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    raise ImageError(
        ImageFault.UNSUPPORTED_FORMAT,
        "image",
        expected=f"JPEG, {', '.join(_PLUGINS)}",
        found=_describe(data),
        mend="give a picture in one of these formats",
    )


def _describe(data: bytes) -> str:
    """Say what some bytes are that are none of our formats, without showing them."""
    head = data[:512]
    brand = head[4:12]
    if brand.startswith(b"ftyp"):
        return {b"avif": "AVIF", b"heic": "HEIC", b"mif1": "HEIF"}.get(brand[4:], "a video")
    if head.startswith(b"%PDF"):
        return "PDF"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "HTML"
    if b"<svg" in text:
        return "SVG"
    return "binary data" if b"\0" in head or b"\xff" in head else "text"


def _corrupt(kind: str, error: Exception) -> ImageError:
    """Make the error for data that its decoder refuses."""
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return ImageError(
        ImageFault.CORRUPT, f"{kind} image", expected="a whole one", found=f"damage ({reason})"
    )


def _decode_with_pillow(kind: str, data: bytes, limits: ImageLimits, grey: bool) -> Picture:
    """Decode anything but JPEG; its plugin by name, for `Image.open` has limits of its own."""
    with _PLUGINS[kind](io.BytesIO(data)) as image:
        limits.check_pixels(image.height, image.width, f"{kind} image")
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            _check_tiles(image, limits)
        if image.tile and image.tile[0].codec_name == "bmp_rle":
            _check_rle(data)
        if kind == "PNG":  # decoding passes over the checksums of the pixels
            PngImagePlugin.PngImageFile(io.BytesIO(data)).verify()
        _check_mode(image, kind)
        image.load()
        orientation = _pillow_orientation(image)
        flat = to_mode(flatten(image), "L" if grey else "RGB")
    return Picture.whole(turn_upright(np.asarray(flat), orientation))


def _check_tiles(image: TiffImagePlugin.TiffImageFile, limits: ImageLimits) -> None:
    """Refuse a TIFF by its tiles, too: one is decoded whole, however small the image.

    Raises:
        ImageError: TOO_MANY_PIXELS.
    """
    height, width = image.tag_v2.get(TILE_LENGTH_TAG), image.tag_v2.get(TILE_WIDTH_TAG)
    if isinstance(height, int) and isinstance(width, int):
        limits.check_pixels(height, width, "a tile of the TIFF image")


def _check_mode(image: ImageFile.ImageFile, kind: str) -> None:
    """Refuse what Pillow does not read, and what it reads as other greys than are meant.

    It leaves 12 bits in the lower part of 16, 16 bits of which 0 is white as they are, and
    the one transparent grey of a 16-bit PNG opaque.

    Raises:
        ImageError: UNSUPPORTED_FORMAT.
    """
    found = None
    if image.mode in _DEEP_GREY_MODES:
        tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
        if tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,)) != (16,):
            found = "12 bits"
        elif tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1) != 1:
            found = "16 bits of which 0 is white"
        elif "transparency" in image.info:
            found = "16 bits of which one grey is transparent"
    elif image.mode not in _STRAIGHT_MODES:
        found = f"mode {image.mode}"
    if found is not None:
        raise ImageError(
            ImageFault.UNSUPPORTED_FORMAT,
            f"{kind} image",
            expected="8 or 16 bits a channel, grey, RGB, CMYK or a palette",
            found=found,
            mend="save it with 8 bits a channel, in grey or RGB",
        )


def _check_rle(data: bytes) -> None:
    """Refuse a large run-length coded BMP, which Pillow decodes in Python, byte by byte.

    Raises:
        ImageError: TOO_MANY_BYTES.
    """
    if len(data) > MAX_RLE_BYTES:
        raise ImageError(
            ImageFault.TOO_MANY_BYTES,
            "run-length coded BMP image",
            expected=f"at most {MAX_RLE_BYTES} bytes",
            found=f"{len(data)} bytes",
            mend="save it as PNG",
        )


def flatten(image: Image.Image) -> Image.Image:
    """Bring an image to 8 bits a channel and put it on white where it is transparent."""
    if image.mode in _DEEP_GREY_MODES:
        deep = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    layer = to_mode(image, "RGBA")
    page = Image.new("RGB", image.size, "white")
    page.paste(layer, mask=layer)
    return page


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert to a mode; unlike Pillow's own, makes no copy where there is nothing to do."""
    return image if image.mode == mode else image.convert(mode)


def _pillow_orientation(image: Image.Image) -> int:
    """Read the Exif orientation that Pillow found, 1 where there is none."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        value = image.tag_v2.get(ORIENTATION_TAG)
        return value if isinstance(value, int) and 1 <= value <= 8 else 1
    exif = image.info.get("exif")
    return exif_orientation(exif) if isinstance(exif, bytes) else 1
