"""The HTML of a report: its cards and tables, pictures inside it, and its look.

Rules:
    Diagrams take their colours from the page, so that they are right in light and dark.
    Whatever shows something has words for those who do not see it.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from models.html import Html, document, tag
from train.plot import PALETTE

SMALL_SIDE_PX = 96
"""Up to here a picture is shown by its own pixels, as PNG; larger ones are reduced."""

THUMBNAIL_PX = 160
JPEG_QUALITY = 85


def table(rows: Iterable[Iterable[str]], *, head: Iterable[str] = (), caption: str = "") -> Html:
    """Lay out rows of cells; the first cell of each is its heading."""
    parts = []
    if caption:
        parts.append(tag("caption", caption))
    if names := [tag("th", name, scope="col") for name in head]:
        parts.append(tag("thead", tag("tr", *names)))
    lines = []
    for first, *rest in rows:
        lines.append(tag("tr", tag("th", first, scope="row"), *(tag("td", x) for x in rest)))
    return tag("div", tag("table", *parts, tag("tbody", *lines)), class_="scroll")


def card(title: str, picture: Html, note: str = "") -> Html:
    """Frame a diagram with its title above and how to read it below."""
    words = [tag("figcaption", tag("b", title), tag("span", note))] if title or note else []
    return tag("figure", *words, picture, class_="card")


def figure_svg(figure: Figure, alt: str) -> Html:
    """Give a matplotlib figure as an element that follows the page's colours and fonts.

    Args:
        figure: drawn in the colours of `train.plot.PALETTE`.
        alt: what it shows, in words; also decides the names inside, which must differ.
    """
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    opening, _, inner = text.partition(">")
    view_box = re.search(r'viewBox="([^"]*)"', opening)
    assert view_box is not None
    referenced = set(re.findall(r'(?:href="|url\()#([^")]+)', inner))
    inner = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in referenced else "", inner)
    for name, colour in PALETTE.items():
        inner = inner.replace(colour, f"var(--{name})")
    start = f'<svg viewBox="{view_box[1]}" role="img" aria-label="{html.escape(alt)}">'
    return Html(start + inner.strip())


def image_element(pixels_HWC: NDArray[np.uint8], alt: str) -> Html:
    """Give a small picture of an image: by its own pixels where they are few."""
    channels = pixels_HWC.shape[2]
    pixels = pixels_HWC[..., 0] if channels < 3 else np.ascontiguousarray(pixels_HWC[..., :3])
    picture = Image.fromarray(pixels)
    is_small = max(picture.size) <= SMALL_SIDE_PX
    buffer = io.BytesIO()
    if is_small:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    uri = data_uri(buffer.getvalue(), "png" if is_small else "jpeg")
    return tag("img", src=uri, alt=alt, class_="pixels" if is_small else "photo")


def data_uri(content: bytes, kind: str) -> str:
    """Give an encoded picture as an address that contains it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def page(title: str, *body: Html) -> str:
    """Give the whole document."""
    return document(title, tag("main", *body), style=STYLE)


STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ground: #f6f8fa; --ink: #1f2328; --muted: #59636e; --grid: #d8dee4;
  --blue: #0969da; --orange: #bc4c00; --green: #1a7f37; --red: #cf222e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161b22; --ground: #0d1117; --ink: #e6edf3; --muted: #9198a1; --grid: #30363d;
    --blue: #58a6ff; --orange: #f0883e; --green: #3fb950; --red: #ff7b72;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 78rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 0 0 .35rem; }
section { margin-top: 3rem; }
p { margin: 0 0 1rem; max-width: 46rem; color: var(--muted); }
header p { margin-bottom: .4rem; overflow-wrap: anywhere; max-width: none; }
.pill { display: inline-block; padding: .1rem .7rem; border-radius: 1rem; font-size: .85rem;
  font-weight: 600; color: var(--paper); background: var(--muted); margin-bottom: .7rem; }
.pill.finished { background: var(--green); } .pill.running { background: var(--blue); }
.pill.stopped { background: var(--orange); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0 0; padding: 0; }
.tile { background: var(--paper); border: 1px solid var(--grid); border-radius: .6rem;
  padding: .8rem 1rem; }
.tile dt { font-size: .85rem; color: var(--muted); }
.tile dd { margin: 0; }
.tile .value { font-size: 1.55rem; font-weight: 650; line-height: 1.3; }
.tile .more { font-size: .85rem; color: var(--muted); line-height: 1.4; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr));
  gap: .75rem; }
.card { margin: 0; background: var(--paper); border: 1px solid var(--grid);
  border-radius: .6rem; padding: .8rem .9rem .6rem; min-width: 0; }
.card figcaption { font-size: .85rem; line-height: 1.4; margin-bottom: .4rem; }
.card figcaption b { display: block; font-size: 1rem; }
.card figcaption span { color: var(--muted); }
.card svg { display: block; width: 100%; height: auto; }
.card img { display: block; width: 100%; min-width: 36rem; height: auto; border-radius: .3rem; }
svg text { font-family: inherit !important; }
svg image, img.pixels { image-rendering: pixelated; }
.warnings { margin: 0; padding: 0; list-style: none; max-width: 60rem; }
.warnings li { background: var(--paper); border: 1px solid var(--grid);
  border-left: .3rem solid var(--orange); border-radius: .4rem; padding: .6rem .9rem;
  margin-bottom: .5rem; }
.search { display: flex; gap: .6rem; overflow-x: auto; padding: .5rem 0 .7rem;
  border-bottom: 1px solid var(--grid); }
.search figure { margin: 0; flex: 1 0 5.6rem; max-width: 7.5rem; font-size: .75rem;
  line-height: 1.3; }
.search figure:first-child { margin-right: 1.1rem; }
.search img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover;
  border: 3px solid var(--grid); border-radius: .35rem; background: #000; }
.search .query img { border-color: var(--ink); }
.search .same img { border-color: var(--green); } .search .other img { border-color: var(--red); }
.search figcaption { margin-top: .2rem; overflow-wrap: anywhere; }
.search small { display: block; color: var(--muted); font-size: .72rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
caption { text-align: left; font-weight: 650; padding: .2rem 0 .4rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--grid);
  vertical-align: top; overflow-wrap: anywhere; }
tbody th { font-weight: 400; color: var(--muted); }
thead th { color: var(--muted); font-weight: 600; }
td { font-variant-numeric: tabular-nums; }
.columns { columns: 21rem; column-gap: 2.5rem; }
.columns > * { break-inside: avoid; margin-bottom: 1.5rem; }
.columns tbody th { width: 54%; }
pre { background: var(--paper); border: 1px solid var(--grid); border-radius: .5rem;
  padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; margin: 0 0 .75rem; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
details { margin-top: .75rem; } summary { cursor: pointer; color: var(--blue); }
@media print { body { background: var(--paper); } .card, .tile { break-inside: avoid; } }
"""
