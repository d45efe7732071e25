import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from index.build import BuildOptions, build
from index.building.part_file import RunKey
from index.building.part_set import PartSet
from index.building.parts import PartStore, parts_directory
from index.building.pipeline import choose_crew, make_parts
from index.building.ray_engine import PartMaker
from index.collection import Collection
from index.errors import CollectionError
from models.encoder import open_encoder
from models.errors import UsageError
from models.images import open_source

ROOT = Path(__file__).parents[3]


def content(collection):
    """Give the bytes of every file but the manifest."""
    return {
        str(file.relative_to(collection)): file.read_bytes()
        for file in sorted(collection.rglob("*"))
        if file.is_file() and file.name != "manifest.json"
    }


def key_of(source, bundle, *, batch_size=4):
    """Give the key of a run."""
    return RunKey(
        source=source.uri, source_count=source.count(), fingerprint=bundle.fingerprint, dim=16,
        batch_size=batch_size, part_size=16 * batch_size,
    )  # fmt: skip


@pytest.fixture
def maker(bundle, train_folder):
    """The actor, in this process, for the training images."""
    source = open_source(str(train_folder))
    key = key_of(source, bundle, batch_size=1)
    return PartMaker(source.uri, str(bundle.path), json.dumps(key.to_json())), key


def part_of(maker, start, keys):
    """Ask an actor for one part, as Ray does."""
    batch = {"start": np.array([start]), "keys": np.array([json.dumps(keys)], dtype=object)}
    made = maker(batch)
    return made["file"][0], made["error"][0]


@pytest.mark.slow  # Ray alone takes some ten seconds to start
def test_ray_writes_what_the_local_engine_writes(tmp_path, bundle, new_folder):
    """A local Ray with one actor goes on from parts that another engine made, to the same bytes."""
    folder = new_folder(per_class=24)
    (folder / "red" / "text.jpg").write_text("no image")
    local, by_ray = tmp_path / "local", tmp_path / "ray"
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=local, batch_size=2))
    source = open_source(str(folder))
    with (
        PartStore(by_ray, key_of(source, bundle, batch_size=2)) as store,
        closing(open_encoder(str(bundle.path), threads=1)) as encoder,
    ):
        batches = (b for b in store.missing(source.records()) if store.number(b.start) == 1)
        for _ in make_parts(batches, encoder, store, crew=choose_crew(1, "bundle")):
            pass
    ran = subprocess.run(
        [
            sys.executable, "-m", "index.build", "--images", folder, "--encoder", bundle.path,
            "--out", by_ray, "--batch-size", "2", "--engine", "ray", "--json",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    summary = json.loads(ran.stdout)
    assert (summary["images"], summary["rejects"], summary["reused"]) == (72, 1, 32)
    assert content(by_ray) == content(local)
    assert not parts_directory(by_ray).exists()
    with Collection.open(by_ray) as collection:
        assert collection.count == 72


def test_an_actor_makes_the_part_that_a_build_makes(tmp_path, maker, bundle, train_folder):
    """One after the other, and any one out of turn."""
    actor, key = maker
    source = open_source(str(train_folder))
    with closing(open_encoder(str(bundle.path), threads=1)) as encoder:
        own = PartSet(tmp_path, key)
        crew = choose_crew(2, "bundle")
        for _ in make_parts(own.missing(source.records()), encoder, own, crew=crew):
            pass
    keys = [record.key for record in source.records()]
    for start in (0, 16, 48, 16):
        file, error = part_of(actor, start, keys[start : start + 16])
        assert error == ""
        assert file == (tmp_path / f"part-{start:012}.parquet").read_bytes()


def test_an_actor_that_sees_other_images_says_so(maker):
    """Machines must share their files; the error names one that differs."""
    actor, _ = maker
    file, error = part_of(actor, 0, ["blue/000.png", "blue/none.png"])
    assert file == b""
    assert (
        "expected the images that the build sees, found others here, 'blue/001.png' among" in error
    )


def test_an_actor_that_finds_another_encoder_says_so(maker, other_bundle):
    """Its vectors would not be comparable."""
    _, key = maker
    actor = PartMaker(key.source, str(other_bundle.path), json.dumps(key.to_json()))
    _, error = part_of(actor, 0, ["blue/000.png"])
    assert f"expected encoder {key.fingerprint}, found encoder {other_bundle.fingerprint}" in error


def test_bytes_that_are_no_part_are_refused(tmp_path, maker):
    """And leave no file behind."""
    _, key = maker
    parts = PartSet(tmp_path, key)
    with pytest.raises(CollectionError, match="expected a part of this run, found something else"):
        parts.adopt(0, b"junk")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # to import Ray takes some seconds
def test_a_cluster_that_cannot_be_joined_is_named(tmp_path, bundle, train_folder):
    """What Ray says of it, in one line; the build is not begun."""
    ran = subprocess.run(
        [
            sys.executable, "-m", "index.build", "--images", train_folder, "--encoder", bundle.path,
            "--out", tmp_path / "c", "--engine", "ray",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "RAY_ADDRESS": "nobody://here"},
    )  # fmt: skip
    assert ran.returncode == 1
    assert "--engine ray: expected the cluster of RAY_ADDRESS, found" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "engine", "expected"),
    [
        ("processes", "ray", "none beside --engine ray"),
        ("requests", "ray", "none beside --engine ray"),
        ("actors", "local", "--engine ray beside it"),
    ],
)
def test_numbers_that_an_engine_does_not_ask_for_are_refused(tmp_path, name, engine, expected):
    """Or somebody waits for eight and has one."""
    with pytest.raises(UsageError, match=f"--{name}: expected {expected}"):
        BuildOptions(images="x", encoder="x", out=tmp_path / "c", engine=engine, **{name: 8})


def test_without_ray_the_error_says_how_to_install_it(tmp_path, monkeypatch, bundle, train_folder):
    """One line, before anything is embedded."""
    monkeypatch.setitem(sys.modules, "ray", None)
    options = BuildOptions(
        images=str(train_folder), encoder=str(bundle.path), out=tmp_path / "c", engine="ray"
    )
    with pytest.raises(CollectionError) as error:
        build(options)
    assert str(error.value).startswith(
        "--engine ray: expected the package ray with ray.data, found"
    )
    assert str(error.value).endswith("install it by `pip install '.[ray]'`")
    assert not (tmp_path / "c").exists()
