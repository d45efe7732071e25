"""A process that searches a collection while another writes to it.

`python -m benchmarks.ledger_reader C SEED ANSWERS.npz` reads until its standard input ends.

Before every search it asks for the latest snapshot. It keeps what it was answered, with the
moments on the system's monotonic clock, for `benchmarks.answers` to judge.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.answers import Answers
from benchmarks.ledger import DIM, FINGERPRINT
from benchmarks.ledger_writer import is_input_over
from index.collection import Collection

K = 10
PAUSE_S = 0.002
"""After each call: eight readers that never rest leave a writer on two cores a few writes a second,
and what is looked for here needs many."""


def read_until(latest: Callable[[], Collection], seed: int, ended: Callable[[], bool]) -> Answers:
    """Search the latest snapshot again and again, exactly, a query a call."""
    draw = np.random.default_rng(seed)
    calls: list[tuple[object, ...]] = []
    while not ended():
        query_D = draw.standard_normal(DIM)
        query_D = (query_D / np.linalg.norm(query_D)).astype(np.float32)
        before_s = time.monotonic()
        collection = latest()
        found = collection.search(query_D[None], K, fingerprint=FINGERPRINT, exact=True)
        (ids_K,), (scores_K,) = found.ids, found.scores
        hits = collection.rows(ids_K[ids_K >= 0])
        after_s = time.monotonic()
        versions_K = np.full(K, -1, np.int64)
        versions_K[: len(hits)] = [int(row.label or -1) for row in hits]
        padding = (0, K - len(ids_K))
        calls.append(
            (
                before_s, after_s, query_D, np.pad(ids_K, padding, constant_values=-1),
                np.pad(scores_K, padding, constant_values=-np.inf), versions_K,
            )
        )  # fmt: skip
        time.sleep(PAUSE_S)
    return pack(calls)


def pack(calls: list[tuple[object, ...]]) -> Answers:
    """Lay calls side by side."""
    columns = [np.array(column) for column in zip(*calls, strict=True)]
    names = ("before_s", "after_s", "queries_AD", "ids_AK", "scores_AK", "versions_AK")
    return Answers(**dict(zip(names, columns, strict=True)))


def main(path: Path, seed: int, out: Path) -> None:
    """Read until the input ends, then write the answers."""
    collection = Collection.open(path, threads=1)

    def latest() -> Collection:
        nonlocal collection
        collection = collection.latest()
        return collection

    print("opened", flush=True)
    read_until(latest, seed, is_input_over).save(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
