"""What stands where a collection is to be built: nothing, a collection, or something else."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from index.building.parts import read_run_id
from index.errors import CollectionError
from index.storage.lock import writer_lock
from index.storage.manifest import MANIFEST_FILE, Manifest, read_manifest
from models.errors import UsageError


def check_target(out: Path, *, replace: bool, is_locked: bool = True) -> None:
    """Leave alone what exists, unless it is a collection and may be replaced.

    Args:
        out: where the collection is to be.
        replace: whether one may be there.
        is_locked: whether to try that one's lock, which makes a file in it.

    Raises:
        UsageError: it must stay, or the name is no text.
        CollectionLockedError: a writer has the collection that is to be replaced.
    """
    check_name("--out", str(out))
    if not out.exists() and not out.is_symlink():
        return
    if not (out / MANIFEST_FILE).is_file():
        raise UsageError(
            f"--out {out}",
            expected="a new directory, or a collection to replace",
            found="something else of that name",
            mend="choose another name",
        )
    if not replace:
        raise UsageError(
            f"--out {out}",
            expected="a new directory",
            found="a collection",
            mend="choose another name, or replace it with --replace",
        )
    if not is_locked:
        return
    with writer_lock(out):  # said now, not after an hour of embedding
        pass


def check_name(option: str, name: str) -> None:
    """Refuse a name that files of the collection could not hold, or no terminal show as one.

    Raises:
        UsageError: it has control characters, or is no UTF-8.
    """
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        raise UsageError(
            f"{option} {name!r}",
            expected="a name without control characters, and in UTF-8",
            found="another",
            mend="choose another name",
        )


def find_finished(out: Path) -> Manifest | None:
    """Read the collection whose run was killed between its last two steps; None if none was."""
    run_id = read_run_id(out)
    if run_id is None or not (out / MANIFEST_FILE).is_file():
        return None
    try:
        manifest = read_manifest(out)
    except CollectionError:
        return None
    return manifest if manifest.build.get("run_id") == run_id else None
