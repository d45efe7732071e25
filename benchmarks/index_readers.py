"""Eight readers search while one writer adds, upserts, deletes, seals and compacts for a minute.

Every answer must equal an exact search over some snapshot that was current during the call, with
the metadata of that snapshot: `benchmarks.answers` works it out anew from what was written. Three
ways of reading take the same minute, one after another:
    processes   eight processes, each with the collection open, ask for its latest snapshot; the
                writer is a process of its own.
    threads     eight threads of one process do so with one shared collection.
    writer      eight threads beside the writer, in its process, search what it offers,
                `CollectionWriter.collection`.

At the end the collection is verified, and a new reader sees what was written. Run from the root:
`python -m benchmarks.index_readers --out benchmarks/results/index_readers.json`.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from benchmarks.answers import Answers, TimedWrite, judge
from benchmarks.ledger import Ledger, Write
from benchmarks.ledger_reader import read_until
from benchmarks.ledger_writer import write_until
from benchmarks.measuring import command_line
from index.collection import Collection
from index.errors import CollectionError
from index.storage.writer import CollectionWriter
from index.verify import verify
from models.bundle import Json
from models.command import run_command
from models.cpu import cpu_budget, cpu_name
from models.errors import UsageError

Way = Literal["processes", "threads", "writer"]


@dataclass(frozen=True, kw_only=True)
class ReadersOptions:
    """Search a collection while it is written to, and check every answer."""

    seconds: float = 60.0
    """How long, for each way of reading."""
    readers: int = 8
    """How many search at once."""
    seed: int = 5
    """Decides what is written and asked."""
    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        for name in ("seconds", "readers"):
            if getattr(self, name) <= 0:
                found = str(getattr(self, name))
                raise UsageError(f"--{name}", expected="more than none", found=found)


def run_way(
    way: Way, path: Path, options: ReadersOptions
) -> tuple[list[TimedWrite], list[Answers]]:
    """Write and read for a while; give both sides of it."""
    lines: list[str] = []
    if way == "writer":
        answers = read_beside_writer(path, options, lines.append)
    else:
        with writing_process(path, options.seed, lines):
            reading = processes_reading if way == "processes" else threads_reading
            with reading(path, options) as answers:
                time.sleep(options.seconds)
    return timed_writes(lines), answers


@contextmanager
def writing_process(path: Path, seed: int, lines: list[str]) -> Iterator[None]:
    """Have a process write within the block; what it says is in `lines` afterwards.

    Raises:
        CollectionError: it failed.
    """
    with process("benchmarks.ledger_writer", str(path), str(seed)) as writer:
        assert writer.stdout is not None
        assert writer.stdin is not None
        lines.append(writer.stdout.readline().rstrip("\n"))
        drain = threading.Thread(
            target=lambda: lines.extend(line.rstrip("\n") for line in writer.stdout or ())
        )
        drain.start()
        try:
            yield
        finally:
            writer.stdin.close()
            drain.join()
    _check(writer)


@contextmanager
def processes_reading(path: Path, options: ReadersOptions) -> Iterator[list[Answers]]:
    """Have processes read within the block; their answers are in the list afterwards."""
    answers: list[Answers] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        files = [Path(folder) / f"{number}.npz" for number in range(options.readers)]
        readers = [
            stack.enter_context(
                process(
                    "benchmarks.ledger_reader", str(path), str(options.seed + number), str(file)
                )
            )
            for number, file in enumerate(files)
        ]
        for reader in readers:
            assert reader.stdout is not None
            reader.stdout.readline()
        try:
            yield answers
        finally:
            for reader in readers:
                assert reader.stdin is not None
                reader.stdin.close()
            for reader in readers:
                reader.wait()
        for reader in readers:
            _check(reader)
        answers += [Answers.load(file) for file in files]


@contextmanager
def threads_reading(path: Path, options: ReadersOptions) -> Iterator[list[Answers]]:
    """Have threads read one shared collection within the block; see `processes_reading`."""
    shared = Collection.open(path, threads=1)

    def latest() -> Collection:
        nonlocal shared
        shared = shared.latest()  # of several threads at once, too; the last one's stays
        return shared

    answers: list[Answers] = []
    over = threading.Event()
    with ThreadPoolExecutor(options.readers) as pool:
        futures = [
            pool.submit(read_until, latest, options.seed + number, over.is_set)
            for number in range(options.readers)
        ]
        try:
            yield answers
        finally:
            over.set()
        answers += [future.result() for future in futures]


def read_beside_writer(
    path: Path, options: ReadersOptions, say: Callable[[str], None]
) -> list[Answers]:
    """Read what a writer of this process offers, in threads beside it."""
    over = threading.Event()
    with ThreadPoolExecutor(options.readers) as pool:
        readers = []

        def start(writer: CollectionWriter) -> None:
            for number in range(options.readers):
                seed = options.seed + number
                readers.append(
                    pool.submit(read_until, lambda: writer.collection, seed, over.is_set)
                )

        end_s = time.monotonic() + options.seconds
        try:
            write_until(
                path, random.Random(options.seed), lambda: time.monotonic() > end_s, say, start
            )
        finally:
            over.set()
        return [reader.result() for reader in readers]


def timed_writes(lines: Iterable[str]) -> list[TimedWrite]:
    """Read what a writer said; a write that did not return has no end."""
    writes: list[TimedWrite] = []
    begun: Write | None = None
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "begin":
            begun = Write.from_line(rest)
        elif word == "done":
            assert begun is not None
            before_s, after_s = json.loads(rest)
            writes.append(TimedWrite(write=begun, before_s=before_s, after_s=after_s))
    return writes


def measure(way: Way, path: Path, options: ReadersOptions) -> dict[str, Json]:
    """Run one way of reading and judge it."""
    writes, answers = run_way(way, path, options)
    verdict = judge(writes, answers)
    ledger = Ledger()
    for timed in writes:
        ledger.begin(timed.write)
        ledger.acknowledge()
    with Collection.open(path) as collection:
        ledger.settle(collection)
    found = verify(path)
    assert not found.faults, found.faults
    call_s = np.concatenate([own.after_s - own.before_s for own in answers])
    return {
        "way": way,
        "seconds": options.seconds,
        "readers": options.readers,
        **asdict(verdict),
        "writes": dict(sorted(Counter(timed.write.kind for timed in writes).items())),
        "write_p99_ms": _p99_ms([timed.after_s - timed.before_s for timed in writes]),
        "images_at_the_end": len(ledger.state),
        "read_p50_ms": round(1e3 * float(np.median(call_s)), 3),
        "read_p99_ms": _p99_ms(call_s.tolist()),
        "read_max_ms": round(1e3 * float(call_s.max()), 3),
        "verify": "sound",
    }


def main(options: ReadersOptions) -> None:
    """Measure every way, print, and write the result.

    Raises:
        CollectionError: an answer was wrong; the result is written all the same.
    """
    start_s = time.monotonic()
    ways: list[dict[str, Json]] = []
    for way in get_args(Way):
        with tempfile.TemporaryDirectory() as folder:
            ways.append(measure(way, Path(folder) / "collection", options))
    report: dict[str, Json] = {
        "command": command_line(),
        "cpu": cpu_name(),
        "cpus": cpu_budget(),
        "versions": {name: version(name) for name in ("faiss-cpu", "numpy", "pyarrow")},
        "seed": options.seed,
        "elapsed_s": round(time.monotonic() - start_s, 1),
        "ways": list[Json](ways),
        "held": not any(way["wrong"] for way in ways),
    }
    print(json.dumps(report, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    if not report["held"]:
        wrong = next(str(way["first_wrong"]) for way in ways if way["wrong"])
        raise CollectionError("answers", expected="those of a current snapshot", found=wrong)


def process(module: str, *args: str) -> subprocess.Popen[str]:
    """Start `python -m MODULE`, which ends when its standard input does."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *args],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _check(process: subprocess.Popen[str]) -> None:
    """Refuse a process that failed."""
    if process.wait():
        assert process.stderr is not None
        said = "" if process.stderr.closed else process.stderr.read()
        raise CollectionError("a process", expected="a good end", found=said.strip() or "none")


def _p99_ms(spent_s: Sequence[float]) -> float:
    """Give the time that one in a hundred takes longer than."""
    return round(1e3 * float(np.quantile(spent_s, 0.99)), 3)


if __name__ == "__main__":
    sys.exit(run_command(ReadersOptions, main, prog="python -m benchmarks.index_readers"))
