"""Queries a second at a measured recall: Horace as it tunes itself, and the graphs of four others.

Two data sets: ann-benchmarks' fashion-mnist-784-euclidean, rebuilt from the data set, and what
the shipped encoder makes of the same images, by cosine. 60,000 training images are searched for
the ten nearest of 10,000 test images; one thread, a query a call and in batches.

Rules:
    Horace is searched through `Collection.search`, by settings that `index.tune` chose on held
    out training images: the test images only show whether they hold.
    Of faiss's HNSW, hnswlib, usearch and voyager the cheapest setting is taken that reaches the
    recall on the test images themselves, in every size of graph: they are given the answer.
    All take turns within every round, so that a noisy moment hits all of them.
    Recall is counted as ann-benchmarks counts it: `benchmarks.nearest.tasks`.

The bar is for the pixels: at .99 Horace answers at least 1.2 times as many queries, one a call, as
the best of the four, at .998 at least 1.5 times, and its recall holds on the test images. The
embeddings are held against the same figures: `bar_holds` of a task is that data set's, and that of
the whole file wants both. `path` says what each layer of a call costs:
docs/decisions/0022-the-path-of-a-query.md.

Run from the root, after `python -m index.build --images fashion-mnist --encoder
models/shipped/fashion-mnist --out artifacts/bench/collection`, and with `fashion-mnist:test` to
`artifacts/bench/collection-test`: `python -m benchmarks.ann --out benchmarks/results/ann.json`.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.measuring import command_line, spread_of, turns
from benchmarks.nearest.peers import BUILDERS, EF_CONSTRUCTION, EFFORTS, Peer
from benchmarks.nearest.tasks import EPSILON, K, Task, embedding_task, pixel_task
from benchmarks.nearest.tuned import (
    FINGERPRINT,
    TunedCollection,
    path_costs,
    tune_collection,
    write_collection,
)
from index.collection import Collection
from index.knn import faiss_threads
from models.bundle import Json
from models.command import progress, run_command
from models.cpu import cpu_budget, cpu_name
from models.errors import UsageError

TARGETS = (0.9, 0.95, 0.99, 0.998, 0.999)
BARS = {0.99: 1.2, 0.998: 1.5}
MAIN_TARGET = 0.99
HORACE, EXACT = "Horace", "exact"
PACKAGES = ("faiss-cpu", "hnswlib", "usearch", "voyager", "numpy")


@dataclass(frozen=True, kw_only=True)
class AnnOptions:
    """Compare Horace's tuned search with four libraries of graphs."""

    data: Literal["both", "pixels", "embeddings"] = "both"
    """What to search in."""
    train: Path = Path("artifacts/bench/collection")
    """A collection of the training images, of which the vectors are taken."""
    test: Path = Path("artifacts/bench/collection-test")
    """A collection of the test images, by the same encoder."""
    queries: int = 10_000
    """Test images to measure recall with."""
    links: tuple[int, ...] = (16, 24)
    """Sizes of the graphs: each is built, and the faster counts."""
    targets: tuple[float, ...] = TARGETS
    """Recalls to compare at."""
    index: tuple[str, ...] = ()
    """Kinds that Horace may try; all that suit where none is given."""
    vectors: int = 60_000
    """Training images to search in."""
    singles: int = 500
    """Queries that are timed one a call, in every round."""
    batch: int = 500
    """Queries of a batch."""
    exacts: int = 50
    """Queries that exact search is timed with, one a call."""
    rounds: int = 5
    """How often all take turns."""
    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        """Check that there are queries enough."""
        if self.queries < max(self.singles, self.batch):
            raise UsageError(
                "--queries", expected="at least --singles and --batch", found=str(self.queries)
            )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to search that is timed.

    Attributes:
        library: whose.
        target: the recall that it is for.
        index: which index.
        parameters: of the search.
        recall: that it has on the queries.
        build_s: seconds to build the index.
        prepare: sets the parameters, where they are not the call's.
        single: searches one query (D,).
        batch: searches many (Q, D), on one thread.
    """

    library: str
    target: float
    index: str
    parameters: dict[str, int]
    recall: float
    build_s: float
    prepare: Callable[[], None]
    single: Callable[[NDArray[np.float32]], object]
    batch: Callable[[NDArray[np.float32]], object]


def main(options: AnnOptions) -> None:
    """Measure, print, and write the result."""
    start_s = time.monotonic()
    tasks = []
    if options.data != "embeddings":
        tasks.append(measure(pixel_task(options.vectors, options.queries), options))
    if options.data != "pixels":
        task = embedding_task(options.train, options.test, options.vectors, options.queries)
        tasks.append(measure(task, options))
    report: dict[str, Json] = {
        "command": command_line(),
        "cpu": cpu_name(),
        "cpus": cpu_budget(),
        "versions": {name: version(name) for name in PACKAGES},
        "k": K,
        "epsilon": dict(EPSILON),
        "ef_construction": EF_CONSTRUCTION,
        "links": list(options.links),
        "queries": options.queries,
        "singles": options.singles,
        "batch": options.batch,
        "rounds": options.rounds,
        "search_threads": 1,
        "tasks": list(tasks),
        "bar_holds": all(bool(task["bar_holds"]) for task in tasks),
        "seconds": round(time.monotonic() - start_s, 1),
    }
    print(json.dumps(report, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def measure(task: Task, options: AnnOptions) -> dict[str, Json]:
    """Tune, build, choose the settings, and let them take turns."""
    with tempfile.TemporaryDirectory() as place:
        tuned = tune_all(task, Path(place), options)
        settings = [horace_setting(task, one) for one in tuned]
        settings.append(exact_setting(task, tuned[0].collection))
        for build in progress(BUILDERS, what=f"{task.name}: building", unit="peer"):
            for links in options.links:
                settings += peer_settings(task, build(task, links, cpu_budget()), options.targets)
        with faiss_threads(1):
            rows = take_turns(task, settings, options)
        main_one = next((one for one in tuned if one.target == MAIN_TARGET), tuned[0])
        path = path_costs(main_one.collection, task.queries_QD[: options.singles], options.rounds)
        tunings = {str(one.target): one.report for one in tuned}
        for one in tuned:
            one.collection.close()
    comparison = compare(rows, options.targets)
    print(as_table(task, rows, comparison), file=sys.stderr)
    return {
        "name": task.name,
        "metric": task.metric,
        "count": len(task.vectors_ND),
        "dim": task.vectors_ND.shape[1],
        "settings": list(rows),
        "comparison": list(comparison),
        "bar_holds": all(bool(row["holds"]) for row in comparison if "bar" in row),
        "path": path,
        "tuning": tunings,
    }


def tune_all(task: Task, place: Path, options: AnnOptions) -> list[TunedCollection]:
    """Tune to every target among all kinds, but below the main one with what won there."""
    write_collection(place / "collection", task)
    targets = options.targets
    first = MAIN_TARGET if MAIN_TARGET in targets else targets[0]
    best = tune_collection(place / "collection", place / str(first), first, kinds=options.index)
    if best is None:
        raise UsageError("tuning", expected=f"an index of recall {first}", found="none")
    tuned = [best]
    for target in progress(targets, what=f"{task.name}: tuning", unit="target"):
        if target != first:
            kinds = [best.collection.factory] if target < first else options.index
            one = tune_collection(place / "collection", place / str(target), target, kinds=kinds)
            tuned += [] if one is None else [one]
    return tuned


def horace_setting(task: Task, tuned: TunedCollection) -> Setting:
    """Search a tuned collection as anybody does."""
    collection = tuned.collection

    def search(queries_QD: NDArray[np.float32]) -> NDArray[np.int64]:
        return collection.search(queries_QD, K, fingerprint=FINGERPRINT).ids

    return Setting(
        library=HORACE,
        target=tuned.target,
        index=collection.factory,
        parameters=dict(collection.manifest.segments[0].parameters),
        recall=task.recall(collection.row_numbers(search(task.queries_QD))),
        build_s=tuned.build_s,
        prepare=lambda: None,
        single=lambda query_D: search(query_D[None]),
        batch=search,
    )


def exact_setting(task: Task, collection: Collection) -> Setting:
    """Search a collection exactly."""

    def search(queries_QD: NDArray[np.float32]) -> NDArray[np.int64]:
        return collection.search(queries_QD, K, fingerprint=FINGERPRINT, exact=True).ids

    few_QD = task.queries_QD[:200]
    return Setting(
        library=EXACT,
        target=1.0,
        index="Flat",
        parameters={},
        recall=task.recall(collection.row_numbers(search(few_QD))),
        build_s=0.0,
        prepare=lambda: None,
        single=lambda query_D: search(query_D[None]),
        batch=search,
    )


def peer_settings(task: Task, peer: Peer, targets: Sequence[float]) -> list[Setting]:
    """Find the least effort by which a graph reaches each target; none where it never does."""

    @functools.cache
    def recall(effort: int) -> float:
        peer.set_effort(effort)
        return task.recall(peer.batch(task.queries_QD, cpu_budget()))

    settings = []
    for target in targets:
        place = bisect_left(EFFORTS, target, key=recall)
        if place == len(EFFORTS):
            continue
        effort = EFFORTS[place]
        settings.append(
            Setting(
                library=peer.name,
                target=target,
                index=f"HNSW{peer.links}",
                parameters={"ef": effort},
                recall=recall(effort),
                build_s=peer.build_s,
                prepare=functools.partial(peer.set_effort, effort),
                single=peer.single,
                batch=functools.partial(_on_one_thread, peer),
            )
        )
    return settings


def take_turns(
    task: Task, settings: Sequence[Setting], options: AnnOptions
) -> list[dict[str, Json]]:
    """Time every setting in every round; queries move on from round to round."""
    singles: list[list[float]] = [[] for _ in settings]
    batches: list[list[float]] = [[] for _ in settings]
    for number in progress(range(options.rounds), what=f"{task.name}: rounds", unit="round"):
        queries_QD = np.roll(task.queries_QD, -number * options.singles, axis=0)
        for place, setting in turns(enumerate(settings), number):
            n = options.exacts if setting.library == EXACT else options.singles
            setting.prepare()
            setting.batch(queries_QD[-20:])  # brings the index back into the caches
            start_s = time.perf_counter()
            for query_D in queries_QD[:n]:
                setting.single(query_D)
            singles[place].append(n / (time.perf_counter() - start_s))
            start_s = time.perf_counter()
            setting.batch(queries_QD[: options.batch])
            batches[place].append(options.batch / (time.perf_counter() - start_s))
    return [
        {
            "library": setting.library,
            "target": setting.target,
            "index": setting.index,
            "parameters": dict(setting.parameters),
            "recall": round(setting.recall, 5),
            "build_s": round(setting.build_s, 2),
            "single_qps": spread_of(single, 1),
            "batch_qps": spread_of(batch, 1),
        }
        for setting, single, batch in zip(settings, singles, batches, strict=True)
    ]


def compare(rows: Sequence[dict], targets: Sequence[float]) -> list[dict[str, Json]]:
    """Hold Horace against the fastest of the others, at each recall."""
    comparison: list[dict[str, Json]] = []
    for target in targets:
        at_target = [row for row in rows if row["target"] == target]
        own = [row for row in at_target if row["library"] == HORACE]
        others = [row for row in at_target if row["library"] != HORACE]
        found: dict[str, Json] = {"target": target, "holds": False}
        if own and others:
            best = max(others, key=lambda row: row["single_qps"]["median"])
            ratio = own[0]["single_qps"]["median"] / best["single_qps"]["median"]
            found |= {
                "best_peer": f"{best['library']} {best['index']}",
                "ratio": round(ratio, 3),
                "batch_ratio": round(
                    own[0]["batch_qps"]["median"]
                    / max(row["batch_qps"]["median"] for row in others),
                    3,
                ),
                "recall_holds": own[0]["recall"] >= target,
                "holds": own[0]["recall"] >= target and ratio >= BARS.get(target, 0),
            }
        if target in BARS:
            found["bar"] = BARS[target]
        comparison.append(found)
    return comparison


def as_table(task: Task, rows: Sequence[dict], comparison: Sequence[dict]) -> str:
    """Lay the figures out for people."""
    lines = [
        f"{task.name}: {len(task.vectors_ND)} x {task.vectors_ND.shape[1]}, {task.metric}",
        f"{'target':>6} {'library':<11} {'index':<27} {'recall':>7} {'QPS':>7} {'batched':>8} "
        f"{'build s':>7}  parameters",
    ]
    for row in sorted(rows, key=lambda row: (row["target"], -row["single_qps"]["median"])):
        parameters = " ".join(f"{name}={value}" for name, value in row["parameters"].items())
        lines.append(
            f"{row['target']:6} {row['library']:<11} {row['index']:<27} {row['recall']:7.4f} "
            f"{row['single_qps']['median']:7.0f} {row['batch_qps']['median']:8.0f} "
            f"{row['build_s']:7.1f}  {parameters}"
        )
    lines += [
        f"at {row['target']}: {row['ratio']:.2f} times {row['best_peer']}"
        for row in comparison
        if "ratio" in row
    ]
    return "\n".join(lines)


def _on_one_thread(peer: Peer, queries_QD: NDArray[np.float32]) -> object:
    """Search a batch without help."""
    return peer.batch(queries_QD, 1)


if __name__ == "__main__":
    sys.exit(run_command(AnnOptions, main, prog="python -m benchmarks.ann"))
