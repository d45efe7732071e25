"""A process that writes to a collection and says so: `python -m benchmarks.ledger_writer C SEED`.

It opens the collection, or makes it, and then adds, upserts, deletes, seals and compacts at random
until it is killed or its standard input ends. Lines on its standard output:

    opened          the writer is open
    begin WRITE     this write is about to be called (`benchmarks.ledger.Write`, as JSON)
    done TIMES      it has returned; before and after on the system's monotonic clock, as JSON

Whoever reads the lines knows what was acknowledged, however the process ends.
"""

from __future__ import annotations

import json
import random
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.indexed import give_index
from benchmarks.ledger import DIM, FINGERPRINT, Kind, Write, rows_of, vectors_of
from index.collection import Collection, id_of
from index.storage.manifest import MANIFEST_FILE
from index.storage.writer import CollectionWriter

KEYS = 3000
"""Names there are; about half of them are in the collection."""

MAX_ROWS = 40
"""Of one write."""

INDEX = "HNSW32"
"""Of a collection that is made one segment: small ones would be searched without."""

WEIGHTS: dict[Kind, int] = {"add": 30, "upsert": 30, "delete": 24, "seal": 8, "compact": 8}


def open_writer(path: Path) -> CollectionWriter:
    """Open the writer of a collection, which is made where there is none."""
    if (path / MANIFEST_FILE).exists():
        return CollectionWriter.open(path)
    return CollectionWriter.create(path, name="ledger", fingerprint=FINGERPRINT, dim=DIM)


def draw_write(draw: random.Random, living: list[str]) -> Write:
    """Draw the next write to a collection with these keys."""
    kind = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    version = draw.getrandbits(62)
    some = draw.sample(range(KEYS), draw.randint(1, MAX_ROWS))
    keys = [f"image-{number:04}" for number in some]
    match kind:
        case "add":
            there = set(living)
            put = {key: version for key in keys if key not in there}
            return Write(kind="add", put=put) if put else Write(kind="seal")
        case "upsert":
            return Write(kind="upsert", put=dict.fromkeys(keys, version))
        case "delete":
            taken = draw.sample(living, min(len(living), len(keys)))
            return Write(kind="delete", taken=tuple(taken))
        case "compact":
            return Write(kind="compact", all=draw.random() < 0.3)
    return Write(kind="seal")


def call(writer: CollectionWriter, write: Write) -> None:
    """Make a write; it is acknowledged when this returns."""
    match write.kind:
        case "add":
            writer.add(rows_of(write.put), vectors_of(write.put), fingerprint=FINGERPRINT)
        case "upsert":
            writer.upsert(rows_of(write.put), vectors_of(write.put), fingerprint=FINGERPRINT)
        case "delete":
            deleted = writer.delete([id_of(key) for key in write.taken])
            assert deleted == len(write.taken)
        case "seal":
            writer.seal()
        case "compact":
            if write.all and writer.collection.count:
                give_index(writer, INDEX)
            else:
                writer.compact()


def write_until(
    path: Path,
    draw: random.Random,
    ended: Callable[[], bool],
    say: Callable[[str], None],
    on_opened: Callable[[CollectionWriter], None] = lambda _: None,
) -> None:
    """Write at random until it is enough."""
    with open_writer(path) as writer:
        on_opened(writer)
        say("opened")
        while not ended():
            write = draw_write(draw, _keys(writer.collection))
            say(f"begin {write.to_line()}")
            before_s = time.monotonic()
            call(writer, write)
            say(f"done {json.dumps([before_s, time.monotonic()])}")


def _keys(collection: Collection) -> list[str]:
    """List the living keys in an order that does not depend on how they lie."""
    return sorted(collection.keys())


def _say(line: str) -> None:
    """Write a line that is out when this returns."""
    print(line, flush=True)


def is_input_over() -> bool:
    """Whether whoever started this process wants it to end."""
    return bool(select.select([sys.stdin], [], [], 0)[0]) and not sys.stdin.read(1)


if __name__ == "__main__":
    write_until(Path(sys.argv[1]), random.Random(int(sys.argv[2])), is_input_over, _say)
