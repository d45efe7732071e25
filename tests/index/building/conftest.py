"""Pictures in a folder, and what brings a collection up to date with them."""

import dataclasses
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from index.build import BuildOptions, sync
from index.building import sync_state
from index.collection import Collection, id_of
from index.embed import embed
from index.storage.writer import CollectionWriter
from index.verify import verify
from models.images import open_source
from models.runtime import open_bundle

COUNTS = (
    "new", "changed", "moved", "gone", "updated", "unchanged", "unreadable", "rejected",
    "embedded", "read",
)  # fmt: skip


def picture(file, level):
    """Write a picture of one grey, which no other level has the bytes of."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (level, level, level)).save(file)


def facts(summary):
    """Give the counts of a summary that are not 0."""
    values = dataclasses.asdict(summary)
    return {name: values[name] for name in COUNTS if values[name]}


def check(collection, folder, bundle):
    """Hold a collection against its folder: keys, digests and vectors; and all its files."""
    records = {}
    with Collection.open(collection) as opened, closing(open_bundle(bundle.path)) as encoder:
        for record in open_source(str(folder)).records():
            records[record.key] = encoder.preprocess(record.read())
        assert sorted(opened.keys()) == sorted(records)
        ids = [id_of(key) for key in records]
        expected = embed(encoder, np.stack(list(records.values())))
        np.testing.assert_array_equal(opened.vectors(ids), expected)
    assert (verify(collection).faults, verify(collection).unknown) == ([], [])


def count(path):
    """Give how many images a collection has."""
    with Collection.open(path) as collection:
        return collection.count


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures in two folders."""
    for level in range(12):
        picture(tmp_path / "images" / "ab"[level % 2] / f"{level:02}.png", 20 * level)
    return tmp_path / "images"


@pytest.fixture
def unsettled():
    """Take no file for settled, however long a test runs; apart from `monkeypatch.undo`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sync_state, "SETTLED_S", 1e9)
        yield


@pytest.fixture
def options(tmp_path, bundle, folder, unsettled):
    """What brings a new collection up to date with the pictures."""
    return BuildOptions(
        images=str(folder), encoder=str(bundle.path), out=tmp_path / "c", sync=True, batch_size=4
    )


@pytest.fixture
def settled(unsettled, monkeypatch):
    """Take files that were just written for settled, where no test can wait."""
    monkeypatch.setattr(sync_state, "SETTLED_S", -1e9)


@pytest.fixture
def interrupt(monkeypatch):
    """Give a function that begins a sync and ends it before its third write."""

    def run(options):
        upsert, written = CollectionWriter.upsert, []

        def write_twice(self, rows, vectors_ND, **options):
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(rows)
            upsert(self, rows, vectors_ND, **options)

        with monkeypatch.context() as patch:
            patch.setattr(CollectionWriter, "upsert", write_twice)
            with pytest.raises(KeyboardInterrupt, match="the same command goes on from there"):
                sync(options)

    return run
