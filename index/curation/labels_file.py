"""Labels that people gave: CSV files with a column `key` or `id`, and a column `label`.

Rules:
    A list that `index.select` wrote, with its column `label` filled in, is one.
    A line without a label is an image that was chosen and is not labelled: it is not chosen
    again, and teaches nothing.
    A later line wins over an earlier one.
    Images that the collection no longer has are left out and counted; a file of which it has
    none is another collection's, and refused.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from index.collection import Collection, id_of
from index.errors import CollectionError
from models.command import counted
from models.errors import UsageError

log = logging.getLogger("horace.index")


def read_labels(file: Path, collection: Collection) -> dict[int, str | None]:
    """Read what is known of the collection's images: ids and labels, None for no label.

    Raises:
        UsageError: the file is no such table, or knows no image of the collection.
        CollectionError: it cannot be read.
    """
    known = set(collection.ids.tolist())
    labels: dict[int, str | None] = {}
    unknown = 0
    for id_, label in _lines(file):
        if id_ in known:
            labels[id_] = label or None
        else:
            unknown += 1
    if unknown and not labels and known:
        raise UsageError(
            f"--labels {file}",
            expected=f"keys of collection {collection.name}, such as {collection.keys()[0]!r}",
            found="none of them",
            mend="give labels of this collection's images",
        )
    if unknown:
        log.warning("%s: %s not in collection %s", file, counted(unknown, "image"), collection.name)
    return labels


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Give the id and the label of each line."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:  # spreadsheets write a mark
            table = csv.DictReader(lines)
            columns = table.fieldnames or []
            if "label" not in columns or not {"key", "id"} & set(columns):
                raise UsageError(
                    f"--labels {file}",
                    expected="a CSV file with the columns key (or id) and label",
                    found=", ".join(columns) or "no line",
                )
            for line in table:
                yield _id(file, table.line_num, line), (line["label"] or "").strip()
    except OSError as error:
        raise CollectionError(
            f"--labels {file}", expected="a file that can be read", found=error.strerror
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(
            f"--labels {file}", expected="a CSV file in UTF-8", found=str(error)
        ) from error


def _id(file: Path, number: int, line: Mapping[str, str | None]) -> int:
    """Give the id of a line: that of its key, or the one that stands there."""
    if line.get("key"):
        return id_of(str(line["key"]))
    try:
        return int(line.get("id") or "")
    except ValueError as error:
        raise UsageError(
            f"--labels {file}, line {number}", expected="a key or an id", found="neither"
        ) from error
