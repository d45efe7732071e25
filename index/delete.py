"""`python -m index.delete C`: take images out of a collection; it can be searched meanwhile.

Which ones: `--key`, `--id`, `--filter` (`index.filters`), `--list` (a CSV file with a column `id`
or `key`, such as the delete.csv of `index.duplicates`), or several of these together.

Rules:
    One key, id or line that is not there, and nothing is deleted: a slip of the pen is found
    before it costs something.
    All of them go in one write: after a crash all are gone, or none.
    `--dry-run` opens the collection for reading only, and says what would go.
    The images' files are not touched, and the space is given back by `index.compact`.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from tyro.conf import Positional

from index.collection import Collection
from index.errors import CollectionError
from index.milvus.connection import require_directory
from index.storage.writer import CollectionWriter
from models.command import counted, run_command, shown
from models.errors import UsageError

SHOWN_KEYS = 10
"""Of a dry run, without --json."""

ID_COLUMN, KEY_COLUMN = "id", "key"
"""Of a list. Ids go before keys; spreadsheets write numbers of 19 digits as others, so that one who
has saved a list there takes that column out."""


@dataclass(frozen=True, kw_only=True)
class DeleteOptions:
    """Delete images from a collection."""

    collection: Positional[Path]
    """The collection's directory."""
    key: tuple[str, ...] = ()
    """Keys of images to delete."""
    id: tuple[int, ...] = ()
    """Ids of images to delete."""
    filter: str | None = None
    """Which images to delete, such as "label = 'Coat'"."""
    list: Path | None = None
    """A CSV file with what to delete in its column `id`, or without that `key`; such as that of
    `index.duplicates`."""
    dry_run: bool = False
    """Say what would be deleted, and delete nothing."""
    json: bool = False
    """Print what was deleted as JSON."""

    def __post_init__(self) -> None:
        """Check what can be checked without opening anything."""
        if not (self.key or self.id or self.filter is not None or self.list is not None):
            raise UsageError(
                "what to delete", expected="--key, --id, --filter or --list", found="none of them"
            )
        if not all(0 <= id_ < 1 << 63 for id_ in self.id):
            raise UsageError("--id", expected="numbers below 2^63", found=str(self.id))


def main(options: DeleteOptions) -> None:
    """Delete, and say how many.

    Raises:
        HoraceError: the collection cannot be read or written, or one of those to be deleted is
            not there; then nothing is.
    """
    require_directory(options.collection)
    if options.dry_run:
        with Collection.open(options.collection) as collection:
            ids = choose(collection, options)
            _tell_dry_run(collection, options, ids)
        return
    with CollectionWriter.open(options.collection) as writer:
        ids = choose(writer.collection, options)
        deleted = writer.delete(ids)
        left = writer.collection.count
    if options.json:
        print(json.dumps({"deleted": deleted, "count": left}, indent=2))
    else:
        print(f"{options.collection}: deleted {counted(deleted, 'image')}, {left} are left")


def choose(collection: Collection, options: DeleteOptions) -> NDArray[np.int64]:
    """Find the ids of all that is to be deleted, each once.

    Raises:
        UnknownIdError: one of them is not there.
        FilterError: the filter cannot be read.
        CollectionError: the list cannot be read.
    """
    ids, keys = list(options.id), list(options.key)
    if options.list is not None:
        listed = ListedImages.read(options.list)
        ids, keys = ids + listed.ids, keys + listed.keys
    named = ids + collection.find_keys(keys)
    ids_N = np.array(named, np.int64)
    collection.row_numbers(ids_N)
    if options.filter is not None:
        chosen = collection.ids[collection.select(options.filter).mask_N]
        ids_N = np.concatenate([ids_N, chosen])
    return np.unique(ids_N)


@dataclass
class ListedImages:
    """What a list names: ids, or where it has none, keys."""

    ids: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a CSV file.

        Raises:
            CollectionError: it cannot be read, has no such column, or something else in it; names
                the line.
        """
        listed = cls()
        try:
            with file.open(newline="", encoding="utf-8-sig") as lines:  # spreadsheets write a mark
                reader = csv.DictReader(lines)
                columns = reader.fieldnames or ()
                if ID_COLUMN not in columns and KEY_COLUMN not in columns:
                    found = ", ".join(columns) or "nothing"
                    raise _bad_list(f"{file}", f"a column {ID_COLUMN} or {KEY_COLUMN}", found)
                for row in reader:
                    if ID_COLUMN not in columns:
                        listed.keys.append(row[KEY_COLUMN] or "")
                        continue
                    text = row[ID_COLUMN] or ""
                    if not re.fullmatch("[0-9]{1,19}", text) or int(text) >= 1 << 63:
                        where = f"{file}, line {reader.line_num}"
                        raise _bad_list(where, "an id", repr(text[:80]))
                    listed.ids.append(int(text))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise _bad_list(f"{file}", "a CSV file", str(error)) from error
        return listed


def _bad_list(where: str, expected: str, found: str) -> CollectionError:
    """Make the error for a list that cannot be read."""
    return CollectionError(
        f"--list {where}",
        expected=expected,
        found=found,
        mend="give it the delete.csv of `python -m index.duplicates`, or a column key alone",
    )


def _tell_dry_run(collection: Collection, options: DeleteOptions, ids: NDArray[np.int64]) -> None:
    """Say what would be deleted."""
    left = collection.count - len(ids)
    if options.json:
        keys = [row.key for row in collection.rows(ids)]
        texts = [str(id_) for id_ in ids]  # as in `Row.to_json`
        found = {"would_delete": len(ids), "count": left, "ids": texts, "keys": keys}
        print(json.dumps(found, indent=2))
        return
    print(f"{options.collection}: would delete {counted(len(ids), 'image')}, {left} would be left")
    for row in collection.rows(ids[:SHOWN_KEYS]):
        print(f"  {shown(row.key)}")
    if len(ids) > SHOWN_KEYS:
        print(f"  ... and {len(ids) - SHOWN_KEYS} more")


if __name__ == "__main__":
    sys.exit(run_command(DeleteOptions, main, prog="python -m index.delete"))
