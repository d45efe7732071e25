"""A million vectors of 256 dimensions: built and tuned within a memory budget, and added to.

Each step is a process of its own, whose memory is watched from outside:
    write   vectors are drawn in blocks and added to a collection, which is then compacted
    tune    `python -m index.tune C --recall R --memory BYTES`, as anybody calls it
    ask     fresh queries of the same clusters, against exact truth
    add     10,000 more vectors, through the writer: no rebuild, and they are found

Rules:
    `held_bytes` is what a process cannot give back (RssAnon and RssShmem), read every 10 ms;
    `resident_bytes` is the kernel's own high-water mark, with the pages of mapped files, which
    the system takes back when it needs room.
    Queries are drawn by another seed than the vectors and are seen by no one who chooses.
    Vectors are unit vectors around 100 centres in 32 directions each, with noise in all 256:
    `benchmarks.filters.draw_clustered`.

The bar: writing and tuning hold no more than the budget, recall@10 holds on the fresh queries,
and adding takes seconds.

Run from the root:
`python -m benchmarks.million --memory 1GB --out benchmarks/results/million.json`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.filters import SYNTHETIC_DIM, draw_clustered
from benchmarks.indexed import give_index
from benchmarks.measuring import command_line
from benchmarks.nearest.tasks import K, make_task
from benchmarks.nearest.tuned import FINGERPRINT, make_rows
from index.ann.memory import parse_size
from index.collection import Collection
from index.knn import COSINE
from index.storage.writer import CollectionWriter
from models.bundle import Json
from models.command import progress, run_command
from models.cpu import cpu_budget, cpu_name
from models.errors import UsageError

BLOCK = 10_000
QUERY_SEED, VECTOR_SEED = 1, 1_000
ADD_MAX_S = 30.0
"""What "seconds, not a rebuild" may mean at most."""

EVERY_S = 0.01
PACKAGES = ("faiss-cpu", "numpy", "pyarrow")
Step = Literal["write", "ask", "add"]


@dataclass(frozen=True, kw_only=True)
class MillionOptions:
    """Build a large collection within a memory budget, ask it, and add to it."""

    memory: str = "1GB"
    """Budget of writing and tuning, such as 1GB: what a process may hold, mapped files aside."""
    vectors: int = 1_000_000
    """How many, in blocks of 10,000."""
    more: int = 10_000
    """How many are added later."""
    recall: float = 0.99
    """Share of the ten nearest that must be found."""
    queries: int = 2000
    """Fresh queries."""
    index: tuple[str, ...] = ()
    """Kinds that may be tried; all that suit where none is given."""
    place: Path | None = None
    """Directory for the collection, with 3 GB of room; the system's temporary one where None."""
    out: Path | None = None
    """JSON file for the result."""
    step: Step | None = None
    """One step alone, of the collection that --place names; all of them, in a place of their own,
    where None."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        parse_size(self.memory)
        if min(self.vectors, self.more, self.queries) < 1:
            raise UsageError("numbers", expected="at least 1 of each", found="fewer")


def main(options: MillionOptions) -> None:
    """Do one step, or all of them, each in a process of its own."""
    if options.step is not None:
        assert options.place is not None
        print(json.dumps(STEPS[options.step](options.place, options)))
        return
    with tempfile.TemporaryDirectory(dir=options.place) as folder:
        report = run_all(Path(folder) / "collection", options)
    print(json.dumps(report, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def run_all(path: Path, options: MillionOptions) -> dict[str, Json]:
    """Run the steps and hold them against the bar."""
    budget = parse_size(options.memory)
    written = watch(own_step("write", path, options))
    tuning = [sys.executable, "-m", "index.tune", str(path), "--recall", str(options.recall)]
    tuning += ["--k", str(K), "--memory", options.memory, "--json"]
    tuned = watch([*tuning, *(["--index", *options.index] if options.index else [])])
    asked = watch(own_step("ask", path, options))
    added = watch(own_step("add", path, options))
    bar: dict[str, Json] = {
        "memory": max(written["held_bytes"], tuned["held_bytes"]) <= budget,
        "recall": asked["result"]["recall"] >= options.recall,
        "add": added["result"]["add_s"] <= ADD_MAX_S and added["result"]["found"] == 1.0,
    }
    print(as_text(written, tuned, asked, added), file=sys.stderr)
    return {
        "command": command_line(),
        "cpu": cpu_name(),
        "cpus": cpu_budget(),
        "versions": {name: version(name) for name in PACKAGES},
        "vectors": options.vectors,
        "dim": SYNTHETIC_DIM,
        "memory_bytes": budget,
        "recall": options.recall,
        "write": written,
        "tune": tuned,
        "ask": asked,
        "add": added,
        "bar": bar,
        "bar_holds": all(bool(held) for held in bar.values()),
    }


def write(path: Path, options: MillionOptions) -> dict[str, Json]:
    """Draw vectors and add them, block by block, then merge them into one exact segment."""
    start_s = time.monotonic()
    with CollectionWriter.create(
        path, name="million", fingerprint=FINGERPRINT, dim=SYNTHETIC_DIM
    ) as writer:
        starts = range(0, options.vectors, BLOCK)
        for start in progress(starts, what="adding", unit="block"):
            add_block(writer, start, min(BLOCK, options.vectors - start))
        added_s = time.monotonic() - start_s
        give_index(writer, "Flat")
    return {"add_s": round(added_s, 2), "compact_s": round(time.monotonic() - start_s - added_s, 2)}


def ask(path: Path, options: MillionOptions) -> dict[str, Json]:
    """Search for fresh queries, a query a call and in one batch, and exactly."""
    queries_QD = draw_clustered(options.queries, seed=QUERY_SEED)
    start_s = time.monotonic()
    with Collection.open(path, threads=1) as collection:
        open_s = time.monotonic() - start_s
        segment = collection.manifest.segments[0]
        bank_ND = collection._snapshot.parts[0].segment.vectors_ND
        task = make_task("million", COSINE, bank_ND, queries_QD)
        found = collection.search(queries_QD, K, fingerprint=FINGERPRINT).ids
        times = []
        for number in range(len(queries_QD)):
            start_s = time.perf_counter()
            collection.search(queries_QD[number : number + 1], K, fingerprint=FINGERPRINT)
            times.append(time.perf_counter() - start_s)
        return {
            "index": segment.factory,
            "parameters": dict(segment.parameters),
            "recall": round(task.recall(collection.row_numbers(found)), 5),
            "queries": len(queries_QD),
            "open_s": round(open_s, 2),
            "single_qps": round(len(times) / sum(times), 1),
            "p50_ms": round(1e3 * statistics.median(times), 3),
            "p99_ms": round(1e3 * float(np.quantile(times, 0.99)), 3),
        }


def add(path: Path, options: MillionOptions) -> dict[str, Json]:
    """Add more, one block a call, and look whether each is the nearest to itself."""
    start_s = time.monotonic()
    with CollectionWriter.open(path) as writer:
        open_s = time.monotonic() - start_s
        before = [segment.name for segment in writer.collection.manifest.segments]
        start_s = time.monotonic()
        for start in range(options.vectors, options.vectors + options.more, BLOCK):
            n = min(BLOCK, options.vectors + options.more - start)
            add_block(writer, start, n)
        add_s = time.monotonic() - start_s
        collection = writer.collection
        asked = collection.ids[-min(options.more, 500) :]
        nearest = collection.search(collection.vectors(asked), 1, fingerprint=FINGERPRINT)
        kept = [segment.name for segment in collection.manifest.segments]
        return {
            "open_s": round(open_s, 2),
            "add_s": round(add_s, 2),
            "count": collection.count,
            "found": float((nearest.ids[:, 0] == asked).mean()),
            "segments_before": list(before),
            "segments_after": list(kept),
        }


STEPS: dict[Step, Callable[[Path, MillionOptions], dict[str, Json]]] = {
    "write": write,
    "ask": ask,
    "add": add,
}


def add_block(writer: CollectionWriter, start: int, n: int) -> None:
    """Draw n vectors by a seed of their own and add them."""
    vectors_ND = draw_clustered(n, seed=VECTOR_SEED + start)
    writer.add(make_rows(start, n), vectors_ND, fingerprint=FINGERPRINT)


def own_step(step: Step, path: Path, options: MillionOptions) -> list[str]:
    """Give the command of a step."""
    return [
        sys.executable, "-m", "benchmarks.million", "--step", step, "--place", str(path),
        "--vectors", str(options.vectors), "--more", str(options.more),
        "--queries", str(options.queries),
    ]  # fmt: skip


def watch(command: Sequence[str]) -> dict:
    """Run a command that prints JSON, and watch its memory.

    Raises:
        UsageError: it fails; what it says has gone to stderr.
    """
    start_s = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        peak = [0]
        ended = threading.Event()
        watcher = threading.Thread(target=_watch_held, args=(process.pid, peak, ended))
        watcher.start()
        assert process.stdout is not None
        printed = process.stdout.read()
        ended.set()
        watcher.join()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UsageError(" ".join(command[1:4]), expected="status 0", found=str(process.returncode))
    return {
        "seconds": round(time.monotonic() - start_s, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "held_bytes": peak[0],
        "resident_bytes": 1024 * usage.ru_maxrss,
        "result": json.loads(printed),
    }


def as_text(written: dict, tuned: dict, asked: dict, added: dict) -> str:
    """Lay the figures out for people."""
    found, more = asked["result"], added["result"]
    steps = {"write": written, "tune": tuned, "ask": asked, "add": added}
    lines = [
        f"{name:<6} {step['seconds']:7.1f} s, held {step['held_bytes'] / 1e6:6.0f} MB, "
        f"with mapped files {step['resident_bytes'] / 1e6:6.0f} MB"
        for name, step in steps.items()
    ]
    return "\n".join(
        [
            *lines,
            f"{found['index']} {found['parameters']}: recall@{K} {found['recall']:.4f} of "
            f"{found['queries']} fresh queries, {found['single_qps']:.0f} a second one a call",
            f"{more['count']} after adding for {more['add_s']} s; found {more['found']:.3f}",
        ]
    )


def _watch_held(pid: int, peak: list[int], ended: threading.Event) -> None:
    """Keep the most that a process held, until it ends."""
    while not ended.wait(EVERY_S):
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        held = [
            int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))
        ]
        peak[0] = max(peak[0], 1024 * sum(held))


if __name__ == "__main__":
    sys.exit(run_command(MillionOptions, main, prog="python -m benchmarks.million"))
