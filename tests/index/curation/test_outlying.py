import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from sklearn.neighbors import LocalOutlierFactor

from index.collection import Collection, id_of
from index.curation.near import find_groups
from index.curation.outlying import (
    SCORERS,
    Surroundings,
    default_neighbours,
    farthest_distances,
    find_surroundings,
    find_suspects,
    local_outlier_factors,
    mean_distances,
)
from index.curation.smoothing import smooth
from index.storage.rows import ROW_SCHEMA
from index.storage.writer import CollectionWriter
from models.errors import UsageError


def with_group(unit_rows, size):
    """Two crowds of 60 unit vectors, and a tight group of `size` far from both."""
    centres = np.eye(3, 16, dtype=np.float32)
    spread = np.repeat([0.5, 0.5, 0.02], [60, 60, size])
    rows = np.repeat(centres, [60, 60, size], axis=0)
    rows = rows + spread[:, None] * unit_rows(120 + size, 16)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("factory", ["Flat", "HNSW32"])
@pytest.mark.parametrize("method", SCORERS)
def test_the_one_that_is_far_from_all_is_the_oddest(
    tmp_path, make_collection, unit_rows, factory, method
):
    """By every score, with an index or without."""
    path = make_collection(tmp_path, with_group(unit_rows, 1), factory=factory)
    with Collection.open(path) as collection:
        around = find_surroundings(collection, 10)
        odd = around.ids[SCORERS[method](around).argmax()]
        assert collection.rows([odd])[0].key == "0120"


def test_a_group_is_found_where_k_is_more_than_it_has(tmp_path, make_collection, unit_rows):
    """Seven of a kind are at home with k = 5, and odd with k = 10."""
    with Collection.open(make_collection(tmp_path, with_group(unit_rows, 7))) as collection:
        at_home = farthest_distances(find_surroundings(collection, 5))
        assert at_home[120:].max() < at_home[:120].min()
        odd = farthest_distances(find_surroundings(collection, 10))
        assert odd[120:].min() > odd[:120].max()


def test_scores_are_what_their_sources_say(tmp_path, make_collection, unit_rows):
    """Against distances worked out here, and scikit-learn's local outlier factor."""
    vectors = unit_rows(80, 16)
    with Collection.open(make_collection(tmp_path, vectors, n_segments=3)) as collection:
        stored = collection.vectors(collection.ids)
        around = find_surroundings(collection, 9)
    distances = np.sort(1 - stored @ stored.T + 10 * np.eye(80), axis=1)[:, :9]
    np.testing.assert_allclose(farthest_distances(around), distances[:, -1], atol=1e-5)
    np.testing.assert_allclose(mean_distances(around), distances.mean(axis=1), atol=1e-5)
    peer = LocalOutlierFactor(n_neighbors=9, metric="cosine", algorithm="brute").fit(stored)
    np.testing.assert_allclose(
        local_outlier_factors(around), -peer.negative_outlier_factor_, rtol=1e-4
    )


def test_copies_do_not_make_their_neighbours_infinitely_odd(tmp_path, make_collection, unit_rows):
    """Thirty copies of one image: density around them has a bound."""
    vectors = np.concatenate([np.repeat(unit_rows(1, 16), 30, axis=0), unit_rows(60, 16)])
    with Collection.open(make_collection(tmp_path, vectors)) as collection:
        factors = local_outlier_factors(find_surroundings(collection, 10))
    assert factors.max() < 10
    assert factors[:30].max() < 2


def test_what_a_filter_leaves_out_is_no_neighbour(tmp_path, make_collection, unit_rows):
    """And k is no more than there are."""
    with Collection.open(make_collection(tmp_path, unit_rows(30, 16))) as collection:
        selection = collection.select("label = '1'")
        around = find_surroundings(collection, 50, selection=selection)
        assert around.places_NK.shape == (10, 9)
        assert set(around.ids) == set(collection.ids[1::3])
        for place, neighbours in enumerate(around.places_NK):
            assert sorted(neighbours) == [other for other in range(10) if other != place]
        with pytest.raises(UsageError, match=r"to look at: expected at least 2, found 0$"):
            find_surroundings(collection, 5, selection=collection.select("label = 'x'"))


def test_a_small_collection_is_asked_for_few_neighbours():
    """Fifty of fifty would be everything."""
    assert [default_neighbours(count) for count in (3, 200, 1_000, 60_000)] == [5, 10, 50, 50]


def test_wrong_labels_are_suspects_and_right_ones_are_not(tmp_path, make_collection, unit_rows):
    """The clearest first; an image without a label neither votes nor is judged."""
    vectors = with_group(unit_rows, 60)
    labels = ["a"] * 60 + ["b"] * 60 + ["c"] * 60
    labels[0], labels[70], labels[120], labels[5] = "c", "a", "b", None
    with Collection.open(make_collection(tmp_path, vectors)) as collection:
        around = find_surroundings(collection, 20)
    suspects = find_suspects(around, labels)
    assert {(s.place, s.given, s.suggested) for s in suspects[:3]} == {
        (0, "c", "a"),
        (70, "a", "b"),
        (120, "b", "c"),
    }
    margins = [suspect.margin for suspect in suspects]
    assert margins == sorted(margins, reverse=True)
    assert all(suspect.given_share < suspect.suggested_share for suspect in suspects[:3])
    assert 5 not in {suspect.place for suspect in suspects}


def test_suspects_of_many_classes_take_no_product_of_memory():
    """As of folders of two pictures each; in twos, each beside the other of its class."""
    n = 5_000
    places_NK = (np.arange(n)[:, None] ^ [1, 2, 3]).astype(np.int64)
    scores_NK = np.tile(np.array([0.9, 0.5, 0.4], np.float32), (n, 1))
    around = Surroundings(
        ids=np.arange(n), places_NK=places_NK, scores_NK=scores_NK, distances_NK=1 - scores_NK
    )
    labels = [f"{place // 2}" for place in range(n)]
    labels[0] = "1000"
    tracemalloc.start()
    (first, *_) = find_suspects(around, labels)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (first.place, first.given, first.suggested) == (0, "1000", "0")
    assert peak_bytes < 8 << 20


def test_one_class_or_none_has_no_suspects(tmp_path, make_collection, unit_rows):
    """There is nothing else that a label could be."""
    with Collection.open(make_collection(tmp_path, unit_rows(20, 16))) as collection:
        around = find_surroundings(collection, 5)
    assert find_suspects(around, ["a"] * 20) == find_suspects(around, [None] * 20) == []


def test_a_collection_that_is_written_to_is_looked_at_as_it_is(tmp_path, unit_rows):
    """By Euclidean distance where that is its metric, without what was deleted."""
    vectors = (5 * unit_rows(40, 8)).astype(np.float32)
    vectors[7] *= 3
    keys = [f"{n:02}" for n in range(40)]
    columns = {"id": [id_of(key) for key in keys], "key": keys}
    columns |= {"label": ["a"] * 40, "source": ["folder:/nowhere"] * 40}
    rows = pa.table(columns, schema=ROW_SCHEMA)
    with CollectionWriter.create(
        tmp_path / "c", name="far", fingerprint="f" * 64, dim=8, metric="euclidean"
    ) as writer:
        writer.add(rows, vectors, fingerprint="f" * 64)
        writer.delete([id_of("03")])
        collection = writer.collection
        around = find_surroundings(collection, 4)
        assert len(around.ids) == 39
        assert around.places_NK.min() >= 0
        stored = collection.vectors(around.ids)
        distances = np.linalg.norm(stored[:, None] - stored, axis=2)
        nearest = np.sort(distances, axis=1)[:, 1:5]
        np.testing.assert_allclose(around.distances_NK, nearest, rtol=1e-3)
        odd = around.ids[farthest_distances(around).argmax()]
        assert collection.rows([odd])[0].key == "07"
        once = smooth(stored, around.places_NK, 1, unit=False)
        near = stored[around.places_NK[0]]
        np.testing.assert_allclose(once[0], (stored[0] + near.sum(axis=0)) / 5, rtol=1e-5)
        with pytest.raises(UsageError, match="--threshold: expected a collection of cosines"):
            find_groups(collection, 0.9)
