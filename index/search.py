"""`python -m index.search`: the nearest images of a collection, for people and for scripts.

Queries are image files, or images of the collection by key or id; those are left out of
their own neighbours. With `--together` or `--not` all of them are one query: more like these,
less like those. `--filter` says which images may be found (`index.filters`), `--min-score` asks
for all that are near enough instead of the k nearest.

The encoder is the one that built the collection, found where it was then; another one is
refused.

A query that cannot be used has a line of its own and status 1 at the end; the others are
answered.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from tyro.conf import Positional, arg

from index.combine import (
    NEGATIVE_WEIGHT,
    Combination,
    Example,
    check_negative_weight,
    pad_ids,
    query_vector,
)
from index.embed import open_collection_encoder
from index.errors import CollectionError, QueryError, UnknownIdError, mend_of
from index.found import Found, as_text, look_up_hits
from index.interface import AnyCollection, open_collection
from index.knn import COSINE
from index.neighbours import Neighbours
from index.ranking import Ranking, search_range
from models.command import run_command
from models.encoder import Encoder
from models.errors import ImageError, UsageError, reason_of
from models.image_source import read_image_file
from models.vectors import finish_vectors

EMBED_BATCH = 64
"""Query images that are encoded at once."""

DEFAULT_K = 10
RANGE_LIMIT = 10_000
"""Neighbours within a range that are shown where `--k` does not say how many."""

SHOWN_LABELS = 10
"""Of a collection, where a filter about them finds nothing."""

MOST_LABELLED = 100_000
"""Images of which the labels are read for that."""

log = logging.getLogger("horace.index")


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Find the nearest images of a collection."""

    collection: Positional[str]
    """The collection's directory, or milvus:URI#NAME."""
    images: Positional[tuple[str, ...]] = ()
    """Image files to search with."""
    key: tuple[str, ...] = ()
    """Keys of images of the collection to search with."""
    id: tuple[int, ...] = ()
    """Ids of images of the collection to search with."""
    k: int | None = None
    """Neighbours a query at most: 10 by default, or 10,000 with --min-score."""
    filter: str | None = None
    """Which images may be found, such as "label in ('Coat', 'Shirt') and not key contains 'b'"."""
    together: bool = False
    """Make one query of all that is searched with: their mean."""
    negatives: Annotated[tuple[str, ...], arg(name="not")] = ()
    """Image files that the answer is to be unlike; implies --together."""
    not_key: tuple[str, ...] = ()
    """Keys of images of the collection that the answer is to be unlike; implies --together."""
    not_weight: float = NEGATIVE_WEIGHT
    """How much the negatives weigh against the positives, 0 to 10."""
    encoder: str | None = None
    """The encoder: a bundle or URI; by default the one that built the collection."""
    min_score: float | None = None
    """The least cosine, -1 to 1: all images that are so near, and not the k nearest."""
    diversity: float = 0.0
    """0 for the nearest, up to 1 for what is also unlike one another."""
    effort: int | None = None
    """Candidates that the index weighs for a query: more find more, and take longer. With
    --min-score they are at least four for each that is looked for."""
    exact: bool = False
    """Search every vector instead of the index."""
    json: bool = False
    """Print the result as JSON."""
    grid: Path | None = None
    """Draw queries and neighbours into this PNG file."""

    def __post_init__(self) -> None:
        """Check what can be checked without opening anything."""
        for name, value in (("--k", self.k), ("--effort", self.effort)):
            if value is not None and value < 1:
                raise UsageError(name, expected="at least 1", found=str(value))
        if self.exact and self.effort is not None:
            raise UsageError("--effort", expected="an index to search", found="--exact")
        if not (self.images or self.key or self.id):
            raise UsageError("queries", expected="image files, --key or --id", found="none of them")
        if not all(0 <= id_ < 1 << 63 for id_ in self.id):
            raise UsageError("--id", expected="numbers below 2^63", found=str(self.id))
        check_negative_weight(self.not_weight)
        self.ranking  # noqa: B018  # checks itself
        if self.grid is not None and self.grid.suffix.lower() != ".png":
            raise UsageError("--grid", expected="a name that ends in .png", found=str(self.grid))

    @property
    def ranking(self) -> Ranking:
        """What is made of the nearest."""
        return Ranking(min_score=self.min_score, diversity=self.diversity)

    @property
    def limit(self) -> int:
        """How many neighbours a query has at most."""
        return self.k or (RANGE_LIMIT if self.is_range else DEFAULT_K)

    @property
    def is_range(self) -> bool:
        """Whether all that is near enough is looked for; diversity picks k of it."""
        return self.min_score is not None and not self.diversity

    @property
    def is_combined(self) -> bool:
        """Whether all that is searched with is one query."""
        return self.together or bool(self.negatives or self.not_key)


def main(options: SearchOptions) -> None:
    """Search, and show what was found as table or JSON, and as a picture on request.

    Raises:
        HoraceError: nothing can be searched, or, after the rest is shown, a query was bad.
    """
    if options.grid is not None and not options.grid.parent.is_dir():
        raise _unwritable(options.grid, f"no directory {options.grid.parent}", "make it")
    with closing(open_collection(options.collection)) as collection:
        if options.filter is not None:
            collection.select(options.filter)  # a bad one is said before anything is opened
        if options.is_combined:
            found = [_search_combined(collection, options)]
        else:
            found = [*_search_files(collection, options), *_search_stored(collection, options)]
        errors = [one.error for one in found if one.error is not None]
        is_any_good = len(errors) < len(found)
        if options.json:
            print(_as_json(collection, options, found))
        elif is_any_good:
            is_any_empty = any(not one.hits and one.error is None for one in found)
            nothing = _why_nothing(collection, options) if is_any_empty else ""
            print(as_text(found, nothing=nothing))
        if options.grid is not None and is_any_good:
            _draw(options.grid, collection, found)
            if not options.json:
                print(f"\npicture: {options.grid}")
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise QueryError(f"{len(errors)} bad queries of {len(found)}, the first {errors[0]}")


def _search(
    collection: AnyCollection,
    options: SearchOptions,
    queries_QD: NDArray[np.float32],
    without_QW: NDArray[np.int64] | None = None,
) -> Neighbours:
    """Search as the options say."""
    effort, limit = options.effort, options.limit
    if options.is_range and options.min_score is not None:
        found = search_range(
            collection, queries_QD, options.min_score, fingerprint=collection.fingerprint,
            limit=limit, exact=options.exact, effort=effort, filter=options.filter,
            without_QW=without_QW,
        )  # fmt: skip
        if options.k is None and found.ids.shape[1] == limit:
            log.warning("the nearest %d are given, and there may be more: see --k", limit)
        return found
    k = options.ranking.pool(limit)
    parameters = None if effort is None else collection.effort_parameters(effort, k)
    found = collection.search(
        queries_QD, k, fingerprint=collection.fingerprint,
        exact=options.exact, parameters=parameters, filter=options.filter, without_QW=without_QW,
    )  # fmt: skip
    return options.ranking.rank(collection, found, limit)


def _search_files(collection: AnyCollection, options: SearchOptions) -> list[Found]:
    """Embed the query files and search with them."""
    if not options.images:
        return []
    found, vectors_QD = _embed_files(collection, options, options.images)
    if not len(vectors_QD):
        return found
    neighbours = _search(collection, options, vectors_QD)
    return _with_hits(collection, found, neighbours)


def _embed_files(
    collection: AnyCollection, options: SearchOptions, names: Sequence[str]
) -> tuple[list[Found], NDArray[np.float32]]:
    """Read and embed image files; a row for each that can be used.

    Cosines are of unit vectors; by distances the encoder's own output is compared.
    """
    with closing(open_collection_encoder(collection, options.encoder)) as encoder:
        queries = [_read_query(encoder, name) for name in names]
        pixels = [image for _, image in queries if image is not None]
        batches = [pixels[n : n + EMBED_BATCH] for n in range(0, len(pixels), EMBED_BATCH)]
        encoded = [encoder.encode(np.stack(batch)) for batch in batches]
    empty = np.empty((0, collection.dim), np.float32)
    vectors_QD = np.concatenate([empty, *encoded])
    is_unit = collection.metric == COSINE
    return [one for one, _ in queries], finish_vectors(vectors_QD, normalize=is_unit)


def _search_combined(collection: AnyCollection, options: SearchOptions) -> Found:
    """Make one query of everything and search with it; one bad part is one bad query."""
    files: tuple[str, ...] = (*options.images, *options.negatives)
    found, vectors_QD = _embed_files(collection, options, files) if files else ([], np.empty(0))
    likes: list[str | int] = [*options.key, *options.id]
    found += [_look_up(collection, query) for query in (*likes, *options.not_key)]
    query = " and ".join([*options.images, *map(str, likes)])
    if options.negatives or options.not_key:
        query += f" but not {' or '.join([*options.negatives, *options.not_key])}"
    for one in found:
        if one.error is not None:
            return Found(query=query, error=one.error)
    examples: list[Example] = [*vectors_QD, *(one.row.id for one in found if one.row is not None)]
    n_images, n_files, n_positives = len(options.images), len(files), len(files) + len(likes)
    combination = Combination(
        positives=[*examples[:n_images], *examples[n_files:n_positives]],
        negatives=[*examples[n_images:n_files], *examples[n_positives:]],
        negative_weight=options.not_weight,
    )
    query_QD = query_vector(collection, combination)[None]
    neighbours = _search(collection, options, query_QD, pad_ids([combination.ids]))
    shown = found[0 if options.images else n_files]
    (hits,) = look_up_hits(collection, neighbours)
    return dataclasses.replace(shown, query=query, pictured=shown.query, hits=hits)


def _read_query(encoder: Encoder, name: str) -> tuple[Found, NDArray[np.uint8] | None]:
    """Read and preprocess a query file; None where it cannot be used, and why."""
    try:
        image = read_image_file(Path(name), name)
        return Found(query=name, image=image), encoder.preprocess(image)
    except ImageError as error:
        named = ImageError(
            error.fault, name, expected=error.expected, found=error.found, mend=error.mend
        )
        return Found(query=name, error=named), None


def _search_stored(collection: AnyCollection, options: SearchOptions) -> list[Found]:
    """Search with images of the collection."""
    queries: list[str | int] = [*options.key, *options.id]
    found = [_look_up(collection, query) for query in queries]
    ids = [one.row.id for one in found if one.row is not None]
    if not ids:
        return found
    without_QW = np.array(ids, np.int64)[:, None]
    neighbours = _search(collection, options, collection.vectors(ids), without_QW)
    return _with_hits(collection, found, neighbours)


def _look_up(collection: AnyCollection, query: str | int) -> Found:
    """Find the image of a key or an id."""
    try:
        id_ = collection.find_key(query) if isinstance(query, str) else query
        (row,) = collection.rows([id_])
    except UnknownIdError as error:
        return Found(query=str(query), error=error)
    return Found(query=row.key, label=row.label, row=row)


def _with_hits(
    collection: AnyCollection, found: Sequence[Found], neighbours: Neighbours
) -> list[Found]:
    """Give the good queries their neighbours, in order."""
    hits = iter(look_up_hits(collection, neighbours))
    return [one if one.error else dataclasses.replace(one, hits=next(hits)) for one in found]


def _why_nothing(collection: AnyCollection, options: SearchOptions) -> str:
    """Say what every image failed: the filter, the least cosine, or to be another than given."""
    image = "no image" if options.images else "no other image"
    if options.min_score is not None:
        that = "" if options.filter is None else " that passes the filter"
        return f"{image}{that} is as near as --min-score {options.min_score}"
    if options.filter is None:
        return f"{image} is there"
    labels = _shown_labels(collection) if re.search(r"\blabel\b", options.filter) else ""
    return f"{image} passes the filter{labels}"


def _shown_labels(collection: AnyCollection) -> str:
    """Show what labels there are, for a filter that none of them passes."""
    if collection.count > MOST_LABELLED:
        return ""
    labels = sorted({label for label in collection.labels() if label is not None})
    more = f" and {len(labels) - SHOWN_LABELS} more" if len(labels) > SHOWN_LABELS else ""
    shown = ", ".join(map(repr, labels[:SHOWN_LABELS]))
    return f"; labels here are {shown}{more}" if labels else "; no image here has a label"


def _as_json(collection: AnyCollection, options: SearchOptions, found: Sequence[Found]) -> str:
    """Lay out everything that was found for a machine."""
    document = {
        "collection": collection.name,
        "fingerprint": collection.fingerprint,
        "index": collection.factory,
        "exact": options.exact or collection.factory == "Flat",
        "effort": options.effort,
        "k": options.limit,
        "filter": options.filter,
        "min_score": options.min_score,
        "diversity": options.diversity,
        "queries": [
            {
                "query": one.query,
                "label": one.label,
                "error": None if one.error is None else str(one.error),
                "hits": [{"score": hit.score, **hit.row.to_json()} for hit in one.hits],
            }
            for one in found
        ],
    }
    return json.dumps(document, indent=2)


def _draw(path: Path, collection: AnyCollection, found: Sequence[Found]) -> None:
    """Draw the grid of queries and neighbours."""
    from index.grid import draw  # matplotlib: only for a picture

    try:
        draw(path, collection, found)
    except OSError as error:
        raise _unwritable(path, reason_of(error), mend_of(error)) from error


def _unwritable(grid: Path, found: str, mend: str) -> CollectionError:
    """Make the error for a picture that has no place."""
    return CollectionError(
        f"--grid {grid}",
        expected="a file that can be written",
        found=found,
        mend=f"{mend}, or choose another place",
    )


if __name__ == "__main__":
    sys.exit(run_command(SearchOptions, main, prog="python -m index.search"))
