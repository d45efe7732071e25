"""A page of pictures as one HTML file.

Rules:
    Pictures are decoded with the limits of every image, and reduced before they are kept.
"""

from __future__ import annotations

import base64
import io

from PIL import Image

from models.decode import decode
from models.errors import ImageError
from models.html import Html, document, tag
from models.image_source import ImageData

THUMBNAIL_PX = 112
JPEG_QUALITY = 85

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem;
  padding: 0 1rem; color: #222; background: #fcfcfa; }
section { border-top: 1px solid #ccc; padding: .6rem 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: .2rem 0 .6rem; }
h3 { font-size: .95rem; margin: .2rem 0 .5rem; }
.row { display: flex; flex-wrap: wrap; gap: .8rem; }
figure { margin: 0; width: 7.6rem; }
figure img, figure .none { width: 7rem; height: 7rem; object-fit: contain; background: #eee;
  border: 2px solid #bbb; display: block; image-rendering: auto; }
figure .none { display: grid; place-items: center; color: #777; font-size: .8rem; }
.kept img, .kept .none { border-color: #1a7f4b; }
.doubt img, .doubt .none { border-color: #a33; }
figcaption span { display: block; } .key { color: #666; }
figcaption { font-size: .78rem; overflow-wrap: anywhere; }
.warn { color: #a33; }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #191919; } section { border-color: #444; }
  figure img, figure .none { background: #2a2a2a; border-color: #555; }
  .kept img, .kept .none { border-color: #3fbf7f; } .warn { color: #f08080; }
  .doubt img, .doubt .none { border-color: #f08080; } .key { color: #aaa; }
}
"""


def page(title: str, *children: str) -> str:
    """Make a whole document of pictures and texts."""
    return document(title, *children, style=STYLE)


def figure(image: ImageData | None, caption: Html, *, alt: str, class_: str = "") -> Html:
    """Show one image, or that there is none."""
    source = None if image is None else thumbnail(image)
    shown = (
        tag("div", "no picture", class_="none")
        if source is None
        else tag("img", src=source, alt=alt)
    )
    return tag("figure", shown, tag("figcaption", caption), class_=class_)


def caption(first: str, label: str | None, key: str) -> Html:
    """Say below a picture what is found of it and what it is, and where it stands."""
    about = " · ".join(filter(None, (first, label)))
    return Html(tag("span", about) + tag("span", key, class_="key"))


def thumbnail(image: ImageData) -> str | None:
    """Give a small picture as a data URI; None for what cannot be decoded."""
    try:
        if isinstance(image, bytes):
            image = decode(image, shorter_side=THUMBNAIL_PX).pixels
    except ImageError:
        return None
    picture = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    is_small = max(picture.size) <= THUMBNAIL_PX
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    content = io.BytesIO()
    if is_small or picture.mode == "RGBA":
        picture.save(content, "PNG")
        kind = "png"
    else:
        picture.save(content, "JPEG", quality=JPEG_QUALITY)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
