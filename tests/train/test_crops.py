"""Crops cut while decoding: the right place, few pixels decoded, any image that is served."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models.errors import ImageError
from models.jpeg import decode_jpeg
from models.picture import DEFAULT_LIMITS, Pixels
from models.preprocess import PreprocessSpec, preprocess
from train.views import crops
from train.views.crops import Box, CutCrops, cut_crops


def scene(height: int, width: int) -> Pixels:
    """Paint a smooth picture in which every place has a colour of its own."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * y / height, 255 * x / width
    blue = 127 + 100 * np.sin(x / 40) * np.cos(y / 30)
    return np.dstack([red, green, blue]).astype(np.uint8)


def jpeg(pixels: Pixels, orientation: int = 1) -> bytes:
    """Encode a JPEG."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


def cut(data: bytes | Pixels, boxes: Sequence[Box], side: int = 32, channels: int = 3) -> Pixels:
    """Cut boxes out, as int."""
    views = cut_crops(data, lambda *_: boxes, height=side, width=side, channels=channels)
    return np.stack(views).astype(int)


def test_the_whole_image_is_what_preprocessing_gives() -> None:
    """A crop of all of a square photograph is the picture that is served, to rounding."""
    data = jpeg(scene(100, 100))
    spec = PreprocessSpec(height=64, width=64, channels=3, resize=64)
    served = preprocess(data, spec).astype(int)
    assert np.abs(cut(data, [Box(0, 0, 100, 100)], 64)[0] - served).max() <= 1


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(90, 700),
    width=st.integers(90, 700),
    orientation=st.integers(1, 8),
    share=st.tuples(*[st.floats(0.3, 1)] * 2),
    place=st.tuples(*[st.floats(0, 1)] * 2),
)
def test_a_crop_lies_where_it_was_drawn(
    height: int,
    width: int,
    orientation: int,
    share: tuple[float, float],
    place: tuple[float, float],
) -> None:
    """At every scale of decoding, whichever way the image is stored, but for half a pixel."""
    data = jpeg(scene(height, width), orientation)
    upright = preprocess_whole(data)
    h, w = upright.shape[:2]
    box_h, box_w = share[0] * h, share[1] * w
    box = Box(place[0] * (h - box_h), place[1] * (w - box_w), box_h, box_w)
    corners = (box.left, box.top, box.left + box_w, box.top + box_h)
    wanted = Image.fromarray(upright).resize((64, 64), Image.Resampling.BILINEAR, box=corners)
    found = cut(data, [box], 64)[0]
    assert np.abs(found - np.asarray(wanted).astype(int)).mean() < 3


def preprocess_whole(data: bytes) -> Pixels:
    """Decode upright, at full scale."""
    return decode_jpeg(data, DEFAULT_LIMITS, grey=False, choose_divisor=lambda *_: 1).pixels


@pytest.mark.parametrize(
    ("box", "pixels"),
    [
        (Box(0, 0, 1000, 1500), 125 * 188),  # all of it to 100: an eighth is enough
        (Box(0, 0, 790, 1500), 250 * 375),  # an eighth of 790 is less than 100
        (Box(10, 10, 200, 200), 500 * 750),
        (Box(10, 10, 199, 400), 1000 * 1500),
        (Box(10, 10, 50, 50), 1000 * 1500),
    ],
)
def test_no_more_is_decoded_than_the_crop_needs(
    box: Box, pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest scale at which the crop still has the pixels of the view."""
    decoded = []

    def decode_and_look(*args: object, **options: object) -> object:
        decoded.append(decode(*args, **options))
        return decoded[-1]

    decode = crops.decode
    monkeypatch.setattr(crops, "decode", decode_and_look)
    cut(jpeg(scene(1000, 1500)), [box], 100)
    assert decoded[0].pixels.size == 3 * pixels


def test_one_decoding_serves_the_smallest_of_all_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The boxes are drawn once, for the upright size."""
    sizes = []

    def draw_boxes(height: int, width: int) -> list[Box]:
        sizes.append((height, width))
        return [Box(0, 0, height, width), Box(0, 0, 60, 60)]

    data = jpeg(scene(300, 400), orientation=6)
    whole, small = cut_crops(data, draw_boxes, height=50, width=50, channels=3)
    assert sizes == [(400, 300)]
    alone = cut(data, [Box(0, 0, 60, 60)], 50)[0]
    assert np.array_equal(small, alone)
    assert np.abs(cut(data, [Box(0, 0, 400, 300)], 50)[0] - whole).mean() < 2


@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_image_is_cut(channels: int) -> None:
    """PNG, CMYK and 16-bit files, and arrays; grey or in colour as the view is."""
    pixels = scene(40, 60)
    png, cmyk, deep = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    Image.fromarray(pixels).convert("CMYK").save(cmyk, "JPEG", quality=95)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(deep, "PNG")
    box = [Box(5, 5, 30, 30)]
    wanted = cut(pixels, box, channels=channels)
    assert wanted.shape == (1, 32, 32, channels)
    assert np.array_equal(cut(png.getvalue(), box, channels=channels), wanted)
    assert np.abs(cut(cmyk.getvalue(), box, channels=channels) - wanted).mean() < 12
    red = cut(pixels[..., 0], box, channels=channels)
    assert np.array_equal(cut(deep.getvalue(), box, channels=channels), red)


def test_views_are_two_and_a_function_of_the_generator() -> None:
    """Equal seeds give equal crops; the two differ, and each keeps to its own area."""
    pixels = scene(80, 80)
    make = CutCrops(((0.9, 1.0), (0.05, 0.06)), height=24, width=24, channels=3)
    one, again = (make(pixels, np.random.default_rng(5)) for _ in range(2))
    other = make(pixels, np.random.default_rng(6))
    assert [view.shape for view in one] == [(24, 24, 3)] * 2
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one[0], other[0])
    large, small = (view[..., 0].max() - int(view[..., 0].min()) for view in one)
    assert large > 150 > 90 > small


def test_a_damaged_image_is_an_error_of_its_own() -> None:
    """As it is where images are served."""
    with pytest.raises(ImageError, match="JPEG image: expected a whole one"):
        cut(jpeg(scene(100, 100))[:900], [Box(0, 0, 10, 10)])
