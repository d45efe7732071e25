"""`python -m index.search`: the nearest images of a collection, for people and for scripts.

Queries are image files, or images of the collection by key or id; those are left out of
their own neighbours. The encoder is the one that built the collection, found where it was
then; another one is refused.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from index.collection import Collection, Neighbours, Row
from index.embed import embed
from index.errors import CollectionError
from models.command import run_command
from models.encoder import Encoder, open_encoder
from models.errors import BundleError, ImageError, SourceError, UsageError
from models.image_source import read_image_file
from models.images import ImageData, ImageSource, open_source

EMBED_BATCH = 64
"""Query images that are encoded at once."""

log = logging.getLogger("horace.index")


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Find the nearest images of a collection."""

    collection: Positional[Path]
    """The collection's directory."""
    images: Positional[tuple[str, ...]] = ()
    """Image files to search with."""
    key: tuple[str, ...] = ()
    """Keys of images of the collection to search with."""
    id: tuple[int, ...] = ()
    """Ids of images of the collection to search with."""
    k: int = 10
    """Neighbours a query."""
    encoder: str | None = None
    """The encoder: a bundle or URI; by default the one that built the collection."""
    exact: bool = False
    """Search every vector instead of the index."""
    json: bool = False
    """Print the result as JSON."""
    grid: Path | None = None
    """Draw queries and neighbours into this PNG file."""

    def __post_init__(self) -> None:
        """Check what can be checked without opening anything."""
        if self.k < 1:
            raise UsageError("--k", expected="at least 1", found=str(self.k))
        if not (self.images or self.key or self.id):
            raise UsageError("queries", expected="image files, --key or --id", found="none of them")


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One neighbour.

    Attributes:
        score: its cosine.
        row: which image it is.
    """

    score: float
    row: Row


@dataclass(frozen=True, kw_only=True)
class Found:
    """One query and its neighbours, best first.

    Attributes:
        query: the file's path or the image's key.
        label: its class, for an image of the collection that has one.
        image: its content; None for an image of the collection.
        row: which image of the collection it is, if it is one.
        hits: the neighbours.
    """

    query: str
    label: str | None
    image: ImageData | None
    row: Row | None
    hits: list[Hit]


def main(options: SearchOptions) -> None:
    """Search, and show what was found as table or JSON, and as a picture on request."""
    with Collection.open(options.collection) as collection:
        found = [*_search_files(collection, options), *_search_stored(collection, options)]
        if options.grid is not None:
            _draw(options.grid, collection, found)
        print(_as_json(collection, options, found) if options.json else _as_text(found))
        if options.grid is not None and not options.json:
            print(f"\npicture: {options.grid}")


def open_collection_encoder(collection: Collection, encoder: str | None) -> Encoder:
    """Open the named encoder, or the one that built the collection; it must be the same.

    Raises:
        BundleError: the recorded encoder is no longer where it was.
        FingerprintMismatchError: it is another encoder; names both.
    """
    uri = encoder or collection.manifest.encoder
    if encoder is None and "://" not in uri and not os.path.exists(uri):
        raise BundleError(
            f"encoder of collection {collection.name}",
            expected=f"the bundle at {uri}, where it was when the collection was built",
            found="nothing",
            mend="say where it is now with --encoder",
        )
    opened = open_encoder(uri)
    try:
        collection.require(opened.fingerprint)
    except Exception:
        opened.close()
        raise
    return opened


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


def _search_files(collection: Collection, options: SearchOptions) -> list[Found]:
    """Embed the query files and search with them."""
    if not options.images:
        return []
    with closing(open_collection_encoder(collection, options.encoder)) as encoder:
        data = [read_image_file(Path(name), name) for name in options.images]
        pixels = [
            _preprocess(encoder, image, name)
            for name, image in zip(options.images, data, strict=True)
        ]
        batches = [pixels[n : n + EMBED_BATCH] for n in range(0, len(pixels), EMBED_BATCH)]
        queries_QD = np.concatenate([embed(encoder, np.stack(batch)) for batch in batches])
        fingerprint = encoder.fingerprint
    neighbours = collection.search(
        queries_QD, options.k, fingerprint=fingerprint, exact=options.exact
    )
    hits = _hits(collection, neighbours)
    return [
        Found(query=name, label=None, image=image, row=None, hits=hits_of_one)
        for name, image, hits_of_one in zip(options.images, data, hits, strict=True)
    ]


def _search_stored(collection: Collection, options: SearchOptions) -> list[Found]:
    """Search with images of the collection."""
    ids = [*(collection.find_key(key) for key in options.key), *options.id]
    if not ids:
        return []
    rows = collection.rows(ids)
    hits = _hits(collection, collection.search_ids(ids, options.k, exact=options.exact))
    return [
        Found(query=row.key, label=row.label, image=None, row=row, hits=hits_of_one)
        for row, hits_of_one in zip(rows, hits, strict=True)
    ]


def _preprocess(encoder: Encoder, image: bytes, name: str) -> np.ndarray:
    """Preprocess a query, and name it where it cannot be used."""
    try:
        return encoder.preprocess(image)
    except ImageError as error:
        raise ImageError(
            error.fault, name, expected=error.expected, found=error.found, mend=error.mend
        ) from error


def _hits(collection: Collection, neighbours: Neighbours) -> list[list[Hit]]:
    """Look up what was found; padding is left out."""
    found = []
    for ids, scores in zip(neighbours.ids, neighbours.scores, strict=True):
        kept = ids >= 0
        rows = collection.rows(ids[kept])
        found.append(
            [Hit(score=float(s), row=row) for s, row in zip(scores[kept], rows, strict=True)]
        )
    return found


def _as_text(found: Sequence[Found]) -> str:
    """Lay out a table for each query."""
    lines = []
    for one in found:
        lines.append(f"{one.query}" + (f"  ({one.label})" if one.label is not None else ""))
        labels = [hit.row.label or "-" for hit in one.hits]
        width = max(5, *(len(label) for label in labels)) if labels else 5
        lines.append(f"  {'score':>7}  {'label':<{width}}  key")
        for hit, label in zip(one.hits, labels, strict=True):
            lines.append(f"  {hit.score:7.4f}  {label:<{width}}  {hit.row.key}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _as_json(collection: Collection, options: SearchOptions, found: Sequence[Found]) -> str:
    """Lay out everything that was found for a machine."""
    document = {
        "collection": collection.name,
        "fingerprint": collection.fingerprint,
        "index": collection.factory,
        "exact": options.exact or collection.factory == "Flat",
        "k": options.k,
        "queries": [
            {
                "query": one.query,
                "label": one.label,
                "hits": [{"score": hit.score, **dataclasses.asdict(hit.row)} for hit in one.hits],
            }
            for one in found
        ],
    }
    return json.dumps(document, indent=2)


def _draw(path: Path, collection: Collection, found: Sequence[Found]) -> None:
    """Draw the grid of queries and neighbours."""
    from index.plots import MAX_GRID_ROWS, Tile, draw_grid  # matplotlib: only for a picture

    if len(found) > MAX_GRID_ROWS:
        log.warning("%s shows the first %d of %d queries", path, MAX_GRID_ROWS, len(found))
    found = found[:MAX_GRID_ROWS]
    stored = [row for one in found for row in (one.row, *(hit.row for hit in one.hits)) if row]
    pictures = dict(zip((row.id for row in stored), load_images(stored), strict=True))
    rows = []
    for one in found:
        image = one.image if one.row is None else pictures[one.row.id]
        query = Tile(image=image, caption=one.label or Path(one.query).name)
        tiles = [
            Tile(
                image=pictures[hit.row.id],
                caption=f"{hit.score:.3f}\n{hit.row.label or hit.row.key}",
                is_match=None if one.label is None else hit.row.label == one.label,
            )
            for hit in one.hits
        ]
        rows.append((query, tiles))
    title = f"{collection.name}: nearest of {collection.count:,} images by cosine"
    try:
        draw_grid(path, rows, title=title)
    except OSError as error:
        raise CollectionError(
            f"--grid {path}",
            expected="a file that can be written",
            found=os.strerror(error.errno) if error.errno else str(error),
            mend="choose another name",
        ) from error


if __name__ == "__main__":
    sys.exit(run_command(SearchOptions, main, prog="python -m index.search"))
