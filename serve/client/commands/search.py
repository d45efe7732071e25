"""`python -m serve.client search`: the nearest images of a served collection.

A query that cannot be used has a line of its own, and the exit status is 1 at the end; the
others are answered.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from numpy.typing import NDArray
from tyro.conf import Positional, arg

from models.command import shown
from models.errors import HoraceError, ImageError, SourceError, UsageError, reason_of
from models.image_source import ImageData
from serve.client.arguments import check_number
from serve.client.blocking import Client
from serve.client.combining import MAX_NEGATIVE_WEIGHT, NEGATIVE_WEIGHT, Combination
from serve.client.commands.connecting import ServerOptions
from serve.client.commands.files import ImageFile, read_files, require_parent
from serve.client.requests import SearchOptions
from serve.client.results import Hit, SearchResult
from serve.errors import FailedItemsError, RequestError, UnknownNameError

if TYPE_CHECKING:
    from index.evaluation.plots import Tile

KEYS_AT_ONCE = 100
"""Of which the ids are asked for in one request, where the server allows so many neighbours."""


@dataclass(frozen=True, kw_only=True)
class SearchCommand(ServerOptions):
    """Find the nearest images of a collection, by image files, stored images or vectors."""

    images: Positional[tuple[Path, ...]] = ()
    """Image files to search with; a folder gives all images below it."""
    key: tuple[str, ...] = ()
    """Keys of stored images to search with, as they stand in what a search prints."""
    id: tuple[int, ...] = ()
    """Ids of stored images to search with, as they stand there."""
    together: bool = False
    """Make one query of all files, keys and ids that are searched with: their mean."""
    negatives: Annotated[tuple[Path, ...], arg(name="not")] = ()
    """Image files that the answer is to be unlike; implies --together."""
    not_key: tuple[str, ...] = ()
    """Keys of stored images that the answer is to be unlike; implies --together."""
    not_id: tuple[int, ...] = ()
    """Ids of stored images that the answer is to be unlike; implies --together."""
    not_weight: float = NEGATIVE_WEIGHT
    """How much those weigh against what is searched with, 0 to 10."""
    vectors: Path | None = None
    """A .npy file of (N, D) vectors to search with, of the encoder that --fingerprint names."""
    fingerprint: str | None = None
    """Of the encoder that made the vectors."""
    collection: str | None = None
    """A served collection; the server's only one where not given."""
    k: int = 10
    """Neighbours a query."""
    filter: str | None = None
    """Which images may be hits, such as: label = 'Coat'."""
    min_score: float | None = None
    """The least cosine of a hit, -1 to 1."""
    diversity: float = 0.0
    """0 for the nearest, up to 1 for hits that are also unlike one another."""
    effort: int | None = None
    """Candidates that the index weighs for a query: more find more, and take longer."""
    exact: bool = False
    """Compare every vector, and ask no index."""
    metadata: bool = False
    """Show what the collection knows of the neighbours besides."""
    json: bool = False
    """Print the result as JSON."""
    grid: Path | None = None
    """Draw queries and neighbours into this PNG file: the first 24 of either."""
    pictures: str | None = None
    """Where the pictures of the neighbours are, for --grid, such as folder:photos; the server
    gives keys only."""

    def __post_init__(self) -> None:
        """Check what can be checked without a server.

        Raises:
            UsageError: a value makes no sense.
        """
        super().__post_init__()
        SearchOptions(
            collection=self.collection,
            k=self.k,
            filter=self.filter,
            effort=self.effort,
            min_score=self.min_score,
            diversity=self.diversity,
        )
        check_number("--not-weight", self.not_weight, 0, MAX_NEGATIVE_WEIGHT)
        if self.exact and self.effort is not None:
            raise UsageError("--effort", expected="an index to search", found="--exact")
        if not (self.images or self.key or self.id or self.vectors):
            expected = "image files, --key, --id or --vectors"
            raise UsageError("queries", expected=expected, found="none of them")
        if self.vectors is not None and not self.fingerprint:
            raise UsageError(
                "--vectors",
                expected="--fingerprint of the encoder that made them beside it",
                found="none",
            )
        if self.is_combined and self.vectors is not None:
            raise UsageError("--vectors", expected="no --together and no --not", found="either")
        if self.is_combined and not (self.images or self.key or self.id):
            raise UsageError("--together", expected="image files, --key or --id", found="none")
        if self.grid is not None and self.grid.suffix.lower() != ".png":
            raise UsageError("--grid", expected="a name that ends in .png", found=str(self.grid))
        if self.grid is not None and self.pictures is None:
            raise UsageError("--grid", expected="--pictures SOURCE beside it", found="none")

    @property
    def is_combined(self) -> bool:
        """Whether all that is searched with is one query."""
        return self.together or bool(self.negatives or self.not_key or self.not_id)


@dataclass(frozen=True, kw_only=True)
class Found:
    """One query and its neighbours, nearest first.

    Attributes:
        query: the file's name, the key, the id, or the row.
        image: the query's own picture, where it is one.
        pictured: which of several examples that is.
        hits: the neighbours.
        error: why the query has none.
    """

    query: str
    image: ImageData | None = None
    pictured: str = ""
    hits: tuple[Hit, ...] = ()
    error: str = ""


def main(options: SearchCommand) -> None:
    """Search, and show what was found.

    Raises:
        HoraceError: nothing can be searched, or, after the rest is shown, a query was bad.
    """
    if options.grid is not None:
        require_parent("--grid", options.grid)
    vectors = None if options.vectors is None else _read_vectors(options.vectors)
    with options.connect() as client:
        if options.is_combined:
            found = _search_together(client, options)
        else:
            found = _search_each(client, options, vectors)
    print(_as_json(found) if options.json else _as_text(options, found))
    errors = [f"{one.query}: {one.error}" for one in found if one.error]
    if options.grid is not None and len(errors) < len(found):
        _draw(options.grid, options.pictures or "", found)
    if len(errors) == 1:
        raise FailedItemsError(errors[0])
    if errors:
        raise FailedItemsError(f"{len(errors)} bad queries of {len(found)}, the first {errors[0]}")


def _search_each(
    client: Client, options: SearchCommand, vectors: NDArray[np.float32] | None
) -> list[Found]:
    """Search by each file, each key, each id and each vector."""
    found = _search_files(client, options) + _search_keys(client, options)
    if options.id:
        result = _search(client, options, ids=options.id)
        found += _join([Found(query=str(id_)) for id_ in options.id], result)
    if vectors is not None:
        result = _search(client, options, vectors=vectors, fingerprint=options.fingerprint)
        rows = [Found(query=f"{options.vectors}[{n}]") for n in range(len(vectors))]
        found += _join(rows, result)
    return found


def _search_together(client: Client, options: SearchCommand) -> list[Found]:
    """Make one query of everything; each of its files and keys has to be good.

    Raises:
        ImageError: a file cannot be read.
        UnknownNameError: no image has a key.
    """
    likes, unlikes = ([*read_files(paths)] for paths in (options.images, options.negatives))
    for file in (*likes, *unlikes):
        if file.error is not None:
            raise file.error
    ids = _look_up(client, options, (*options.key, *options.not_key))
    for key in (*options.key, *options.not_key):
        if key not in ids:
            raise _unknown_key(key)
    combination = Combination(
        positives=[*map(_data, likes), *(ids[key] for key in options.key), *options.id],
        negatives=[*map(_data, unlikes), *(ids[key] for key in options.not_key), *options.not_id],
        negative_weight=options.not_weight,
    )
    positives = [*(file.name for file in likes), *options.key, *map(str, options.id)]
    negatives = [*(file.name for file in unlikes), *options.not_key, *map(str, options.not_id)]
    query = " and ".join(positives) + (f", not {' nor '.join(negatives)}" if negatives else "")
    picture = likes[0].data if likes else None
    one = Found(query=query, image=picture, pictured=positives[0])
    return _join([one], _search(client, options, combined=[combination]))


def _search_files(client: Client, options: SearchCommand) -> list[Found]:
    """Search by the files; one that cannot be read says so in its place."""
    files = list(read_files(options.images))
    readable = [file for file in files if file.data is not None]
    found: list[Found] = []
    if readable:
        result = _search(client, options, images=[_data(file) for file in readable])
        found = _join([Found(query=file.name, image=file.data) for file in readable], result)
    answered = iter(found)
    return [
        next(answered) if file.error is None else Found(query=file.name, error=file.reason)
        for file in files
    ]


def _search_keys(client: Client, options: SearchCommand) -> list[Found]:
    """Search by the keys; one that no image has says so in its place."""
    ids = _look_up(client, options, options.key)
    known = [key for key in options.key if key in ids]
    found: list[Found] = []
    if known:
        result = _search(client, options, ids=[ids[key] for key in known])
        found = _join([Found(query=key) for key in known], result)
    answered = iter(found)
    return [
        next(answered) if key in ids else Found(query=key, error=str(_unknown_key(key)))
        for key in options.key
    ]


def _look_up(client: Client, options: SearchCommand, keys: Sequence[str]) -> dict[str, int]:
    """Ask the server for the ids of keys; those that no image has are left out.

    What is searched with is of no matter: nothing but images of these keys may be found.
    """
    if not keys:
        return {}
    served = client.list_collections()
    dim, fingerprint = next(
        ((one.dim, one.fingerprint) for one in served if options.collection in (None, one.name)),
        (1, "any"),  # the search is told which collections there are
    )
    literals = ["'" + key.replace("'", "''") + "'" for key in dict.fromkeys(keys)]
    ids: dict[str, int] = {}
    at_once = KEYS_AT_ONCE
    while literals:
        asked = literals[:at_once]
        try:
            result = client.search(
                vectors=np.eye(1, dim, dtype=np.float32),
                fingerprint=fingerprint,
                collection=options.collection,
                k=len(asked),
                filter=f"key in ({', '.join(asked)})",
                exact=True,
            )
        except RequestError:
            if len(asked) <= options.k:
                raise
            at_once = options.k  # the search that is to follow asks for no fewer
            continue
        (hits,) = result.raise_for_status().hits
        ids |= {hit.key: hit.id for hit in hits}
        literals = literals[at_once:]
    return ids


def _unknown_key(key: str) -> UnknownNameError:
    """Make the error for a key that no image has."""
    return UnknownNameError(
        f"key {key!r}",
        expected="a key of the collection",
        found="none such",
        mend="take keys from a search of it",
    )


def _data(file: ImageFile) -> ImageData:
    """Give the content of a file that has been read."""
    assert file.data is not None
    return file.data


def _search(
    client: Client,
    options: SearchCommand,
    *,
    images: Sequence[ImageData] | None = None,
    ids: Sequence[int] | None = None,
    vectors: NDArray[np.float32] | None = None,
    combined: Sequence[Combination] | None = None,
    fingerprint: str | None = None,
) -> SearchResult:
    """Search by one kind of query."""
    return client.search(
        images,
        vectors=vectors,
        ids=ids,
        combined=combined,
        fingerprint=fingerprint,
        collection=options.collection,
        k=options.k,
        filter=options.filter,
        effort=options.effort,
        min_score=options.min_score,
        diversity=options.diversity,
        exact=options.exact,
        include_metadata=options.metadata,
    )


def _join(queries: Sequence[Found], result: SearchResult) -> list[Found]:
    """Give queries what was found for them."""
    return [
        replace(one, hits=hits, error=status.message)
        for one, hits, status in zip(queries, result.hits, result.statuses, strict=True)
    ]


def _read_vectors(path: Path) -> NDArray[np.float32]:
    """Read query vectors.

    Raises:
        UsageError: the file holds none.
    """
    expected = "a .npy file of (N, D) numbers"
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            shape, vectors = loaded.shape, np.asarray(loaded, np.float32)
    except OSError as error:
        found = reason_of(error)
        raise UsageError(f"--vectors {path}", expected=expected, found=found) from error
    except Exception as error:  # NumPy raises whatever the bytes of a file lead it to
        raise UsageError(f"--vectors {path}", expected=expected, found="another") from error
    if len(shape) != 2 or not vectors.size:
        raise UsageError(f"--vectors {path}", expected=expected, found=f"{shape}")
    return vectors


def _as_text(options: SearchCommand, found: Sequence[Found]) -> str:
    """Lay out a table for each query, or say why nothing was found for it."""
    lines = []
    for one in found:
        lines.append(shown(one.query))
        if one.error:
            lines += [f"  {shown(one.error)}", ""]
            continue
        if not one.hits:
            lines += [f"  {_why_nothing(options)}", ""]
            continue
        labels = [shown(hit.label or "-") for hit in one.hits]
        width = max([5, *map(len, labels)])
        lines.append(f"  {'score':>7}  {'label':<{width}}  {'id':<19}  key")
        for hit, label in zip(one.hits, labels, strict=True):
            known = hit.metadata.items()
            further = "".join(f"  {name}={value}" for name, value in known if value is not None)
            name = shown(hit.key + further)
            lines.append(f"  {hit.score:7.4f}  {label:<{width}}  {hit.id:<19}  {name}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _why_nothing(options: SearchCommand) -> str:
    """Say what every image failed: the filter, the least cosine, or to be another than given."""
    is_new = options.images or options.vectors is not None
    image = "no image" if is_new else "no other image"
    if options.min_score is not None:
        that = "" if options.filter is None else " that passes the filter"
        return f"{image}{that} is as near as --min-score {options.min_score}"
    return f"{image} is there" if options.filter is None else f"{image} passes the filter"


def _as_json(found: Sequence[Found]) -> str:
    """Lay out everything that was found for a machine."""
    queries = [
        {
            "query": one.query,
            "error": one.error or None,
            "hits": [
                {name: value for name, value in asdict(hit).items() if name != "vector"}
                | {"id": str(hit.id)}  # 63 bits: a JSON number is exact to 53 in most readers
                for hit in one.hits
            ],
        }
        for one in found
    ]
    return json.dumps({"queries": queries}, indent=2)


def _draw(path: Path, pictures: str, found: Sequence[Found]) -> None:
    """Draw a row for each query that was answered.

    Raises:
        HoraceError: the pictures cannot be had, or the file cannot be written.
    """
    from index.evaluation.plots import (  # matplotlib: only for a picture
        MAX_GRID_COLUMNS,
        MAX_GRID_ROWS,
        Tile,
        draw_grid,
    )
    from models.images import open_source

    source = open_source(pictures)

    def tile(hit: Hit) -> Tile:
        try:
            image = source.load(hit.key)
        except (ImageError, SourceError):
            image = None
        return Tile(image=image, caption=f"{hit.label or hit.key}\n{hit.score:.3f}")

    answered = [one for one in found if not one.error]
    rows = [
        (
            Tile(image=one.image, caption=Path(one.pictured or one.query).name),
            [tile(hit) for hit in one.hits[:MAX_GRID_COLUMNS]],
        )
        for one in answered[:MAX_GRID_ROWS]
    ]
    try:
        draw_grid(path, rows, title="nearest images by cosine")
    except OSError as error:
        raise HoraceError(
            f"--grid {path}",
            expected="a file that can be written",
            found=reason_of(error),
            mend="make room or choose another",
        ) from error
