"""Horace's side of `benchmarks.ann`: a collection that `index.tune` tuned, as a user has it.

Rules:
    Settings come from `python -m index.tune C --recall R`, which sees the training vectors alone;
    the queries of the task only show whether they hold.
    Every target has a collection of its own.

Shapes: Q queries, D dimensions, K neighbours.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.indexed import give_index
from benchmarks.measuring import spread_of, turns
from benchmarks.nearest.tasks import K, Task
from index.collection import Collection
from index.knn import faiss_threads
from index.storage.writer import CollectionWriter
from models.bundle import Json
from models.errors import UsageError

FINGERPRINT = "0" * 64
BLOCK = 16_384

Way = Callable[[NDArray[np.float32]], object]
"""Searches one query, (1, D)."""


@dataclass(frozen=True, kw_only=True)
class TunedCollection:
    """An open collection, tuned to a recall.

    Attributes:
        target: what it was tuned to.
        collection: searched on one thread.
        build_s: seconds to build the index that was taken.
        report: of the tuning, as in the manifest.
    """

    target: float
    collection: Collection
    build_s: float
    report: dict[str, Json]


def write_collection(path: Path, task: Task) -> None:
    """Write a task's vectors as a collection of one exact segment, in their order."""
    count, dim = task.vectors_ND.shape
    with CollectionWriter.create(
        path, name=task.name, fingerprint=FINGERPRINT, dim=dim, metric=task.metric
    ) as writer:
        for start in range(0, count, BLOCK):
            block_ND = task.vectors_ND[start : start + BLOCK]
            writer.add(make_rows(start, len(block_ND)), block_ND, fingerprint=FINGERPRINT)
        give_index(writer, "Flat")


def make_rows(start: int, n: int) -> pa.Table:
    """Give metadata of n rows: a key that sorts as it counts, and a source."""
    keys = [f"{number:08}" for number in range(start, start + n)]
    return pa.table({"key": keys, "source": ["benchmark"] * n})


def tune_collection(
    path: Path, into: Path, target: float, *, kinds: Sequence[str] = ()
) -> TunedCollection | None:
    """Tune a copy of a collection; None where no kind reaches the target.

    Raises:
        UsageError: tuning failed for another reason.
    """
    shutil.copytree(path, into, copy_function=_link_vectors)
    command = [sys.executable, "-m", "index.tune", str(into), "--recall", str(target)]
    command += ["--k", str(K), *(["--index", *kinds] if kinds else [])]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode == 1:
        return None
    if done.returncode:
        raise UsageError(" ".join(command[1:]), expected="status 0", found=done.stderr[-500:])
    collection = Collection.open(into, verify=False, threads=1)
    report = dict(collection.manifest.tuning)
    chosen = report["chosen"]
    assert isinstance(chosen, dict)
    return TunedCollection(
        target=target,
        collection=collection,
        build_s=float(str(chosen["build_s"])),
        report=report,
    )


def path_costs(
    collection: Collection, queries_QD: NDArray[np.float32], rounds: int
) -> dict[str, Json]:
    """Split the time of a query a call, by how deep the call begins, each with all below it.

    `faiss_c` is the library behind its Python wrapper, `faiss` with it, on the very index that
    the collection searches by; then come Horace's own layers. `bare` are those over an index
    that answers at once: what they cost themselves, while nothing else is in the caches.
    """
    segment = collection._snapshot.parts[0].segment
    index = segment.index
    if index is None:
        return {}
    parameters = dict(segment.entry.parameters)
    settings, _ = index._settings_of(K, {**index.kind.defaults, **parameters})
    top = index._top
    scores, rows = np.empty((1, K), np.float32), np.empty((1, K), np.int64)
    outputs = [faiss.swig_ptr(scores), faiss.swig_ptr(rows)]
    below: dict[str, Way] = {
        "faiss_c": lambda query: top.search_c(1, faiss.swig_ptr(query), K, *outputs, settings),
        "faiss": lambda query: top.search(query, K, params=settings),
    }
    layers: dict[str, Way] = {
        "AnnIndex.search": lambda query: index.search(query, K, parameters=parameters, threads=1),
        "Segment.search": lambda query: segment.search(
            query, K, exact=False, parameters=parameters, threads=1
        ),
        "Collection.search": lambda query: collection.search(query, K, fingerprint=FINGERPRINT),
    }
    whole = _take_turns({**below, **layers}, queries_QD, rounds)
    with patch.object(index, "_top", _Instant()):
        bare = _take_turns(layers, queries_QD, rounds)
    return {"whole": whole, "bare": bare}


class _Instant:
    """Stands for an index whose search takes no time."""

    def search(self, *_: object, **__: object) -> tuple[object, object]:
        """Find the first rows."""
        return np.zeros((1, K), np.float32), np.arange(K)[None]


def _take_turns(
    ways: dict[str, Way], queries_QD: NDArray[np.float32], rounds: int
) -> dict[str, Json]:
    """Time ways to search, one query a call: microseconds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with faiss_threads(1):
        for number in range(rounds):
            for name, way in turns(ways.items(), number):
                start_s = time.perf_counter()
                for row in range(len(queries_QD)):
                    way(queries_QD[row : row + 1])
                seconds[name].append((time.perf_counter() - start_s) / len(queries_QD))
    return {
        name: {
            f"{which}_us": value
            for which, value in spread_of([1e6 * value for value in values], 2).items()
        }
        for name, values in seconds.items()
    }


def _link_vectors(source: str, target: str) -> None:
    """Copy a file; one that is large and never changes is linked."""
    if source.endswith("vectors.npy"):
        os.link(source, target)
    else:
        shutil.copy2(source, target)
