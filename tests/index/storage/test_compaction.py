import pytest

from index.storage.compaction import choose_index, choose_segments
from index.storage.manifest import SegmentEntry

MILLION = 1_000_000


def entry(count, dead=0, *, name="a", factory="Flat", **parameters):
    """A segment of so many rows."""
    tombstones = "tombstones.npy" if dead else ""
    return SegmentEntry(
        name=name, count=count, dead=dead, tombstones=tombstones, factory=factory,
        parameters=parameters,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "chosen"),
    [
        ([], ""),
        ([(MILLION, 0)], ""),
        ([(10, 0)], ""),  # alone, and nothing to drop
        ([(10, 1)], ""),
        ([(10, 2)], "a"),  # a fifth
        ([(MILLION, 0), (10, 0)], ""),
        ([(MILLION, 0), (10, 0), (9000, 0)], "bc"),  # the large one is left alone
        ([(MILLION, 0), (100_000, 0), (9000, 0)], "bc"),
        ([(MILLION, 0), (400_000, 0), (9000, 0)], ""),
        ([(MILLION, 200_000), (400_000, 1), (9000, 0)], "ac"),
    ],
)
def test_the_small_and_the_deleted_are_merged(counts, chosen):
    """To add a little never rebuilds a lot."""
    entries = [entry(*count, name=name) for count, name in zip(counts, "abc", strict=False)]
    assert choose_segments(entries) == list(chosen)


def test_all_are_merged_where_that_changes_something():
    """One whole segment stays as it is."""
    assert choose_segments([entry(MILLION)], all=True) == []
    assert choose_segments([entry(MILLION, 1)], all=True) == ["a"]
    assert choose_segments([entry(MILLION), entry(5, name="b")], all=True) == ["a", "b"]


def test_the_index_of_what_was_merged():
    """Flat where it is small, else the collection's own, else HNSW."""
    tuned = entry(MILLION, factory="IVF256,PQ196x4fs,RFlat", nprobe=16)
    small = entry(15_000)
    assert choose_index(20_000, [small, tuned], []) == ("Flat", {})
    assert choose_index(MILLION, [small, tuned], []) == (tuned.factory, {"nprobe": 16})
    assert choose_index(30_000, [small, small], [tuned]) == (tuned.factory, {"nprobe": 16})
    assert choose_index(30_000, [small, small], []) == ("HNSW32", {"efSearch": 64})
    exact = entry(50_000)  # large and Flat: somebody wanted it so
    assert choose_index(60_000, [small, exact], [tuned]) == ("Flat", {})
