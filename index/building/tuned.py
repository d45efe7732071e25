"""Gives a collection the index that `index.ann.tuning` chooses, and the report beside it.

Rules:
    The collection is locked meanwhile: readers read on, writers are refused.
    Where no index reaches the recall, the collection keeps the one that it has.
    One segment is tuned. Where there are several, deleted rows, or rows in the journal, one is
    made of them beside the collection, which is searched as before until an index is chosen.
    Indexes wait below `segments/`: what a process that is killed leaves of them is swept away by
    the next writer, and by none before, since this one has the lock.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from index.ann.report import as_text, to_json
from index.ann.trials import Goal
from index.ann.tuning import Tuned, tune
from index.storage.lock import LOCK_FILE
from index.storage.manifest import Manifest, read_manifest, write_manifest
from index.storage.segment import SEGMENTS
from index.storage.writer import CollectionWriter
from models.files import TEMPORARY_PREFIX

log = logging.getLogger("horace.index")


def tune_collection(
    path: Path,
    goal: Goal,
    *,
    queries_QD: NDArray[np.float32] | None = None,
    queries_from: str = "",
) -> Tuned:
    """Choose the index of a collection and put it there, with the report.

    Args:
        path: the collection's directory.
        goal: what is asked for.
        queries_QD: (Q, D) queries of the user's own; rows are held back where None.
        queries_from: says where they are from.

    Raises:
        CollectionLockedError: somebody writes to it.
        CollectionError: no index reaches the recall; the collection keeps its own.
        UsageError: no index fits the memory, or there are too few vectors or queries.
    """
    with (
        CollectionWriter.open(path, threads=goal.threads) as writer,
        writer.whole() as whole,
        tempfile.TemporaryDirectory(
            prefix=f"{TEMPORARY_PREFIX}tune.", dir=path / SEGMENTS
        ) as folder,
    ):
        tuned = tune(
            whole.segment.vectors_ND,
            goal,
            Path(folder),
            metric=writer.collection.metric,
            queries_QD=queries_QD,
            queries_from=queries_from,
        )
        writer.replace_index(
            whole,
            tuned.chosen.file,
            factory=tuned.chosen.candidate.factory,
            parameters=tuned.chosen.parameters or {},
            tuning=to_json(tuned),
        )
    return tuned


def tune_built(directory: Path, goal: Goal) -> Manifest:
    """Choose the index of a finished collection that nobody else knows yet.

    Args:
        directory: of the collection, searched exactly so far.
        goal: what its index must reach.

    Returns:
        The manifest, whose build report counts the seconds, too.

    Raises:
        CollectionError: no index reaches the recall.
        UsageError: none fits the memory, or there are too few images to hold any back.
    """
    start_s = time.monotonic()
    tuned = tune_collection(directory, goal)
    log.info("the index:\n%s", as_text(tuned))
    (directory / LOCK_FILE).unlink(missing_ok=True)  # it is of a path that will be gone
    manifest = read_manifest(directory)
    seconds = cast(float, manifest.build["index_s"]) + time.monotonic() - start_s
    manifest = dataclasses.replace(manifest, build={**manifest.build, "index_s": seconds})
    write_manifest(directory, manifest)
    return manifest
