"""How every evaluation hands over what it found: as text or JSON, as files, with its encoder.

Rules:
    What took minutes to measure is shown first: a file that cannot be written loses nothing.
    A report that is kept says which versions measured it, and one that is recorded says by
    which command.
    Pictures are drawn only where files are asked for: matplotlib takes half a second to load.

It measures nothing.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import faiss
import numpy as np

from index.errors import unwritable
from index.interface import open_collection
from models.bundle import record_evaluation
from models.command import counted
from models.encoder import bundle_path
from models.errors import UsageError
from models.files import atomic_file

MAX_CLASS_LINES = 50
"""Of a table of classes, the worst first: more push the headline off the screen."""


def first_classes(lines: Sequence[str]) -> list[str]:
    """Give as many lines of a table of classes as are read, and say how many there are besides."""
    left = len(lines) - MAX_CLASS_LINES
    more = [f"  ... and {counted(left, 'class', plural='classes')} more, in the JSON"]
    return [*lines[:MAX_CLASS_LINES], *(more if left > 0 else [])]


def hand_over(
    text: str,
    document: Mapping[str, object],
    *,
    as_json: bool,
    out: Path | None,
    draw: Callable[[Path], None],
) -> None:
    """Print a report, and write it with its pictures where that was asked for.

    Args:
        text: the report for people.
        document: the same for machines.
        as_json: whether to print the document instead of the text.
        out: directory for report.txt, report.json and the pictures; none where None.
        draw: writes the pictures into that directory.

    Raises:
        CollectionError: the files cannot be written.
    """
    written = json.dumps(document, indent=2, allow_nan=False)
    print(written if as_json else text)
    if out is None:
        return
    try:
        for name, content in (("report.txt", text), ("report.json", written)):
            with atomic_file(out / name) as temporary:
                temporary.write_text(content + "\n", encoding="utf-8")
        draw(out)
    except OSError as error:
        raise unwritable(f"--out {out}", "a directory that can be written", error) from error
    if not as_json:
        print(f"\nreport and pictures: {out}")


def record(
    kind: str, document: Mapping[str, object], *, collection: str, encoder: str | None
) -> None:
    """Keep a report in the bundle of the encoder that it is about.

    Args:
        kind: of evaluation; an older result of the same kind goes.
        document: the report, without what is too long to keep.
        collection: whose encoder it is.
        encoder: the bundle; the one that built the collection where None.

    Raises:
        UsageError: the encoder is no bundle on this machine.
        CollectionError: the bundle cannot be written.
    """
    with closing(open_collection(collection)) as opened:
        uri = encoder or opened.encoder
    bundle = bundle_path(uri)
    if bundle is None:
        raise UsageError(
            "--record", expected="an encoder that is a bundle's directory here", found=uri
        )
    command = f"python {shlex.join(sys.orig_argv[1:])}"
    result = json.loads(json.dumps({"command": command, **document}))  # number keys become text
    try:
        record_evaluation(bundle, kind, result)
    except OSError as error:
        raise unwritable("--record", f"a bundle at {uri} that can be written", error) from error


def versions() -> dict[str, str]:
    """Name the libraries that decide what is measured."""
    try:
        own = version("horace")
    except PackageNotFoundError:  # it runs without being installed
        own = "unknown"
    return {"faiss": faiss.__version__, "horace": own, "numpy": np.__version__}
