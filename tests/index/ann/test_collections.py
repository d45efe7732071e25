"""Collections of every kind of index: filters, effort, several segments, verification."""

import numpy as np
import pytest

from index.collection import Collection
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
            parameters = collection.effort_parameters(effort)
            return collection.search(queries, K, fingerprint=FINGERPRINT, parameters=parameters)

        exact = collection.search(queries, K, fingerprint=FINGERPRINT, exact=True)
        assert recall(search(1), exact) <= recall(search(40), exact) <= recall(search(900), exact)
        assert recall(search(1), exact) < recall(search(900), exact)
        assert recall(search(900), exact) > 0.99


@pytest.mark.parametrize("filter", ["label in ('0', '1')", "label = '2'"])
def test_filters_keep_what_the_index_finds(path, unit_rows, filter, monkeypatch):
    """Through the index, too: k of what was chosen, and nearly the nearest."""
    queries = unit_rows(50, DIM, seed=1)
    monkeypatch.setattr("index.storage.segment.is_exact_cheaper", lambda **_: False)
    with Collection.open(path) as collection:
        parameters = collection.effort_parameters(400)

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
