"""SIGKILL at random moments of add, upsert, delete, compact and build, against a ledger.

A process (`benchmarks.ledger_writer`) writes to a collection at random and says through a pipe
what it begins and what has returned. It is killed: in turn while it opens the collection and
within an add, an upsert, a delete and a compaction, at a moment drawn evenly from the time that
such a write takes. After each kill
    the collection opens, and `index.verify` finds no fault;
    every acknowledged write is there, nothing twice, every vector and label to the bit;
    the write that was under way is there whole, or not at all;
    readers that opened the collection up to four kills ago still see what they saw then, to the
    bit and through search, though compactions have deleted their files;
    the oldest of them sees by `latest()` what a new reader sees.
Then the next process goes on with the same collection. In the end nothing lies about that is no
part of it.

A build (`python -m index.build`) of random images is killed as often again and again at random
moments of the time that it takes undisturbed; what stands at its place meanwhile is nothing, or
the whole collection, and it ends in the bytes of an undisturbed one.

A build that ends before its moment is no kill: another is begun. It is about processes that are
killed, not about machines that lose power. Run from the root:
`python -m benchmarks.index_kills --out benchmarks/results/index_kills.json`.
"""

from __future__ import annotations

import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.build_kills import kill_builds
from benchmarks.ledger import FINGERPRINT, Ledger, State, Write, read_state, vectors_of
from benchmarks.measuring import command_line
from index.collection import Collection
from index.errors import CollectionError
from index.storage.manifest import MANIFEST_FILE
from index.storage.writer import CollectionWriter
from index.verify import verify
from models.bundle import Json
from models.command import progress, run_command
from models.cpu import cpu_budget, cpu_name
from models.errors import UsageError

MOMENTS = ("opening", "add", "upsert", "delete", "compact")
"""Where the process is to be killed, in turn."""

FIRST_GUESS_S = {"opening": 1.5, "compact": 0.05}
ANY_GUESS_S = 0.01
"""How long a write takes, before one was seen."""

MARGIN = 1.2
"""Moments are drawn up to the median time, and a little more: what comes next is killed, too."""

HELD_SNAPSHOTS = 4
MAX_SKIPPED = 6
"""Writes of the wanted kind that are let pass, at most, before the one that is killed."""


@dataclass(frozen=True, kw_only=True)
class KillOptions:
    """Kill writers and builds at random moments and hold the collection against a ledger."""

    kills: int = 100
    """How often, builds included: one in six is of a build."""
    seed: int = 5
    """Decides what is written, and the moments."""
    build_images: int = 3000
    """Images of the build that is killed."""
    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        for name in ("kills", "build_images"):
            if getattr(self, name) < 1:
                found = str(getattr(self, name))
                name = name.replace("_", "-")
                raise UsageError(f"--{name}", expected="at least 1", found=found)


@dataclass(kw_only=True)
class Trial:
    """One collection, whose writer is killed again and again.

    Attributes:
        path: the collection's.
        ledger: what it must hold.
        draw: decides what is written and when it is killed.
        held: snapshots of readers, and what they saw when they opened.
        spent_s: how long writes of each kind took.
        struck: what was under way at each kill.
        there: of the writes that were under way, how many were there and how many were not.
    """

    path: Path
    draw: random.Random
    ledger: Ledger = field(default_factory=Ledger)
    held: deque[tuple[Collection, State]] = field(
        default_factory=lambda: deque(maxlen=HELD_SNAPSHOTS)
    )
    spent_s: dict[str, list[float]] = field(default_factory=dict)
    struck: Counter[str] = field(default_factory=Counter)
    there: Counter[str] = field(default_factory=Counter)

    def kill(self, moment: str) -> None:
        """Start a writer, kill it at a moment, and look at what is left.

        Raises:
            AssertionError: it is not what was promised.
        """
        self._start_and_kill(moment)
        self.look()

    def look(self) -> None:
        """Hold the collection, and the snapshots of its readers, against the ledger."""
        if not (self.path / MANIFEST_FILE).exists():  # killed before it was made
            assert not self.ledger.acknowledged, "what was acknowledged is gone"
            self.ledger.under_way = None
            return
        with Collection.open(self.path, verify=False) as early:
            seen = read_state(early)  # before anybody mends anything
        found = verify(self.path)
        assert not found.faults, found.faults
        collection = Collection.open(self.path)
        write = self.ledger.under_way
        is_there = self.ledger.settle(collection)
        assert seen == self.ledger.state
        if write is not None and is_there is not None:
            self.there[f"{write.kind} {'there' if is_there else 'not there'}"] += 1
        for snapshot, state in self.held:
            check_snapshot(snapshot, state, self.draw)
        if self.held:
            assert read_state(self.held[0][0].latest()) == self.ledger.state
        check_snapshot(collection, self.ledger.state, self.draw)
        self.held.append((collection, self.ledger.state))

    def _start_and_kill(self, moment: str) -> None:
        """Start a writer and kill it.

        Raises:
            CollectionError: it ended of itself.
        """
        command = [sys.executable, "-m", "benchmarks.ledger_writer", str(self.path)]
        command.append(str(self.draw.getrandbits(30)))
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stderr is not None
            opened = self._run_up_to(moment, process)
            time.sleep(self.draw.uniform(0, MARGIN * self._guess_s(moment)))
            process.kill()
            for line in process.stdout:
                opened |= line == "opened\n"
                self._note(line)
            status, said = process.wait(), process.stderr.read()
        if status != -signal.SIGKILL:
            raise CollectionError("a writer", expected="one that goes on", found=said.strip())
        at = self.ledger.under_way.kind if self.ledger.under_way else "between writes"
        self.struck[at if opened else "opening"] += 1

    def _run_up_to(self, moment: str, process: subprocess.Popen[str]) -> bool:
        """Read what a writer says up to the moment's beginning; whether it is open."""
        assert process.stdout is not None
        if moment == "opening":
            return False
        started_s, left = time.monotonic(), self.draw.randint(1, MAX_SKIPPED)
        for line in process.stdout:
            if line == "opened\n":
                self.spent_s.setdefault("opening", []).append(time.monotonic() - started_s)
            self._note(line)
            if self.ledger.under_way is not None and line.startswith("begin"):
                left -= self.ledger.under_way.kind == moment
                if not left:
                    break
        return True

    def _note(self, line: str) -> None:
        """Enter into the ledger what a writer said; a line that was cut off was not said."""
        word, _, rest = line.rstrip("\n").partition(" ")
        if not line.endswith("\n"):
            return
        if word == "begin":
            self.ledger.begin(Write.from_line(rest))
        elif word == "done":
            assert self.ledger.under_way is not None
            before_s, after_s = json.loads(rest)
            kind = self.ledger.under_way.kind
            self.spent_s.setdefault(kind, []).append(after_s - before_s)
            self.ledger.acknowledge()

    def _guess_s(self, moment: str) -> float:
        """Say how long such a write takes."""
        seen = self.spent_s.get(moment)
        return statistics.median(seen) if seen else FIRST_GUESS_S.get(moment, ANY_GUESS_S)


def check_snapshot(collection: Collection, state: State, draw: random.Random) -> None:
    """Hold what a reader sees against what it saw when it opened, also through a search.

    Raises:
        AssertionError: it sees something else.
    """
    assert read_state(collection) == state, "a reader's snapshot has changed"
    if not state:
        return
    keys = draw.sample(sorted(state), min(8, len(state)))
    queries_QD = vectors_of({key: state[key] for key in keys})
    found = collection.search(queries_QD, 1, fingerprint=FINGERPRINT, exact=True)
    assert [row.key for row in collection.rows(found.ids[:, 0])] == keys
    np.testing.assert_allclose(found.scores[:, 0], 1, atol=1e-5)


def kill_writers(path: Path, kills: int, draw: random.Random) -> dict[str, Json]:
    """Kill the writers of a collection, and say what became of it."""
    trial = Trial(path=path, draw=draw)
    for number in progress(range(kills), what="killing", total=kills, unit="kill"):
        trial.kill(MOMENTS[number % len(MOMENTS)])
    with CollectionWriter.open(path):
        found = verify(path)  # what killed writers had left lying about is swept away
        assert (found.faults, found.unknown) == ([], []), found
    return {
        "kills": kills,
        "struck_in": dict(sorted(trial.struck.items())),
        "under_way": dict(sorted(trial.there.items())),
        "acknowledged": dict(sorted(trial.ledger.acknowledged.items())),
        "images": len(trial.ledger.state),
        "median_ms": {
            kind: round(1e3 * statistics.median(times), 3)
            for kind, times in sorted(trial.spent_s.items())
        },
    }


def main(options: KillOptions) -> None:
    """Kill, look, and write the result.

    Raises:
        AssertionError: something was lost, twice there, or otherwise than promised.
    """
    start_s, draw = time.monotonic(), random.Random(options.seed)
    n_builds = options.kills // (len(MOMENTS) + 1)
    with tempfile.TemporaryDirectory() as folder:
        written = kill_writers(Path(folder) / "written", options.kills - n_builds, draw)
        built = kill_builds(Path(folder), options.build_images, n_builds, draw)
    report: dict[str, Json] = {
        "command": command_line(),
        "cpu": cpu_name(),
        "cpus": cpu_budget(),
        "versions": {name: version(name) for name in ("faiss-cpu", "numpy", "pyarrow")},
        "seed": options.seed,
        "elapsed_s": round(time.monotonic() - start_s, 1),
        "writers": written,
        "builds": built,
        "held": True,
    }
    print(json.dumps(report, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(KillOptions, main, prog="python -m benchmarks.index_kills"))
