"""`index.search --grid`: queries and their neighbours as a picture.

Import this module where a picture is drawn: matplotlib takes half a second to load.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from index.curation.stored_images import StoredImages, load_images
from index.evaluation.plots import MAX_GRID_COLUMNS, MAX_GRID_ROWS, Tile, draw_grid
from index.found import Found
from index.interface import AnyCollection
from index.knn import COSINE
from models.image_source import ImageData

log = logging.getLogger("horace.index")


def draw(path: Path, collection: AnyCollection, found: Sequence[Found]) -> None:
    """Draw the grid of queries and neighbours as PNG.

    Raises:
        OSError: the file cannot be written.
    """
    if len(found) > MAX_GRID_ROWS:
        log.warning("%s shows the first %d of %d queries", path, MAX_GRID_ROWS, len(found))
    most = max((len(one.hits) for one in found), default=0)
    if most > MAX_GRID_COLUMNS:
        log.warning("%s shows the first %d of %d neighbours", path, MAX_GRID_COLUMNS, most)
    found = [replace(one, hits=one.hits[:MAX_GRID_COLUMNS]) for one in found[:MAX_GRID_ROWS]]
    stored = [row for one in found for row in (one.row, *(hit.row for hit in one.hits)) if row]
    images = load_images(stored, StoredImages())
    pictures = dict(zip((row.id for row in stored), images, strict=True))
    by = COSINE if collection.metric == COSINE else "distance"
    title = f"{collection.name}: nearest of {collection.count:,} images by {by}"
    draw_grid(path, lay_out(found, pictures), title=title)


def lay_out(
    found: Sequence[Found], pictures: Mapping[int, ImageData | None]
) -> list[tuple[Tile, list[Tile]]]:
    """Give each query and its neighbours a picture and a caption.

    Args:
        found: the queries.
        pictures: of the collection's images, by id; None for what cannot be read.
    """
    rows = []
    for one in found:
        query = Tile(
            image=one.image if one.row is None else pictures[one.row.id],
            caption=_caption(one.pictured or one.query, one.label),
        )
        tiles = [
            Tile(
                image=pictures[hit.row.id],
                caption=_caption(hit.row.key, f"{hit.score:.3f} {hit.row.label or ''}".rstrip()),
                is_match=None if one.label is None else hit.row.label == one.label,
            )
            for hit in one.hits
        ]
        rows.append((query, tiles))
    return rows


def _caption(key: str, above: str | None) -> str:
    """Put the file's name, which is the end of its key, below what is known of it."""
    name = key.rpartition("/")[2]
    return name if above is None else f"{above}\n{name}"
