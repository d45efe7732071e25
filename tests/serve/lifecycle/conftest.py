"""Bundles and collections that are replaced on the disk as `train.export` and `index.build` do.

And directories that cannot be read.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from index.build import BuildOptions, build
from models.bundle import ENCODER_FILE, Bundle, read_bundle
from models.files import atomic_directory

COUNT = 6


@pytest.fixture
def put_bundle(tmp_path, make_bundle) -> Callable[..., Bundle]:
    """A function that writes a bundle at a path, in one step, in the place of what is there."""

    def put(path: Path, seed: int = 0, *, damaged: bool = False) -> Bundle:
        made = tmp_path / f"made-{seed}"
        if not made.exists():
            make_bundle("m", seed=seed, path=made)
        with atomic_directory(path, replace=True) as temporary:
            shutil.copytree(made, temporary, dirs_exist_ok=True)
            if damaged:
                with (temporary / ENCODER_FILE).open("ab") as file:
                    file.write(b"damage")
        return read_bundle(path, verify=False)

    return put


@pytest.fixture
def put_collection(tmp_path) -> Callable[[Path, Bundle], Path]:
    """A function that builds a collection at a path, in the place of what is there."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(COUNT):
        pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")

    def put(path: Path, bundle: Bundle) -> Path:
        build(
            BuildOptions(
                images=str(folder), encoder=str(bundle.path), out=path, replace=path.exists()
            )
        )
        return path

    return put


@pytest.fixture
def no_reading(monkeypatch) -> Callable[[Path, int], AbstractContextManager[None]]:
    """A context manager in which a directory cannot be read, also by root: by an error's number."""

    @contextmanager
    def run(directory: Path, number: int) -> Iterator[None]:
        def refuse(path: object) -> None:
            raise OSError(number, os.strerror(number), str(path))

        def scan(path=".", scandir=os.scandir):
            is_within = isinstance(path, (str, Path)) and Path(path).is_relative_to(directory)
            return refuse(path) if is_within else scandir(path)

        def look(path, *args, stat=os.stat, **kwargs):
            is_within = isinstance(path, (str, Path)) and directory in Path(path).parents
            return refuse(path) if is_within else stat(path, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", scan)
            patch.setattr(os, "stat", look)
            yield

    return run
