"""The locked directory of a build's parts, so that a killed build goes on.

Beside the collection `C` that is being built lies the directory `C.parts`. Each part is one
file of consecutive records, see `index.building.part_file`; which there are and what is
missing, `index.building.part_set` knows.

Rules:
    One build at a time: the directory is locked while a process works in it.
    Parts of other parameters (source, encoder, sizes) are never mixed in: they are refused.
    What is not a build's stays: a directory of that name with anything else in it is refused.
    A run has a name of its own, which ends up in the collection, so that a build that was
    killed between its last two steps is known for finished.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from index.building.part_file import RunKey
from index.building.part_set import PART_PREFIX, PartSet
from index.errors import CollectionError
from index.storage.manifest import MANIFEST_FILE
from models.errors import UsageError
from models.files import TEMPORARY_PREFIX, atomic_file

LOCK_FILE = "lock"
RUN_ID_FILE = "run-id"

_OWN_FILE = re.compile(
    rf"{LOCK_FILE}|{RUN_ID_FILE}|{PART_PREFIX}\d{{12}}\.parquet|{re.escape(TEMPORARY_PREFIX)}.*",
    re.DOTALL,
)

LOCK_PATIENCE_S, LOCK_PAUSE_S = 1.0, 0.02
"""How long a lock is waited for: the workers of a killed build end a moment after it."""


class PartStore(PartSet):
    """The parts of one build, locked. Use as a context manager.

    Attributes:
        out: the collection that is being built.
        run_id: the name of the run.
        lock: the descriptor of the lock: it holds until every process that has it has ended.
    """

    def __init__(
        self,
        out: Path,
        key: RunKey,
        *,
        restart: bool = False,
        give_up: Callable[[str], None] | None = None,
    ) -> None:
        """Take the parts of the collection `out`, and keep every other build out.

        Args:
            out: the collection that is being built.
            key: the parameters of this run.
            restart: whether to drop the parts that may be there.
            give_up: with `restart`, drops what else the run has made that they are of; it is given
                the name of that run, which stays until it is done.

        Raises:
            UsageError: something else lies in the directory.
            CollectionError: another process is building, or the parts are of another run.
        """
        self.out, self.directory = out, parts_directory(out)
        refuse_foreign(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.lock = _lock(self.directory / LOCK_FILE)
        try:
            if restart and give_up is not None and (earlier := read_run_id(out)) is not None:
                give_up(earlier)
            kept = () if restart else (PART_PREFIX, RUN_ID_FILE)
            self._remove_all_but(LOCK_FILE, *kept)
            self.run_id = read_run_id(out) or self._start_run()
            super().__init__(self.directory, key)
        except BaseException:
            os.close(self.lock)
            raise

    def __enter__(self) -> PartStore:
        return self

    def __exit__(self, *_: object) -> None:
        """Unlock; the parts stay for the next run, if there is an image in them."""
        if not self.n_images:
            self.discard()
        os.close(self.lock)

    def discard(self) -> None:
        """Delete the directory: the collection is made, or nothing was.

        The run's name and the lock go last, so that a build killed here is still found.
        """
        with suppress(OSError):
            self._remove_all_but(LOCK_FILE, RUN_ID_FILE)
            (self.directory / RUN_ID_FILE).unlink(missing_ok=True)
            (self.directory / LOCK_FILE).unlink(missing_ok=True)
            self.directory.rmdir()

    def _remove_all_but(self, *kept: str) -> None:
        """Remove the entries of the directory that are ours and whose names do not begin so."""
        for entry in self.directory.iterdir():
            if entry.name.startswith(kept) or not _is_own(entry):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _start_run(self) -> str:
        """Give this run a name of its own, which its later processes find."""
        run_id = uuid.uuid4().hex
        with atomic_file(self.directory / RUN_ID_FILE) as temporary:
            temporary.write_text(run_id)
        return run_id


def parts_directory(out: Path) -> Path:
    """Name the directory of the parts of a collection."""
    return out.with_name(f"{out.name}.parts")


def read_run_id(out: Path) -> str | None:
    """Give the name of the unfinished run of a collection; None where there is none."""
    file = parts_directory(out) / RUN_ID_FILE
    return file.read_text() if file.is_file() else None


def refuse_foreign(directory: Path) -> None:
    """Leave alone a directory of that name that somebody else has filled.

    Raises:
        UsageError: so it is.
    """
    with suppress(FileNotFoundError):
        if foreign := next((one for one in directory.iterdir() if not _is_own(one)), None):
            raise UsageError(
                f"--out {directory.with_suffix('')}",
                expected=f"{directory.name}, where the parts go, absent or of a build",
                found=f"{foreign.name!r} in it",
                mend="choose another --out, or move it away",
            )


def _is_own(entry: Path) -> bool:
    """Whether it is a build's: parts, what is being written, the collection or the replaced one."""
    if entry.name in ("collection", "collection.old"):
        return (entry / MANIFEST_FILE).is_file()
    return _OWN_FILE.fullmatch(entry.name) is not None


def _lock(file: Path) -> int:
    """Lock a file and give its descriptor; the lock ends with the process.

    Raises:
        CollectionError: another process has it.
    """
    give_up_s = time.monotonic() + LOCK_PATIENCE_S
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            if time.monotonic() >= give_up_s:
                raise CollectionError(
                    str(file.parent),
                    expected="no other build of this collection",
                    found="one at work",
                    mend="wait for it, or choose another --out",
                ) from error
            time.sleep(LOCK_PAUSE_S)
            file.parent.mkdir(parents=True, exist_ok=True)
            continue
        if file.exists() and os.fstat(descriptor).st_ino == file.stat().st_ino:
            return descriptor
        os.close(descriptor)  # its holder has just finished and deleted it
        file.parent.mkdir(parents=True, exist_ok=True)
