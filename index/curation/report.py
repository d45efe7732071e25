"""A report as a directory: a page for people, lists and JSON for machines, all or nothing.

Rules:
    A directory is replaced only if it is an earlier report of the same command, which its
    document of that name shows.
    It appears whole, under its name, when everything is written.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from index.errors import unwritable
from models.errors import UsageError
from models.files import atomic_directory


def require_place(out: Path | None, document: str) -> None:
    """Refuse to replace what is no earlier report.

    Args:
        out: where the report will be; None where there will be none.
        document: the name of the file that makes a directory a report of this command.

    Raises:
        UsageError: there is something else.
    """
    if out is not None and out.exists() and not (out / document).is_file():
        raise UsageError(
            f"--out {out}",
            expected="a new directory, or an earlier report to replace",
            found="something else of that name",
            mend="choose another name",
        )


@contextmanager
def report_directory(out: Path) -> Iterator[Path]:
    """Give a directory to fill; it becomes `out` when the block ends well.

    Raises:
        CollectionError: it cannot be written.
    """
    try:
        with atomic_directory(out, replace=True) as directory:
            yield directory
    except OSError as error:
        raise unwritable(f"--out {out}", "a directory that can be written", error) from error


def write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table as CSV, in UTF-8 wherever: so `index.select` reads its lists."""
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerow(header)
        writer.writerows(rows)
