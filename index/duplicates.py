"""`python -m index.duplicates C`: near-duplicates, to look at and to delete.

What a group is, and that groups do not chain, is `index.curation.near`. With `--out` there are,
in a directory that appears whole:
    index.html   the groups with pictures, the largest first; one file, nothing from elsewhere.
    delete.csv   the images that may go, each with the one that stays and how near it is.
    groups.json  the same for a machine, and by which encoder and threshold.
Nothing is deleted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tyro.conf import Positional

from index.collection import Collection, Row
from index.curation.near import Group, find_groups
from index.curation.page import caption, figure, page
from index.curation.report import report_directory, require_place, write_csv
from index.curation.stored_images import StoredImages, load_images
from models.bundle import Json
from models.command import counted, run_command, shown
from models.errors import UsageError
from models.html import Html, tag

GROUPS_FILE, DELETE_FILE, PAGE_FILE = "groups.json", "delete.csv", "index.html"

MAX_SHOWN = 24
"""Pictures of one group on the page."""


@dataclass(frozen=True, kw_only=True)
class DuplicateOptions:
    """Find near-duplicates in a collection; nothing is deleted."""

    collection: Positional[Path]
    """The collection's directory."""
    threshold: float = 0.95
    """Cosine from which two images are near-duplicates, above 0 and up to 1."""
    filter: str | None = None
    """Which images to look at, such as "label = 'Coat'"; all where none is given."""
    exact: bool = False
    """Compare every pair instead of asking the index, which may miss some."""
    out: Path | None = None
    """Directory for the page, the list to delete and the groups; an earlier one is replaced."""
    max_groups: int = 200
    """Groups that the page shows and the terminal lists."""
    json: bool = False
    """Print the groups as JSON."""

    def __post_init__(self) -> None:
        """Check what can be checked without opening anything."""
        if not 0 < self.threshold <= 1:
            raise UsageError("--threshold", expected="above 0, up to 1", found=f"{self.threshold}")
        if self.max_groups < 1:
            raise UsageError("--max-groups", expected="at least 1", found=str(self.max_groups))
        require_place(self.out, GROUPS_FILE)


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """A group with what is known of its images.

    Attributes:
        kept: the one that stays.
        others: the others, nearest first.
        scores: cosines of those to the kept one.
    """

    kept: Row
    others: Sequence[Row]
    scores: Sequence[float]

    @property
    def labels(self) -> list[str]:
        """The labels in the group: more than one, and somebody was wrong."""
        return sorted({row.label for row in (self.kept, *self.others) if row.label is not None})


def main(options: DuplicateOptions) -> None:
    """Find the groups, show them, and write the report on request.

    Raises:
        HoraceError: the collection cannot be read, or the report not be written.
    """
    with Collection.open(options.collection) as collection:
        selection = None if options.filter is None else collection.select(options.filter)
        found = find_groups(collection, options.threshold, exact=options.exact, selection=selection)
        groups = _look_up(collection, found)
        looked_at = collection.count if selection is None else selection.count
        document = _document(collection, options, groups, looked_at)
        if options.out is not None:
            _write(options.out, collection, options, groups, document)
    if options.json:
        print(json.dumps(document, indent=2))
        return
    print(_as_text(groups, looked_at, max_groups=options.max_groups))
    if options.out is not None:
        print(f"report: {options.out / PAGE_FILE}; to delete: {options.out / DELETE_FILE}")


def _look_up(collection: Collection, groups: Sequence[Group]) -> list[Duplicates]:
    """Find what is known of the images of all groups: one by one each would take milliseconds."""
    ids = [id_ for group in groups for id_ in (group.kept, *group.others)]
    rows = iter(collection.rows(ids))
    return [
        Duplicates(kept=next(rows), others=[*islice(rows, len(group.others))], scores=group.scores)
        for group in groups
    ]


def _document(
    collection: Collection,
    options: DuplicateOptions,
    groups: Sequence[Duplicates],
    looked_at: int,
) -> dict[str, Json]:
    """Lay everything out for a machine."""
    return {
        "collection": collection.name,
        "fingerprint": collection.fingerprint,
        "threshold": options.threshold,
        "filter": options.filter,
        "exact": options.exact or collection.factory == "Flat",
        "images": looked_at,
        "duplicates": sum(len(group.others) for group in groups),
        "groups": [
            {
                "kept": group.kept.to_json(),
                "labels": list(group.labels),
                "others": [
                    {"score": score, **row.to_json()}
                    for score, row in zip(group.scores, group.others, strict=True)
                ],
            }
            for group in groups
        ],
    }


def _as_text(groups: Sequence[Duplicates], looked_at: int, *, max_groups: int) -> str:
    """Lay the groups out for people, the first of them by their images."""
    count = sum(len(group.others) for group in groups)
    lines = [
        f"{counted(count, 'near-duplicate')} in {counted(len(groups), 'group')}, "
        f"of {counted(looked_at, 'image')}"
    ]
    for group in groups[:max_groups]:
        differ = f"  labels differ: {', '.join(group.labels)}" if len(group.labels) > 1 else ""
        lines += ["", shown(f"{group.kept.key}  ({len(group.others)} more){differ}")]
        lines += [
            f"  {score:.4f}  {shown(row.key)}"
            for score, row in zip(group.scores, group.others, strict=True)
        ]
    if len(groups) > max_groups:
        lines.append(f"... and {counted(len(groups) - max_groups, 'group')} more")
    return "\n".join(lines)


def _write(
    out: Path,
    collection: Collection,
    options: DuplicateOptions,
    groups: Sequence[Duplicates],
    document: dict[str, Json],
) -> None:
    """Write the report's directory, whole or not at all."""
    with report_directory(out) as directory:
        (directory / GROUPS_FILE).write_text(json.dumps(document, indent=2) + "\n")
        _write_list(directory / DELETE_FILE, groups)
        (directory / PAGE_FILE).write_text(_page(collection, options, groups), encoding="utf-8")


def _write_list(file: Path, groups: Sequence[Duplicates]) -> None:
    """Write what may be deleted."""
    rows = (
        [row.key, row.source, row.id, f"{score:.6f}", group.kept.key, group.kept.id]
        for group in groups
        for score, row in zip(group.scores, group.others, strict=True)
    )
    write_csv(file, ["key", "source", "id", "score", "kept_key", "kept_id"], rows)


def _page(collection: Collection, options: DuplicateOptions, groups: Sequence[Duplicates]) -> str:
    """Lay out the page of pictures."""
    title = f"Near-duplicates in {collection.name}"
    count = sum(len(group.others) for group in groups)
    shown = groups[: options.max_groups]
    stored = StoredImages()
    sections = [_section(n, group, stored) for n, group in enumerate(shown, start=1)]
    left = len(groups) - len(shown)
    return page(
        title,
        tag("h1", title),
        tag(
            "p",
            f"{counted(count, 'near-duplicate')} in {counted(len(groups), 'group')}: a cosine of "
            f"{options.threshold:g} or more with an image that is kept (green). "
            f"{DELETE_FILE} lists what may go.",
        ),
        *sections,
        *([tag("p", f"{counted(left, 'group')} more in {GROUPS_FILE}.")] if left else []),
    )


def _section(number: int, group: Duplicates, stored: StoredImages) -> Html:
    """Show one group."""
    rows = [group.kept, *group.others[: MAX_SHOWN - 1]]
    images = load_images(rows, stored)
    captions = ["kept", *(f"{score:.4f}" for score in group.scores)]
    figures = [
        figure(
            image,
            caption(first, row.label, row.key),
            alt=row.key,
            class_="kept" if n == 0 else "",
        )
        for n, (row, image, first) in enumerate(zip(rows, images, captions, strict=False))
    ]
    count = 1 + len(group.others)
    more = f", the nearest {MAX_SHOWN}" if count > MAX_SHOWN else ""
    differ = f"labels differ: {', '.join(group.labels)}" if len(group.labels) > 1 else ""
    heading = tag("h2", f"{number}. {count} images{more} ", tag("span", differ, class_="warn"))
    return tag("section", heading, tag("div", *figures, class_="row"))


if __name__ == "__main__":
    sys.exit(run_command(DuplicateOptions, main, prog="python -m index.duplicates"))
