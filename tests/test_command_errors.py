"""Bad input to every command: one line says what, expected, found and how to mend it.

The first case of each command is a process of its own, as a person would start it. The others
run its module in this one, since most of a process's time goes into imports.
"""

import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from index.build import BuildOptions, build

ROOT = Path(__file__).parents[1]

Place = dict[str, Path | str]
Outcome = subprocess.CompletedProcess[str]


def flip_last_byte(path: Path) -> None:
    """Damage a file without changing its size."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def place(tmp_path, make_bundle) -> Place:
    """Lay out sound and unsound inputs: each case names one by a word in braces."""
    photos = tmp_path / "photos"
    for label in ("a", "b"):
        (photos / label).mkdir(parents=True)
        for n in range(6):
            pixels = np.random.default_rng(n).integers(0, 256, (30, 30), dtype=np.uint8)
            Image.fromarray(pixels).save(photos / label / f"{n}.png")
    sound, other = make_bundle("sound", seed=1), make_bundle("other", seed=2)
    broken_bundle = tmp_path / "broken-bundle"
    shutil.copytree(sound.path, broken_bundle)
    flip_last_byte(broken_bundle / "encoder.onnx")
    collection, broken = tmp_path / "collection", tmp_path / "broken-collection"
    build(BuildOptions(images=str(photos), encoder=str(sound.path), out=collection))
    shutil.copytree(collection, broken)
    flip_last_byte(broken / "segments/000000/vectors.npy")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no image")
    (tmp_path / "text.jpg").write_text("no image")
    return {
        "photos": photos,
        "sound": sound.path,
        "other": other.path,
        "broken_bundle": broken_bundle,
        "collection": collection,
        "broken_collection": broken,
        "empty": tmp_path / "empty",
        "text": tmp_path / "text.txt",
        "text_jpg": tmp_path / "text.jpg",
        "image": photos / "a" / "0.png",
        "nothing": tmp_path / "nothing",
        "long": tmp_path / ("n" * 300),
        "new": tmp_path / "new",
        "sound_fingerprint": sound.fingerprint,
        "other_fingerprint": other.fingerprint,
    }


KINDS = ("knn", "linear", "finetune", "transfer")
"""Second words of commands that are named in their errors."""

CASES = [
    ("train.pretrain {photos} --epochs 0", 2, "--epochs: expected at least 1, found 0"),
    ("train.pretrain {nothing}", 1, "expected .*folder:PATH.* found nothing of that name; "),
    ("train.pretrain {photos} --out {long}", 1, ".*File name too long"),
    ("train.export {long} --out {new}", 1, ".*: File name too long"),
    ("train.report {long}", 1, ".*: File name too long"),
    ("index.build --images {photos} --encoder {long} --out {new}", 1, ".*: .*File name too long"),
    ("index.build --images {photos} --encoder {sound} --out {long}", 1, ".*File name too long"),
    ("index.search {long} {image}", 1, ".*File name too long"),
    ("index.verify {long}", 1, ".*: File name too long"),
    ("index.duplicates {collection} --out {long}", 1, ".*File name too long"),
    ("train.pretrain folder:{nothing}", 1, "expected a folder, found nothing.*; "),
    ("train.pretrain folder:{empty} --out {new}", 1, "expected .*image.*, found .*; "),
    (
        "train.pretrain idx:{text} --out {new}",
        1,
        "IDX file .*: expected magic number .*, found .*; ",
    ),
    ("train.export {empty} --out {new}", 1, "expected a run.*, found .*; "),
    ("train.report {nothing} --images 3", 2, "--images: expected 0, or at least 16, found 3"),
    ("train.probe guess", 2, "kind of probe: expected linear, finetune or transfer, found 'guess'"),
    ("train.probe finetune {empty} --images {photos} --test {photos}", 1, "expected a run.*; "),
    ("index.build --images {nothing} --encoder {sound} --out {new}", 1, "expected .*, found .*; "),
    ("index.build --images {photos} --encoder {nothing} --out {new}", 1, "no such directory; make"),
    ("index.build --images {photos} --encoder {empty} --out {new}", 1, r"no bundle\.json in it; "),
    ("index.build --images {photos} --encoder {broken_bundle} --out {new}", 1, "SHA-256 .*damaged"),
    ("index.build --images {photos} --encoder {sound} --out {empty}", 2, "expected .*found .*; "),
    ("index.build --images {photos} --encoder {sound} --out {collection}", 2, ".*--replace"),
    ("index.search {nothing} {image}", 1, "expected a collection.*, found .*; "),
    ("index.search {sound} {image}", 1, "expected a collection.*, found .*; "),
    ("index.search {broken_collection} {image}", 1, r"vectors\.npy: expected SHA-256 .*; "),
    ("index.search {collection} {nothing}", 1, "expected .*, found .*; "),
    ("index.search {collection} {text_jpg}", 1, "expected JPEG, .*, found text"),
    (
        "index.search {collection} {image} --encoder {other}",
        1,
        r"expected encoder {sound_fingerprint} \({sound}\), "
        r"found encoder {other_fingerprint} \({other}\); ",
    ),
    ("index.describe {nothing}", 1, "expected a collection directory, found no such directory; "),
    ("index.describe {sound}", 1, r"expected a collection directory, found no manifest\.json"),
    ("index.export {nothing} --out {new}", 1, "expected a collection directory, found no such"),
    ("index.export {collection} --out {text}", 2, "expected a new name, found something of that"),
    ("index.export {collection} --out {new} --filter colour=1", 2, "found 'colour'"),
    ("index.export {broken_collection} --out {new}", 1, r"vectors\.npy: expected SHA-256 .*; "),
    ("index.delete {nothing} --key a", 1, "expected a collection directory, found no such"),
    ("index.delete {collection}", 2, "expected --key, --id, --filter or --list, found none"),
    (
        "index.delete {collection} --key nobody",
        1,
        "expected a key of the 12 in .*, found none such",
    ),
    ("index.delete {collection} --id -3", 2, r"--id: expected numbers below 2\^63"),
    ("index.delete {collection} --list {nothing}", 1, "expected a CSV file, found .*; give it"),
    ("index.compact {nothing}", 1, "expected a collection directory, found no such directory; "),
    ("index.compact {broken_collection}", 1, r"vectors\.npy: expected SHA-256 .*; "),
    ("index.verify {nothing}", 1, "expected a collection directory, found no such directory; "),
    ("index.verify {broken_collection}", 1, r"vectors\.npy: expected SHA-256 .*; "),
    ("index.verify {broken_bundle}", 1, r"encoder\.onnx: expected SHA-256 .*damaged"),
    ("index.duplicates {nothing}", 1, "expected a collection.*, found .*; "),
    ("index.duplicates {collection} --out {photos}", 2, "expected a new directory, .*found .*; "),
    ("index.duplicates {collection} --threshold 7", 2, "expected above 0, up to 1, found 7"),
    ("index.evaluate knn --collection {nothing} --images {photos}", 1, "expected a collection"),
    ("index.evaluate knn --collection {collection} --images {empty}", 1, "expected .*, found .*; "),
    ("index.evaluate best", 2, "expected knn or retrieval or recall or space, found 'best'; see"),
    ("serve --port 0 --bundle {sound} --collection {nothing}", 1, "expected a collection"),
    ("serve --port 0 --bundle {sound} --collection {broken_collection}", 1, "expected SHA-256"),
    ("serve --port 70000", 2, "--port: expected 0 to 65535, found 70000"),
]


AS_PROCESS = {command.split()[0]: command for command, _, _ in reversed(CASES)}
"""The first case of each command."""


@pytest.fixture
def run(place, monkeypatch, capfd) -> Callable[[str], Outcome]:
    """Give a function that runs `python -m COMMAND`."""

    def as_process(module: str, args: list[str]) -> Outcome:
        argv = [sys.executable, "-m", module, *args]
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)

    def in_process(module: str, args: list[str]) -> Outcome:
        monkeypatch.setenv("GOMP_SPINCOUNT", "10000")  # train.pretrain would set it for good
        monkeypatch.setattr(sys, "argv", [module, *args])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        said = capfd.readouterr()
        return Outcome(args, end.value.code, said.out, said.err)

    def run(command: str) -> Outcome:
        module, *args = command.format(**place).split()
        # The server gives the log handlers of its process a form that would outlive the test.
        alone = module == "serve" or command == AS_PROCESS[module]
        return as_process(module, args) if alone else in_process(module, args)

    return run


def check(outcome: Outcome, command: str, status: int, line: str) -> None:
    """Hold status, message and the absence of anything else against what is promised."""
    *before, last = outcome.stderr.splitlines()
    kind = next((f" {word}" for word in command.split()[1:2] if word in KINDS), "")
    assert last.startswith(f"python -m {command.split()[0]}{kind}: "), outcome.stderr
    assert re.search(line, last), last
    assert outcome.returncode == status
    assert status == 1 or not before, "bad use is told before any work"
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")  # of runpy
@pytest.mark.parametrize(("command", "status", "line"), CASES, ids=[case[0] for case in CASES])
def test_bad_input_is_one_line(run, place, command, status, line):
    """What was wrong, what was expected, what was found; 2 for bad use, 1 for failed work."""
    check(run(command), command, status, line.format(**place))
    assert not Path(place["new"]).exists()
