import numpy as np

from index.evaluation.places import Places


def test_ids_are_found_where_they_stand():
    """In any shape; what is not there is -1."""
    places = Places(np.array([30, 10, 20], np.int64))
    found = places.of(np.array([[10, 20, 30], [-1, 5, 99]], np.int64))
    assert found.tolist() == [[1, 2, 0], [-1, -1, -1]]


def test_nothing_is_in_an_empty_collection():
    """Every id is unknown there."""
    assert Places(np.empty(0, np.int64)).of(np.array([1, -1], np.int64)).tolist() == [-1, -1]
