import tracemalloc

import numpy as np
import pytest

from index.collection import Collection
from index.combine import Combination, combine_vectors, pad_ids
from index.errors import UnknownIdError
from index.neighbours import Neighbours, leave_out
from models.errors import FingerprintMismatchError, UsageError
from tests.combined import search_combined

FINGERPRINT = "f" * 64


def unit(vector):
    """The vector of its direction."""
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_the_formula(unit_rows, weight):
    """normalise(mean of positives - w * mean of negatives), whatever the examples' length."""
    positives, negatives = unit_rows(3, 8), unit_rows(2, 8, seed=1)
    expected = unit(positives.mean(axis=0) - weight * negatives.mean(axis=0))
    lengths = np.array([[0.01], [5], [300]], np.float32)
    found = combine_vectors(positives * lengths, negatives * 7, negative_weight=weight)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == np.float32
    alone = combine_vectors(positives[:1] * 3, negatives[:0], negative_weight=weight)
    np.testing.assert_allclose(alone, positives[0], atol=1e-6)


def test_examples_that_cancel_out_are_refused(unit_rows):
    """What is left has no direction."""
    rows = unit_rows(2, 8)
    with pytest.raises(UsageError, match="positives and negatives that leave a direction, found"):
        combine_vectors(rows, rows, negative_weight=1.0)
    with pytest.raises(UsageError, match="cancel out"):
        combine_vectors(np.stack([rows[0], -rows[0]]), rows[:0])


def test_stored_and_given_examples_in_one_query(tmp_path, unit_rows, make_collection):
    """Ids and vectors mix; the stored ones, of either side, are not in the answer."""
    vectors = unit_rows(200, 8)
    given = unit_rows(1, 8, seed=1)[0]
    with Collection.open(make_collection(tmp_path, vectors)) as collection:
        ids = collection.ids
        combinations = [
            Combination(positives=[int(ids[3]), given], negatives=[ids[9]]),
            Combination(positives=[given]),
        ]
        found = search_combined(collection, combinations, 5, fingerprint=FINGERPRINT)
        query = unit((vectors[3] + given) / 2 - 0.5 * vectors[9])
        order = [row for row in np.argsort(-vectors @ query) if row not in (3, 9)][:5]
        assert found.ids[0].tolist() == ids[order].tolist()
        assert found.ids[1].tolist() == ids[np.argsort(-vectors @ given)[:5]].tolist()
        filtered = search_combined(
            collection, combinations, 5, fingerprint=FINGERPRINT, filter="label = '0'"
        )
        assert {row.label for row in collection.rows(filtered.ids[0])} == {"0"}
        assert not np.isin(filtered.ids[0], ids[[3, 9]]).any()


def test_every_image_may_be_an_example(tmp_path, unit_rows, make_collection):
    """Then nothing is left to find."""
    with Collection.open(make_collection(tmp_path, unit_rows(4, 8))) as collection:
        everything = Combination(positives=list(collection.ids))
        assert search_combined(collection, [everything], 3, fingerprint=FINGERPRINT).ids.size == 0
        most = Combination(positives=list(collection.ids[:3]))
        found = search_combined(collection, [most, everything], 3, fingerprint=FINGERPRINT)
        assert found.ids.tolist() == [[collection.ids[3]], [-1]]
        assert search_combined(collection, [], 3, fingerprint=FINGERPRINT).ids.shape[0] == 0


def test_what_cannot_be_meant_is_refused(tmp_path, unit_rows, make_collection):
    """No positive, a weight out of bounds, unknown ids, another encoder."""
    with pytest.raises(UsageError, match="positives: expected at least one, found none"):
        Combination(positives=[], negatives=[1])
    for weight in (-0.1, 11.0, float("nan")):
        with pytest.raises(UsageError, match="negative weight: expected 0 to 10, found"):
            Combination(positives=[1], negative_weight=weight)
    with Collection.open(make_collection(tmp_path, unit_rows(4, 8))) as collection:
        with pytest.raises(UnknownIdError, match="id 5: expected an id of the 4"):
            search_combined(collection, [Combination(positives=[5])], 1, fingerprint=FINGERPRINT)
        one = Combination(positives=[unit_rows(1, 8)[0]])
        with pytest.raises(FingerprintMismatchError):
            search_combined(collection, [one], 1, fingerprint="e" * 64)


def test_lists_of_ids_become_one_array():
    """Shorter ones are filled with -1."""
    assert pad_ids([[1, 2], [], [3]]).tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert pad_ids([]).shape == (0, 0)


def test_to_leave_many_out_takes_no_memory_for_all_of_them_at_once():
    """As where one query of a batch has hundreds of examples."""
    ids_QC = np.arange(100 * 400).reshape(100, 400)
    found = Neighbours(ids=ids_QC, scores=np.zeros(ids_QC.shape, np.float32))
    without_QW = np.full((100, 300), -1)
    without_QW[7] = ids_QC[7, :300]
    tracemalloc.start()
    left = leave_out(found, without_QW, 100)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert left.ids[7].tolist() == ids_QC[7, 300:].tolist()
    assert left.ids[8].tolist() == ids_QC[8, :100].tolist()
    assert peak_bytes < 2 << 20  # (100, 400, 300) would be 12 MB
