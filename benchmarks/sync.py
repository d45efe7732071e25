"""What it costs to bring a collection up to date: `index.build --sync` over a folder of JPEGs.

JPEGs of 500 x 375 (`benchmarks.photographs`) are built into a collection with the shipped encoder.
Then the folder is changed as users change theirs, and brought up to date, `--rounds` times each:
    checksum   nothing is changed, every file is read and hashed;
    stamps     nothing is changed, files are known by size and times;
    moved      a tenth of the files is renamed: nothing is embedded;
    changed    a hundredth has other bytes: those are embedded.
Beside them stands what a build of all of it takes, and what the digest of a file costs beside its
decoding, both on one thread. Files are in the page cache, as those that were just written are: a
disk adds its own time to whatever reads. Run from the root:
`python -m benchmarks.sync --out benchmarks/results/sync.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.measuring import command_line, spread_of
from benchmarks.photographs import DEBIAN_PHOTOS, make_jpegs
from index.build import BuildOptions, build, sync
from index.building.sync_state import SETTLED_S
from index.building.sync_summary import SyncSummary
from models.bundle import Json
from models.command import run_command
from models.cpu import cpu_budget, cpu_name
from models.encoder import open_encoder
from models.errors import UsageError
from models.image_source import digest_of

HASHED_FILES = 300


@dataclass(frozen=True, kw_only=True)
class SyncBenchOptions:
    """Measure how long a collection takes to follow its folder."""

    encoder: str = "models/shipped/fashion-mnist"
    """The encoder; a larger one makes the difference to a build larger."""
    count: int = 5000
    """JPEGs in the folder."""
    rounds: int = 5
    """How often each kind of change is made."""
    photos: Path = DEBIAN_PHOTOS
    """Photographs that the JPEGs are cut from."""
    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        if self.count < 100:
            raise UsageError("--count", expected="at least 100", found=str(self.count))
        if self.rounds < 1:
            raise UsageError("--rounds", expected="at least 1", found=str(self.rounds))


def rename_tenth(folder: Path, number: int) -> int:
    """Rename a tenth of the files; give how many."""
    files = sorted(folder.glob("*.jpg"))[::10]
    for file in files:
        file.rename(file.with_name(f"{file.stem.split('-')[0]}-{number}.jpg"))
    return len(files)


def change_hundredth(folder: Path, number: int) -> int:
    """Give a hundredth of the files other bytes of the same picture; give how many."""
    files = sorted(folder.glob("*.jpg"))[::100]
    for file in files:
        file.write_bytes(file.read_bytes() + bytes([number % 256, 0]))  # after the end of the image
    return len(files)


def measure(
    options: BuildOptions, rounds: int, change: Callable[[int], int], counted: str
) -> dict[str, Json]:
    """Change, wait until files have settled, and bring up to date; give seconds and counts.

    Raises:
        AssertionError: something else was done than what was changed.
    """
    seconds, summary = [], None
    for number in range(rounds):
        count = change(number)
        time.sleep(SETTLED_S + 0.1)
        start_s = time.monotonic()
        summary = sync(options)
        seconds.append(time.monotonic() - start_s)
        assert isinstance(summary, SyncSummary)
        assert getattr(summary, counted) == count, f"{summary} after {count} were {counted}"
    assert isinstance(summary, SyncSummary)
    return {
        "images": getattr(summary, counted),
        "read": summary.read,
        "embedded": summary.embedded,
        "n": len(seconds),
        **{f"{name}_s": value for name, value in spread_of(seconds, 3).items()},
    }


def measure_digest(folder: Path, encoder_uri: str) -> dict[str, Json]:
    """Time reading out of the cache, digest and decoding of some files, each on one thread."""
    files = sorted(folder.glob("*.jpg"))[:HASHED_FILES]
    data = [file.read_bytes() for file in files]
    with closing(open_encoder(encoder_uri, threads=1)) as encoder:
        start_s = time.perf_counter()
        for one in data:
            digest_of(one)
        hashed_s = time.perf_counter()
        for one in data:
            hashlib.blake2b(one, digest_size=16).hexdigest()
        other_s = time.perf_counter()
        for one in data:
            encoder.preprocess(one)
        decoded_s = time.perf_counter()
    return {
        "files": len(files),
        "bytes_a_file": round(statistics.mean(map(len, data))),
        "digest_us": round(1e6 * (hashed_s - start_s) / len(files), 1),
        "blake2b_us": round(1e6 * (other_s - hashed_s) / len(files), 1),
        "decode_us": round(1e6 * (decoded_s - other_s) / len(files), 1),
    }


def main(options: SyncBenchOptions) -> None:
    """Build, change, bring up to date, and write the result."""
    with tempfile.TemporaryDirectory() as place:
        folder = make_jpegs(Path(place) / "images", options.count, photos=options.photos)
        follow = BuildOptions(
            images=str(folder), encoder=options.encoder, out=Path(place) / "c", sync=True
        )
        start_s = time.monotonic()
        build(dataclasses.replace(follow, sync=False))
        build_s = time.monotonic() - start_s
        checked, rounds = dataclasses.replace(follow, checksum=True), options.rounds
        report: dict[str, Json] = {
            "command": command_line(),
            "cpu": cpu_name(),
            "cpus": cpu_budget(),
            "versions": {
                name: version(name) for name in ("faiss-cpu", "numpy", "onnxruntime", "pyarrow")
            },
            "encoder": options.encoder,
            "images": options.count,
            "build_s": round(build_s, 3),
            "checksum": measure(checked, rounds, lambda _: options.count, "unchanged"),
            "stamps": measure(follow, rounds, lambda _: options.count, "unchanged"),
            "moved": measure(follow, rounds, lambda n: rename_tenth(folder, n), "moved"),
            "changed": measure(follow, rounds, lambda n: change_hundredth(folder, n), "changed"),
            "digest": measure_digest(folder, options.encoder),
        }
    print(json.dumps(report, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(SyncBenchOptions, main, prog="python -m benchmarks.sync"))
