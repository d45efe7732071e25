import base64
import io

import numpy as np
import pytest
from PIL import Image

from index.curation.page import THUMBNAIL_PX, figure, page, thumbnail
from models.html import Html, tag


def encoded(height, width, kind="PNG"):
    """A file of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def opened(uri):
    """The picture in a data URI."""
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


@pytest.mark.parametrize(
    ("image", "kind", "size"),
    [
        (encoded(40, 60), "PNG", (60, 40)),
        (np.zeros((28, 28, 1), np.uint8), "PNG", (28, 28)),
        (np.zeros((28, 30), np.uint8), "PNG", (30, 28)),
        (encoded(300, 600), "JPEG", (THUMBNAIL_PX, THUMBNAIL_PX // 2)),
        (encoded(900, 600, "JPEG"), "JPEG", None),
    ],
)
def test_small_pictures_stay_and_large_ones_are_reduced(image, kind, size):
    """Whole, in their proportions."""
    with opened(thumbnail(image)) as picture:
        assert picture.format == kind
        assert max(picture.size) <= THUMBNAIL_PX
        assert size is None or picture.size == size


def test_what_cannot_be_decoded_has_a_place_without_a_picture():
    """The page is made nevertheless."""
    assert thumbnail(b"junk") is None
    for image in (None, b"junk"):
        shown = figure(image, Html("x"), alt="x", class_="kept")
        assert shown == (
            '<figure class="kept"><div class="none">no picture</div>'
            "<figcaption>x</figcaption></figure>"
        )


def test_text_is_never_markup():
    """Neither in an element nor in an attribute nor in the title."""
    hostile = '<script>"&'
    assert tag("p", hostile, title=hostile) == (
        '<p title="&lt;script&gt;&quot;&amp;">&lt;script&gt;&quot;&amp;</p>'
    )
    assert "<script" not in page(hostile, tag("h1", hostile))
