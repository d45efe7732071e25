"""`python -m index.outliers C`: images that do not belong, and labels that are doubtful.

How either is found is `index.curation.outlying`. With `--out` there are, in a directory that
appears whole:
    index.html     both with pictures, the oddest first; one file, nothing from elsewhere.
    outliers.csv   every image that was looked at, with its score, the oddest first.
    suspects.csv   the doubtful labels, each with what the neighbours say instead.
    outliers.json  the first of both for a machine, and by which encoder and settings.
Nothing is deleted and no label is changed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tyro.conf import Positional

from index.collection import Collection, Row
from index.curation.outlying import (
    SCORERS,
    TEMPERATURE,
    Surroundings,
    Suspect,
    default_neighbours,
    find_surroundings,
    find_suspects,
)
from index.curation.page import caption, figure, page
from index.curation.report import report_directory, require_place, write_csv
from index.curation.stored_images import StoredImages, load_images
from models.bundle import Json
from models.command import counted, run_command, shown
from models.errors import UsageError
from models.html import Html, tag
from models.image_source import ImageData

DOCUMENT_FILE, PAGE_FILE = "outliers.json", "index.html"
OUTLIERS_FILE, SUSPECTS_FILE = "outliers.csv", "suspects.csv"

SHOWN_NEIGHBOURS = 5
"""Pictures beside a doubtful label."""

TERMINAL_ROWS = 20
BLOCK_ROWS = 8192
"""Rows of a list that are in memory at once."""


@dataclass(frozen=True, kw_only=True)
class OutlierOptions:
    """Find images that do not belong and labels that are doubtful; nothing is changed."""

    collection: Positional[Path]
    """The collection's directory."""
    method: Literal["farthest", "mean", "lof"] = "farthest"
    """Score: distance to the k-th neighbour, mean distance to all k, or local outlier factor."""
    k: int | None = None
    """Neighbours; 50, or a twentieth of the images where they are few. A group of foreign
    images is found where k is more than the group has."""
    filter: str | None = None
    """Which images to look at, such as "label = 'Coat'"; all where none is given."""
    exact: bool = False
    """Compare every pair instead of asking the index, which may miss some."""
    count: int = 100
    """Outliers, and doubtful labels, on the page and in the JSON."""
    out: Path | None = None
    """Directory for the page, the lists and the JSON; an earlier one is replaced."""
    json: bool = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        """Check what can be checked without opening anything."""
        if self.k is not None and self.k < 1:
            raise UsageError("--k", expected="at least 1", found=str(self.k))
        if self.count < 1:
            raise UsageError("--count", expected="at least 1", found=str(self.count))
        require_place(self.out, DOCUMENT_FILE)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was found.

    Attributes:
        around: the neighbours of every image: those that a score asks, and those that vote.
        k: neighbours that the score asks.
        scores_N: (N,) float64, odd is high.
        order_N: (N,) int64 places of the images, the oddest first.
        suspects: doubtful labels, the most doubtful first.
    """

    around: Surroundings
    k: int
    scores_N: NDArray[np.float64]
    order_N: NDArray[np.int64]
    suspects: Sequence[Suspect]


def main(options: OutlierOptions) -> None:
    """Find both, show them, and write the report on request.

    Raises:
        HoraceError: the collection cannot be read, or the report not be written.
    """
    with Collection.open(options.collection) as collection:
        found = find(collection, options)
        document = _document(collection, options, found)
        if options.out is not None:
            _write(options.out, collection, options, found, document)
        text = _as_text(collection, found)
    if options.json:
        print(json.dumps(document, indent=2))
        return
    print(text)
    if options.out is not None:
        print(f"report: {options.out / PAGE_FILE}; lists: {OUTLIERS_FILE}, {SUSPECTS_FILE}")


def find(collection: Collection, options: OutlierOptions) -> Findings:
    """Score every image, and weigh every label."""
    selection = None if options.filter is None else collection.select(options.filter)
    count = collection.count if selection is None else selection.count
    voters = default_neighbours(count)
    k = min(options.k or voters, count - 1)
    around = find_surroundings(collection, max(k, voters), exact=options.exact, selection=selection)
    scores_N = SCORERS[options.method](around.nearest(k))
    labels = collection.labels()
    if selection is not None:
        labels = [labels[row] for row in np.flatnonzero(selection.mask_N)]
    temperature = TEMPERATURE if collection.metric == "cosine" else np.inf
    return Findings(
        around=around,
        k=k,
        scores_N=scores_N,
        order_N=np.argsort(-scores_N, kind="stable"),
        suspects=find_suspects(around, labels, temperature=temperature, voters=voters),
    )


def _document(collection: Collection, options: OutlierOptions, found: Findings) -> dict[str, Json]:
    """Lay the first of both out for a machine."""
    outliers = found.order_N[: options.count]
    suspects = found.suspects[: options.count]
    return {
        "collection": collection.name,
        "fingerprint": collection.fingerprint,
        "method": options.method,
        "k": found.k,
        "filter": options.filter,
        "exact": options.exact or collection.factory == "Flat",
        "images": len(found.around.ids),
        "median_score": float(np.median(found.scores_N)),
        "outliers": [
            {"score": float(found.scores_N[place]), **row.to_json()}
            for place, row in zip(outliers, _rows(collection, found, outliers), strict=True)
        ],
        "doubtful_labels": len(found.suspects),
        "suspects": [
            {**_as_row(suspect), **row.to_json()}
            for suspect, row in zip(
                suspects, _rows(collection, found, [s.place for s in suspects]), strict=True
            )
        ],
    }


def _as_row(suspect: Suspect) -> dict[str, Json]:
    """Give what is said of a label."""
    return {
        "suggested": suspect.suggested,
        "margin": round(suspect.margin, 6),
        "given_share": round(suspect.given_share, 6),
        "suggested_share": round(suspect.suggested_share, 6),
    }


def _rows(
    collection: Collection, found: Findings, places: Sequence[int] | NDArray[np.int64]
) -> list[Row]:
    """Find what is known of images by their places."""
    return collection.rows(found.around.ids[np.asarray(places, np.int64)])


def _in_blocks(
    collection: Collection, found: Findings, places: Sequence[int] | NDArray[np.int64]
) -> Iterator[Row]:
    """Give the same one after the other: there may be as many as images."""
    for start in range(0, len(places), BLOCK_ROWS):
        yield from _rows(collection, found, places[start : start + BLOCK_ROWS])


def _as_text(collection: Collection, found: Findings) -> str:
    """Lay the oddest out for people."""
    order = found.order_N[:TERMINAL_ROWS]
    lines = [
        f"the {len(order)} oddest of {counted(len(found.order_N), 'image')} "
        f"(median score {np.median(found.scores_N):.4f})"
    ]
    for place, row in zip(order, _rows(collection, found, order), strict=True):
        name = shown(f"{row.key}  {row.label or ''}")
        lines.append(f"  {found.scores_N[place]:.4f}  {name}".rstrip())
    suspects = found.suspects[:TERMINAL_ROWS]
    lines += ["", counted(len(found.suspects), "doubtful label")]
    rows = _rows(collection, found, [suspect.place for suspect in suspects])
    lines += [
        f"  {suspect.margin:.4f}  "
        + shown(f"{row.key}  {suspect.given}, its neighbours {suspect.suggested}")
        for suspect, row in zip(suspects, rows, strict=True)
    ]
    return "\n".join(lines)


def _write(
    out: Path,
    collection: Collection,
    options: OutlierOptions,
    found: Findings,
    document: dict[str, Json],
) -> None:
    """Write the report's directory, whole or not at all."""
    with report_directory(out) as directory:
        (directory / DOCUMENT_FILE).write_text(json.dumps(document, indent=2) + "\n")
        rows = _in_blocks(collection, found, found.order_N)
        write_csv(
            directory / OUTLIERS_FILE,
            ["key", "source", "id", "label", "score"],
            (
                [row.key, row.source, row.id, row.label or "", f"{found.scores_N[place]:.6f}"]
                for row, place in zip(rows, found.order_N, strict=True)
            ),
        )
        rows = _in_blocks(collection, found, [suspect.place for suspect in found.suspects])
        header = ["suggested", "margin", "given_share", "suggested_share"]
        write_csv(
            directory / SUSPECTS_FILE,
            ["key", "source", "id", "label", *header],
            (
                [row.key, row.source, row.id, suspect.given, *_as_row(suspect).values()]
                for row, suspect in zip(rows, found.suspects, strict=True)
            ),
        )
        (directory / PAGE_FILE).write_text(_page(collection, options, found), encoding="utf-8")


def _page(collection: Collection, options: OutlierOptions, found: Findings) -> str:
    """Lay out the page of pictures."""
    title = f"What does not belong in {collection.name}"
    shown = found.order_N[: options.count]
    suspects = found.suspects[: options.count]
    rows, stored = _rows(collection, found, shown), StoredImages()
    figures = [
        _figure(row, image, f"{found.scores_N[place]:.4f}")
        for place, row, image in zip(shown, rows, load_images(rows, stored), strict=True)
    ]
    parts = [
        tag("h1", title),
        tag(
            "section",
            tag("h2", f"The {len(shown)} oddest of {len(found.order_N)} images"),
            tag(
                "p",
                f"Scored by {_EXPLAINED[options.method]}, with k = "
                f"{found.k}; half of all images have less than "
                f"{np.median(found.scores_N):.4f}. {OUTLIERS_FILE} lists them all.",
            ),
            tag("div", *figures, class_="row"),
        ),
    ]
    if suspects:
        heading = counted(len(found.suspects), "doubtful label")
        more = f", the {len(suspects)} most doubtful" if len(found.suspects) > len(suspects) else ""
        parts += [
            tag("h2", f"{heading}{more}"),
            tag(
                "p",
                "The image, what it is called and what its neighbours say instead, and the "
                f"nearest {SHOWN_NEIGHBOURS} of them. {SUSPECTS_FILE} lists all.",
            ),
            *(_section(collection, found, suspect, stored) for suspect in suspects),
        ]
    return page(title, *parts)


_EXPLAINED = {
    "farthest": "the distance to the k-th nearest image",
    "mean": "the mean distance to the k nearest images",
    "lof": "how much denser the collection is around the k nearest images (local outlier factor)",
}


def _section(
    collection: Collection, found: Findings, suspect: Suspect, stored: StoredImages
) -> Html:
    """Show a doubtful label with the images that contradict it."""
    near = found.around.places_NK[suspect.place, :SHOWN_NEIGHBOURS]
    rows = _rows(collection, found, [suspect.place, *near[near >= 0].tolist()])
    images = load_images(rows, stored)
    scores = found.around.scores_NK[suspect.place]
    figures = [_figure(rows[0], images[0], "in doubt", class_="doubt")]
    figures += [
        _figure(row, image, f"{score:.4f}")
        for row, image, score in zip(rows[1:], images[1:], scores, strict=False)
    ]
    heading = tag(
        "h3",
        tag("span", suspect.given, class_="warn"),
        f" ({suspect.given_share:.0%} of the vote), or rather {suspect.suggested} "
        f"({suspect.suggested_share:.0%})?",
    )
    return tag("section", heading, tag("div", *figures, class_="row"))


def _figure(row: Row, image: ImageData | None, first: str, *, class_: str = "") -> Html:
    """Show an image with what is known of it."""
    return figure(image, caption(first, row.label, row.key), alt=row.key, class_=class_)


if __name__ == "__main__":
    sys.exit(run_command(OutlierOptions, main, prog="python -m index.outliers"))
