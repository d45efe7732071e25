"""What indexes weigh, and what is asked of a budget."""

import numpy as np
import pytest

from index.ann.candidates import choose_candidates, list_count, sub_vectors
from index.ann.kinds import parse_kind
from index.ann.making import build_index
from index.ann.memory import build_bytes, parse_size, release_pages
from index.ann.peak import PeakMemory
from models.errors import UsageError

COUNT, DIM = 30_000, 64
SLACK = 8 << 20
"""What the process takes beside it: threads' heaps and the test's own."""


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """A memory map of 7.7 MB."""
    file = tmp_path_factory.mktemp("vectors") / "vectors.npy"
    np.save(file, np.random.default_rng(0).standard_normal((COUNT, DIM)).astype(np.float32))
    return np.load(file, mmap_mode="r")


@pytest.mark.parametrize(
    "factory", ["IVF64,PQ32x4fs,RFlat", "RR,IVF64,RaBitQfs,RFlat", "RR,IVF64,RaBitQ8,RFlat"]
)
def test_building_takes_no_more_than_it_was_thought_to(vectors, factory):
    """And the map's pages are not counted, since they are given back."""
    with PeakMemory() as memory:
        build_index(vectors, factory)
    grown = memory.peak_bytes - memory.before_bytes
    assert grown <= build_bytes(parse_kind(factory), COUNT, DIM) + SLACK


def test_pages_that_are_given_back_are_read_again(vectors):
    """Their content is the file's."""
    before = np.array(vectors[1000:2000])
    release_pages(vectors, 1000, 2000)
    np.testing.assert_array_equal(vectors[1000:2000], before)
    release_pages(before, 0, 10)  # no map: left alone


@pytest.mark.parametrize(
    ("text", "size"),
    [("500MB", 500_000_000), ("2 GiB", 2 << 30), ("1.5k", 1500), ("17", 17), ("1b", 1)],
)
def test_sizes_as_people_write_them(text, size):
    """Decimal units, and binary ones with an i."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-5MB", "0", "5XB", "1e40GB", "nan"])
def test_what_is_no_size_is_refused(text):
    """With examples of what is."""
    with pytest.raises(UsageError, match="expected a size such as 500MB"):
        parse_size(text)


def test_the_kinds_depend_on_the_number_of_vectors():
    """A few are compared; graphs are linked where that takes minutes; lists go with the root."""

    def names(count, **options):
        return [c.factory for c in choose_candidates(count, 128, memory_bytes=None, **options)]

    assert names(500) == ["Flat"]
    assert names(10_000)[0] == "Flat"
    assert "HNSW32" in names(60_000)
    assert "Flat" not in names(60_000)
    assert names(1_000_000) == [
        "IVF1024,PQ32x4fs,RFlat", "IVF1024,PQ64x4fs,RFlat", "RR,IVF1024,RaBitQfs,RFlat",
    ]  # fmt: skip
    assert names(60_000, factories=["HNSW48"]) == ["HNSW48"]


def test_lists_and_sub_vectors_by_rule():
    """Powers of two, and divisors of any dimension."""
    assert [list_count(n) for n in (100, 60_000, 1_000_000, 10**9)] == [16, 256, 1024, 8192]
    assert sub_vectors(784) == [196, 392]
    assert sub_vectors(50) == [10, 25]
    assert sub_vectors(7) == [1]
    for dim in (1, 7, 13, 96, 127, 1536):
        assert all(dim % m == 0 for m in sub_vectors(dim))


def test_a_budget_leaves_out_what_would_not_fit():
    """A graph over a million vectors needs them in memory; codes do not."""
    asked = ["HNSW32", "IVF1024,PQ64x4fs,RFlat"]
    found = choose_candidates(1_000_000, 256, memory_bytes=500_000_000, factories=asked)
    assert [c.fits for c in found] == [False, True]
    with pytest.raises(UsageError, match=r"expected at least .* for IVF1024,PQ64x4fs,RFlat, found"):
        choose_candidates(1_000_000, 256, memory_bytes=50_000_000, factories=asked)
