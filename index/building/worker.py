"""One of several processes that make the parts of a build: what it is told, does and says.

Rules:
    It says the number of records of each batch, and last that it is done, or what went wrong.
    It holds the build's lock until it ends. It ends at once when its parent is gone.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path

from index.building.part_file import RunKey
from index.building.part_set import PartSet, Share
from index.building.pipeline import ENCODE_THREADS, Crew, make_parts
from models.encoder import open_encoder
from models.errors import FingerprintMismatchError, HoraceError
from models.images import open_source


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one worker does.

    Attributes:
        images: the source, as `open_source` takes it.
        encoder: as `open_encoder` takes it.
        directory: of the parts.
        key: what decides the parts.
        share: which of them are this worker's.
        crew: how many batches it has at work.
    """

    images: str
    encoder: str
    directory: Path
    key: RunKey
    share: Share
    crew: Crew


@dataclass(frozen=True)
class Done:
    """A worker's last word: how many records the source had."""

    n_seen: int


@dataclass(frozen=True)
class Failed:
    """A worker's last word: what went wrong, in one line."""

    line: str
    errno: int | None


class HeldLock:
    """A descriptor that goes to a process with the arguments that it starts with."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> tuple[Callable[..., HeldLock], tuple[object]]:
        """Have the descriptor inherited."""
        return _take_lock, (reduction.DupFd(self.descriptor),)


def _take_lock(inherited: reduction.DupFd) -> HeldLock:  # type: ignore[valid-type]  # a function in its stubs
    """Take the descriptor over, in the new process."""
    return HeldLock(inherited.detach())  # type: ignore[attr-defined]  # likewise


def run_worker(job: Job, pipe: Connection, lock: HeldLock) -> None:
    """Make the parts of one share; the target of a process, which holds `lock` until it ends."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    assert lock.descriptor >= 0
    try:
        pipe.send(Done(_work(job, pipe)))
    except (HoraceError, OSError) as error:
        with suppress(OSError):
            pipe.send(Failed(str(error), error.errno if isinstance(error, OSError) else None))


def _work(job: Job, pipe: Connection) -> int:
    """Embed the share; give the number of records in the source."""
    source, parts = open_source(job.images), PartSet(job.directory, job.key)
    with closing(open_encoder(job.encoder, threads=ENCODE_THREADS)) as encoder:
        if encoder.fingerprint != job.key.fingerprint:
            raise FingerprintMismatchError(
                job.encoder,
                expected=job.key.fingerprint,
                found=encoder.fingerprint,
                mend="the encoder has changed since this build began: start anew with --restart",
            )
        batches = parts.missing(source.records(), job.share)
        for n_records in make_parts(batches, encoder, parts, crew=job.crew):
            pipe.send(n_records)
    assert parts.n_seen is not None
    return parts.n_seen


def _end_with_parent(pipe: Connection) -> None:
    """Wait for the end of the pipe, on which nothing is ever said, and end this process."""
    with suppress(EOFError, OSError):
        pipe.recv()
    os._exit(1)
