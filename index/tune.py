"""`python -m index.tune C --recall .99`: choose a collection's index by its measured recall.

Kinds of index that suit the number of vectors, their length and the memory are built over the
collection's own vectors; search parameters are swept on queries that no index has seen, against
exact truth; the cheapest setting that reaches the recall is taken, and the report lands in
`manifest.json` under `tuning`.

Rules:
    Where none reaches it the collection keeps the index that it has, and the command says what
    the best one reached: status 1.
    The collection is locked meanwhile: readers read on, writers are refused.
    One segment is tuned. Where there are several, deleted rows, or rows in the journal, one is
    made of them beside the collection, which is searched as before until an index is chosen.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tyro.conf import Positional

from index.ann import report
from index.ann.candidates import Candidate
from index.ann.kinds import FLAT
from index.ann.making import SEED
from index.ann.memory import as_size, parse_size
from index.ann.trials import Goal
from index.ann.tuning import MAX_QUERIES, Tuned, plan
from index.building.tuned import tune_collection
from index.collection import Collection
from index.errors import CollectionError, mend_of
from index.evaluation.queries import open_queries
from index.milvus.connection import require_directory
from models.command import run_command
from models.errors import UsageError, reason_of


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Choose a collection's index by its measured recall; status 1 where none reaches it."""

    collection: Positional[Path]
    """The collection's directory."""
    recall: float = 0.99
    """Mean share of the k nearest that a search must find."""
    k: int = 10
    """Neighbours."""
    memory: str | None = None
    """Most that this process may hold while it builds, mapped files aside, such as 500MB; what
    does not fit is not built. As much as there is where none is given."""
    index: tuple[str, ...] = ()
    """Kinds to try instead of those that suit: Flat, HNSW32, HNSW32,SQ8,RFlat,
    HNSW32,SQfp16,RFlat, IVF256,PQ64x4fs,RFlat, RR,IVF256,RaBitQfs,RFlat, CAGRA64 and their like."""
    queries: int | None = None
    """Images that are held back to ask with, at most a tenth of all; up to 2,000 where none is
    given. Of fewer than 200 images none can be, and exact search is taken, which needs none."""
    query_from: str | None = None
    """Ask with these instead: a collection of the same encoder, or a source as for
    `index.build`."""
    threads: int | None = None
    """CPU threads; the CPU budget where none is given."""
    plot: Path | None = None
    """PNG of recall against queries a second."""
    json: bool = False
    """Print the report as JSON."""
    dry_run: bool = False
    """Say which kinds would be built and what they would take, and do nothing."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        self.goal  # noqa: B018  # checks itself

    @property
    def goal(self) -> Goal:
        """What is asked for."""
        return Goal(
            recall=self.recall,
            k=self.k,
            memory_bytes=None if self.memory is None else parse_size(self.memory),
            n_queries=self.queries,
            factories=self.index,
            threads=self.threads,
        )


def main(options: TuneOptions) -> None:
    """Tune the collection and say what came of it.

    Raises:
        CollectionError: no index reaches the recall, or the disk refuses an index or the picture.
        UsageError: nothing fits the memory, or the picture has no place.
    """
    require_directory(options.collection)
    if options.dry_run:
        with Collection.open(options.collection, verify=False) as collection:
            candidates = plan(collection.count, collection.dim, options.goal)
        print(_plan_json(candidates) if options.json else _plan_text(candidates))
        return
    if options.plot is not None:
        _check_place(options.plot)
    queries_QD = None if options.query_from is None else _read_queries(options)
    try:
        tuned = tune_collection(
            options.collection,
            options.goal,
            queries_QD=queries_QD,
            queries_from=options.query_from or "",
        )
    except OSError as error:
        raise CollectionError(
            f"collection {options.collection}",
            expected="one that can be written, with room for the indexes that are tried out",
            found=reason_of(error),
            mend=f"{mend_of(error)}; it keeps the index that it has",
        ) from error
    print(json.dumps(report.to_json(tuned), indent=2) if options.json else report.as_text(tuned))
    if options.plot is not None:
        _draw(options.plot, tuned)


def _check_place(plot: Path) -> None:
    """Refuse a picture that could not be written, before hours of work."""
    folder = plot.parent
    if not folder.is_dir():
        found = "no such directory"
    elif plot.is_dir():
        found = "a directory"
    elif not os.access(folder, os.W_OK):
        found = "a directory that cannot be written"
    else:
        return
    raise UsageError(f"--plot {plot}", expected="a file that can be written", found=found)


def _draw(plot: Path, tuned: Tuned) -> None:
    """Draw the picture; where that is refused the index is in its place all the same."""
    try:
        report.draw(plot, tuned)
    except OSError as error:
        raise CollectionError(
            f"--plot {plot}",
            expected="a file that can be written",
            found=reason_of(error),
            mend="the index is in its place; tune again for another picture",
        ) from error


def _read_queries(options: TuneOptions) -> NDArray[np.float32]:
    """Read the user's own queries, or a sample of them."""
    assert options.query_from is not None
    goal = options.goal
    with ExitStack() as stack:
        collection = stack.enter_context(Collection.open(options.collection, verify=False))
        queries = open_queries(stack, collection, options.query_from)
        queries = queries.sample(goal.n_queries or MAX_QUERIES, seed=SEED)
        return np.ascontiguousarray(queries.vectors(np.arange(len(queries))))


def _plan_text(candidates: list[Candidate]) -> str:
    """Lay the kinds out for a terminal."""
    lines = [f"{'index':<28} {'to build':>10} {'to search':>10}"]
    for one in candidates:
        sizes = f"{as_size(one.build_bytes):>10} {as_size(one.search_bytes):>10}"
        if one.factory == FLAT:
            sizes = f"{'-':>10} {'-':>10}  exact: there is nothing to build"
        lines.append(f"{one.factory:<28} {sizes}" + ("" if one.fits else "  does not fit"))
    return "\n".join(lines)


def _plan_json(candidates: list[Candidate]) -> str:
    """Lay the kinds out for machines."""
    found = [
        {
            "factory": one.factory,
            "build_memory_bytes": one.build_bytes,
            "search_memory_bytes": one.search_bytes,
            "fits": one.fits,
        }
        for one in candidates
    ]
    return json.dumps(found, indent=2)


if __name__ == "__main__":
    sys.exit(run_command(TuneOptions, main, prog="python -m index.tune"))
