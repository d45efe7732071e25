"""The parts of one build, made by several processes.

Rules:
    Process n of N makes every N-th part of the grid, from the n-th on: nothing is handed out,
    and who makes a part does not decide what is in it.
    A worker that dies without a word is started again and makes what is missing of its share;
    one that dies `MAX_DEATHS` times without another part ends the build. What it says itself,
    of a source, an encoder or a disk, ends the build at once. What is in parts is kept.
    Workers hold the build's lock with their parent, so that no other build begins before the
    last of them has ended; a worker whose parent is gone ends at once. SIGINT is the parent's.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import cast

from index.building.part_set import PART_PREFIX, Share
from index.building.parts import PartStore
from index.building.worker import Done, Failed, HeldLock, Job, run_worker
from index.errors import CollectionError

MAX_DEATHS = 3
"""In a row without a new part: a machine that is short of memory kills again and again."""

log = logging.getLogger("horace.index")


class Worker:
    """One process and its share; started again when it dies."""

    def __init__(self, job: Job, lock: HeldLock) -> None:
        """Prepare; nothing is started yet."""
        self.job, self._lock = job, lock
        self._deaths, self._n_parts = 0, self._count_parts()
        self.n_seen: int | None = None
        self.pipe: Connection | None = None
        self.process: SpawnProcess | None = None

    def __str__(self) -> str:
        return f"worker {self.job.share.number + 1} of {self.job.share.of}"

    def start(self) -> None:
        """Start a process for this share."""
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(
            target=run_worker, args=(self.job, theirs, self._lock), name=str(self), daemon=True
        )
        with _interrupts_held():
            self.process.start()
        theirs.close()

    def bury(self) -> None:
        """See what a death without a last word means; start again if it may help.

        Raises:
            CollectionError: it has died too often.
        """
        assert self.process is not None
        self.process.join()
        code, n_parts = self.process.exitcode or 0, self._count_parts()
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        self._deaths = self._deaths + 1 if n_parts == self._n_parts else 1
        self._n_parts = n_parts
        if self._deaths >= MAX_DEATHS:
            raise CollectionError(
                str(self),
                expected="a process that finishes its parts",
                found=f"one that {how}, {self._deaths} times without a new part",
                mend="check the machine's memory, or use fewer --processes or a smaller "
                "--batch-size; what is embedded is kept, and the same command goes on from here",
            )
        log.warning("%s %s; another goes on from its last part", self, how)
        self.start()

    def stop(self) -> None:
        """End the process, whatever it is at: its parts are whole or absent."""
        if self.pipe is not None:
            self.pipe.close()
        if self.process is not None and self.process.pid is not None:
            self.process.kill()
            self.process.join()

    def _count_parts(self) -> int:
        """Count the parts of this share by their names: to open thousands takes seconds."""
        share, part_size = self.job.share, self.job.key.part_size
        files = self.job.directory.glob(f"{PART_PREFIX}*.parquet")
        starts = [int(file.stem.removeprefix(PART_PREFIX)) for file in files]
        return sum(start // part_size % share.of == share.number for start in starts)


def share_jobs(job: Job, processes: int) -> list[Job]:
    """Cut a job among processes, its workers and requests too; each has one at least."""

    def nth(whole: int, n: int) -> int:
        return max(1, whole // processes + (n < whole % processes))

    return [
        dataclasses.replace(
            job,
            share=Share(number=n, of=processes),
            crew=dataclasses.replace(
                job.crew, workers=nth(job.crew.workers, n), encoding=nth(job.crew.encoding, n)
            ),
        )
        for n in range(processes)
    ]


def make_parts_in_processes(
    job: Job, store: PartStore, *, processes: int
) -> Generator[int, None, None]:
    """Make the parts that are missing; yield the number of records of each batch.

    Args:
        job: the whole of it.
        store: the locked parts, which are read again at the end.
        processes: how many share the job.

    Raises:
        HoraceError: a worker failed, or died again and again.
        OSError: a part cannot be written.
    """
    workers = [Worker(each, HeldLock(store.lock)) for each in share_jobs(job, processes)]
    try:
        for worker in workers:
            worker.start()
        while busy := {worker.pipe: worker for worker in workers if worker.n_seen is None}:
            for pipe in wait([pipe for pipe in busy if pipe is not None]):
                yield from _hear(busy[cast(Connection, pipe)])
    finally:
        for worker in workers:
            worker.stop()
        store.find()
    seen = {worker.n_seen for worker in workers}
    if seen != {store.n_records}:
        raise CollectionError(
            store.key.source,
            expected=f"the {store.n_records} images that are in parts, for every process",
            found=" and ".join(map(str, seen)),
            mend="the source changes: let it rest, then start anew with --restart",
        )


def _hear(worker: Worker) -> Generator[int, None, None]:
    """Take what a worker says, or notice that it will say nothing any more."""
    assert worker.pipe is not None
    try:
        said = worker.pipe.recv()
    except (EOFError, OSError):
        worker.bury()
        return
    if isinstance(said, Failed):
        if said.errno is not None:
            raise OSError(said.errno, os.strerror(said.errno))
        raise CollectionError(said.line)
    if isinstance(said, Done):
        worker.n_seen = said.n_seen
    else:
        yield said


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Start a process that SIGINT does not reach: the whole group gets it, the parent acts."""
    resource_tracker.ensure_running()  # it lets signals through again, so it goes first
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
