"""Damage to every file of a collection and of a bundle: what verify finds and opening refuses.

A collection is made with all that one can have: a segment with an index, one without, deleted
rows, a journal with what is in no segment yet, a log of rejects. Each of its files is damaged in
hundreds of ways (`benchmarks.damage`), one at a time:
    damaged   as a disk or a copy damages it: the manifest still says what the file should be.
              `index.verify` must find a fault and name the file or the manifest; opening must
              refuse, where it reads the file.
    forged    the manifest agrees with the damaged file, as somebody hostile would have it. Opening
              must refuse, or give a collection that can be searched: nothing crashes, hangs,
              raises anything but a CollectionError, or takes more than 2 GiB of memory.
What is in a journal behind its last acknowledged write is no damage, but the trace of a write that
was cut off: there opening gives the collection as it was.

All of it runs in processes of limited memory, which say what they are about to try: one that dies
is a finding, and the next one goes on behind it. Run from the root:
`python -m benchmarks.index_fuzz --out benchmarks/results/index_fuzz.json`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.damage import Damage, damages
from benchmarks.indexed import give_index
from benchmarks.ledger import DIM, FINGERPRINT, read_state, rows_of, vectors_of
from benchmarks.measuring import command_line
from index.collection import Collection, id_of
from index.errors import CollectionError
from index.storage.manifest import (
    MANIFEST_FILE,
    REJECTS_FILE,
    hash_files,
    read_manifest,
    write_manifest,
)
from index.storage.writer import CollectionWriter
from index.verify import verify
from models.bundle import SHIPPED_BUNDLE, Json, read_bundle
from models.command import run_command
from models.cpu import cpu_name
from models.errors import BundleError, UsageError

MEMORY_BYTES = 2 << 30
"""Beyond what a process has when it begins."""

FACTORIES = ("HNSW32", "HNSW32,SQ8,RFlat", "IVF4,PQ8x4fs,RFlat", "RR,IVF4,RaBitQ,RFlat")
"""Of the index: the first in a collection that is attacked everywhere, the others there alone."""

INDEX_FILE = "index.faiss"

TIME_S = 20.0
"""Of one opening, one search or one verification; they take milliseconds."""


@dataclass(frozen=True, kw_only=True)
class FuzzOptions:
    """Damage every file of a collection and of a bundle in every way."""

    flips: int = 200
    """Places at which each file has a byte flipped, and about as many for other changes."""
    seed: int = 5
    """Chooses places and bits."""
    only: str = ""
    """Files whose path contains this, alone."""
    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        if self.flips < 1:
            raise UsageError("--flips", expected="at least 1", found=str(self.flips))


def make_collection(path: Path, seed: int, factory: str, images: int = 120) -> None:
    """Make a collection with one of every kind of file, and one index of a kind."""
    version = seed + 1
    keys = [f"image-{number:03}" for number in range(images)]
    first, second, third = keys[: images // 2], keys[images // 2 : -20], keys[-20:]
    with CollectionWriter.create(path, name="fuzz", fingerprint=FINGERPRINT, dim=DIM) as writer:
        for some, index in ((first, factory), (second, None)):
            put = dict.fromkeys(some, version)
            writer.add(rows_of(put), vectors_of(put), fingerprint=FINGERPRINT)
            writer.seal()
            if index is not None:
                give_index(writer, index)
        writer.delete([id_of(key) for key in (first[3], second[4])])
        put = dict.fromkeys(third[:10], version)
        writer.add(rows_of(put), vectors_of(put), fingerprint=FINGERPRINT)
        writer.seal()  # writes down what is deleted in the segments
        put = dict.fromkeys(third[10:], version)
        writer.add(rows_of(put), vectors_of(put), fingerprint=FINGERPRINT)
        writer.delete([id_of(first[5])])
    (path / REJECTS_FILE).write_text('{"key": "bad.png", "reason": "corrupt"}\n')
    manifest = read_manifest(path)
    files = {**manifest.files, **hash_files(path, [REJECTS_FILE])}
    write_manifest(path, dataclasses.replace(manifest, files=files))


def cases(path: Path, other: Path, options: FuzzOptions) -> Iterator[tuple[str, Damage]]:
    """Give every file of a directory in every damage, always in the same order."""
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        name = file.relative_to(path).as_posix()
        if options.only not in name or file.name.startswith("."):
            continue
        twin = other / name
        others = twin.read_bytes() if twin.is_file() else None
        draw = random.Random(f"{options.seed} {name}")
        content = file.read_bytes()
        for damage in damages(name, content, others, flips=options.flips, draw=draw):
            yield name, damage


def try_collection(path: Path, name: str, damage: Damage, expected: dict[str, int]) -> str:
    """Damage a file of a sound collection as a disk does; what is wrong with the answer."""
    file = path / name
    sound = file.read_bytes()
    file.write_bytes(damage.content)
    try:
        found = verify(path)
        refused = _opens(path, verify_files=True)
        is_tail = name.startswith("journal") and _is_behind(sound, damage.content)
        if is_tail or name == REJECTS_FILE:
            with Collection.open(path) as collection:
                if read_state(collection) != expected:
                    return "opened with other content"
        elif refused is None:
            return "opened"
        if is_tail:
            return f"faults where there are none: {found.faults}" if found.faults else ""
        if not found.faults:
            return "not found by verify"
        named = (name, MANIFEST_FILE, str(path))
        if not any(word in fault for fault in found.faults for word in named):
            return f"not named by verify: {found.faults}"
    finally:
        file.write_bytes(sound)
    return ""


def try_forged(path: Path, name: str, damage: Damage) -> str:
    """Let the manifest agree with a damaged file; what is wrong with the answer."""
    file, manifest_file = path / name, path / MANIFEST_FILE
    sound, sound_manifest = file.read_bytes(), manifest_file.read_bytes()
    file.write_bytes(damage.content)
    try:
        manifest = read_manifest(path)
        files = {**manifest.files, **hash_files(path, [name])}
        write_manifest(path, dataclasses.replace(manifest, files=files))
        verify(path)
        _opens(path, verify_files=True)
        _opens(path, verify_files=False)
    finally:
        file.write_bytes(sound)
        manifest_file.write_bytes(sound_manifest)
    return ""


def try_bundle(path: Path, name: str, damage: Damage) -> str:
    """Damage a file of a bundle; what is wrong with the answer."""
    file = path / name
    sound = file.read_bytes()
    file.write_bytes(damage.content)
    try:
        if not verify(path).faults:
            return "not found by verify"
        try:
            read_bundle(path)
        except BundleError:
            return ""
        return "opened"
    finally:
        file.write_bytes(sound)


def _opens(path: Path, *, verify_files: bool) -> str | None:
    """Open a collection and use all of it; the refusal, or None where there is none."""
    try:
        with Collection.open(path, verify=verify_files, threads=1) as collection:
            queries_QD = np.eye(DIM, dtype=np.float32)[:2]
            for exact in (False, True):
                found = collection.search(
                    queries_QD, 10, fingerprint=collection.fingerprint, exact=exact
                )
                collection.rows(found.ids[found.ids >= 0])
            collection.search(
                queries_QD, 5, fingerprint=collection.fingerprint, filter="label > '1'"
            )
            collection.vectors(collection.ids)
            collection.keys()
    except CollectionError as error:
        return str(error)
    return None


def _is_behind(sound: bytes, damaged: bytes) -> bool:
    """Whether everything that was acknowledged of a journal is as it was."""
    return damaged.startswith(sound)


def attack(folder: Path, skip: int, options: FuzzOptions) -> None:
    """Try every case from one on; say each before and after. Runs in a process of its own."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
    path, other, bundle = folder / "c", folder / "other", folder / "bundle"
    with Collection.open(path) as collection:
        expected = read_state(collection)
    named = read_manifest(path).files
    trials = itertools.chain(
        (("damaged", path, *case) for case in cases(path, other, options)),
        (("forged", path, *case) for case in cases(path, other, options) if case[0] in named),
        (("bundle", bundle, *case) for case in cases(bundle, bundle, options)),
    )
    number = -1
    for number, (way, where, name, damage) in enumerate(trials):
        if number < skip:
            continue
        _say(number=number, way=way, file=name, kind=damage.kind, how=damage.how)
        start_s = time.monotonic()
        try:
            if way == "damaged":
                wrong = try_collection(where, name, damage, expected)
            elif way == "forged":
                wrong = try_forged(where, name, damage)
            else:
                wrong = try_bundle(where, name, damage)
        except BaseException as error:  # a finding, whatever it is
            wrong = f"{type(error).__name__}: {str(error)[:300]}"
        if time.monotonic() - start_s > TIME_S:
            wrong = wrong or "took too long"
        _say(wrong=wrong)
    _say(total=number + 1)


def _say(**facts: Json) -> None:
    """Write a line that is out when this returns."""
    print(json.dumps(facts), flush=True)


def hunt_kinds(options: FuzzOptions) -> dict[str, Json]:
    """Attack a whole collection, and the index of one of every other kind."""
    found: dict[str, Json] = {}
    for number, factory in enumerate(FACTORIES):
        if number and options.only not in INDEX_FILE:
            break
        with tempfile.TemporaryDirectory() as place:
            prepare(Path(place), factory)
            only = INDEX_FILE if number else options.only
            found[factory] = hunt(Path(place), dataclasses.replace(options, only=only))
    return found


def hunt(folder: Path, options: FuzzOptions) -> dict[str, Json]:
    """Have processes try every case; one that dies is a finding."""
    counts: Counter[str] = Counter()
    findings: list[Json] = []
    total, done = -1, 0
    while total < 0:
        command = [
            sys.executable,
            "-m",
            "benchmarks.index_fuzz",
            "--attack",
            str(folder),
            str(done),
        ]
        command += [str(options.flips), str(options.seed), options.only]
        trial: dict[str, Json] = {}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            for line in process.stdout:
                facts: dict[str, Json] = json.loads(line)
                if "number" in facts:
                    trial = facts
                elif "wrong" in facts:
                    counts[f"{trial['way']} {trial['kind']}"] += 1
                    if facts["wrong"]:
                        findings.append({**trial, **facts})
                    done, trial = done + 1, {}
                else:
                    total = int(str(facts["total"]))
            said = process.stderr.read()
            status = process.wait()
        if total < 0:
            if not trial:
                raise CollectionError("an attack", expected="a good end", found=said.strip())
            findings.append({**trial, "wrong": f"the process ended with status {status}"})
            done = int(str(trial["number"])) + 1
            _restore(folder)
    return {"trials": total, "by_kind": dict(sorted(counts.items())), "findings": findings}


def prepare(folder: Path, factory: str) -> None:
    """Make what is attacked."""
    make_collection(folder / "c", seed=0, factory=factory)
    make_collection(folder / "other", seed=1, factory=factory)
    shutil.copytree(SHIPPED_BUNDLE, folder / "bundle")
    shutil.copytree(folder / "c", folder / "sound")
    shutil.copytree(folder / "bundle", folder / "sound-bundle")


def _restore(folder: Path) -> None:
    """Undo what a process that died had damaged."""
    for name, sound in (("c", "sound"), ("bundle", "sound-bundle")):
        shutil.rmtree(folder / name)
        shutil.copytree(folder / sound, folder / name)


def main(options: FuzzOptions) -> None:
    """Attack, print, and write the result.

    Raises:
        CollectionError: something was not found or not refused; the result is written all the
            same.
    """
    start_s = time.monotonic()
    found = hunt_kinds(options)
    findings = [one for kind in found.values() for one in cast(dict[str, Any], kind)["findings"]]
    report: dict[str, Json] = {
        "command": command_line(),
        "cpu": cpu_name(),
        "versions": {name: version(name) for name in ("faiss-cpu", "numpy", "pyarrow")},
        "elapsed_s": round(time.monotonic() - start_s, 1),
        "memory_limit_bytes": MEMORY_BYTES,
        "kinds": found,
        "held": not findings,
    }
    print(json.dumps(report, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    if findings:
        raise CollectionError(
            "damage", expected="all of it found or refused", found=f"{findings!r:.500}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--attack"]:
        _, _, place, skip, flips, seed, *only = sys.argv
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        chosen = FuzzOptions(flips=int(flips), seed=int(seed), only="".join(only))
        attack(Path(place), int(skip), chosen)
    else:
        sys.exit(run_command(FuzzOptions, main, prog="python -m benchmarks.index_fuzz"))
