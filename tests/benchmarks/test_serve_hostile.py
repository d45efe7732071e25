"""A short run of the benchmark: a real server, some hundred hostile inputs, on each front end."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.hostile_inputs import BOMBS, HostileImages
from models.decode import decode
from models.errors import ImageError, ImageFault

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("frontend", ["native", "grpcio"])
def test_a_server_lives_through_hostile_inputs_and_answers_everybody_else(frontend, tmp_path):
    """Every sound image has its vector, nothing is held or stuck, no reply tells too much."""
    out = tmp_path / "result.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.serve_hostile", "--frontend", frontend,
            "--inputs", "400", "--seed", "3", "--looks", "1", "--out", str(out),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    result = json.loads(out.read_text())
    verdict = result["verdict"]
    del verdict["memory is flat"]  # says something after thousands
    assert all(verdict.values()), (result["first"], done.stderr[-3000:])
    assert result["inputs"] >= 400
    assert result["sound"] > 400
    assert {"CORRUPT", "TOO_MANY_PIXELS", "UNSUPPORTED_FORMAT", "OK"} <= set(result["items"])


def test_the_same_seed_makes_the_same_inputs():
    """A run that found something can be made again."""
    first, second = HostileImages(5), HostileImages(5)
    assert [first.next() for _ in range(200)] == [second.next() for _ in range(200)]


def test_every_seed_is_a_sound_image_or_of_a_mode_that_is_refused():
    """What is mutated is whole: its mutants get as far as the decoder."""
    refused = {}
    for name, data in HostileImages(0).seeds.items():
        try:
            decode(data)
        except ImageError as error:
            refused[name] = error.fault
    odd = ImageFault.UNSUPPORTED_FORMAT
    assert refused == {"float.tiff": odd, "lab.tiff": odd}


def test_every_bomb_is_small():
    """What it asks for lies in its header."""
    rng = random.Random(0)
    assert all(len(make(rng)) < 4 << 20 for _, make in BOMBS for _ in range(5))
