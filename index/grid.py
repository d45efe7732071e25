"""`index.search --grid`: queries and their neighbours as a picture.

Import this module where a picture is drawn: matplotlib takes half a second to load.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from index.evaluation.plots import MAX_GRID_ROWS, Tile, draw_grid
from index.found import Found
from index.interface import AnyCollection
from index.storage.rows import Row
from models.errors import ImageError, SourceError
from models.images import ImageData, ImageSource, open_source

MAX_GRID_COLUMNS = 24
"""Neighbours of a query: within a range there may be thousands."""

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
    pictures = dict(zip((row.id for row in stored), load_images(stored), strict=True))
    title = f"{collection.name}: nearest of {collection.count:,} images by cosine"
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
            caption=_caption(one.query, one.label),
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


def load_images(rows: Sequence[Row]) -> list[ImageData | None]:
    """Read images of a collection from their sources; None for what cannot be read now."""
    sources: dict[str, ImageSource | None] = {}
    images: list[ImageData | None] = []
    for row in rows:
        if row.source not in sources:
            try:
                sources[row.source] = open_source(row.source)
            except SourceError as error:
                log.warning("%s", error)
                sources[row.source] = None
        source = sources[row.source]
        try:
            images.append(None if source is None else source.load(row.key))
        except (ImageError, SourceError) as error:
            log.warning("%s", error)
            images.append(None)
    return images
