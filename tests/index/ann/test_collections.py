"""Collections of every kind of index: filters, effort, several segments, verification."""

import dataclasses

import numpy as np
import pytest

from index.ann.making import build_index, write_index
from index.collection import Collection
from index.storage.manifest import hash_files, read_manifest, write_manifest
from index.verify import verify

FINGERPRINT = "f" * 64
COUNT, DIM, K = 1000, 32, 10
FACTORIES = [
    "HNSW16,SQfp16,RFlat", "IVF16,PQ16x4fs,RFlat", "RR,IVF16,RaBitQ,RFlat",
    "RR,IVF16,RaBitQfs2,RFlat",
]  # fmt: skip


@pytest.fixture(params=FACTORIES)
def path(request, tmp_path, make_collection, unit_rows):
    """A collection of two segments."""
    return make_collection(
        tmp_path / "made", unit_rows(COUNT, DIM), factory=request.param, n_segments=2
    )


def recall(found, exact):
    """Give the share of the exact neighbours that were found."""
    return np.mean([np.isin(e, f).mean() for e, f in zip(exact.ids, found.ids, strict=True)])


def test_more_effort_finds_what_exact_search_finds(path, unit_rows):
    """`effort` is turned into each kind's own parameters."""
    queries = unit_rows(50, DIM, seed=1)
    with Collection.open(path) as collection:

        def search(effort):
            parameters = collection.effort_parameters(effort, K)
            return collection.search(queries, K, fingerprint=FINGERPRINT, parameters=parameters)

        exact = collection.search(queries, K, fingerprint=FINGERPRINT, exact=True)
        assert recall(search(1), exact) <= recall(search(40), exact) <= recall(search(900), exact)
        assert recall(search(1), exact) < recall(search(900), exact)
        assert recall(search(900), exact) > 0.99


def test_the_nearest_alone_is_as_good_as_the_first_of_ten(tmp_path, make_collection, unit_rows):
    """With few rows ranked again a neighbour, too; and of a hundred more lists are looked into."""
    vectors, queries = unit_rows(2000, DIM), unit_rows(300, DIM, seed=1)
    path = make_collection(tmp_path / "c", vectors, factory="IVF16,PQ16x4fs,RFlat")
    manifest = read_manifest(path)
    entry = dataclasses.replace(manifest.segments[0], parameters={"nprobe": 12, "k_factor": 2})
    write_manifest(path, dataclasses.replace(manifest, segments=(entry,)))
    with Collection.open(path) as collection:

        def search(k, **options):
            return collection.search(queries, k, fingerprint=FINGERPRINT, **options)

        def first(k, **options):
            return np.mean(search(k, **options).ids[:, 0] == exact.ids[:, 0])

        exact = search(100, exact=True)
        assert first(1) == first(10) > first(1, parameters={"k_factor": 2})
        literal = search(100, parameters={"nprobe": 12})
        assert recall(search(100), exact) > recall(literal, exact)


@pytest.mark.parametrize("filter", ["label in ('0', '1')", "label = '2'"])
def test_filters_keep_what_the_index_finds(path, unit_rows, filter, monkeypatch):
    """Through the index, too: k of what was chosen, and nearly the nearest."""
    queries = unit_rows(50, DIM, seed=1)
    monkeypatch.setattr("index.storage.segment.is_exact_cheaper", lambda **_: False)
    with Collection.open(path) as collection:
        parameters = collection.effort_parameters(400, K)

        def search(**options):
            return collection.search(queries, K, fingerprint=FINGERPRINT, **options)

        exact = search(exact=True, filter=filter)
        found = search(parameters=parameters, filter=filter)
        assert (found.ids >= 0).all()
        assert np.isin(found.ids, collection.ids[collection.select(filter).mask_N]).all()
        assert recall(found, exact) > 0.95


def test_every_kind_is_verified(path):
    """And nothing is left over."""
    found = verify(path)
    assert (found.faults, found.unknown) == ([], [])


@pytest.mark.parametrize("order", [1, -1])
def test_segments_of_different_kinds_get_the_most_that_any_wants(
    tmp_path, make_collection, unit_rows, order
):
    """Whichever comes last: none of them finds less than it would alone."""
    path = make_collection(tmp_path / "c", unit_rows(600, DIM), factory="HNSW16", n_segments=2)
    kinds = [
        ("IVF16,PQ16x4fs,RFlat", {"nprobe": 3, "k_factor": 8}),
        ("HNSW16,SQ8,RFlat", {"efSearch": 64, "k_factor": 2}),
    ][::order]
    manifest, entries = read_manifest(path), []
    for entry, (factory, parameters) in zip(manifest.segments, kinds, strict=True):
        folder = path / "segments" / entry.name
        vectors = np.load(folder / "vectors.npy")
        write_index(build_index(vectors, factory), folder / "index.faiss", factory)
        entries.append(dataclasses.replace(entry, factory=factory, parameters=parameters))
    files = hash_files(path, manifest.files)
    write_manifest(path, dataclasses.replace(manifest, segments=tuple(entries), files=files))
    with Collection.open(path) as collection:
        assert collection.effort_parameters(80, 10) == {"efSearch": 80, "nprobe": 3, "k_factor": 8}
        assert collection.effort_parameters(10, 10) == {"efSearch": 10, "nprobe": 1, "k_factor": 2}
