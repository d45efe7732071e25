"""`python -m index.map C --out DIR`: the collection in two dimensions, with its pictures.

In the directory, which appears whole:
    index.html   the map to move about in, with thumbnails, search and a legend; one file.
    map.png      the same as a picture.
    map.csv      where each image is: key, id, label, x, y.
    map.json     by which encoder, method and settings, and how many neighbours it keeps.

Vectors are averaged over their neighbourhood first (`index.curation.smoothing`): two dimensions
have room for what images have in common, and for nothing else.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tyro.conf import Positional

from index.collection import Collection
from index.curation.map_page import make_legend, make_map_page
from index.curation.outlying import Surroundings, find_surroundings
from index.curation.projection import neighbours_kept, project
from index.curation.report import report_directory, require_place, write_csv
from index.curation.smoothing import neighbours_for, rounds_for, smooth
from index.curation.sprites import make_sprites
from models.bundle import Json
from models.command import run_command
from models.errors import UsageError

DOCUMENT_FILE, PAGE_FILE, PICTURE_FILE, PLACES_FILE = "map.json", "index.html", "map.png", "map.csv"

MAX_IMAGES = 200_000


@dataclass(frozen=True, kw_only=True)
class MapOptions:
    """Draw a collection in two dimensions."""

    collection: Positional[Path]
    """The collection's directory."""
    out: Path
    """Directory for the map; an earlier one is replaced."""
    method: Literal["pca", "pacmap"] = "pca"
    """pca: quick, the same every time; pacmap: tells groups apart, needs the extra map."""
    smoothing: int | None = None
    """How often vectors are averaged with their neighbours first: 8, or once where images are
    fewer than 1,000; 0 leaves them as they are."""
    filter: str | None = None
    """Which images to draw, such as "label = 'Coat'"; all where none is given."""
    images: int = 60_000
    """At most so many; of more, some are drawn by lot."""
    exact: bool = False
    """Find neighbours by comparing every pair instead of asking the index."""
    seed: int = 0
    """Of what is drawn."""
    json: bool = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        """Check what can be checked without opening anything."""
        if not 2 <= self.images <= MAX_IMAGES:
            raise UsageError("--images", expected=f"2 to {MAX_IMAGES}", found=str(self.images))
        if self.smoothing is not None and self.smoothing < 0:
            raise UsageError("--smoothing", expected="at least 0", found=str(self.smoothing))
        if self.seed < 0:
            raise UsageError("--seed", expected="at least 0", found=str(self.seed))
        require_place(self.out, DOCUMENT_FILE)


def main(options: MapOptions) -> None:
    """Draw the map.

    Raises:
        HoraceError: the collection cannot be read, an extra is missing, or the map cannot be
            written.
    """
    with Collection.open(options.collection) as collection:
        document = make_map(collection, options)
    if options.json:
        print(json.dumps(document, indent=2))
        return
    print(
        f"{document['images']} of {document['of']} images by {options.method}; of "
        f"{document['neighbours']} nearest among these, {document['neighbours_kept']:.1%} "
        "are among as many on the map"
    )
    print(f"map: {options.out / PAGE_FILE}, {options.out / PICTURE_FILE}")


def make_map(collection: Collection, options: MapOptions) -> dict[str, Json]:
    """Find the places, read the pictures, and write everything."""
    selection = None if options.filter is None else collection.select(options.filter)
    count = collection.count if selection is None else selection.count
    k = neighbours_for(count)
    rounds = rounds_for(count) if options.smoothing is None else options.smoothing
    around = find_surroundings(collection, k, exact=options.exact, selection=selection)
    vectors_ND = collection.vectors(around.ids)
    is_unit = collection.metric == "cosine"
    smooth_ND = smooth(vectors_ND, around.places_NK, rounds, unit=is_unit)
    drawn = _draw_lots(around, options)
    places_N2 = project(smooth_ND[drawn], options.method, seed=options.seed)
    kept_of = min(k, len(drawn) - 1)
    document: dict[str, Json] = {
        "collection": collection.name,
        "fingerprint": collection.fingerprint,
        "method": options.method,
        "smoothing": rounds,
        "filter": options.filter,
        "seed": options.seed,
        "images": len(drawn),
        "of": len(around.ids),
        "neighbours": kept_of,
        "neighbours_kept": neighbours_kept(
            places_N2, vectors_ND[drawn], kept_of, metric=collection.metric
        ),
    }
    rows = collection.rows(around.ids[drawn])
    sprites = make_sprites(rows)
    legend = make_legend([row.label for row in rows])
    about = f"{len(drawn):,} images by {options.method.upper().replace('PACMAP', 'PaCMAP')}"
    from index.curation.map_picture import draw_map  # matplotlib takes half a second to load

    with report_directory(options.out) as directory:
        (directory / DOCUMENT_FILE).write_text(json.dumps(document, indent=2) + "\n")
        write_csv(
            directory / PLACES_FILE,
            ["key", "id", "label", "x", "y"],
            (
                [row.key, row.id, row.label or "", f"{x:.6g}", f"{y:.6g}"]
                for row, (x, y) in zip(rows, places_N2, strict=True)
            ),
        )
        text = make_map_page(
            f"Map of {collection.name}",
            about,
            keys=[row.key for row in rows],
            places_N2=places_N2,
            legend=legend,
            sprites=sprites,
        )
        (directory / PAGE_FILE).write_text(text, encoding="utf-8")
        draw_map(
            directory / PICTURE_FILE, places_N2, legend, sprites,
            title=f"{collection.name}: {about}",
        )  # fmt: skip
    return document


def _draw_lots(around: Surroundings, options: MapOptions) -> NDArray[np.int64]:
    """Say which images are drawn, in the collection's order."""
    count = len(around.ids)
    if count <= options.images:
        return np.arange(count)
    lots = np.random.default_rng(options.seed).permutation(count)[: options.images]
    return np.sort(lots)


if __name__ == "__main__":
    sys.exit(run_command(MapOptions, main, prog="python -m index.map"))
