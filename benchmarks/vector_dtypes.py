"""Compare a collection's vectors at fp32 and at fp16: bytes, bits, neighbours, search time.

Both take turns, round by round.

The figures of docs/decisions/0002-vectors-at-fp32.md. Run from the root, after
`python -m index.build --images fashion-mnist --encoder models/shipped/fashion-mnist --out C`:
`python -m benchmarks.vector_dtypes C --out benchmarks/results/vector_dtypes.json`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import faiss
import numpy as np
import tyro

from benchmarks.measuring import command_line, spread_of, turns
from index.collection import Collection
from index.knn import faiss_threads, knn_search
from models.command import run_command
from models.cpu import cpu_budget, cpu_name
from models.encoder import open_encoder
from models.fashion_mnist import open_fashion_mnist
from models.vectors import finish_vectors

K = 10
BATCH_REPEATS, SINGLE_REPEATS = 3, 200


@dataclass(frozen=True, kw_only=True)
class DtypeOptions:
    """Compare fp32 and fp16 vectors of a collection, with 2,000 test images as queries."""

    collection: tyro.conf.Positional[Path]
    """A collection of Fashion-MNIST's training images."""
    queries: int = 2000
    """How many test images to search with."""
    out: Path | None = None
    """JSON file for the result."""


def main(options: DtypeOptions) -> None:
    """Measure, print, and write the result."""
    with Collection.open(options.collection) as collection:
        bank = collection.vectors(collection.ids)
        encoder = open_encoder(collection.manifest.encoder)
        arrays = open_fashion_mnist("test")
        images = arrays.images[: options.queries, :, :, None]
        queries = finish_vectors(encoder.encode(images))
    halves = bank.astype(np.float16)
    exact_scores, exact = knn_search(queries, bank, K)
    _, rounded = knn_search(queries, halves.astype(np.float32), K)
    kept = [len(np.intersect1d(a, b)) / K for a, b in zip(exact, rounded, strict=True)]
    rounded_scores = np.einsum("qd,qkd->qk", queries, halves.astype(np.float32)[exact])
    half_index = faiss.index_factory(bank.shape[1], "SQfp16", faiss.METRIC_INNER_PRODUCT)
    half_index.add(bank)

    def search_fp16(rows: np.ndarray, threads: int) -> None:
        with faiss_threads(threads):
            half_index.search(rows, K)

    def search_fp32(rows: np.ndarray, threads: int) -> None:
        knn_search(rows, bank, K, threads=threads)

    ways = {"fp32": search_fp32, "fp16": search_fp16}
    all_at_once = {n: lambda s=s: s(queries, cpu_budget()) for n, s in ways.items()}
    alone = {n: lambda s=s: s(queries[:1], 1) for n, s in ways.items()}
    report = {
        "command": command_line(),
        "count": len(bank),
        "dim": bank.shape[1],
        "queries": len(queries),
        "fingerprint": encoder.fingerprint,
        "cpu": cpu_name(),
        "cpus": cpu_budget(),
        "versions": {name: version(name) for name in ("faiss-cpu", "numpy")},
        "bytes": {"fp32": bank.nbytes, "fp16": halves.nbytes},
        "rows_equal_to_the_bit": float((halves.astype(np.float32) == bank).all(axis=1).mean()),
        "top10_kept": float(np.mean(kept)),
        "same_order": float((exact == rounded).all(axis=1).mean()),
        "largest_change_of_a_cosine": float(np.abs(rounded_scores - exact_scores).max()),
        "batch_s": {
            name: spread_of(seconds)
            for name, seconds in _take_turns(all_at_once, BATCH_REPEATS).items()
        },
        "single_ms": {
            name: spread_of([1e3 * value for value in seconds])
            for name, seconds in _take_turns(alone, SINGLE_REPEATS).items()
        },
    }
    print(json.dumps(report, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def _take_turns(ways: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Give each way's seconds, a figure a round, after one run of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for number in range(rounds):
        for name, way in turns(ways.items(), number):
            start_s = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start_s)
    return seconds


if __name__ == "__main__":
    sys.exit(run_command(DtypeOptions, main, prog="python -m benchmarks.vector_dtypes"))
