"""What deleted images cost a search, before compaction has dropped them.

A collection of clustered random vectors, once with an HNSW index and once without. Images are
deleted: one, 1%, 10%, 30% and 60% of all, drawn at random, and `nearest`, the one nearest to each
query, which is what an update of images leaves behind. Ways, which take turns in every round:
    search    `Collection.search`, which asks for a few rows more and drops the dead ones.
    mask      the dead ones left out as a filter leaves images out: see `benchmarks.filters`.
    undeleted the collection before anything was deleted.
Recall@10 is against an exact search of the living. A query a call and batches of 256, on one
thread.

Run from the root: `python -m benchmarks.tombstones --out benchmarks/results/tombstones.json`.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.filters import Search, draw_clustered, recall, take_turns, write_synthetic
from benchmarks.indexed import give_index
from benchmarks.measuring import command_line
from index.collection import Collection
from index.storage.snapshot import join_masks
from index.storage.writer import CollectionWriter
from models.command import run_command
from models.cpu import cpu_budget, cpu_name
from models.errors import UsageError

K, BATCH = 10, 256
SHARES = (0.01, 0.1, 0.3, 0.6)


@dataclass(frozen=True, kw_only=True)
class TombstoneOptions:
    """Search collections from which images were deleted."""

    count: int = 60_000
    """Images before anything is deleted."""
    queries: int = 256
    """How many vectors of the same clusters to search with."""
    singles: int = 100
    """How many of them are timed a query a call, in every round."""
    rounds: int = 7
    """How often the ways take turns."""
    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        """Check that there is something to delete."""
        if self.count < 10 * self.queries:
            raise UsageError("--count", expected="ten times --queries", found=str(self.count))


def main(options: TombstoneOptions) -> None:
    """Measure, print, and write the result."""
    report = {
        "command": command_line(),
        "cpu": cpu_name(),
        "cpus": cpu_budget(),
        "versions": {name: version(name) for name in ("faiss-cpu", "numpy", "pyarrow")},
        "k": K,
        "rounds": options.rounds,
        "cases": [],
    }
    with tempfile.TemporaryDirectory() as place:
        path = write_synthetic(Path(place) / "synthetic", options.count)
        queries_QD = draw_clustered(options.queries, seed=11)
        for index in ("HNSW32", "Flat"):
            with CollectionWriter.open(path) as writer:
                give_index(writer, index)
            report["cases"] += measure(path, queries_QD, options)
    print(json.dumps(report, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def measure(path: Path, queries_QD: NDArray[np.float32], options: TombstoneOptions) -> list[dict]:
    """Delete some of a collection, or more, from a copy of it each time."""
    rows = []
    with Collection.open(path, threads=1) as whole:
        nearest = search(whole, exact=True)(queries_QD)[:, 0]
        shuffled = np.random.default_rng(0).permutation(whole.ids)
        cases = {"one": shuffled[:1], "nearest": nearest}
        cases |= {f"{100 * share:g}%": shuffled[: int(share * len(shuffled))] for share in SHARES}
        for name, ids in cases.items():
            copy = shutil.copytree(path, path.with_name("copy"))
            with CollectionWriter.open(copy, threads=1) as writer:
                writer.delete(ids)
                rows.append(compare(whole, writer.collection, queries_QD, options))
            rows[-1] |= {"deleted": name}
            shutil.rmtree(copy)
    return rows


def compare(
    whole: Collection,
    living: Collection,
    queries_QD: NDArray[np.float32],
    options: TombstoneOptions,
) -> dict:
    """Take turns at what is left."""
    ways = {"search": search(living), "mask": masked(whole, living), "undeleted": search(whole)}
    truth = search(living, exact=True)(queries_QD)
    blocks = [queries_QD[n : n + BATCH] for n in range(0, len(queries_QD), BATCH)]
    singles = [query_D[None] for query_D in queries_QD[: options.singles]]
    return {
        "index": whole.factory,
        "dead": whole.count - living.count,
        "count": whole.count,
        "recall": {key: recall(ways[key](queries_QD), truth) for key in ("search", "mask")},
        "single_ms": take_turns(ways, singles, options.rounds),
        "batch_ms": take_turns(ways, blocks, options.rounds),
    }


def search(collection: Collection, *, exact: bool = False) -> Search:
    """Search as anybody does."""
    return lambda q: collection.search(q, K, fingerprint=collection.fingerprint, exact=exact).ids


def masked(whole: Collection, living: Collection) -> Search:
    """Search with the dead left out as by a filter."""
    mask_N = np.isin(whole.ids, living.ids)
    parts = whole._snapshot.parts
    masks = np.split(mask_N, np.cumsum([part.count for part in parts])[:-1])
    selection = join_masks("alive", masks, parts)
    return lambda q: whole.search(q, K, fingerprint=whole.fingerprint, filter=selection).ids


if __name__ == "__main__":
    sys.exit(run_command(TombstoneOptions, main, prog="python -m benchmarks.tombstones"))
