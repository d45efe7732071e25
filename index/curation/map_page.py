"""The map as one HTML file: points and thumbnails on a canvas, with search and a legend.

Rules:
    The file loads nothing from anywhere, and its policy forbids it: the only script that runs is
    the one whose hash stands in its head.
    Keys and labels are JSON in an element that is not run, without a `<`, and become text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.curation.sprites import Sprites, as_jpeg
from models.bundle import Json
from models.html import Html, document, tag

PALETTE = (
    "#4e79a7", "#f28e2b", "#e15759", "#3d9e97", "#59a14f", "#c9a50a", "#b07aa1", "#ff7f9b",
    "#9c755f", "#8a8a8a", "#1f77d0", "#a05d00", "#8b1a4f", "#17becf", "#2d7a2d", "#7b61d1",
)  # fmt: skip
MAX_LABELS = 40
"""In the legend; the images of rarer labels are `others`."""

NO_LABEL, OTHERS = "no label", "others"
GREY = "#8c8c8c"

FOLDER = Path(__file__).parent

KEYS = (
    ("drag, wheel, arrows, + and -", "move and zoom"),
    ("0", "everything"),
    ("p", "pictures or points"),
    ("Enter in the search box, n", "the next that was found"),
    ("Space", "what is in the middle"),
    ("Shift and click on a label", "this label alone"),
)


@dataclass(frozen=True, kw_only=True)
class Legend:
    """Labels as they are coloured.

    Attributes:
        names: the most frequent first, then what is left.
        colours: theirs.
        counts: images of each.
        numbers_N: (N,) which is each image's.
    """

    names: Sequence[str]
    colours: Sequence[str]
    counts: Sequence[int]
    numbers_N: NDArray[np.int64]


def make_legend(labels: Sequence[str | None]) -> Legend:
    """Give the labels colours: those that many have first, so that they differ."""
    counts = Counter(label for label in labels if label is not None)
    names = [name for name, _ in counts.most_common(MAX_LABELS)]
    names = sorted(names) if len(names) == len(counts) else names
    colours = [PALETTE[n % len(PALETTE)] for n in range(len(names))]
    numbers = {name: number for number, name in enumerate(names)}
    rest = [NO_LABEL] if None in labels else []
    rest += [OTHERS] if len(counts) > len(names) else []
    others = {name: len(names) + n for n, name in enumerate(rest)}
    numbers_N = np.array(
        [
            others[NO_LABEL] if label is None else numbers.get(label, others.get(OTHERS, 0))
            for label in labels
        ],
        np.int64,
    )
    sizes = np.bincount(numbers_N, minlength=len(names) + len(rest))
    return Legend(
        names=[*names, *rest],
        colours=[*colours, *[GREY] * len(rest)],
        counts=sizes.tolist(),
        numbers_N=numbers_N,
    )


def make_map_page(
    title: str,
    about: str,
    *,
    keys: Sequence[str],
    places_N2: NDArray[np.float32],
    legend: Legend,
    sprites: Sprites,
) -> str:
    """Lay out the page.

    Args:
        title: its heading.
        about: a line beside it.
        keys: N keys.
        places_N2: (N, 2) float32, x to the right and y up.
        legend: labels and their colours.
        sprites: the thumbnails.
    """
    grid_N2 = to_grid(places_N2)
    labels = zip(legend.names, legend.colours, legend.counts, strict=True)
    data: dict[str, Json] = {
        "keys": list(keys),
        "labels": [{"name": n, "colour": c, "count": count} for n, c, count in labels],
        "x": _pack(grid_N2[:, 0], "<u2"),
        "y": _pack(grid_N2[:, 1], "<u2"),
        "label": _pack(legend.numbers_N, "<u2"),
        "tile": _pack(sprites.tiles_N, "<i4"),
        "px": sprites.px,
        "columns": sprites.columns,
    }
    script = (FOLDER / "map.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sheets = [
        _data(f"sheet-{number}", base64.b64encode(as_jpeg(sheet)).decode(), "text/plain")
        for number, sheet in enumerate(sprites.sheets)
    ]
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return document(
        title,
        *_body(title, about),
        _data("data", text, "application/json"),
        *sheets,
        tag("script", Html(script)),
        style=(FOLDER / "map.css").read_text(encoding="utf-8"),
        script_hash=f"sha256-{digest}",
    )


def to_grid(places_N2: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Put places onto a square grid of 65,536, in proportion, with y down as on a screen."""
    low_2, high_2 = places_N2.min(axis=0), places_N2.max(axis=0)
    extent = float((high_2 - low_2).max()) or 1.0
    unit_N2 = 0.5 + (places_N2 - (low_2 + high_2) / 2) / extent
    unit_N2[:, 1] = 1 - unit_N2[:, 1]
    return np.asarray(np.clip(np.round(unit_N2 * 65535), 0, 65535), np.uint16)


def _pack(values_N: NDArray[np.generic], dtype: str) -> str:
    """Give numbers as base64."""
    return base64.b64encode(values_N.astype(dtype).tobytes()).decode()


def _data(name: str, text: str, kind: str) -> Html:
    """Give an element of data that is not run; the text has no `<`."""
    assert "<" not in text
    return tag("script", Html(text), id=name, type=kind)


def _body(title: str, about: str) -> list[Html]:
    """Lay out what the script fills."""
    header = tag(
        "header",
        tag("h1", title),
        tag("p", about),
        tag(
            "div",
            tag("span", "", id="status", role="status"),
            tag(
                "input", id="search", type="search", placeholder="key or label",
                aria_label="Find images by key or label",
            ),
            tag("button", "pictures", id="pictures", aria_pressed="false"),
            tag("button", "everything", id="fit"),
            class_="tools",
        ),
    )  # fmt: skip
    canvas = tag(
        "canvas", "A map of images; this needs a browser that runs scripts.",
        id="map", tabindex="0", role="application",
        aria_label="Map of images: arrows move, plus and minus zoom, Space names the image in the "
        "middle",
    )  # fmt: skip
    details = tag(
        "div",
        tag("canvas", id="picture", width="320", height="320", role="img", aria_labelledby="key"),
        tag("div", "no picture", id="none"),
        tag("div", id="key"),
        tag("div", tag("span", id="swatch", class_="swatch"), " ", tag("span", id="label")),
        id="details", aria_live="polite", hidden="",
    )  # fmt: skip
    help_rows = [tag("div", tag("b", keys), f": {does}") for keys, does in KEYS]
    aside = tag(
        "aside",
        details,
        tag("div", id="legend", role="group", aria_label="Labels"),
        tag("details", tag("summary", "keys"), *help_rows),
    )
    return [header, tag("main", canvas), aside]
