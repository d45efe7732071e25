"""Builds that are killed at random moments, for `benchmarks.index_kills`.

One build is left alone. Others of the same images are killed again and again, each time at a
moment drawn evenly from the time that the undisturbed one took, and started anew by the same
command, until one ends, or is killed after its last step; then it begins at another place, until
there were enough kills.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from index.errors import CollectionError
from index.storage.manifest import MANIFEST_FILE, manifest_bytes, read_manifest
from index.verify import verify
from models.bundle import SHIPPED_BUNDLE, Json
from models.command import log
from models.files import sha256_file

BATCH = 16
"""Images encoded at once: small, so that there are many part files to be killed between."""


def kill_builds(folder: Path, images: int, kills: int, draw: random.Random) -> dict[str, Json]:
    """Kill builds; give how often, and how the finished ones compare.

    Raises:
        AssertionError: something else than a whole collection, or other bytes.
        CollectionError: a build failed of itself.
    """
    source = write_images(folder / "images.gz", images)
    start_s = time.monotonic()
    run_to_end(command(source, folder / "undisturbed"))
    undisturbed_s = time.monotonic() - start_s
    expected = hashes_of(folder / "undisturbed")
    killed = finished = resumed = 0
    while killed < kills:
        out = folder / f"killed-{finished}"
        while (
            killed < kills
            and not (out / MANIFEST_FILE).exists()
            and not kill_at(command(source, out), draw.uniform(0, undisturbed_s))
        ):
            killed += 1
            resumed += bool(list(folder.glob(f"{out.name}.parts*")))
            if (out / MANIFEST_FILE).exists():
                assert hashes_of(out) == expected
            else:
                assert not out.exists(), f"{out} is there, and no collection"
            log.info("killed a build %d times of %d", killed, kills)
        if not (out / MANIFEST_FILE).exists():
            run_to_end(command(source, out))
        assert hashes_of(out) == expected, f"{out} has other bytes than an undisturbed build"
        finished += 1
    return {
        "kills": killed,
        "of_which_with_parts_to_go_on_from": resumed,
        "finished_builds": finished,
        "images": images,
        "undisturbed_s": round(undisturbed_s, 2),
        "bytes_equal": True,
    }


def command(source: str, out: Path) -> list[str]:
    """Give the command of a build."""
    return [
        sys.executable, "-m", "index.build", "--images", source, "--encoder", str(SHIPPED_BUNDLE),
        "--out", str(out), "--name", "killed", "--index", "hnsw", "--batch-size", str(BATCH),
    ]  # fmt: skip


def kill_at(build: Sequence[str], after_s: float) -> bool:
    """Start a build and kill it then; whether it ended of itself before.

    Raises:
        CollectionError: it failed of itself.
    """
    process = subprocess.Popen(build, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, said = process.communicate(timeout=after_s)
    except subprocess.TimeoutExpired:
        process.kill()
        _, said = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        raise CollectionError("a build", expected="a good end", found=said.decode().strip())
    return process.returncode == 0


def run_to_end(build: Sequence[str]) -> None:
    """Run a build to its good end.

    Raises:
        CollectionError: it failed.
    """
    done = subprocess.run(build, check=False, capture_output=True, text=True)
    if done.returncode:
        raise CollectionError("a build", expected="a good end", found=done.stderr.strip())


def hashes_of(path: Path) -> dict[str, str]:
    """Hash every file of a sound collection; of the manifest all but the report of times.

    Raises:
        AssertionError: something is wrong with it.
    """
    found = verify(path)
    assert not found.faults, found.faults
    assert not found.unknown, f"{path} has files that are no part of it: {found.unknown}"
    manifest = read_manifest(path)
    timeless = manifest_bytes(dataclasses.replace(manifest, build={}))
    hashes = {name: sha256_file(path / name) for name in manifest.files}
    return {**hashes, MANIFEST_FILE: hashlib.sha256(timeless).hexdigest()}


def write_images(file: Path, count: int) -> str:
    """Write random images of 28 x 28 as an IDX file, and name it as a source."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    with gzip.open(file, "wb", compresslevel=1) as stream:
        stream.write(struct.pack(">4I", 0x803, *pixels.shape))
        stream.write(pixels.tobytes())
    return f"idx:{file}"
