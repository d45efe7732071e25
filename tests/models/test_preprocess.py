"""Preprocessing: geometry, colour, limits, and the reduced decoding of JPEGs."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from models.decode import decode, sniff
from models.errors import BundleError, HoraceError, ImageError, ImageFault, UsageError
from models.jpeg import REDUCED_GAP, reduction
from models.picture import ImageLimits, Picture, exif_orientation
from models.preprocess import INTERPOLATIONS, PreprocessSpec, preprocess

GOLDEN = Path(__file__).parent / "golden"
SPEC_28 = PreprocessSpec(height=28, width=28, channels=1, resize=28)


def spec(side: int, channels: int = 3, **values: object) -> PreprocessSpec:
    """Make a square spec."""
    given = {"height": side, "width": side, "channels": channels, "resize": side} | values
    return PreprocessSpec(**given)  # type: ignore[arg-type]  # some are wrong on purpose


def scene(height: int, width: int) -> NDArray[np.uint8]:
    """Draw something smooth with edges, unlike its own mirror images, (h, w, 3)."""
    y, x = np.mgrid[0:height, 0:width] / min(height, width)
    waves = np.stack([np.sin(7 * x + 3 * y), np.cos(5 * y * x), np.sin(9 * y - 4 * x)], axis=2)
    picture = (waves * 70 + 128).astype(np.uint8)
    picture[height // 8 : height // 3, width // 2 : width // 2 + height // 4] = (250, 240, 20)
    return picture


def jpeg(pixels: NDArray[np.uint8], **options: object) -> bytes:
    """Encode as JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **({"quality": 92} | options))
    return file.getvalue()


def fault_of(action: Callable[[], object]) -> tuple[ImageFault, str]:
    """Give the fault and text of the ImageError that an action raises."""
    with pytest.raises(ImageError) as caught:
        action()
    return caught.value.fault, str(caught.value)


# Geometry.


@given(st.binary(min_size=784, max_size=784))
def test_an_image_of_the_final_size_passes_to_the_byte(data: bytes) -> None:
    """Fashion-MNIST is what it is: no filter touches it."""
    image = np.frombuffer(data, np.uint8).reshape(28, 28)
    assert np.array_equal(preprocess(image, SPEC_28)[..., 0], image)


@given(
    h=st.integers(1, 90),
    w=st.integers(1, 90),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    more=st.integers(0, 20),
    channels=st.sampled_from([1, 3]),
    interpolation=st.sampled_from(sorted(INTERPOLATIONS)),
)
def test_any_size_comes_out_at_the_size_asked_for(
    h: int, w: int, height: int, width: int, more: int, channels: int, interpolation: str
) -> None:
    """Up, down, in one dimension only: right shape, and a flat colour stays itself."""
    wanted = PreprocessSpec(
        height=height,
        width=width,
        channels=channels,
        resize=max(height, width) + more,
        interpolation=interpolation,
    )
    found = preprocess(np.full((h, w, 3), 77, np.uint8), wanted)
    assert (found.shape, found.dtype) == ((height, width, channels), np.uint8)
    assert found.flags.c_contiguous
    assert (found == 77).all()


@pytest.mark.parametrize(("h", "w"), [(60, 90), (90, 60), (61, 97), (60, 60)])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_the_window_is_what_resizing_and_then_cropping_gives(
    h: int, w: int, interpolation: str
) -> None:
    """One step computes what two would: Pillow's resize of all, then its centre."""
    wanted = spec(20, resize=30, interpolation=interpolation)
    image = Image.fromarray(scene(h, w))
    scale = 30 / min(h, w)
    # A canvas of a whole number of pixels around the centre, which two steps need.
    rows, columns = 2 * int(h * scale / 2), 2 * int(w * scale / 2)
    box = (
        (w - columns / scale) / 2,
        (h - rows / scale) / 2,
        (w + columns / scale) / 2,
        (h + rows / scale) / 2,
    )
    whole = np.asarray(image.resize((columns, rows), INTERPOLATIONS[interpolation], box=box))
    top, left = (rows - 20) // 2, (columns - 20) // 2
    expected = whole[top : top + 20, left : left + 20].astype(int)
    assert np.abs(preprocess(scene(h, w), wanted) - expected).max() <= 1


def test_shrinking_is_antialiased() -> None:
    """A fine checkerboard becomes its mean, not a picture of the sampling grid."""
    board = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    found = preprocess(board, spec(32, channels=1)).astype(int)
    assert np.abs(found - 127).max() <= 2


def test_a_strip_costs_no_more_than_its_window() -> None:
    """Resized as a whole, this would be 2.2 gigapixels."""
    strip = np.zeros((1, 100_000, 3), np.uint8)
    assert preprocess(strip, spec(150)).shape == (150, 150, 3)


@settings(max_examples=30)
@given(
    h=st.integers(65, 400),
    w=st.integers(65, 400),
    turn=st.integers(1, 8),
    channels=st.sampled_from([1, 3]),
)
def test_a_jpeg_decoded_small_is_close_to_one_decoded_whole(
    h: int, w: int, turn: int, channels: int
) -> None:
    """Also where 1/n of a side is no whole number of pixels, and whichever way it is turned."""
    exif = Image.Exif()
    exif[0x0112] = turn
    data = jpeg(scene(h, w), exif=exif)
    wanted = spec(16, channels=channels)
    assert decode(data, shorter_side=16).pixels.size < decode(data).pixels.size
    whole = preprocess(decode(data).pixels, wanted).astype(int)
    difference = np.abs(preprocess(data, wanted) - whole)
    assert difference.mean() < 1.5
    assert np.percentile(difference, 99) <= 12


def test_a_jpeg_on_its_side_is_measured_upright() -> None:
    """What chooses how small it is decoded knows the picture as it will be seen."""
    exif, seen = Image.Exif(), []
    exif[0x0112] = 6
    decode(jpeg(scene(20, 30), exif=exif), choose_divisor=lambda *sides: seen.append(sides) or 1)
    assert seen == [(30, 20)]


@given(side=st.integers(1, 10_000), target=st.integers(1, 1000))
def test_reduced_decoding_never_leaves_less_than_twice_the_target(side: int, target: int) -> None:
    """And takes the smallest scale that keeps the promise."""
    n = reduction(side, target)
    assert n == 1 or side / n >= REDUCED_GAP * target
    assert n == 8 or side // (2 * n) < REDUCED_GAP * target
    assert reduction(side, None) == 1


# Colour.


def test_raw_pixels_of_every_layout_take_the_same_road() -> None:
    """Grey in two layouts, RGB, and RGBA over white."""
    rgb = scene(28, 28)
    grey = rgb[..., 0]
    half = np.dstack([rgb, np.full((28, 28), 102, np.uint8)])
    wanted = spec(28)
    assert np.array_equal(preprocess(rgb, wanted), rgb)
    assert np.array_equal(preprocess(grey, wanted), np.dstack([grey] * 3))
    assert np.array_equal(preprocess(grey[..., None], SPEC_28), grey[..., None])
    over_white = np.rint(rgb * 0.4 + 255 * 0.6)
    assert np.abs(preprocess(half, wanted) - over_white).max() <= 1
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    assert np.abs(preprocess(rgb, SPEC_28)[..., 0] - luma).max() <= 1


def test_pixels_of_the_final_size_are_cut_where_the_spec_cuts() -> None:
    """A spec that resizes to more than its window takes the middle of them, as of a file's."""
    pixels = scene(8, 8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    cut = preprocess(pixels, spec(8, resize=12))
    np.testing.assert_array_equal(cut, preprocess(file.getvalue(), spec(8, resize=12)))
    assert not np.array_equal(cut, pixels)


def test_a_png_of_a_wrong_checksum_is_refused() -> None:
    """Its pixels would decode, and be others than those that were saved."""
    file = io.BytesIO()
    Image.fromarray(scene(8, 8)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[data.index(b"IEND") - 5] ^= 1  # the last byte of the checksum of IDAT
    fault, text = fault_of(lambda: decode(bytes(data)))
    assert fault is ImageFault.CORRUPT
    assert "PNG image: expected a whole one, found damage" in text


def test_views_are_as_good_as_arrays() -> None:
    """Flipped and strided pixels are read as they are seen."""
    view = scene(60, 80)[::-1, ::2]
    assert np.array_equal(preprocess(view, spec(20)), preprocess(view.copy(), spec(20)))


@pytest.mark.parametrize(
    ("pixels", "fault", "found"),
    [
        (np.zeros((4, 4), np.float32), ImageFault.WRONG_SHAPE, "float32 of shape (4, 4)"),
        (np.zeros((4,), np.uint8), ImageFault.WRONG_SHAPE, "uint8 of shape (4,)"),
        (np.zeros((3, 4, 4, 3), np.uint8), ImageFault.WRONG_SHAPE, "shape (3, 4, 4, 3)"),
        (np.zeros((3, 4, 5), np.uint8), ImageFault.WRONG_SHAPE, "uint8 of shape (3, 4, 5)"),
        (np.zeros((0, 4, 3), np.uint8), ImageFault.EMPTY, "found shape (0, 4, 3)"),
    ],
)
def test_arrays_that_are_no_image_are_refused(
    pixels: NDArray[np.uint8], fault: ImageFault, found: str
) -> None:
    """The shape that was given is named."""
    caught, text = fault_of(partial(preprocess, pixels, SPEC_28))
    assert caught is fault
    assert found in text


# Limits and damage.


def test_bytes_are_counted_before_the_format_is_looked_at() -> None:
    """A large upload is refused unread."""
    limits = ImageLimits(max_image_bytes=10)
    fault, text = fault_of(partial(preprocess, b"x" * 11, SPEC_28, limits))
    assert fault is ImageFault.TOO_MANY_BYTES
    assert text == "image: expected at most 10 bytes, found 11 bytes"


@pytest.mark.parametrize("name", ["baseline.jpg", "rgb.png", "lossy.webp", "rgb.bmp", "lzw.tiff"])
def test_pixels_are_counted_in_every_format(name: str) -> None:
    """The limit itself is allowed; one pixel less is not."""
    data = (GOLDEN / name).read_bytes()
    assert decode(data, limits=ImageLimits(max_pixels=64 * 32)).pixels.shape == (32, 64, 3)
    fault, text = fault_of(partial(decode, data, limits=ImageLimits(max_pixels=64 * 32 - 1)))
    assert fault is ImageFault.TOO_MANY_PIXELS
    assert text == f"{sniff(data)} image: expected at most 2047 pixels, found 64 x 32 = 2048"


def test_raw_pixels_are_counted_too() -> None:
    """An array costs what an image costs."""
    limits = ImageLimits(max_pixels=99)
    fault, _ = fault_of(partial(preprocess, np.zeros((10, 10), np.uint8), SPEC_28, limits))
    assert fault is ImageFault.TOO_MANY_PIXELS


def test_a_progressive_jpeg_of_endless_scans_is_refused() -> None:
    """A few kilobytes could keep a core busy for minutes."""
    data = (GOLDEN / "progressive.jpg").read_bytes()
    scan = data.rindex(b"\xff\xda")
    bomb = data[:scan] + data[scan:-2] * 200 + data[-2:]
    hidden = data[:scan] + (data[scan:-2] + b"\xff\xfe\x00\x04\xff\xd9") * 200 + data[-2:]
    for endless in (bomb, hidden):  # by a comment that reads like the end
        fault, text = fault_of(partial(decode, endless))
        assert fault is ImageFault.CORRUPT
        assert "more than 100 scans" in text


@pytest.mark.parametrize("name", ["baseline.jpg", "progressive.jpg"])
def test_a_film_behind_a_photograph_is_passed_over(name: str) -> None:
    """As phones append it: among millions of bytes of any kind many read like scans."""
    data = (GOLDEN / name).read_bytes()
    film = np.random.default_rng(0).bytes(10_000) + b"\xff\xda" * 300
    np.testing.assert_array_equal(decode(data + film).pixels, decode(data).pixels)


@pytest.mark.parametrize("name", ["baseline.jpg", "progressive.jpg", "grey.jpg", "ycck-adobe.jpg"])
def test_a_jpeg_cut_anywhere_is_refused(name: str) -> None:
    """Never half a picture with grey below, whatever the encoding."""
    data = (GOLDEN / name).read_bytes()
    for length in range(3, len(data) - 1):
        fault, _ = fault_of(partial(decode, data[:length]))
        assert fault is ImageFault.CORRUPT


def test_decoders_say_nothing_themselves() -> None:
    """Neither warnings of Pillow nor lines of libtiff reach stderr, whatever is decoded."""
    code = f"""
import pathlib
from models.decode import decode
from models.errors import ImageError
for path in sorted(pathlib.Path({str(GOLDEN)!r}).iterdir()):
    data = path.read_bytes()
    for at in range(4, min(len(data), 200), 3):
        try:
            decode(data[:at] + b"\\xff" + data[at + 1 :])
        except ImageError:
            pass
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert done.stdout + done.stderr == b""


def test_many_threads_give_the_pixels_of_one() -> None:
    """A pool decodes what a loop does."""
    files = [path.read_bytes() for path in sorted(GOLDEN.glob("*.*"))]
    wanted = spec(24)

    def outcome(data: bytes) -> bytes | ImageFault:
        """Give the pixels or the fault."""
        try:
            return preprocess(data, wanted).tobytes()
        except ImageError as error:
            return error.fault

    alone = [outcome(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, files * 8)) == alone * 8


@given(st.binary(max_size=64))
def test_any_exif_block_gives_an_orientation(data: bytes) -> None:
    """Damage means upright."""
    for head in (b"", b"Exif\0\0", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08"):
        assert 1 <= exif_orientation(head + data) <= 8


# The spec.


def test_a_spec_survives_json() -> None:
    """What a bundle stores opens as the same spec."""
    wanted = spec(64, resize=72, interpolation="bicubic")
    assert PreprocessSpec.from_json(wanted.to_json()) == wanted
    assert wanted.to_json() == {
        "height": 64,
        "width": 64,
        "channels": 3,
        "resize": 72,
        "interpolation": "bicubic",
        "revision": 1,
    }


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"height": 0}, "preprocessing.height: expected 1 to 4096, found 0"),
        ({"width": 5000}, "preprocessing.width: expected 1 to 4096, found 5000"),
        ({"channels": 4}, "preprocessing.channels: expected 1 or 3, found 4"),
        (
            {"resize": 31},
            "preprocessing.resize: expected 32 (the larger of height and width) to 4096, found 31",
        ),
        (
            {"interpolation": "nearest"},
            "preprocessing.interpolation: expected bilinear or bicubic or lanczos, found 'nearest'",
        ),
        (
            {"revision": 2},
            "preprocessing.revision: expected 1, the one of this version of Horace, found 2",
        ),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(values: dict[str, object], text: str) -> None:
    """The value, what it could have been, and what it was."""
    with pytest.raises(UsageError) as caught:
        spec(32, **values)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"height": None}, "preprocessing.height: expected of type int, found NoneType"),
        ({"height": True}, "preprocessing.height: expected of type int, found bool"),
        ({"interpolation": 3}, "preprocessing.interpolation: expected of type str, found int"),
        ({"mean": 0.5}, "found channels, height, interpolation, mean, resize, revision, width"),
    ],
)
def test_json_of_another_shape_is_refused(change: dict[str, object], text: str) -> None:
    """A bundle written by something else says so, field by field."""
    with pytest.raises(BundleError, match=r"^preprocessing") as caught:
        PreprocessSpec.from_json(spec(32).to_json() | change)
    assert text in str(caught.value)
    with pytest.raises(HoraceError, match="found nothing"):
        PreprocessSpec.from_json({})
    with pytest.raises(HoraceError, match=r"found \[1\]"):
        PreprocessSpec.from_json([1])


def test_a_picture_of_whole_pixels_fills_them() -> None:
    """The usual case: nothing was reduced."""
    picture = Picture.whole(np.zeros((3, 5), np.uint8))
    assert (picture.top, picture.left, picture.height, picture.width) == (0, 0, 3, 5)


def test_a_tile_counts_against_the_limit_however_small_the_image() -> None:
    """A TIFF of one pixel whose tile has 1.6 gigapixels is refused before it is inflated."""
    tags = [
        (256, 4, 1), (257, 4, 1), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1),
        (322, 4, 40_000), (323, 4, 40_000), (324, 4, 8), (325, 4, 16),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    tile = zlib.compress(bytes(8))[:16].ljust(16, b"\0")
    ifd = struct.pack("<H", len(tags)) + entries + bytes(4)
    bomb = struct.pack("<2sHI", b"II", 42, 24) + tile + ifd
    fault, text = fault_of(partial(decode, bomb))
    assert fault is ImageFault.TOO_MANY_PIXELS
    assert "a tile of the TIFF image" in text
    assert "found 40000 x 40000" in text


def test_a_large_run_length_bmp_is_refused() -> None:
    """Its decoder is Python; a small one is decoded, a large one would hold all other threads."""
    palette = bytes(range(256)) * 4

    def rle_bmp(runs: bytes) -> bytes:
        info = struct.pack("<IiiHHIIiiII", 40, 4, 1, 1, 8, 1, len(runs), 0, 0, 256, 0)
        start = 14 + len(info) + len(palette)
        return struct.pack("<2sIHHI", b"BM", start + len(runs), 0, 0, start) + info + palette + runs

    assert decode(rle_bmp(b"\x04\x07\x00\x01")).pixels.shape == (1, 4, 3)
    fault, text = fault_of(partial(decode, rle_bmp(bytes(2 << 20))))
    assert fault is ImageFault.TOO_MANY_BYTES
    assert "run-length coded BMP image: expected at most 1048576 bytes" in text
