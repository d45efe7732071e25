import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from index.collection import Collection, id_of
from index.errors import CollectionError
from index.selection import Selection
from index.storage.delta import FIRST_CAPACITY, Delta
from index.storage.manifest import hash_files, read_manifest, write_manifest
from index.storage.rows import ROW_SCHEMA
from index.storage.segment import Block
from index.storage.snapshot import SPARE, spare_rows
from index.storage.store import Store
from index.storage.writer import CollectionWriter
from models.errors import UsageError

FINGERPRINT, DIM = "f" * 64, 8


def expected_ids(ids, vectors, queries, k):
    """What an exact search of these rows finds."""
    return ids[np.argsort(-(queries @ vectors.T), axis=1)[:, :k]]


@pytest.mark.parametrize("factory", ["Flat", "HNSW32"])
@pytest.mark.parametrize("dead", [1, 30, 150, 390, 399, 400])
def test_k_living_are_found_where_so_many_live(tmp_path, unit_rows, make_collection, factory, dead):
    """However many are dead, and though they were the nearest to the query."""
    vectors, queries = unit_rows(400, DIM), unit_rows(3, DIM, seed=1)
    path = make_collection(tmp_path / "c", vectors, factory=factory)
    with CollectionWriter.open(path, threads=1) as writer:
        ids = writer.collection.ids
        order = np.argsort(-(queries[0] @ vectors.T))
        assert writer.delete(ids[order[:dead]]) == dead
        left = np.sort(order[dead:])
        for collection in (writer.collection, Collection.open(path, threads=1)):
            found = collection.search(
                queries, 10, fingerprint=FINGERPRINT, parameters=efforts(factory)
            )
            assert found.ids.shape == (3, min(10, len(left)))
            wanted = expected_ids(ids[left], vectors[left], queries, 10)
            np.testing.assert_array_equal(found.ids, wanted)


def efforts(factory):
    """Parameters with which an index misses nothing."""
    return {} if factory == "Flat" else {"efSearch": 400}


def test_a_selection_over_dead_rows_and_a_delta(tmp_path, unit_rows, make_collection):
    """Finds what was chosen in each; one that was made by hand is of no state, and refused."""
    vectors = unit_rows(40, DIM)
    path = make_collection(tmp_path / "c", vectors, n_segments=2)
    with CollectionWriter.open(path, threads=1) as writer:
        writer.delete([id_of("0003"), id_of("0020"), id_of("0021")])
        extra = pa.table({"key": ["x"], "source": ["folder:/nowhere"]})
        writer.add(extra, vectors[3:4], fingerprint=FINGERPRINT)
        collection = writer.collection
    mask = np.zeros(collection.count, np.bool_)
    mask[[0, 18, 37]] = True
    keys = [collection.keys()[place] for place in (0, 18, 37)]
    chosen = collection.select(" or ".join(f"key = '{key}'" for key in keys))
    np.testing.assert_array_equal(chosen.mask_N, mask)
    found = collection.search(vectors[3:4], 5, fingerprint=FINGERPRINT, filter=chosen)
    assert set(found.ids[0][found.ids[0] >= 0]) == set(collection.ids[mask])
    assert collection.rows(found.ids[0][:1])[0].key == "x"
    by_hand = Selection(filter="by hand", mask_N=mask, count=3)
    with pytest.raises(UsageError, match="expected a selection of this state of collection made"):
        collection.search(vectors[3:4], 5, fingerprint=FINGERPRINT, filter=by_hand)


@pytest.mark.parametrize("dead", [[], ["3999"]])
def test_a_selection_weighs_what_it_holds(tmp_path, unit_rows, make_collection, dead):
    """The numbers of few rows and a mask, and over dead rows another."""
    path = make_collection(tmp_path / "c", unit_rows(4000, DIM))
    with CollectionWriter.open(path, threads=1) as writer:
        writer.delete([id_of(key) for key in dead])
        chosen = writer.collection.select("key < '0490'")
        weighed = writer.collection._snapshot._kept._weigh((chosen.filter, None))
    (rows,) = chosen.chosen
    assert (rows.mask_N is chosen.mask_N) == (not dead)
    held = chosen.mask_N.nbytes + rows.rows().nbytes + (rows.mask_N.nbytes if dead else 0)
    assert rows.rows() is rows.rows()
    assert held <= weighed < held + 2000


@pytest.mark.parametrize("dead", [[3, 3], [5, 3], [-1, 4], [4, 40]])
def test_tombstones_of_no_rows_are_refused(tmp_path, unit_rows, make_collection, dead):
    """Though every checksum agrees."""
    path = make_collection(tmp_path / "c", unit_rows(40, DIM))
    with CollectionWriter.open(path, threads=1) as writer:
        writer.delete([id_of("0003"), id_of("0004")])
        writer.seal()
        (entry,) = writer.collection.manifest.segments
    np.save(path / entry.tombstones, np.array(dead))
    manifest = read_manifest(path)
    files = hash_files(path, manifest.files)
    write_manifest(path, dataclasses.replace(manifest, files=files))
    with pytest.raises(CollectionError, match="expected rows of 40, each once and ascending"):
        Collection.open(path)


def test_a_view_of_the_delta_never_changes(unit_rows):
    """While rows are added beyond its room, and killed."""
    n = 5 * FIRST_CAPACITY
    vectors = unit_rows(n, DIM)
    delta, views = Delta(DIM, "cosine"), []
    for row in range(n):
        if row % 3 == 0:
            delta.kill(np.array([row // 2]))
        columns = {"id": [row], "key": [str(row)], "label": [None], "source": ["s"]}
        rows = pa.table(columns, schema=ROW_SCHEMA)
        delta.add(Block(rows=rows, vectors_ND=vectors[row : row + 1]))
        if row % 100 == 0:
            segment, alive = delta.view()
            views.append((row + 1, segment, None if alive is None else alive.copy(), alive))
    for count, segment, alive_before, alive in views:
        np.testing.assert_array_equal(segment.vectors_ND, vectors[:count])
        assert segment.rows["key"].to_pylist() == [str(row) for row in range(count)]
        assert segment.rows["key"].num_chunks <= 12
        if alive is not None:
            np.testing.assert_array_equal(alive, alive_before)
    segment, alive = delta.view()
    assert alive.sum() == delta.n_alive == n - len({row // 2 for row in range(3, n, 3)})


def test_a_mask_is_copied_once_a_snapshot(tmp_path, unit_rows, make_collection):
    """Not once for each record of a journal; snapshots that were taken keep theirs."""
    path = make_collection(tmp_path / "c", unit_rows(40, DIM))
    contents = Store(path, verify=False).contents
    masks, snapshots = [], []
    for rows in ([3], [4, 5], [6]):
        for row in rows:
            assert contents.kill(np.array([id_of(f"{row:04}")])) == 1
            masks.append(contents._alive[0])
        snapshots.append(contents.snapshot(0).parts[0])
    assert [mask is masks[1] for mask in masks] == [False, True, True, False]
    assert [part.count for part in snapshots] == [39, 37, 36]
    assert [int(part.alive_N.sum()) for part in snapshots] == [39, 37, 36]


@pytest.mark.parametrize(("dead", "most"), [(0, 0), (1, 1), (100, SPARE + 2), (5000, 30)])
def test_a_few_dead_rows_cost_a_few_more(dead, most):
    """Of 10,000, for the 10 nearest."""
    assert spare_rows(10, dead=dead, count=10_000) <= most
