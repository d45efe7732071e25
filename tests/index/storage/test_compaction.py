import pytest

from index.storage import compaction
from index.storage.compaction import choose_index, choose_segments
from index.storage.manifest import SegmentEntry

MILLION = 1_000_000


def entry(count, dead=0, *, name="a", factory="Flat", is_provisional=False, **parameters):
    """A segment of so many rows."""
    tombstones = "tombstones.npy" if dead else ""
    return SegmentEntry(
        name=name, count=count, dead=dead, tombstones=tombstones, factory=factory,
        parameters=parameters, is_provisional=is_provisional,
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


def test_a_segment_with_an_index_is_small_below_the_bound():
    """Whatever its share of the whole."""
    for count, chosen in ((19_999, "ab"), (20_000, "")):
        assert choose_segments([entry(count, factory="HNSW32"), entry(10, name="b")]) == list(
            chosen
        )


def test_what_would_be_flat_again_is_not_written_for_an_index():
    """So few of a delta's rows are left that exact search does."""
    assert choose_segments([entry(24_000, 3_000, is_provisional=True)]) == ["a"]
    assert choose_segments([entry(24_000, 4_000, is_provisional=True)]) == []


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
    graph = entry(MILLION, factory="HNSW32,SQ8,RFlat", efSearch=99, k_factor=3)
    chosen = (graph.factory, {"efSearch": 99, "k_factor": 3})
    assert choose_index(30_000, [small, small], [graph]) == chosen
    assert choose_index(30_000, [small, small], []) == ("HNSW32", {"efSearch": 64})
    assert choose_index(60_000, [entry(25_000, factory="HNSW16"), graph], []) == chosen
    assert choose_index(60_000, [graph, entry(25_000, factory="HNSW16")], []) == chosen
    exact = entry(50_000)  # large and Flat: somebody wanted it so
    assert choose_index(60_000, [small, exact], [tuned]) == ("Flat", {})


@pytest.mark.parametrize(
    ("factory", "before", "count", "fitting", "nprobe"),
    [
        ("IVF1024,PQ8x4fs,RFlat", MILLION, 20_001, "IVF128,PQ8x4fs,RFlat", 16),
        ("RR,IVF65536,RaBitQ,RFlat", MILLION, 20_001, "RR,IVF128,RaBitQ,RFlat", 16),
        ("PCAR128,IVF256,PQ8x4fs,RFlat", 65_536, MILLION, "PCAR128,IVF1024,PQ8x4fs,RFlat", 64),
        ("IVF100,PQ8x4fs,RFlat", 65_536, MILLION, "IVF1024,PQ8x4fs,RFlat", 164),
        ("IVF4096,PQ8x4fs,RFlat", MILLION, 1_100_000, "IVF4096,PQ8x4fs,RFlat", 16),
        ("IVF30000,PQ8x4fs,RFlat", 30_000, 29_000, "IVF128,PQ8x4fs,RFlat", 16),
    ],
)
def test_an_index_has_lists_for_its_rows(factory, before, count, fitting, nprobe):
    """Where it was chosen for another number of them; and looks into no smaller share."""
    tuned = entry(before, factory=factory, nprobe=16, k_factor=4)
    found = choose_index(count, [entry(15_000)], [tuned])
    assert found == (fitting, {"nprobe": nprobe, "k_factor": 4})


def test_no_more_lists_are_looked_into_than_there_are():
    """However many there were."""
    tuned = entry(MILLION, factory="IVF1024,PQ8x4fs,RFlat", nprobe=300)
    assert choose_index(20_001, [], [tuned]) == ("IVF128,PQ8x4fs,RFlat", {"nprobe": 128})


def test_a_graph_of_a_gpu_is_one_of_a_cpu_where_there_is_none(monkeypatch):
    """Of as many links, searched in the same way."""
    tuned = entry(MILLION, factory="CAGRA64", efSearch=48)
    for is_there, factory in ((True, "CAGRA64"), (False, "HNSW32")):
        monkeypatch.setattr(compaction, "can_build_cagra", lambda is_there=is_there: is_there)
        assert choose_index(30_000, [entry(15_000)], [tuned]) == (factory, {"efSearch": 48})


def test_what_was_a_delta_is_not_left_without_an_index():
    """Of whatever size: alone where it is large, else together with others of its kind."""
    deltas = [entry(20_000, name=name, is_provisional=True) for name in "abc"]
    assert choose_segments(deltas) == ["a", "b", "c"]
    assert choose_index(60_000, deltas, []) == ("HNSW32", {"efSearch": 64})
    assert choose_segments(deltas[:1]) == []
    large = entry(60_000, name="d", is_provisional=True)
    for all_ in (False, True):
        assert choose_segments([large], all=all_) == ["d"]
        assert choose_segments([entry(60_000)], all=all_) == []  # somebody wanted it so
    assert choose_index(60_000, [large], []) == ("HNSW32", {"efSearch": 64})
    assert choose_index(60_000, [large], [entry(50_000)]) == ("Flat", {})
    million = entry(MILLION, name="m", factory="HNSW32", efSearch=99)
    assert choose_segments([million, large]) == ["d"]
    assert choose_index(60_000, [large], [million]) == ("HNSW32", {"efSearch": 99})
