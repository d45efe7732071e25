import numpy as np

from index.storage.ids import Places


def test_ids_are_found_where_they_stand():
    """In any shape; of one that stands twice the last place, and -1 of what is not there."""
    places = Places(np.array([30, 10, 20, 10], np.int64))
    found = places.of(np.array([[30, 20, 10, 20], [-1, 5, 99, 30]], np.int64))
    assert found.tolist() == [[0, 2, 3, 2], [-1, -1, -1, 0]]


def test_nothing_is_among_no_ids():
    """Every id is unknown there."""
    assert Places(np.empty(0, np.int64)).of(np.array([1, -1], np.int64)).tolist() == [-1, -1]
